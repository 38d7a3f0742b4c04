//! A Hugging Face folder as a model in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use edge_models::{Config, DecoderSpec, NameBuf, Role, family_by_hf_type};
use edge_runtime::format::{bf16_to_f32, f16_to_f32};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::{JsonConfig, LoadError, check_finite};
use crate::model::{Model, Weights};
use crate::text::hf_vocabulary;

/// Largest JSON file that is read, in bytes.
const MAX_JSON: u64 = 1 << 26;

pub(super) fn load(folder: &Path) -> Result<Model, LoadError> {
    let config_path = folder.join("config.json");
    let config = JsonConfig(document(&config_path)?);
    let model_type = config.0.get("model_type").and_then(Value::as_str).unwrap_or("(none)");
    let family = family_by_hf_type(model_type)
        .ok_or_else(|| LoadError::UnknownFamily { path: config_path.clone(), found: model_type.into() })?;
    let spec = family.from_hf.read(&config).map_err(|source| LoadError::Spec {
        path: config_path.clone(),
        prefix: String::new(),
        source,
    })?;
    let mut weights = weights(folder, &spec)?;
    for (role, list) in [(Role::RopeLong, "long_factor"), (Role::RopeShort, "short_factor")] {
        if role.required(&spec) {
            weights.insert(role, 0, rope_divisors(&config, list, &spec, &config_path)?);
        }
    }
    let name = folder
        .canonicalize()
        .ok()
        .and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned()))
        .unwrap_or_default();
    Ok(Model { spec, weights, vocabulary: hf_vocabulary::read(folder)?, name })
}

/// The content of a JSON file.
///
/// # Errors
/// The file system's refusal; `InvalidData` for more than 64 MiB or what is not JSON.
pub(crate) fn json(path: &Path) -> io::Result<Value> {
    let bytes = fs::metadata(path)?.len();
    if bytes > MAX_JSON {
        let message = format!("{bytes} bytes of JSON, expected at most {MAX_JSON}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// The list of rotary divisors called `list`, which is kept in `config.json`.
fn rope_divisors(
    config: &JsonConfig,
    list: &str,
    spec: &DecoderSpec,
    path: &Path,
) -> Result<Tensor, LoadError> {
    let key = ["rope_parameters", "rope_scaling"].map(|place| format!("{place}.{list}"));
    let count = spec.rope_dims / 2;
    let values = |key: &String| -> Option<Vec<f32>> {
        let number = |i| config.float(&format!("{key}.{i}")).map(|x| x as f32);
        (0..count).map(number).collect::<Option<Vec<_>>>().filter(|_| number(count).is_none())
    };
    let Some(values) = key.iter().find_map(values) else {
        let message = format!("no `{list}` of {count} numbers under `{}` or `{}`", key[0], key[1]);
        return Err(LoadError::Json { path: path.into(), message });
    };
    Tensor::from_vec(values, count, &Device::Cpu)
        .map_err(|source| LoadError::Tensor { path: path.into(), source })
}

fn document(path: &Path) -> Result<Value, LoadError> {
    json(path).map_err(|source| LoadError::Io { path: path.into(), source })
}

/// The files that hold the weights.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let single = folder.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = folder.join("model.safetensors.index.json");
    let map = document(&index)?;
    let malformed = |message: &str| LoadError::Json { path: index.clone(), message: message.into() };
    let map = map.get("weight_map").and_then(Value::as_object).ok_or_else(|| malformed("no `weight_map`"))?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    if names.iter().any(|name| name.contains(['/', '\\'])) {
        return Err(malformed("`weight_map` names a file outside the folder"));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn weights(folder: &Path, spec: &DecoderSpec) -> Result<Weights, LoadError> {
    let paths = shards(folder)?;
    let maps: Vec<Mmap> = paths
        .iter()
        .map(|path| {
            let io = |source| LoadError::Io { path: path.clone(), source };
            let file = File::open(path).map_err(io)?;
            // SAFETY: read-only and private; every offset into it is checked by `deserialize` below.
            // A file that is cut while it is mapped raises SIGBUS, as for every tool that maps models.
            unsafe { Mmap::map(&file) }.map_err(io)
        })
        .collect::<Result<_, _>>()?;
    let mut views: BTreeMap<String, (&Path, TensorView<'_>)> = BTreeMap::new();
    for (path, map) in paths.iter().zip(&maps) {
        let shard = SafeTensors::deserialize(map)
            .map_err(|source| LoadError::Safetensors { path: path.clone(), source })?;
        for (name, view) in shard.iter() {
            views.insert(name.to_owned(), (path, view));
        }
    }

    let mut wanted = Vec::new();
    for row in spec.family.tensors.iter().filter(|row| !row.hf.is_empty() && row.role.required(spec)) {
        for layer in 0..if row.role.per_layer() { spec.layers } else { 1 } {
            wanted.push((row, layer, NameBuf::new(row.hf, layer).as_str().to_owned()));
        }
    }
    let known: BTreeSet<&str> = wanted.iter().map(|(_, _, name)| name.as_str()).collect();
    // A copy of the tied head and the rotary frequencies of old checkpoints carry nothing new.
    let redundant = |name: &str| name == "lm_head.weight" || name.ends_with(".rotary_emb.inv_freq");
    if let Some((name, (path, _))) =
        views.iter().find(|(name, _)| !known.contains(name.as_str()) && !redundant(name))
    {
        return Err(LoadError::UnknownTensor {
            path: (*path).into(),
            name: name.clone(),
            family: spec.family.name,
        });
    }
    let loaded: Vec<_> = wanted
        .par_iter()
        .map(|(row, layer, name)| {
            let Some((path, view)) = views.get(name.as_str()) else {
                return Err(LoadError::MissingTensor { path: folder.into(), name: name.clone() });
            };
            let [rows, cols] = row.file_shape(spec);
            let expected = if row.role.is_vector() { vec![cols] } else { vec![rows, cols] };
            if view.shape() != expected {
                let found = view.shape().to_vec();
                return Err(LoadError::Shape { path: (*path).into(), name: name.clone(), found, expected });
            }
            let span = row.span(spec);
            let bytes = view.data().len() / rows;
            let data = &view.data()[span.start * bytes..span.end * bytes];
            let mut values = to_f32(view.dtype(), data).ok_or_else(|| LoadError::Type {
                path: (*path).into(),
                name: name.clone(),
                found: format!("{:?}", view.dtype()),
                expected: "F32, F16 or BF16",
            })?;
            check_finite(path, name, &values)?;
            if row.role.is_norm() {
                values.iter_mut().for_each(|weight| *weight += spec.family.hf_norm_offset);
            }
            let shape = if row.role.is_vector() { vec![cols] } else { vec![span.len(), cols] };
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)
                .map_err(|source| LoadError::Tensor { path: (*path).into(), source })?;
            Ok((row.role, *layer, tensor))
        })
        .collect::<Result<_, _>>()?;
    let mut weights = Weights::default();
    for (role, layer, tensor) in loaded {
        weights.insert(role, layer, tensor);
    }
    Ok(weights)
}

/// The values of a tensor of a float type, `None` for any other.
pub(crate) fn to_f32(dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    let halves = |convert: fn(u16) -> f32| {
        data.as_chunks::<2>().0.iter().map(|bytes| convert(u16::from_le_bytes(*bytes))).collect()
    };
    match dtype {
        Dtype::F32 => Some(data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => Some(halves(f16_to_f32)),
        Dtype::BF16 => Some(halves(bf16_to_f32)),
        _ => None,
    }
}
