//! Mixes: which tensor of a model becomes which type.
//!
//! The mixes are those of llama.cpp's `llama-quantize` (`llama_tensor_get_type` in `src/llama-quant.cpp`),
//! so a file says what its users expect of its name; the tests compare with lists that the tool wrote.

use std::str::FromStr;

use edge_models::{DecoderSpec, Role};
use edge_runtime::format::DType;

/// A named mix of tensor types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Mix {
    F32,
    F16,
    BF16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
    Q6_K,
    IQ4_NL,
    Q3_K_L,
    Q3_K_M,
    Q3_K_S,
    Q2_K,
}

/// A name that is no mix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is no quantization type, expected one of {expected}")]
pub struct UnknownMix {
    found: String,
    expected: String,
}

impl Mix {
    /// Every mix, from the largest file to the smallest within each kind.
    pub const ALL: [Self; 18] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q5_1,
        Self::Q5_0,
        Self::Q4_1,
        Self::Q4_0,
        Self::Q6_K,
        Self::Q5_K_M,
        Self::Q5_K_S,
        Self::Q4_K_M,
        Self::Q4_K_S,
        Self::IQ4_NL,
        Self::Q3_K_L,
        Self::Q3_K_M,
        Self::Q3_K_S,
        Self::Q2_K,
    ];

    /// The name that users see, as llama.cpp spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4_K_S => "Q4_K_S",
            Self::Q4_K_M => "Q4_K_M",
            Self::Q5_K_S => "Q5_K_S",
            Self::Q5_K_M => "Q5_K_M",
            Self::Q6_K => "Q6_K",
            Self::IQ4_NL => "IQ4_NL",
            Self::Q3_K_L => "Q3_K_L",
            Self::Q3_K_M => "Q3_K_M",
            Self::Q3_K_S => "Q3_K_S",
            Self::Q2_K => "Q2_K",
        }
    }

    /// `general.file_type`: llama.cpp's `LLAMA_FTYPE` number.
    pub const fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q2_K => 10,
            Self::Q3_K_S => 11,
            Self::Q3_K_M => 12,
            Self::Q3_K_L => 13,
            Self::Q4_K_S => 14,
            Self::Q4_K_M => 15,
            Self::Q5_K_S => 16,
            Self::Q5_K_M => 17,
            Self::Q6_K => 18,
            Self::IQ4_NL => 25,
            Self::BF16 => 32,
        }
    }

    /// The type of most matrices.
    pub const fn base(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::Q8_0 => DType::Q8_0,
            Self::Q4_0 => DType::Q4_0,
            Self::Q4_1 => DType::Q4_1,
            Self::Q5_0 => DType::Q5_0,
            Self::Q5_1 => DType::Q5_1,
            Self::Q4_K_S | Self::Q4_K_M => DType::Q4K,
            Self::Q5_K_S | Self::Q5_K_M => DType::Q5K,
            Self::Q6_K => DType::Q6K,
            Self::IQ4_NL => DType::IQ4NL,
            Self::Q3_K_L | Self::Q3_K_M | Self::Q3_K_S => DType::Q3K,
            Self::Q2_K => DType::Q2K,
        }
    }

    /// The type of one tensor of a model with `spec`.
    ///
    /// Vectors stay F32. A matrix whose rows are not whole blocks of the type that the mix gives it falls
    /// back to the next one with blocks of 32, and to F16 where even those do not fit.
    pub fn dtype(self, role: Role, layer: usize, spec: &DecoderSpec) -> DType {
        if role.is_vector() {
            return DType::F32;
        }
        let base = self.base();
        if base.is_float() {
            return base;
        }
        let [_, cols] = role.shape(spec);
        fit(self.mixed(role, layer, spec), cols)
    }

    /// What the mix gives a matrix, whatever its shape.
    fn mixed(self, role: Role, layer: usize, spec: &DecoderSpec) -> DType {
        let (base, layers) = (self.base(), spec.layers);
        let medium = matches!(self, Self::Q4_K_M | Self::Q5_K_M);
        match role {
            // The matrix that makes the logits: errors in it reach every token.
            Role::Output => logits_type(base),
            Role::TokenEmbedding if spec.tied_embeddings => logits_type(base),
            Role::AttnQ | Role::AttnK | Role::AttnV if is_fused(role, spec) => match self {
                Self::Q4_K_M => DType::Q5K,
                Self::Q5_K_M => DType::Q6K,
                Self::Q3_K_M | Self::Q3_K_L => DType::Q4K,
                _ => base,
            },
            Role::AttnV => match self {
                Self::Q2_K if spec.heads / spec.kv_heads.max(1) >= 4 => shared_value(DType::Q4K, spec),
                Self::Q2_K => shared_value(DType::Q3K, spec),
                Self::Q3_K_M if layer >= 2 => shared_value(DType::Q4K, spec),
                Self::Q3_K_M | Self::Q3_K_L => DType::Q5K,
                Self::IQ4_NL if spec.heads / spec.kv_heads.max(1) >= 4 => DType::Q5K,
                _ if medium && more_bits(layer, layers) => DType::Q6K,
                Self::Q4_K_S if layer < 4 => DType::Q5K,
                _ => shared_value(base, spec),
            },
            Role::AttnOut => match self {
                Self::Q2_K => DType::Q3K,
                Self::Q3_K_M => DType::Q4K,
                Self::Q3_K_L => DType::Q5K,
                _ => base,
            },
            Role::FfnDown => match self {
                Self::Q2_K => DType::Q3K,
                Self::Q3_K_M if layer < layers / 16 => DType::Q5K,
                Self::Q3_K_M => DType::Q4K,
                Self::Q3_K_L => DType::Q5K,
                Self::IQ4_NL if layer < layers / 8 => DType::Q5K,
                _ if medium && more_bits(layer, layers) => DType::Q6K,
                Self::Q4_K_S if layer < layers / 8 => DType::Q5K,
                _ => base,
            },
            _ => base,
        }
    }
}

fn logits_type(base: DType) -> DType {
    if base == DType::Q8_0 { base } else { DType::Q6K }
}

/// The type of values in what llama.cpp takes for a model of 70 billion parameters: many query heads share one value
/// head there, so its extra bits are nearly free.
fn shared_value(dtype: DType, spec: &DecoderSpec) -> DType {
    if is_70b(spec) && matches!(dtype, DType::Q3K | DType::Q4K) { DType::Q5K } else { dtype }
}

/// The first and last eighth of the layers, and every third between.
fn more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// The matrix of `role` lies in one tensor with others.
fn is_fused(role: Role, spec: &DecoderSpec) -> bool {
    spec.family.tensor(role).is_some_and(|row| !row.fused.is_empty())
}

/// What llama.cpp takes for a model of 70 billion parameters.
fn is_70b(spec: &DecoderSpec) -> bool {
    spec.layers == 80 && (spec.family.gguf_architecture != "llama" || spec.heads != spec.kv_heads)
}

/// `dtype`, or what stands in for it where a row of `cols` is not a whole number of its blocks.
fn fit(dtype: DType, cols: usize) -> DType {
    let fits = |dtype: DType| cols.is_multiple_of(dtype.block_len());
    let smaller = match dtype {
        DType::Q2K | DType::Q3K => DType::Q4_0,
        DType::Q4K => DType::Q5_0,
        DType::Q5K => DType::Q5_1,
        DType::Q6K => DType::Q8_0,
        other => other,
    };
    [dtype, smaller].into_iter().find(|dtype| fits(*dtype)).unwrap_or(DType::F16)
}

impl FromStr for Mix {
    type Err = UnknownMix;

    /// Case does not matter; `q3_k`, `q4_k` and `q5_k` mean the medium mixes, as in llama.cpp.
    fn from_str(name: &str) -> Result<Self, UnknownMix> {
        let upper = name.to_ascii_uppercase();
        match upper.as_str() {
            "Q3_K" => Ok(Self::Q3_K_M),
            "Q4_K" => Ok(Self::Q4_K_M),
            "Q5_K" => Ok(Self::Q5_K_M),
            _ => Self::ALL.into_iter().find(|mix| mix.name() == upper).ok_or_else(|| UnknownMix {
                found: name.into(),
                expected: Self::ALL.map(Self::name).join(", "),
            }),
        }
    }
}

impl std::fmt::Display for Mix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
