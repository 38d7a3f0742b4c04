//! The table of families. A family is one file here and one line in [`FAMILIES`].

mod llama;
mod qwen2;

use crate::spec::{required, size};
use crate::{Activation, Config, DecoderSpec, Role, Rope, RopePairing, RopeScaling, SpecError, TensorRow};

/// One family of decoder models: how to read its hyper-parameters and what its tensors are called.
pub struct Family {
    /// `general.architecture` of its GGUF files; also the name users see.
    pub name: &'static str,
    /// `model_type` in `config.json`.
    pub hf_model_type: &'static str,
    /// `architectures[0]` in `config.json`.
    pub hf_architecture: &'static str,
    /// Which elements its GGUF files rotate together. Hugging Face checkpoints of every family here
    /// rotate halves.
    pub gguf_rope: RopePairing,
    /// Its tensors.
    pub tensors: &'static [TensorRow],
    /// Reads the specification from `config.json`.
    pub from_hf: fn(&dyn Config) -> Result<DecoderSpec, SpecError>,
    /// Reads the specification from GGUF metadata.
    pub from_gguf: fn(&dyn Config) -> Result<DecoderSpec, SpecError>,
}

/// Every family, in the order in which messages list them.
pub static FAMILIES: &[&Family] = &[&llama::LLAMA, &qwen2::QWEN2];

/// The family whose GGUF files say `name`.
pub fn family_by_gguf_name(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.name == name)
}

/// The family whose `config.json` says `model_type`.
pub fn family_by_hf_type(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.hf_model_type == model_type)
}

impl Family {
    /// The row of a role, if the family has it.
    pub fn tensor(&self, role: Role) -> Option<&'static TensorRow> {
        self.tensors.iter().find(|row| row.role == role)
    }
}

impl core::fmt::Debug for Family {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// What llama-like families call their tensors.
macro_rules! row {
    ($role:ident, $gguf:literal, $hf:literal) => {
        TensorRow { role: Role::$role, gguf: $gguf, hf: $hf }
    };
}

/// The tensors of Llama and of every family that kept its names.
pub(crate) const LLAMA_TENSORS: &[TensorRow] = &[
    row!(TokenEmbedding, "token_embd.weight", "model.embed_tokens.weight"),
    row!(OutputNorm, "output_norm.weight", "model.norm.weight"),
    row!(Output, "output.weight", "lm_head.weight"),
    row!(RopeFreqs, "rope_freqs.weight", ""),
    row!(AttnNorm, "blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    row!(AttnQ, "blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight"),
    row!(AttnK, "blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight"),
    row!(AttnV, "blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    row!(AttnOut, "blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    row!(AttnQBias, "blk.{}.attn_q.bias", "model.layers.{}.self_attn.q_proj.bias"),
    row!(AttnKBias, "blk.{}.attn_k.bias", "model.layers.{}.self_attn.k_proj.bias"),
    row!(AttnVBias, "blk.{}.attn_v.bias", "model.layers.{}.self_attn.v_proj.bias"),
    row!(AttnOutBias, "blk.{}.attn_output.bias", "model.layers.{}.self_attn.o_proj.bias"),
    row!(FfnNorm, "blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    row!(FfnGate, "blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    row!(FfnUp, "blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    row!(FfnDown, "blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
];

/// Reads the keys that `config.json` of llama-like families shares.
///
/// `rope_parameters` is where transformers 5 keeps rope; older files have `rope_theta` and
/// `rope_scaling`. Both exist in the wild.
pub(crate) fn llama_like_from_hf(
    family: &'static Family,
    config: &dyn Config,
) -> Result<DecoderSpec, SpecError> {
    match config.text("hidden_act") {
        None | Some("silu") => {}
        Some(_) => return Err(SpecError::Unsupported { key: "hidden_act", expected: "silu" }),
    }
    if config.bool("mlp_bias") == Some(true) {
        return Err(SpecError::Unsupported { key: "mlp_bias", expected: "false" });
    }
    let hidden = required(config, "hidden_size")?;
    let heads = required(config, "num_attention_heads")?;
    let optional = |key: &'static str, default: usize| match config.uint(key) {
        Some(value) => size(value, key),
        None => Ok(default),
    };
    let attention_bias = config.bool("attention_bias").unwrap_or(false);
    Ok(DecoderSpec {
        family,
        layers: required(config, "num_hidden_layers")?,
        hidden,
        heads,
        kv_heads: optional("num_key_value_heads", heads)?,
        head_dim: optional("head_dim", hidden.checked_div(heads).unwrap_or(0))?,
        ffn: required(config, "intermediate_size")?,
        vocab: required(config, "vocab_size")?,
        context: optional("max_position_embeddings", 2048)?,
        norm_eps: config.float("rms_norm_eps").unwrap_or(1e-6) as f32,
        rope: Rope {
            theta: config
                .float("rope_parameters.rope_theta")
                .or_else(|| config.float("rope_theta"))
                .unwrap_or(10_000.0),
            scaling: hf_rope_scaling(config)?,
        },
        qkv_bias: attention_bias,
        attn_out_bias: attention_bias,
        activation: Activation::Silu,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(false),
    })
}

fn hf_rope_scaling(config: &dyn Config) -> Result<RopeScaling, SpecError> {
    // One of the two tables, never a mix of both.
    let new = config.text("rope_parameters.rope_type").is_some();
    let key = |new_key: &'static str, old_key: &'static str| if new { new_key } else { old_key };
    let kind = match config.text("rope_parameters.rope_type") {
        Some(kind) => Some(kind),
        None => config.text("rope_scaling.rope_type").or_else(|| config.text("rope_scaling.type")),
    };
    let number = |key: &'static str| config.float(key).ok_or(SpecError::Missing { key });
    let factor_key = key("rope_parameters.factor", "rope_scaling.factor");
    let factor = || match number(factor_key)? {
        factor if (1.0..=1e6).contains(&factor) => Ok(factor),
        found => Err(SpecError::OutOfRange { key: factor_key, found, min: 1.0, max: 1e6 }),
    };
    match kind {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
        Some("llama3") => {
            let low = number(key("rope_parameters.low_freq_factor", "rope_scaling.low_freq_factor"))?;
            let high_key = key("rope_parameters.high_freq_factor", "rope_scaling.high_freq_factor");
            let high = number(high_key)?;
            if !(low > 0.0 && high > low) {
                return Err(SpecError::OutOfRange { key: high_key, found: high, min: low, max: 1e6 });
            }
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: number(key(
                    "rope_parameters.original_max_position_embeddings",
                    "rope_scaling.original_max_position_embeddings",
                ))?,
            })
        }
        Some(_) => Err(SpecError::Unsupported {
            key: key("rope_parameters.rope_type", "rope_scaling.rope_type"),
            expected: "default, linear or llama3",
        }),
    }
}

/// Reads the keys that GGUF files of llama-like families share.
pub(crate) fn llama_like_from_gguf(
    family: &'static Family,
    config: &dyn Config,
) -> Result<DecoderSpec, SpecError> {
    let hidden = required(config, "embedding_length")?;
    let heads = required(config, "attention.head_count")?;
    let optional = |key: &'static str, default: usize| match config.uint(key) {
        Some(value) => size(value, key),
        None => Ok(default),
    };
    let head_dim = optional("attention.key_length", hidden.checked_div(heads).unwrap_or(0))?;
    if config.uint("rope.dimension_count").is_some_and(|dims| dims != head_dim as u64) {
        return Err(SpecError::Unsupported {
            key: "rope.dimension_count",
            expected: "the head width (partial rotation is not implemented)",
        });
    }
    let scaling = if config.tensor_shape("rope_freqs.weight").is_some() {
        RopeScaling::Table
    } else {
        match config.text("rope.scaling.type") {
            None | Some("none") => RopeScaling::None,
            Some("linear") => RopeScaling::Linear {
                factor: config
                    .float("rope.scaling.factor")
                    .ok_or(SpecError::Missing { key: "rope.scaling.factor" })?,
            },
            Some(_) => {
                return Err(SpecError::Unsupported { key: "rope.scaling.type", expected: "none or linear" });
            }
        }
    };
    let vocab = match config.tensor_shape("token_embd.weight") {
        Some([rows, _]) => size(rows, "vocab_size")?,
        None => required(config, "vocab_size")?,
    };
    Ok(DecoderSpec {
        family,
        layers: required(config, "block_count")?,
        hidden,
        heads,
        kv_heads: optional("attention.head_count_kv", heads)?,
        head_dim,
        ffn: required(config, "feed_forward_length")?,
        vocab,
        context: required(config, "context_length")?,
        norm_eps: config
            .float("attention.layer_norm_rms_epsilon")
            .ok_or(SpecError::Missing { key: "attention.layer_norm_rms_epsilon" })? as f32,
        rope: Rope { theta: config.float("rope.freq_base").unwrap_or(10_000.0), scaling },
        qkv_bias: config.tensor_shape("blk.0.attn_q.bias").is_some(),
        attn_out_bias: config.tensor_shape("blk.0.attn_output.bias").is_some(),
        activation: Activation::Silu,
        tied_embeddings: config.tensor_shape("output.weight").is_none(),
    })
}
