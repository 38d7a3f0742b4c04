//! [`DecoderSpec`]: the hyper-parameters and switches of a decoder-only transformer.

use crate::{Config, Family, SpecError};

/// Everything that tells one decoder-only transformer from another, besides its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecoderSpec {
    /// The row of the family table that this specification was read with.
    pub family: &'static Family,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Inner width of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Longest context that the model was trained for, in tokens.
    pub context: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Query, key and value projections carry a bias.
    pub qkv_bias: bool,
    /// The output projection of the attention carries a bias.
    pub attn_out_bias: bool,
    /// Gate of the feed-forward network.
    pub activation: Activation,
    /// The output head is the embedding table.
    pub tied_embeddings: bool,
}

/// Activation of the gated feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)` (SwiGLU).
    Silu,
}

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
    /// [`RopeScaling::Table`] answers 1: its divisors come from the file.
    pub fn divisor(&self, inverse_frequency: f64) -> f64 {
        match *self {
            Self::None | Self::Table => 1.0,
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
}

impl DecoderSpec {
    /// Most blocks that a file may ask for.
    pub const MAX_LAYERS: usize = 512;

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Parameters of the model, counting a tied head once.
    pub fn parameters(&self) -> u64 {
        let attention = self.hidden * (2 * self.q_width() + 2 * self.kv_width());
        let bias = if self.qkv_bias { self.q_width() + 2 * self.kv_width() } else { 0 }
            + if self.attn_out_bias { self.hidden } else { 0 };
        let block = attention + bias + 3 * self.hidden * self.ffn + 2 * self.hidden;
        let tables = if self.tied_embeddings { 1 } else { 2 } * self.vocab * self.hidden;
        (self.layers * block + tables + self.hidden) as u64
    }

    /// Refuses what no real model has, so that later arithmetic on these numbers cannot overflow.
    pub fn validate(self) -> Result<Self, SpecError> {
        let bounds: [(&'static str, usize, usize, usize); 8] = [
            ("block_count", self.layers, 1, Self::MAX_LAYERS),
            ("embedding_length", self.hidden, 1, 1 << 16),
            ("attention.head_count", self.heads, 1, 1 << 10),
            ("attention.head_count_kv", self.kv_heads, 1, self.heads),
            ("attention.key_length", self.head_dim, 2, 1 << 10),
            ("feed_forward_length", self.ffn, 1, 1 << 19),
            ("vocab_size", self.vocab, 1, 1 << 21),
            ("context_length", self.context, 1, 1 << 24),
        ];
        for (key, found, min, max) in bounds {
            if found < min || found > max {
                return Err(SpecError::OutOfRange {
                    key,
                    found: found as f64,
                    min: min as f64,
                    max: max as f64,
                });
            }
        }
        if !(self.rope.theta >= 1.0 && self.rope.theta <= 1e12) {
            return Err(SpecError::OutOfRange {
                key: "rope.freq_base",
                found: self.rope.theta,
                min: 1.0,
                max: 1e12,
            });
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(SpecError::Unsupported {
                key: "attention.head_count_kv",
                expected: "a divisor of the number of query heads",
            });
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(SpecError::Unsupported {
                key: "attention.key_length",
                expected: "an even head width",
            });
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(SpecError::OutOfRange {
                key: "attention.layer_norm_rms_epsilon",
                found: f64::from(self.norm_eps),
                min: 0.0,
                max: 1.0,
            });
        }
        Ok(self)
    }
}

/// `config.uint(key)` as a size, or the error that names the key.
pub(crate) fn required(config: &dyn Config, key: &'static str) -> Result<usize, SpecError> {
    let value = config.uint(key).ok_or(SpecError::Missing { key })?;
    size(value, key)
}

/// `value` as a size; more than 2^40 is refused before it can overflow anything.
pub(crate) fn size(value: u64, key: &'static str) -> Result<usize, SpecError> {
    const MAX: u64 = 1 << 40;
    match usize::try_from(value) {
        Ok(size) if value <= MAX => Ok(size),
        _ => Err(SpecError::OutOfRange { key, found: value as f64, min: 0.0, max: MAX as f64 }),
    }
}
