//! What the families' `config.json` files have in common.
//!
//! Rope has two spellings, and both exist in the wild: `rope_parameters` (transformers 5; by kind of
//! attention where layers differ) and `rope_theta`, `rope_scaling`, `rope_local_base_freq` (older).

use crate::spec::{required, size};
use crate::{Activation, Config, DecoderSpec, Family, LayerSet, NameBuf, Rope, RopeScaling, SpecError};

/// Reads the keys that all families share. Windows, soft caps and scales are left as in Llama.
pub(super) fn read(family: &'static Family, config: &dyn Config) -> Result<DecoderSpec, SpecError> {
    if config.bool("mlp_bias") == Some(true) {
        return Err(SpecError::Unsupported { key: "mlp_bias", expected: "false" });
    }
    let hidden = required(config, "hidden_size")?;
    let heads = required(config, "num_attention_heads")?;
    let optional = |key: &'static str, default: usize| match config.uint(key) {
        Some(value) => size(value, key),
        None => Ok(default),
    };
    let head_dim = optional("head_dim", hidden.checked_div(heads).unwrap_or(0))?;
    let context = optional("max_position_embeddings", 2048)?;
    let attention_bias = config.bool("attention_bias").unwrap_or(false);
    let rope = rope(config, context)?;
    Ok(DecoderSpec {
        layers: required(config, "num_hidden_layers")?,
        hidden,
        heads,
        kv_heads: optional("num_key_value_heads", heads)?,
        head_dim,
        ffn: required(config, "intermediate_size")?,
        vocab: required(config, "vocab_size")?,
        context,
        norm_eps: config.float("rms_norm_eps").unwrap_or(1e-6) as f32,
        rope,
        rope_dims: rope_dims(config, head_dim),
        qkv_bias: attention_bias,
        attn_out_bias: attention_bias,
        activation: activation(config)?,
        tied_embeddings: config.bool("tie_word_embeddings").unwrap_or(false),
        ..DecoderSpec::plain(family)
    })
}

fn activation(config: &dyn Config) -> Result<Activation, SpecError> {
    match config.text("hidden_activation").or_else(|| config.text("hidden_act")) {
        None | Some("silu") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(_) => Err(SpecError::Unsupported { key: "hidden_act", expected: "silu or gelu_pytorch_tanh" }),
    }
}

fn rope_dims(config: &dyn Config, head_dim: usize) -> usize {
    let share = config
        .float("rope_parameters.partial_rotary_factor")
        .or_else(|| config.float("partial_rotary_factor"))
        .unwrap_or(1.0);
    if share == 1.0 { head_dim } else { (head_dim as f64 * share) as usize }
}

/// Layers whose kind of attention `layer_types` calls sliding; `None` if the file has no such list.
pub(super) fn layer_types(config: &dyn Config, layers: usize) -> Result<Option<LayerSet>, SpecError> {
    let kind = |layer| config.text(NameBuf::new("layer_types.{}", layer).as_str());
    if kind(0).is_none() {
        return Ok(None);
    }
    let known = |layer| matches!(kind(layer), Some("sliding_attention" | "full_attention"));
    if !(0..layers.min(DecoderSpec::MAX_LAYERS)).all(known) {
        let expected = "sliding_attention or full_attention for every layer";
        return Err(SpecError::Unsupported { key: "layer_types", expected });
    }
    Ok(Some(LayerSet::new(layers, |layer| kind(layer) == Some("sliding_attention"))))
}

/// `sliding_window`: 0 if it is null, `default` if it is absent.
pub(super) fn window(config: &dyn Config, default: usize) -> Result<usize, SpecError> {
    const KEY: &str = "sliding_window";
    let absent = if config.has(KEY) { 0 } else { default };
    config.uint(KEY).map_or(Ok(absent), |window| size(window, KEY))
}

/// A soft cap: 0 if it is null, `default` if it is absent.
pub(super) fn soft_cap(config: &dyn Config, key: &str, default: f32) -> f32 {
    let absent = if config.has(key) { 0.0 } else { default };
    config.float(key).map_or(absent, |cap| cap as f32)
}

/// The keys of one place where rope may be described.
struct Place {
    kind: &'static str,
    old_kind: &'static str,
    theta: &'static str,
    factor: &'static str,
    low: &'static str,
    high: &'static str,
    original: &'static str,
    attention_factor: &'static str,
}

macro_rules! place {
    ($path:literal) => {
        Place {
            kind: concat!($path, ".rope_type"),
            old_kind: concat!($path, ".type"),
            theta: concat!($path, ".rope_theta"),
            factor: concat!($path, ".factor"),
            low: concat!($path, ".low_freq_factor"),
            high: concat!($path, ".high_freq_factor"),
            original: concat!($path, ".original_max_position_embeddings"),
            attention_factor: concat!($path, ".attention_factor"),
        }
    };
}

/// In the order in which they count: a file's rope is described in one of them, never in a mix.
static PLACES: [Place; 3] =
    [place!("rope_parameters.full_attention"), place!("rope_parameters"), place!("rope_scaling")];

fn rope(config: &dyn Config, context: usize) -> Result<Rope, SpecError> {
    let here = |place: &&Place| kind(config, place).is_some() || config.float(place.theta).is_some();
    let place = PLACES.iter().find(here);
    let theta = place.and_then(|place| config.float(place.theta)).or_else(|| config.float("rope_theta"));
    Ok(Rope {
        theta: theta.unwrap_or(10_000.0),
        scaling: place.map_or(Ok(RopeScaling::None), |place| scaling(config, place, context))?,
    })
}

/// Base of the rotary frequencies in layers with a window, where it has one of its own.
pub(super) fn local_theta(config: &dyn Config) -> Option<f64> {
    let nested = config.float("rope_parameters.sliding_attention.rope_theta");
    nested.or_else(|| config.float("rope_local_base_freq"))
}

fn kind<'c>(config: &'c dyn Config, place: &Place) -> Option<&'c str> {
    config.text(place.kind).or_else(|| config.text(place.old_kind))
}

fn scaling(config: &dyn Config, place: &Place, context: usize) -> Result<RopeScaling, SpecError> {
    let number = |key: &'static str| config.float(key).ok_or(SpecError::Missing { key });
    let factor = || match number(place.factor)? {
        factor if (1.0..=1e6).contains(&factor) => Ok(factor),
        found => Err(SpecError::OutOfRange { key: place.factor, found, min: 1.0, max: 1e6 }),
    };
    match kind(config, place) {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: factor()? }),
        Some("llama3") => {
            let (low, high) = (number(place.low)?, number(place.high)?);
            if !(low > 0.0 && high > low) {
                return Err(SpecError::OutOfRange { key: place.high, found: high, min: low, max: 1e6 });
            }
            let original_context = number(place.original)?;
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context,
            })
        }
        // `su` is what the first files of Phi-3 called it.
        Some("longrope" | "su") => {
            let original = ["original_max_position_embeddings", place.original];
            let original = original.into_iter().find_map(|key| Some((config.uint(key)?, key)));
            let (original, key) = original.ok_or(SpecError::Missing { key: place.original })?;
            let original_context = size(original, key)?;
            let stretched = context as f64 / original_context.max(1) as f64;
            let attention_factor = match config.float(place.attention_factor) {
                Some(factor) => factor as f32,
                None => {
                    let factor = config.float(place.factor).unwrap_or(stretched);
                    RopeScaling::long_attention_factor(factor, original_context)
                }
            };
            Ok(RopeScaling::Long { original_context, attention_factor })
        }
        Some(_) => {
            Err(SpecError::Unsupported { key: place.kind, expected: "default, linear, llama3 or longrope" })
        }
    }
}
