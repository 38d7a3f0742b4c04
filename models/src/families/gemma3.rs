//! Gemma 3, its language model: Gemma 2 without soft caps, with normalized heads of queries and keys, a
//! window in five layers of six, and a rotary base of their own for these.
//!
//! llama.cpp scales scores by the head's width, except in the model of 62 layers, and takes a pattern of
//! windows only as a period. Our files say both where they differ (`attention.scale`, a list as
//! `attention.sliding_window_pattern`); this runtime reads it, llama.cpp answers as if it were not there.

use super::gemma2::{from_gguf, from_hf};
use super::{Family, FromHf, GEMMA_TENSORS, hf};
use crate::{DecoderSpec, Rope, RopePairing, RopeScaling};

/// Base of the rotary frequencies in layers with a window unless a file says otherwise.
const LOCAL_THETA: f64 = 10_000.0;
/// The same in layers without.
const GLOBAL_THETA: f64 = 1_000_000.0;

pub(super) static GEMMA3: Family = Family {
    name: "gemma3",
    gguf_architecture: "gemma3",
    hf_model_type: "gemma3_text",
    hf_architecture: "Gemma3ForCausalLM",
    gguf_rope: RopePairing::Halves,
    hf_norm_offset: 1.0,
    window_period: 6,
    local_theta: Some(LOCAL_THETA),
    tensors: GEMMA_TENSORS,
    from_hf: FromHf::new(|config| {
        let spec = from_hf(&GEMMA3, config)?;
        let said = ["rope_theta", "rope_parameters.rope_theta", "rope_parameters.full_attention.rope_theta"];
        let theta = said.into_iter().find_map(|key| config.float(key)).unwrap_or(GLOBAL_THETA);
        let local = hf::local_theta(config).unwrap_or(LOCAL_THETA);
        // Stretching is for the layers that see far.
        let local_rope = Rope { theta: local, scaling: RopeScaling::None };
        DecoderSpec {
            rope: Rope { theta, ..spec.rope },
            local_rope: (!spec.local.is_empty()).then_some(local_rope),
            attn_soft_cap: hf::soft_cap(config, "attn_logit_softcapping", 0.0),
            final_soft_cap: hf::soft_cap(config, "final_logit_softcapping", 0.0),
            qk_norm: true,
            ..spec
        }
        .validate()
    }),
    from_gguf: |config| DecoderSpec { qk_norm: true, ..from_gguf(&GEMMA3, config, 62)? }.validate(),
};
