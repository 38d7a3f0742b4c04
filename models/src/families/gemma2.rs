//! Gemma 2: norms before and after, GeGLU, scaled embeddings, soft caps, a window in every other layer.

use super::{Family, FromHf, GEMMA_TENSORS, gguf, hf};
use crate::spec::size;
use crate::{Activation, Config, DecoderSpec, LayerSet, RopePairing, SpecError, math};

pub(super) static GEMMA2: Family = Family {
    name: "gemma2",
    gguf_architecture: "gemma2",
    hf_model_type: "gemma2",
    hf_architecture: "Gemma2ForCausalLM",
    gguf_rope: RopePairing::Halves,
    hf_norm_offset: 1.0,
    window_period: 2,
    tensors: GEMMA_TENSORS,
    from_hf: FromHf::new(|config| {
        let spec = from_hf(&GEMMA2, config)?;
        DecoderSpec {
            attn_soft_cap: hf::soft_cap(config, "attn_logit_softcapping", 50.0),
            final_soft_cap: hf::soft_cap(config, "final_logit_softcapping", 30.0),
            ..spec
        }
        .validate()
    }),
    from_gguf: |config| {
        let spec = from_gguf(&GEMMA2, config, 46)?;
        // The first files do not mention the window that all models of the family have.
        match config.uint("attention.sliding_window") {
            None => spec.with_windows(4096, LayerSet::periodic(spec.layers, 2)).validate(),
            Some(_) => spec.validate(),
        }
    },
    ..Family::BASE
};

/// What Gemma 2 and 3 share in `config.json`.
pub(super) fn from_hf(family: &'static Family, config: &dyn Config) -> Result<DecoderSpec, SpecError> {
    if config.bool("use_bidirectional_attention") == Some(true) {
        return Err(SpecError::Unsupported { key: "use_bidirectional_attention", expected: "false" });
    }
    let spec = gemma(hf::read(family, config)?);
    // What transformers assumes of keys that a file leaves out.
    let head_dim = config.uint("head_dim").map_or(256, |_| spec.head_dim);
    let spec = DecoderSpec {
        head_dim,
        rope_dims: head_dim,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(true),
        ..spec
    };
    let period = match config.uint("sliding_window_pattern") {
        Some(said) => size(said, "sliding_window_pattern")?,
        None => family.window_period,
    };
    let local = hf::layer_types(config, spec.layers)?;
    let local = local.unwrap_or_else(|| LayerSet::periodic(spec.layers, period));
    let scalar = config.float("query_pre_attn_scalar").unwrap_or(256.0);
    Ok(spec.with_windows(hf::window(config, 4096)?, local).with_query_pre_attn_scalar(scalar))
}

/// What they share in GGUF. The model of `wide_scale_layers` layers is the one whose scores are scaled by
/// the share of the width that a head has, which its files do not say; the others' by the head's width.
pub(super) fn from_gguf(
    family: &'static Family,
    config: &dyn Config,
    wide_scale_layers: usize,
) -> Result<DecoderSpec, SpecError> {
    let spec = gemma(gguf::read(family, config)?);
    if spec.layers == wide_scale_layers && config.float("attention.scale").is_none() && spec.heads > 0 {
        return Ok(spec.with_query_pre_attn_scalar((spec.hidden / spec.heads) as f64));
    }
    Ok(spec)
}

fn gemma(spec: DecoderSpec) -> DecoderSpec {
    DecoderSpec {
        activation: Activation::GeluTanh,
        post_norms: true,
        embedding_scale: math::sqrt(spec.hidden as f64) as f32,
        ..spec
    }
}
