//! A model file as the device's runtime reads it, mapped or laid out in memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use edge_runtime::format::Gguf;
use memmap2::Mmap;

use super::Error;
use crate::export::gguf::{Mix, export_to_vec};
use crate::teacher;

/// The bytes of a GGUF file and where they came from.
pub struct NativeFile {
    bytes: Bytes,
    path: PathBuf,
}

enum Bytes {
    Mapped(Mmap),
    Laid(Vec<u8>),
    Static(&'static [u8]),
}

impl NativeFile {
    /// Opens a GGUF file in place, a run's folder (its `student.gguf`), or a Hugging Face folder, which
    /// is laid out as an f32 GGUF in memory first.
    ///
    /// # Errors
    /// The file cannot be read, or it is not a model.
    pub fn open(path: &Path) -> Result<Self, Error> {
        if path.is_dir() {
            let exported = path.join("student.gguf");
            if exported.is_file() {
                return Self::open(&exported);
            }
            return Self::from_model(&teacher::load(path)?, path);
        }
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only and private to this process. Truncating the file under a running
        // process would raise SIGBUS, as it does for every tool that maps models; no Rust value is
        // derived from the bytes without the checks of `Gguf::parse`.
        let bytes = unsafe { Mmap::map(&file) }.map_err(io)?;
        let file = Self { bytes: Bytes::Mapped(bytes), path: path.to_owned() };
        file.gguf()?;
        Ok(file)
    }

    /// Lays a model in memory out in f32; `path` is what errors call it.
    ///
    /// # Errors
    /// The model cannot be expressed in GGUF.
    pub fn from_model(model: &crate::model::Model, path: &Path) -> Result<Self, Error> {
        let bytes = export_to_vec(model, Mix::F32)
            .map_err(|source| Error::Export { path: path.to_owned(), source })?;
        Ok(Self { bytes: Bytes::Laid(bytes), path: path.to_owned() })
    }

    /// A file inside this program; `path` is what errors call it.
    ///
    /// # Errors
    /// The bytes are not a GGUF file.
    pub fn from_static(bytes: &'static [u8], path: &Path) -> Result<Self, Error> {
        let file = Self { bytes: Bytes::Static(bytes), path: path.to_owned() };
        file.gguf()?;
        Ok(file)
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Laid(bytes) => bytes,
            Bytes::Static(bytes) => bytes,
        }
    }

    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The checked file.
    ///
    /// # Errors
    /// The bytes are not a GGUF file.
    pub fn gguf(&self) -> Result<Gguf<'_>, Error> {
        Gguf::parse(self.bytes()).map_err(|error| self.error(error))
    }

    /// A refusal of the runtime, with the file's name.
    pub fn error(&self, source: edge_runtime::Error) -> Error {
        Error::Runtime { path: self.path.clone(), source }
    }
}
