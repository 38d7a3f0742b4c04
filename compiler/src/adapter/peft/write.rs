//! An adapter as PEFT's folder, which `PeftModel.from_pretrained` takes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use edge_models::DecoderSpec;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::super::settings::{divisor, leaf, module};
use super::super::{Adapter, AdapterError, CONFIG, Pair};
use super::{PREFIX, WEIGHTS};
use crate::atomic;

/// Writes `adapter` to `folder`, which is made if it is not there; each file whole or not at all, the
/// configuration last. `base` is what the configuration calls the model that it belongs to.
///
/// # Errors
/// The file system's refusal.
pub fn write(adapter: &Adapter, spec: &DecoderSpec, base: &str, folder: &Path) -> Result<(), AdapterError> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| AdapterError::Io { path, source }
    };
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let path = folder.join(WEIGHTS);
    let weights =
        weights(adapter).map_err(|source| AdapterError::Safetensors { path: path.clone(), source })?;
    atomic::write(&path, |file| file.write_all(&weights)).map_err(io(&path))?;
    let path = folder.join(CONFIG);
    atomic::write(&path, |file| {
        serde_json::to_writer_pretty(&mut *file, &config(adapter, spec.layers, base))?;
        file.write_all(b"\n")
    })
    .map_err(io(&path))
}

fn weights(adapter: &Adapter) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors = BTreeMap::new();
    for pair in &adapter.pairs {
        let module = module(pair.row, pair.layer);
        let (cols, rows) = (pair.down.len() / pair.rank, pair.up.len() / pair.rank);
        let mut add = |part: &str, shape: Vec<usize>, values: &[f32]| {
            tensors.insert(format!("{PREFIX}{module}.{part}"), (shape, bytes(values)));
        };
        add("lora_A.weight", vec![pair.rank, cols], &pair.down);
        add("lora_B.weight", vec![rows, pair.rank], &pair.up);
        if let Some(magnitude) = &pair.magnitude {
            add("lora_magnitude_vector", vec![rows], magnitude);
        }
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.clone(), view))
    });
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views.collect::<Result<Vec<_>, _>>()?, Some(about))
}

fn config(adapter: &Adapter, layers: usize, base: &str) -> Value {
    let modules: Vec<String> = adapter.pairs.iter().map(|pair| module(pair.row, pair.layer)).collect();
    let ranks: Vec<usize> = adapter.pairs.iter().map(|pair| pair.rank).collect();
    let rank = most_common(&ranks, |a, b| a == b);
    let alphas: Vec<f64> = adapter.pairs.iter().map(|pair| alpha(pair, adapter.rs)).collect();
    let alpha = most_common(&alphas, |a, b| a == b);
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": rank,
        "lora_alpha": number(alpha),
        "target_modules": targets(&modules, layers),
        "rank_pattern": patterns(&modules, &ranks, &rank, |rank| Value::from(*rank)),
        "alpha_pattern": patterns(&modules, &alphas, &alpha, |alpha| number(*alpha)),
        "use_rslora": adapter.rs,
        "use_dora": adapter.is_dora(),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "modules_to_save": null,
        "layers_to_transform": null,
        "layers_pattern": null,
        "revision": null,
    })
}

/// The roundest alpha that gives the pair's scale exactly.
fn alpha(pair: &Pair, rs: bool) -> f64 {
    let divisor = divisor(pair.rank, rs);
    let exact = f64::from(pair.scale) * divisor;
    let short = (exact as f32).to_string().parse().unwrap_or(exact);
    let candidates = [exact.round(), short, exact];
    candidates.into_iter().find(|alpha| (alpha / divisor) as f32 == pair.scale).unwrap_or(exact)
}

fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { Value::from(value as i64) } else { Value::from(value) }
}

/// The value that most have; of several the first.
fn most_common<T: Copy + Default>(values: &[T], same: impl Fn(&T, &T) -> bool) -> T {
    let count = |value: &T| values.iter().filter(|other| same(value, other)).count();
    let best = values.iter().rev().max_by_key(|value| count(value));
    best.copied().unwrap_or_default()
}

/// Last parts of names where they mean the same modules, whole names otherwise.
fn targets(modules: &[String], layers: usize) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for module in modules {
        *counts.entry(leaf(module)).or_default() += 1;
    }
    if counts.values().all(|count| *count == layers) {
        return counts.keys().map(|name| (*name).to_owned()).collect();
    }
    modules.to_vec()
}

/// What is not `default`, by the last part of names where all modules of that end agree, by whole names otherwise.
fn patterns<T: PartialEq>(
    modules: &[String],
    values: &[T],
    default: &T,
    show: impl Fn(&T) -> Value,
) -> Map<String, Value> {
    let agree = |name: &str, value: &T| {
        modules.iter().zip(values).all(|(module, other)| leaf(module) != name || other == value)
    };
    let mut named = BTreeSet::new();
    let mut map = Map::new();
    for (module, value) in modules.iter().zip(values).filter(|(_, value)| *value != default) {
        let name = if agree(leaf(module), value) { leaf(module) } else { module };
        if named.insert(name.to_owned()) {
            map.insert(name.to_owned(), show(value));
        }
    }
    map
}
