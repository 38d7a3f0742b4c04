//! Measures models through the runtime that the device runs: quality ([`eval`]) and speed ([`bench`]).
//!
//! Opens whatever is a model to this tool as the one file that the runtime reads.

pub mod eval;
pub mod parity;

pub use edge_run::{Adapter, ModelFile, Processors, Settings, bench};

use std::path::{Path, PathBuf};

use edge_models::DecoderSpec;
use edge_runtime::session::{Limits, Plan};

use crate::adapter::{self, AdapterError};
use crate::export::gguf::{Mix, export_to_vec};
use crate::model::Model;
use crate::teacher;

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The runtime refused the file or the call.
    #[error(transparent)]
    Run(#[from] edge_run::Error),
    /// A model folder could not be loaded.
    #[error(transparent)]
    Load(#[from] crate::teacher::LoadError),
    /// A model folder could not be laid out for the runtime.
    #[error("{}: {source}", path.display())]
    Export {
        /// The folder.
        path: PathBuf,
        /// What went wrong.
        source: crate::export::gguf::ExportError,
    },
    /// An adapter could not be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The differentiable graph refused a model.
    #[error(transparent)]
    Train(#[from] crate::train::TrainError),
    /// The same, without more to say.
    #[error("graph: {0}")]
    Graph(#[from] candle_core::Error),
    /// The text is shorter than one window.
    #[error("the text has {found} tokens, one window needs {needed}")]
    TextTooShort {
        /// Tokens there are.
        found: usize,
        /// Tokens of one window.
        needed: usize,
    },
    /// Teacher and student count differently.
    #[error(
        "teacher has {teacher} tokens in its vocabulary, student {student}: their logits cannot be compared"
    )]
    VocabularySize {
        /// Rows of the teacher's head.
        teacher: usize,
        /// Rows of the student's head.
        student: usize,
    },
}

/// Opens a GGUF file or a pack in place, a run's folder (its `student.gguf`), or a Hugging Face folder, which is
/// laid out as an f32 GGUF in memory first.
///
/// # Errors
/// The file cannot be read, or it is not a model.
pub fn open(path: &Path) -> Result<ModelFile, Error> {
    if path.is_dir() {
        let exported = path.join("student.gguf");
        if exported.is_file() {
            return open(&exported);
        }
        return lay_out(&teacher::load(path)?, path);
    }
    let file = ModelFile::open(path)?;
    file.parse()?;
    Ok(file)
}

/// A model in memory as an f32 GGUF in memory; `path` is what errors call it.
///
/// # Errors
/// The model cannot be expressed in GGUF.
pub fn lay_out(model: &Model, path: &Path) -> Result<ModelFile, Error> {
    let bytes =
        export_to_vec(model, Mix::F32).map_err(|source| Error::Export { path: path.to_owned(), source })?;
    Ok(ModelFile::from_memory(path, bytes))
}

/// The specification of a model that was opened.
///
/// # Errors
/// The runtime refuses the file.
pub fn spec_of(file: &ModelFile) -> Result<DecoderSpec, Error> {
    let plan = Plan::new(&file.parse()?, Limits { context: 1, ..Limits::default() });
    Ok(*plan.map_err(|error| file.refused(error))?.spec())
}

/// Opens a model as [`open`] does, and adapters for it, each with its scale: GGUF files, and PEFT's folders,
/// which are laid out as GGUF in memory. DoRA adapters change weights: with one of them, the model is
/// merged with it and laid out as f32.
///
/// # Errors
/// What is wrong with the model or an adapter.
pub fn open_with(path: &Path, adapters: &[(PathBuf, f32)]) -> Result<(ModelFile, Vec<Adapter>), Error> {
    let mut file = open(path)?;
    if adapters.is_empty() {
        return Ok((file, Vec::new()));
    }
    let spec = spec_of(&file)?;
    let (mut opened, mut merged) = (Vec::new(), None);
    for (place, scale) in adapters {
        let adapter = if place.is_dir() {
            let read = adapter::read(place, &spec)?;
            if read.is_dora() {
                let mut model = match merged.take() {
                    Some(model) => model,
                    None => teacher::load(path)?,
                };
                adapter::merge(&mut model, &read, *scale)?;
                merged = Some(model);
                continue;
            }
            ModelFile::from_memory(place, adapter::export_to_vec(&read, &spec)?)
        } else {
            let adapter = ModelFile::open(place)?;
            adapter::check_base(&adapter, &file)?;
            adapter
        };
        opened.push(Adapter { file: adapter.into(), scale: *scale });
    }
    if let Some(model) = merged {
        file = lay_out(&model, path)?;
    }
    Ok((file, opened))
}
