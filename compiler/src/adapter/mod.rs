//! LoRA adapters on the host: read from and written as PEFT's folders and GGUF files, or merged into weights.
//!
//! In memory an adapter is what PEFT trains: `W' x = W x + scale * B (A x)` in Hugging Face's row order, and
//! for DoRA the length of each row of `W'` besides. The runtime and llama.cpp take the first kind as GGUF;
//! the second changes the weights themselves: it is merged, or written as a LoRA of full rank.

mod base;
mod dora;
mod gguf;
mod merge;
mod peft;
mod settings;
#[cfg(test)]
mod tests;

pub use base::{base_of, check_base};
pub use dora::as_lora;
pub use gguf::{export, export_for, export_to_vec};
pub use merge::{merge, merge_all};
pub use peft::write;
pub use settings::{Settings, Targets};
pub(crate) use settings::{linear, module};

use std::path::{Path, PathBuf};

use edge_models::{DecoderSpec, TensorRow};

use crate::export::gguf::GgufWriteError;

/// Why an adapter could not be read, written or merged.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AdapterError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Safetensors { path: PathBuf, source: safetensors::SafeTensorError },
    #[error("{}: `{key}` is {found}, expected {expected}", path.display())]
    Key { path: PathBuf, key: String, found: String, expected: &'static str },
    #[error("{}: tensor `{name}`: {message}", path.display())]
    Tensor { path: PathBuf, name: String, message: String },
    #[error("{}: a DoRA adapter changes the weights themselves and has no place in a GGUF LoRA; merge it instead", path.display())]
    Dora { path: PathBuf },
    #[error("{}: made for the model file with SHA-256 {made_for}, but that of {} is {found}", path.display(), model.display())]
    Base { path: PathBuf, made_for: String, model: PathBuf, found: String },
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("targets `{targets}`: {message}")]
    Targets { targets: String, message: String },
    #[error(transparent)]
    Write(#[from] GgufWriteError),
    #[error("cannot merge: {0}")]
    Candle(#[from] candle_core::Error),
}

/// An adapter for models of one specification.
#[derive(Clone, Debug)]
pub struct Adapter {
    /// Where it came from.
    pub path: PathBuf,
    /// One for each adapted matrix.
    pub pairs: Vec<Pair>,
    /// Its scales are rsLoRA's.
    pub rs: bool,
}

/// The file of an adapter's folder that says what it is.
const CONFIG: &str = "adapter_config.json";

/// Reads an adapter for models with `spec`: PEFT's folder, the folder of a run of `edgec tune`, or a GGUF LoRA.
///
/// # Errors
/// What is wrong with the file or the folder.
pub fn read(path: &Path, spec: &DecoderSpec) -> Result<Adapter, AdapterError> {
    if path.is_file() {
        return gguf::read(path, spec);
    }
    let inside = path.join("adapter");
    let of_run = !path.join(CONFIG).is_file() && inside.join(CONFIG).is_file();
    peft::read(if of_run { &inside } else { path }, spec)
}

/// The update of one matrix, in Hugging Face's row order. A fused tensor (Phi-3) has one pair for all its roles.
#[derive(Clone, Debug)]
pub struct Pair {
    /// The matrix.
    pub row: &'static TensorRow,
    /// Its layer.
    pub layer: usize,
    /// Rows of `A`, columns of `B`.
    pub rank: usize,
    /// `A`, `[rank, cols]`.
    pub down: Vec<f32>,
    /// `B`, `[rows, rank]`.
    pub up: Vec<f32>,
    /// What `B (A x)` is multiplied by: `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA (Kalajdzievski
    /// 2023, arXiv 2312.03732).
    pub scale: f32,
    /// DoRA's lengths, one for each row (Liu et al. 2024, arXiv 2402.09353).
    pub magnitude: Option<Vec<f32>>,
}

impl Adapter {
    /// It is a DoRA.
    pub fn is_dora(&self) -> bool {
        self.pairs.iter().any(|pair| pair.magnitude.is_some())
    }
}
