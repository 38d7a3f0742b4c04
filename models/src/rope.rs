//! Rotary position embedding as data: bases, stretching, pairing.

use crate::{Role, math};

/// Rotary position embedding (Su et al., 2021).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by one factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a linear blend between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context before stretching, in tokens.
        original_context: f64,
    },
    /// One divisor for each frequency, in the file's `rope_freqs.weight` (GGUF only).
    Table,
    /// LongRoPE (Ding et al. 2024, arXiv 2402.13753): one divisor for each frequency, one list of them
    /// ([`crate::Role::RopeShort`]) for contexts as long as in the first training and one
    /// ([`crate::Role::RopeLong`]) for longer ones.
    Long {
        /// Longest context, in tokens, for which the short list is meant.
        original_context: usize,
        /// Cosines and sines are multiplied by this, whichever list is used.
        attention_factor: f32,
    },
}

/// Which two elements of a head one rotation acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairing {
    /// Elements `2i` and `2i + 1`.
    Interleaved,
    /// Elements `i` and `i + head_dim / 2`.
    Halves,
}

impl RopeScaling {
    /// The divisor of one inverse frequency (radians per token); 1 where it is kept.
    ///
    /// [`RopeScaling::Table`] and [`RopeScaling::Long`] answer 1: their divisors come from the file.
    pub fn divisor(&self, inverse_frequency: f64) -> f64 {
        match *self {
            Self::None | Self::Table | Self::Long { .. } => 1.0,
            Self::Linear { factor } => factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = 2.0 * core::f64::consts::PI / inverse_frequency;
                if wavelength < original_context / high_freq_factor {
                    1.0
                } else if wavelength > original_context / low_freq_factor {
                    factor
                } else {
                    let smooth = (original_context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
        }
    }
    /// What cosines and sines are multiplied by.
    pub fn magnitude(&self) -> f32 {
        match *self {
            Self::Long { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// What LongRoPE multiplies cosines and sines by unless a file says otherwise (the paper's section
    /// 3.3): `sqrt(1 + ln(factor) / ln(original_context))`.
    pub fn long_attention_factor(factor: f64, original_context: usize) -> f32 {
        if factor <= 1.0 || original_context < 2 {
            return 1.0;
        }
        math::sqrt(1.0 + math::ln(factor) / math::ln(original_context as f64)) as f32
    }

    /// The role of the list of divisors for a context, if they come from a list.
    pub fn divisors(&self, context: usize) -> Option<Role> {
        match *self {
            Self::Table => Some(Role::RopeFreqs),
            Self::Long { original_context, .. } if context > original_context => Some(Role::RopeLong),
            Self::Long { .. } => Some(Role::RopeShort),
            Self::None | Self::Linear { .. } | Self::Llama3 { .. } => None,
        }
    }
}
