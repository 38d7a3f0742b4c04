//! Phi-3, Phi-3.5 and Phi-4-mini: Llama with fused projections, LongRoPE and perhaps a sliding window.
//!
//! llama.cpp reads the window of a file and disables it (its pull request 13676), so its answers are those
//! of the model up to as many tokens as the window has; this runtime keeps to it.

use super::{Family, FromHf, gguf, hf, row};
use crate::{LayerSet, RopePairing, TensorRow};

pub(super) static PHI3: Family = Family {
    name: "phi3",
    gguf_architecture: "phi3",
    hf_model_type: "phi3",
    hf_architecture: "Phi3ForCausalLM",
    gguf_rope: RopePairing::Halves,
    tensors: TENSORS,
    from_hf: FromHf::new(|config| {
        let spec = hf::read(&PHI3, config)?;
        spec.with_windows(hf::window(config, 0)?, LayerSet::periodic(spec.layers, 0)).validate()
    }),
    from_gguf: |config| gguf::read(&PHI3, config)?.validate(),
    ..Family::BASE
};

macro_rules! qkv {
    ($role:ident) => {
        row!(
            $role,
            "blk.{}.attn_qkv.weight",
            "model.layers.{}.self_attn.qkv_proj.weight",
            [AttnQ, AttnK, AttnV]
        )
    };
}

macro_rules! gate_up {
    ($role:ident) => {
        row!($role, "blk.{}.ffn_up.weight", "model.layers.{}.mlp.gate_up_proj.weight", [FfnGate, FfnUp])
    };
}

const TENSORS: &[TensorRow] = &[
    row!(TokenEmbedding, "token_embd.weight", "model.embed_tokens.weight"),
    row!(OutputNorm, "output_norm.weight", "model.norm.weight"),
    row!(Output, "output.weight", "lm_head.weight"),
    row!(RopeLong, "rope_factors_long.weight", ""),
    row!(RopeShort, "rope_factors_short.weight", ""),
    row!(AttnNorm, "blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    qkv!(AttnQ),
    qkv!(AttnK),
    qkv!(AttnV),
    row!(AttnOut, "blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    row!(FfnNorm, "blk.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    gate_up!(FfnGate),
    gate_up!(FfnUp),
    row!(FfnDown, "blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
];
