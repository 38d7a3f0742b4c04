//! Measures models through the runtime that the device runs: quality ([`eval`]) and speed ([`bench`]).

pub mod bench;
pub mod eval;
mod native;

pub use native::NativeFile;

use std::path::PathBuf;

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The runtime refused the file or the call.
    #[error("{}: {source}", path.display())]
    Runtime {
        /// The model.
        path: PathBuf,
        /// The refusal.
        source: edge_runtime::Error,
    },
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
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
    #[error("teacher has {teacher} tokens in its vocabulary, student {student}: their logits cannot be compared")]
    VocabularySize {
        /// Rows of the teacher's head.
        teacher: usize,
        /// Rows of the student's head.
        student: usize,
    },
    /// A kernel table that this CPU cannot run.
    #[error("no kernels `{name}` on this machine; there are {available}")]
    UnknownKernels {
        /// What was asked for.
        name: String,
        /// What can run here.
        available: String,
    },
}

/// How the runtime is to be run on the host.
#[derive(Clone, Debug)]
pub struct Engine {
    /// Threads, at least 1.
    pub threads: usize,
    /// Name of a kernel table, or the best that the CPU has.
    pub kernels: Option<String>,
}

impl Default for Engine {
    fn default() -> Self {
        Self { threads: std::thread::available_parallelism().map_or(1, usize::from), kernels: None }
    }
}

impl Engine {
    /// The kernel table to use.
    ///
    /// # Errors
    /// The name is unknown or the CPU lacks what the table needs.
    pub fn kernels(&self) -> Result<&'static edge_runtime::kernels::Kernels, Error> {
        use edge_runtime::kernels::{Features, Kernels};
        match &self.kernels {
            None => Ok(Kernels::select(Features::detect())),
            Some(name) => Kernels::by_name(name).ok_or_else(|| Error::UnknownKernels {
                name: name.clone(),
                available: Kernels::available().map(|kernels| kernels.name).collect::<Vec<_>>().join(", "),
            }),
        }
    }
}
