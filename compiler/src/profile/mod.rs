//! Measures models through the runtime that the device runs: quality ([`eval`]) and speed ([`bench`]).
//!
//! Opens whatever is a model to this tool as the one file that the runtime reads.

pub mod eval;

pub use edge_run::{ModelFile, Settings, bench};

use std::path::{Path, PathBuf};

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

/// Opens a GGUF file in place, a run's folder (its `student.gguf`), or a Hugging Face folder, which is
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
