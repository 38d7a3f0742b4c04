//! Names of weight tensors: what a tensor is for ([`Role`]) and what each file format calls it.

use crate::{DecoderSpec, RopePairing, RopeScaling};
use core::fmt::Write;
use core::ops::Range;

/// What a weight tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Role {
    /// `[vocab, hidden]`.
    TokenEmbedding,
    /// `[hidden]`.
    OutputNorm,
    /// `[vocab, hidden]`; absent when the embeddings are tied.
    Output,
    /// `[rope_dims / 2]` divisors of the rotary frequencies (GGUF only).
    RopeFreqs,
    /// `[hidden]`.
    AttnNorm,
    /// `[heads * head_dim, hidden]`.
    AttnQ,
    /// `[kv_heads * head_dim, hidden]`.
    AttnK,
    /// `[kv_heads * head_dim, hidden]`.
    AttnV,
    /// `[hidden, heads * head_dim]`.
    AttnOut,
    /// `[heads * head_dim]`.
    AttnQBias,
    /// `[kv_heads * head_dim]`.
    AttnKBias,
    /// `[kv_heads * head_dim]`.
    AttnVBias,
    /// `[hidden]`.
    AttnOutBias,
    /// `[hidden]`.
    FfnNorm,
    /// `[ffn, hidden]`.
    FfnGate,
    /// `[ffn, hidden]`.
    FfnUp,
    /// `[hidden, ffn]`.
    FfnDown,
    /// `[head_dim]`, the same for every query head.
    AttnQNorm,
    /// `[head_dim]`, the same for every key head.
    AttnKNorm,
    /// `[hidden]`; normalizes what attention adds to the residual stream.
    AttnPostNorm,
    /// `[hidden]`; the same after the feed-forward network.
    FfnPostNorm,
    /// `[rope_dims / 2]` divisors of the rotary frequencies for long contexts.
    RopeLong,
    /// `[rope_dims / 2]` divisors of the rotary frequencies for short contexts.
    RopeShort,
}

/// One tensor of a family: its role and its name in both file formats, `{}` being the layer.
#[derive(Clone, Copy, Debug)]
pub struct TensorRow {
    /// What it is for.
    pub role: Role,
    /// Name in a GGUF file.
    pub gguf: &'static str,
    /// Name in a Hugging Face checkpoint; empty if the format has none.
    #[cfg(feature = "hugging-face")]
    pub hf: &'static str,
    /// The roles whose rows lie one after another in the tensor of that name, this one among them; empty
    /// if the tensor is this role's alone. In memory every role has a tensor of its own.
    pub fused: &'static [Role],
}

impl TensorRow {
    /// The rows of this role in the tensor of its name.
    pub fn span(&self, spec: &DecoderSpec) -> Range<usize> {
        let before = self.fused.iter().take_while(|role| **role != self.role);
        let start = before.map(|role| role.shape(spec)[0]).sum();
        start..start + self.role.shape(spec)[0]
    }

    /// `[rows, columns]` of the tensor of this name.
    pub fn file_shape(&self, spec: &DecoderSpec) -> [usize; 2] {
        let [rows, columns] = self.role.shape(spec);
        match self.fused {
            [] => [rows, columns],
            roles => [roles.iter().map(|role| role.shape(spec)[0]).sum(), columns],
        }
    }

    /// This is the first, or the only, role in the tensor of its name.
    pub fn leads(&self) -> bool {
        self.fused.first().is_none_or(|first| *first == self.role)
    }

    /// The roles in the tensor of this name, in order.
    pub fn members(&self) -> &[Role] {
        if self.fused.is_empty() { core::slice::from_ref(&self.role) } else { self.fused }
    }
}

impl Role {
    /// The tensor exists once per layer.
    pub fn per_layer(self) -> bool {
        !matches!(
            self,
            Self::TokenEmbedding
                | Self::OutputNorm
                | Self::Output
                | Self::RopeFreqs
                | Self::RopeLong
                | Self::RopeShort
        )
    }

    /// The weight of a norm.
    pub fn is_norm(self) -> bool {
        matches!(
            self,
            Self::OutputNorm
                | Self::AttnNorm
                | Self::FfnNorm
                | Self::AttnQNorm
                | Self::AttnKNorm
                | Self::AttnPostNorm
                | Self::FfnPostNorm
        )
    }

    /// Divisors of the rotary frequencies.
    pub fn is_rope_table(self) -> bool {
        matches!(self, Self::RopeFreqs | Self::RopeLong | Self::RopeShort)
    }

    /// `[rows, columns]` under `spec`; a vector has one row.
    pub fn shape(self, spec: &DecoderSpec) -> [usize; 2] {
        let (hidden, ffn) = (spec.hidden, spec.ffn);
        match self {
            Self::TokenEmbedding | Self::Output => [spec.vocab, hidden],
            Self::RopeFreqs | Self::RopeLong | Self::RopeShort => [1, spec.rope_dims / 2],
            Self::OutputNorm
            | Self::AttnNorm
            | Self::FfnNorm
            | Self::AttnPostNorm
            | Self::FfnPostNorm
            | Self::AttnOutBias => [1, hidden],
            Self::AttnQNorm | Self::AttnKNorm => [1, spec.head_dim],
            Self::AttnQ => [spec.q_width(), hidden],
            Self::AttnK | Self::AttnV => [spec.kv_width(), hidden],
            Self::AttnOut => [hidden, spec.q_width()],
            Self::AttnQBias => [1, spec.q_width()],
            Self::AttnKBias | Self::AttnVBias => [1, spec.kv_width()],
            Self::FfnGate | Self::FfnUp => [ffn, hidden],
            Self::FfnDown => [hidden, ffn],
        }
    }

    /// The tensor is a vector (norm weight, bias, divisors) and is never quantized.
    pub fn is_vector(self) -> bool {
        self.is_norm() || self.is_rope_table() || self.is_bias()
    }

    /// Added to the outputs of a matrix.
    pub fn is_bias(self) -> bool {
        matches!(self, Self::AttnQBias | Self::AttnKBias | Self::AttnVBias | Self::AttnOutBias)
    }

    /// A model with `spec` must have this tensor.
    pub fn required(self, spec: &DecoderSpec) -> bool {
        match self {
            Self::Output => !spec.tied_embeddings,
            Self::RopeFreqs => spec.rope.scaling == RopeScaling::Table,
            Self::RopeLong | Self::RopeShort => matches!(spec.rope.scaling, RopeScaling::Long { .. }),
            Self::AttnQNorm | Self::AttnKNorm => spec.qk_norm,
            Self::AttnPostNorm | Self::FfnPostNorm => spec.post_norms,
            Self::AttnQBias | Self::AttnKBias | Self::AttnVBias => spec.qkv_bias,
            Self::AttnOutBias => spec.attn_out_bias,
            _ => true,
        }
    }

    /// Number of heads whose rows GGUF stores in another order than Hugging Face, if it does.
    ///
    /// A family whose GGUF rotates neighbours ([`RopePairing::Interleaved`]) stores row `2i + s` of a
    /// head where the checkpoint has row `i + s * head_dim / 2`, for queries and keys alike.
    pub fn permuted_heads(self, spec: &DecoderSpec) -> Option<usize> {
        if spec.family.gguf_rope != RopePairing::Interleaved {
            return None;
        }
        match self {
            Self::AttnQ | Self::AttnQBias => Some(spec.heads),
            Self::AttnK | Self::AttnKBias => Some(spec.kv_heads),
            _ => None,
        }
    }
}

/// Room for one tensor name; the longest name of any family fits.
#[derive(Clone, Copy)]
pub struct NameBuf {
    bytes: [u8; 96],
    len: usize,
}

impl NameBuf {
    /// The name made from `pattern`, its `{}` replaced by `layer`.
    pub fn new(pattern: &str, layer: usize) -> Self {
        let mut name = Self { bytes: [0; 96], len: 0 };
        // Cannot fail: every pattern of the family tables is under 70 bytes, a layer at most 20
        // digits. The test `names_fit` walks all of them.
        let _ = match pattern.split_once("{}") {
            Some((head, tail)) => write!(name, "{head}{layer}{tail}"),
            None => name.write_str(pattern),
        };
        name
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

impl Write for NameBuf {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let end = self.len + text.len();
        self.bytes.get_mut(self.len..end).ok_or(core::fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FAMILIES;

    #[test]
    fn names_fit() {
        for family in FAMILIES {
            for row in family.tensors {
                #[cfg(feature = "hugging-face")]
                let patterns = [row.gguf, row.hf];
                #[cfg(not(feature = "hugging-face"))]
                let patterns = [row.gguf];
                for pattern in patterns {
                    assert!(pattern.len() + 20 < 96, "{pattern}");
                    let name = NameBuf::new(pattern, DecoderSpec::MAX_LAYERS);
                    assert_eq!(name.as_str().contains("512"), pattern.contains("{}"));
                }
                assert_eq!(row.gguf.contains("{}"), row.role.per_layer(), "{}", row.gguf);
                assert!(row.fused.is_empty() || row.fused.contains(&row.role), "{}", row.gguf);
            }
        }
    }
}
