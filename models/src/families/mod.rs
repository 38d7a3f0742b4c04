//! The table of families. A family is one file here and one line in [`FAMILIES`].

mod gemma2;
mod gemma3;
mod gguf;
mod hf;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;

use crate::{Config, DecoderSpec, Role, RopePairing, SpecError, TensorRow};

/// One family of decoder models: how to read its hyper-parameters and what its tensors are called.
pub struct Family {
    /// The name that users see.
    pub name: &'static str,
    /// `general.architecture` of its GGUF files. Where two families share one, the first of them in
    /// [`FAMILIES`] reads such files and says whose they are.
    pub gguf_architecture: &'static str,
    /// `model_type` in `config.json`.
    pub hf_model_type: &'static str,
    /// `architectures[0]` in `config.json`.
    pub hf_architecture: &'static str,
    /// Which elements its GGUF files rotate together. Hugging Face checkpoints of every family here
    /// rotate halves.
    pub gguf_rope: RopePairing,
    /// What is added to the norm weights of its Hugging Face checkpoints; GGUF and memory hold the sum.
    pub hf_norm_offset: f32,
    /// The period of its windows ([`crate::LayerSet::periodic`]), for a file that has a window and no
    /// pattern; 0 means that windows are in every layer.
    pub window_period: usize,
    /// Base of the rotary frequencies in layers with a window, for a file that does not say; `None` means
    /// the base of the others.
    pub local_theta: Option<f64>,
    /// Its tensors.
    pub tensors: &'static [TensorRow],
    /// Reads the specification from `config.json`.
    pub from_hf: FromHf,
    /// Reads the specification from GGUF metadata.
    pub from_gguf: fn(&dyn Config) -> Result<DecoderSpec, SpecError>,
}

/// How a family's `config.json` is read. Without the feature `hugging-face` the function is checked and dropped: a
/// device reads GGUF files and packs.
#[derive(Clone, Copy)]
pub struct FromHf(#[cfg(feature = "hugging-face")] fn(&dyn Config) -> Result<DecoderSpec, SpecError>);

impl FromHf {
    const fn new(_read: fn(&dyn Config) -> Result<DecoderSpec, SpecError>) -> Self {
        Self(
            #[cfg(feature = "hugging-face")]
            _read,
        )
    }

    /// Reads the specification.
    ///
    /// # Errors
    /// A key that is missing or impossible.
    #[cfg(feature = "hugging-face")]
    pub fn read(self, config: &dyn Config) -> Result<DecoderSpec, SpecError> {
        (self.0)(config)
    }
}

/// Every family, in the order in which messages list them.
pub static FAMILIES: &[&Family] = &[
    &llama::LLAMA,
    &mistral::MISTRAL,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &phi3::PHI3,
    &gemma2::GEMMA2,
    &gemma3::GEMMA3,
];

/// The family that reads GGUF files whose architecture is `name`.
pub fn family_by_gguf_name(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.gguf_architecture == name)
}

/// The family whose `config.json` says `model_type`.
pub fn family_by_hf_type(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.hf_model_type == model_type)
}

impl Family {
    /// Llama, from which the others say what differs.
    const BASE: Self = Self {
        name: "llama",
        gguf_architecture: "llama",
        hf_model_type: "llama",
        hf_architecture: "LlamaForCausalLM",
        gguf_rope: RopePairing::Interleaved,
        hf_norm_offset: 0.0,
        window_period: 0,
        local_theta: None,
        tensors: LLAMA_TENSORS,
        from_hf: FromHf::new(|config| hf::read(&llama::LLAMA, config)?.validate()),
        from_gguf: |config| gguf::read(&llama::LLAMA, config)?.validate(),
    };

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

/// A row of a table of tensors: role, name in GGUF, name in Hugging Face's checkpoints, and, of a part of a
/// fused tensor, all roles in it.
macro_rules! row {
    ($role:ident, $gguf:literal, $hf:literal $(, [$($part:ident),+])?) => {
        $crate::TensorRow {
            role: $crate::Role::$role,
            gguf: $gguf,
            #[cfg(feature = "hugging-face")]
            hf: $hf,
            fused: &[$($($crate::Role::$part),+)?],
        }
    };
}
pub(crate) use row;

/// The tensors of Llama and of every family that kept its names.
const LLAMA_TENSORS: &[TensorRow] = &[
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
    row!(AttnQNorm, "blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight"),
    row!(AttnKNorm, "blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
    row!(FfnNorm, "blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    row!(FfnGate, "blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    row!(FfnUp, "blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    row!(FfnDown, "blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
];

/// The tensors of Gemma 2 and 3: norms before and after attention and feed-forward network.
const GEMMA_TENSORS: &[TensorRow] = &[
    row!(TokenEmbedding, "token_embd.weight", "model.embed_tokens.weight"),
    row!(OutputNorm, "output_norm.weight", "model.norm.weight"),
    row!(Output, "output.weight", "lm_head.weight"),
    row!(AttnNorm, "blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    row!(AttnQ, "blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight"),
    row!(AttnK, "blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight"),
    row!(AttnV, "blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    row!(AttnOut, "blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    row!(AttnQNorm, "blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight"),
    row!(AttnKNorm, "blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
    row!(
        AttnPostNorm,
        "blk.{}.post_attention_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight"
    ),
    row!(FfnNorm, "blk.{}.ffn_norm.weight", "model.layers.{}.pre_feedforward_layernorm.weight"),
    row!(FfnGate, "blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    row!(FfnUp, "blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    row!(FfnDown, "blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
    row!(FfnPostNorm, "blk.{}.post_ffw_norm.weight", "model.layers.{}.post_feedforward_layernorm.weight"),
];
