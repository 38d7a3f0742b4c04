//! What the families' GGUF files have in common.

use crate::spec::{required, size};
use crate::{
    Activation, Config, DecoderSpec, Family, LayerSet, NameBuf, Rope, RopePairing, RopeScaling, SpecError,
};

/// Reads the keys that all families share, windows and soft caps among them.
pub(super) fn read(family: &'static Family, config: &dyn Config) -> Result<DecoderSpec, SpecError> {
    let hidden = required(config, "embedding_length")?;
    let heads = required(config, "attention.head_count")?;
    let layers = required(config, "block_count")?;
    let optional = |key: &'static str, default: usize| match config.uint(key) {
        Some(value) => size(value, key),
        None => Ok(default),
    };
    let head_dim = optional("attention.key_length", hidden.checked_div(heads).unwrap_or(0))?;
    let rope_dims = optional("rope.dimension_count", head_dim)?;
    if rope_dims != head_dim && family.gguf_rope == RopePairing::Interleaved {
        return Err(SpecError::Unsupported {
            key: "rope.dimension_count",
            expected: "the head width (this family rotates whole heads)",
        });
    }
    let vocab = match config.tensor_shape("token_embd.weight") {
        Some([rows, _]) => size(rows, "vocab_size")?,
        None => required(config, "vocab_size")?,
    };
    let context = required(config, "context_length")?;
    let theta = config.float("rope.freq_base").unwrap_or(10_000.0);
    let rope = Rope { theta, scaling: scaling(config, context)? };
    // Stretching is for the layers that see far.
    let local_rope = config.float("rope.freq_base_swa").or(family.local_theta);
    let local_rope = local_rope.map(|theta| Rope { theta, scaling: RopeScaling::None });
    let spec = DecoderSpec {
        layers,
        hidden,
        heads,
        kv_heads: optional("attention.head_count_kv", heads)?,
        head_dim,
        ffn: required(config, "feed_forward_length")?,
        vocab,
        context,
        norm_eps: config
            .float("attention.layer_norm_rms_epsilon")
            .ok_or(SpecError::Missing { key: "attention.layer_norm_rms_epsilon" })? as f32,
        rope,
        local_rope,
        rope_dims,
        attn_soft_cap: config.float("attn_logit_softcapping").unwrap_or(0.0) as f32,
        final_soft_cap: config.float("final_logit_softcapping").unwrap_or(0.0) as f32,
        qk_norm: config.tensor_shape("blk.0.attn_q_norm.weight").is_some(),
        qkv_bias: config.tensor_shape("blk.0.attn_q.bias").is_some(),
        attn_out_bias: config.tensor_shape("blk.0.attn_output.bias").is_some(),
        activation: Activation::Silu,
        tied_embeddings: config.tensor_shape("output.weight").is_none(),
        ..DecoderSpec::plain(family)
    };
    let window = optional("attention.sliding_window", 0)?;
    Ok(with_scale(config, spec).with_windows(window, pattern(config, layers, family.window_period)?))
}

/// With `attention.scale`, where the file has one.
fn with_scale(config: &dyn Config, spec: DecoderSpec) -> DecoderSpec {
    match config.float("attention.scale") {
        // Through the number that it was made from, so that it comes out the same as from there.
        Some(scale) if scale > 0.0 => {
            let said = DecoderSpec { attn_scale: Some(scale as f32), ..spec };
            said.with_query_pre_attn_scalar(said.query_pre_attn_scalar())
        }
        _ => spec,
    }
}

/// Layers with a window: a period, or a truth value for each layer.
fn pattern(config: &dyn Config, layers: usize, default: usize) -> Result<LayerSet, SpecError> {
    const KEY: &str = "attention.sliding_window_pattern";
    let local = |layer| config.bool(NameBuf::new("attention.sliding_window_pattern.{}", layer).as_str());
    if local(0).is_none() {
        let period = config.uint(KEY).map_or(Ok(default), |period| size(period, KEY))?;
        return Ok(LayerSet::periodic(layers, period));
    }
    if !(0..layers.min(DecoderSpec::MAX_LAYERS)).all(|layer| local(layer).is_some()) {
        return Err(SpecError::Unsupported { key: KEY, expected: "a truth value for every layer" });
    }
    Ok(LayerSet::new(layers, |layer| local(layer) == Some(true)))
}

fn scaling(config: &dyn Config, context: usize) -> Result<RopeScaling, SpecError> {
    if config.tensor_shape("rope_factors_long.weight").is_some() {
        let original = config.uint("rope.scaling.original_context_length").unwrap_or(context as u64);
        return Ok(RopeScaling::Long {
            original_context: size(original, "rope.scaling.original_context_length")?,
            attention_factor: config.float("rope.scaling.attn_factor").unwrap_or(1.0) as f32,
        });
    }
    if config.tensor_shape("rope_freqs.weight").is_some() {
        return Ok(RopeScaling::Table);
    }
    match config.text("rope.scaling.type") {
        None | Some("none") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear {
            factor: config
                .float("rope.scaling.factor")
                .ok_or(SpecError::Missing { key: "rope.scaling.factor" })?,
        }),
        Some(_) => Err(SpecError::Unsupported { key: "rope.scaling.type", expected: "none or linear" }),
    }
}
