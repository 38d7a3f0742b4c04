//! Qwen3: Llama with normalized heads of queries and keys, and a head width of its own.

use super::{Family, FromHf, gguf, hf, qwen2};
use crate::{DecoderSpec, RopePairing};

pub(super) static QWEN3: Family = Family {
    name: "qwen3",
    gguf_architecture: "qwen3",
    hf_model_type: "qwen3",
    hf_architecture: "Qwen3ForCausalLM",
    gguf_rope: RopePairing::Halves,
    from_hf: FromHf::new(|config| {
        qwen2::refuse_windows(config)?;
        let spec = hf::read(&QWEN3, config)?;
        // Checkpoints that leave `head_dim` out mean 128, whatever the width.
        let head_dim = config.uint("head_dim").map_or(128, |_| spec.head_dim);
        DecoderSpec { qk_norm: true, head_dim, rope_dims: head_dim, ..spec }.validate()
    }),
    from_gguf: |config| DecoderSpec { qk_norm: true, ..gguf::read(&QWEN3, config)? }.validate(),
    ..Family::BASE
};
