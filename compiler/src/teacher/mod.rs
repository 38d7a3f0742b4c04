//! Models in: a GGUF file, a Hugging Face folder, or the folder of an earlier run.
//!
//! Whatever the source, a [`Model`] comes out in f32 and in Hugging Face's row order. Nothing here trusts
//! a file: sizes and shapes are checked against the specification before anything is read by them.

mod config;
mod gguf;
mod hf;

pub use config::JsonConfig;
pub use gguf::{from_gguf, held_from_gguf};
pub(crate) use hf::{json, to_f32};

use std::path::{Path, PathBuf};

use edge_models::{FAMILIES, SpecError};

use crate::model::{Model, Weights};
use crate::quantize::{HeldModel, Mix, QuantizeError, hold};
use crate::text::TextError;

/// Why a model could not be loaded. Every message names the file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LoadError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Gguf { path: PathBuf, source: edge_runtime::Error },
    #[error("{}: is a pack, laid out for a device's kernels; give the GGUF file that it was made from (SHA-256 {source_hash})", path.display())]
    Packed { path: PathBuf, source_hash: String },
    #[error("{}: {}", path.display(), source.behind(prefix))]
    Spec { path: PathBuf, prefix: String, source: SpecError },
    #[error("{}: family `{found}` is not implemented; there are {}", path.display(), family_names())]
    UnknownFamily { path: PathBuf, found: String },
    #[error("{}: {message}", path.display())]
    Json { path: PathBuf, message: String },
    #[error("{}: {source}", path.display())]
    Safetensors { path: PathBuf, source: safetensors::SafeTensorError },
    #[error("{}: tensor `{name}` is missing", path.display())]
    MissingTensor { path: PathBuf, name: String },
    #[error("{}: tensor `{name}` has shape {found:?}, expected {expected:?}", path.display())]
    Shape { path: PathBuf, name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{}: tensor `{name}` has type {found}, expected {expected}", path.display())]
    Type { path: PathBuf, name: String, found: String, expected: &'static str },
    #[error("{}: tensor `{name}` has no place in family `{family}`", path.display())]
    UnknownTensor { path: PathBuf, name: String, family: &'static str },
    #[error("{}: tensor `{name}` holds {value} at element {index}, expected finite numbers", path.display())]
    NotFinite { path: PathBuf, name: String, index: usize, value: f32 },
    #[error("{}: tensor `{name}`: {source}", path.display())]
    Quantize { path: PathBuf, name: String, source: QuantizeError },
    #[error("{}: neither a GGUF file nor a folder with a config.json", path.display())]
    NotAModel { path: PathBuf },
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("{}: {source}", path.display())]
    Tensor { path: PathBuf, source: candle_core::Error },
}

/// Loads a GGUF file, a Hugging Face folder, or the student in a run's folder.
///
/// # Errors
/// The first thing that is wrong, with the file's name.
pub fn load(path: &Path) -> Result<Model, LoadError> {
    if path.is_dir() {
        let student = path.join("student");
        if path.join("config.json").is_file() {
            return hf::load(path);
        }
        if student.join("config.json").is_file() {
            return hf::load(&student);
        }
        return Err(LoadError::NotAModel { path: path.into() });
    }
    gguf::load(path)
}

/// As [`load`], with the matrices in blocks: those of a quantized GGUF file as they are, of anything else in the types
/// of `mix`.
///
/// # Errors
/// As [`load`]; a value that a type cannot hold.
pub fn load_held(path: &Path, mix: Mix) -> Result<HeldModel, LoadError> {
    if path.is_file() {
        return gguf::held(path, mix);
    }
    let Model { spec, weights, .. } = load(path)?;
    let (mut vectors, mut matrices) = (Weights::default(), std::collections::BTreeMap::new());
    for (role, layer, tensor) in weights.iter() {
        if role.is_vector() {
            vectors.insert(role, layer, tensor.clone());
            continue;
        }
        let values = tensor.flatten_all().and_then(|flat| flat.to_vec1::<f32>());
        let values = values.map_err(|source| LoadError::Tensor { path: path.into(), source })?;
        let blocks = hold(&values, role, layer, &spec, mix);
        let name = || format!("{role:?} of layer {layer}");
        matrices.insert((role, layer), blocks.map_err(|source| gguf::quantize_error(path, &name(), source))?);
    }
    Ok(HeldModel { spec, vectors, matrices, as_in_file: false })
}

fn family_names() -> String {
    FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
}

/// Refuses NaN and infinity, which would spread through everything made from them.
fn check_finite(path: &Path, name: &str, values: &[f32]) -> Result<(), LoadError> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => {
            Err(LoadError::NotFinite { path: path.into(), name: name.into(), index, value: values[index] })
        }
    }
}
