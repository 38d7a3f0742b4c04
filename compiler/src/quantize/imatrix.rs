//! Importance of columns: mean squares of what each matrix reads, and the file that llama.cpp keeps them in.
//!
//! The file is GGUF with two tensors for each matrix of the model (llama.cpp, `tools/imatrix`): `NAME.in_sum2`, the
//! sum of squares for each column, and `NAME.counts`, the tokens in it. Both are sums, so files add up. The
//! matrix of a tied head is called as the embedding table is.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use edge_models::{DecoderSpec, NameBuf, Role};
use edge_runtime::format::{DType, Gguf};

use crate::export::gguf::{GgufWriteError, GgufWriter, MetaValue};

const KIND: &str = "imatrix";
const DATASETS: &str = "imatrix.datasets";
const CHUNK_COUNT: &str = "imatrix.chunk_count";
const CHUNK_SIZE: &str = "imatrix.chunk_size";
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// Why an importance file could not be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ImatrixError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: {source}", path.display())]
    Gguf { path: PathBuf, source: edge_runtime::Error },
    #[error("{}: general.type is `{found}`, expected `{KIND}`", path.display())]
    Kind { path: PathBuf, found: String },
    #[error("{}: tensor `{name}` {found}, expected {expected}", path.display())]
    Tensor { path: PathBuf, name: String, found: String, expected: String },
    #[error("{}: nothing about the matrix `{name}`", path.display())]
    Missing { path: PathBuf, name: String },
}

/// Sums for one matrix.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    sums: Vec<f32>,
    tokens: f32,
}

/// Sums of squares for the matrices of a model, by the names of their tensors in GGUF.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Imatrix {
    entries: BTreeMap<String, Entry>,
    /// The texts, as users call them.
    pub datasets: Vec<String>,
    /// Windows that were read.
    pub windows: u32,
    /// Tokens of a window.
    pub length: u32,
}

/// Name of the tensor that holds the matrix of `role`.
fn name(role: Role, layer: usize, spec: &DecoderSpec) -> String {
    spec.family.tensor(role).map_or_else(String::new, |row| NameBuf::new(row.gguf, layer).as_str().to_owned())
}

impl Imatrix {
    /// Puts in sums over `tokens`. Matrices that share a tensor read the same, and share the entry.
    pub fn insert(&mut self, role: Role, layer: usize, spec: &DecoderSpec, sums: Vec<f32>, tokens: usize) {
        self.entries.insert(name(role, layer, spec), Entry { sums, tokens: tokens as f32 });
    }

    /// Mean square of what each column of a matrix reads; `None` if nothing is known of it.
    pub fn importance(&self, role: Role, layer: usize, spec: &DecoderSpec) -> Option<Vec<f32>> {
        let entry = self.entries.get(&name(role, layer, spec))?;
        Some(entry.sums.iter().map(|sum| sum / entry.tokens).collect())
    }

    /// What a matrix reads is divided by `scales`, one for each column. Matrices that share a tensor share the entry,
    /// and it is divided once.
    pub(super) fn scale(&mut self, role: Role, layer: usize, spec: &DecoderSpec, scales: &[f32]) {
        let first = spec.family.tensor(role).map_or(role, |row| row.members()[0]);
        if let Some(entry) = self.entries.get_mut(&name(role, layer, spec)).filter(|_| first == role) {
            entry.sums.iter_mut().zip(scales).for_each(|(sum, scale)| *sum /= scale * scale);
        }
    }

    /// [`Imatrix::importance`] of a matrix, `None` for the embedding table and the head if they are not there, as
    /// llama.cpp leaves them out; `path` is what errors call the file.
    ///
    /// # Errors
    /// A matrix inside a layer of which nothing is known, or one of another width.
    pub fn require(
        &self,
        role: Role,
        layer: usize,
        spec: &DecoderSpec,
        path: &Path,
    ) -> Result<Option<Vec<f32>>, ImatrixError> {
        let name = name(role, layer, spec);
        match self.importance(role, layer, spec) {
            None if role.per_layer() => Err(ImatrixError::Missing { path: path.into(), name }),
            Some(found) if found.len() != role.shape(spec)[1] => Err(ImatrixError::Tensor {
                path: path.into(),
                name: format!("{name}{SUMS}"),
                found: format!("has {} columns", found.len()),
                expected: role.shape(spec)[1].to_string(),
            }),
            found => Ok(found),
        }
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn write(&self, path: &Path) -> Result<u64, GgufWriteError> {
        let mut file = GgufWriter::new();
        file.meta("general.type", &KIND.into())?;
        let datasets = self.datasets.iter().map(|name| name.clone().into_bytes()).collect();
        file.meta(DATASETS, &MetaValue::Strings(datasets))?;
        file.meta(CHUNK_COUNT, &MetaValue::U32(self.windows))?;
        file.meta(CHUNK_SIZE, &MetaValue::U32(self.length))?;
        for (name, entry) in &self.entries {
            let sums: Vec<u8> = entry.sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
            file.tensor(&format!("{name}{SUMS}"), &[entry.sums.len() as u64, 1], DType::F32, sums)?;
            let counts = entry.tokens.to_le_bytes().to_vec();
            file.tensor(&format!("{name}{COUNTS}"), &[1, 1], DType::F32, counts)?;
        }
        file.write_atomic(path)
    }

    /// Reads such a file, llama.cpp's or our own.
    ///
    /// # Errors
    /// No such file, another kind of file, or a tensor that is not a sum of squares.
    pub fn read(path: &Path) -> Result<Self, ImatrixError> {
        let bytes = fs::read(path).map_err(|source| ImatrixError::Io { path: path.into(), source })?;
        let refuse = |source| ImatrixError::Gguf { path: path.into(), source };
        let file = Gguf::parse(&bytes).map_err(refuse)?;
        let found = file.get("general.type").and_then(|value| value.as_str()).unwrap_or_default();
        if found != KIND {
            return Err(ImatrixError::Kind { path: path.into(), found: found.into() });
        }
        let number = |key| file.get(key).and_then(|value| value.as_uint()).unwrap_or(0) as u32;
        let datasets = file.get(DATASETS).and_then(|value| value.as_array()).and_then(|list| list.strings());
        let mut read = Self {
            datasets: datasets
                .map(|names| names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
                .unwrap_or_default(),
            windows: number(CHUNK_COUNT),
            length: number(CHUNK_SIZE),
            ..Self::default()
        };
        for tensor in file.tensors() {
            let Some(name) = tensor.name.strip_suffix(SUMS) else { continue };
            let sums = floats(&file, tensor.name, path)?;
            let counts = floats(&file, &format!("{name}{COUNTS}"), path)?;
            let wrong = |found: String, expected: &str| ImatrixError::Tensor {
                path: path.into(),
                name: tensor.name.into(),
                found,
                expected: expected.into(),
            };
            if counts.len() != 1 {
                return Err(wrong(format!("is for {} experts", counts.len()), "one matrix"));
            }
            if let Some(index) = sums.iter().position(|sum| !(*sum >= 0.0 && sum.is_finite())) {
                return Err(wrong(format!("holds {} at {index}", sums[index]), "a sum of squares"));
            }
            if !(counts[0] > 0.0 && counts[0].is_finite()) {
                return Err(wrong(format!("is of {} tokens", counts[0]), "at least 1"));
            }
            read.entries.insert(name.to_owned(), Entry { sums, tokens: counts[0] });
        }
        Ok(read)
    }
}

/// The values of an F32 tensor.
fn floats(file: &Gguf<'_>, name: &str, path: &Path) -> Result<Vec<f32>, ImatrixError> {
    let wrong = |found: String| ImatrixError::Tensor {
        path: path.into(),
        name: name.into(),
        found,
        expected: "F32 numbers".into(),
    };
    let tensor = file.tensor(name).ok_or_else(|| wrong("is missing".into()))?;
    match tensor.weights() {
        Some((DType::F32, _)) => {
            Ok(tensor.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        }
        Some((dtype, _)) => Err(wrong(format!("is {}", dtype.name()))),
        None => Err(wrong("is of an unknown type".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::fixture::tiny;

    fn sample(spec: &DecoderSpec) -> Imatrix {
        let mut imatrix =
            Imatrix { datasets: vec!["a.txt".into()], windows: 2, length: 8, ..Imatrix::default() };
        for layer in 0..spec.layers {
            for role in [Role::AttnQ, Role::AttnK, Role::AttnV, Role::AttnOut, Role::FfnGate, Role::FfnUp] {
                let sums = (0..16).map(|i| (i + layer) as f32).collect();
                imatrix.insert(role, layer, spec, sums, 16);
            }
        }
        imatrix
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let spec = tiny(2, 1).spec;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix.gguf");
        let written = sample(&spec);
        written.write(&path).unwrap();
        let read = Imatrix::read(&path).unwrap();
        assert_eq!(read, written);
        assert_eq!(read.importance(Role::AttnK, 1, &spec).unwrap()[3], 4.0 / 16.0);
        // As llama.cpp calls them.
        let bytes = std::fs::read(&path).unwrap();
        let file = Gguf::parse(&bytes).unwrap();
        assert_eq!(file.tensor("blk.1.attn_q.weight.in_sum2").unwrap().dims, [16, 1, 1, 1]);
        assert_eq!(file.tensor("blk.1.attn_q.weight.counts").unwrap().dims, [1, 1, 1, 1]);
        assert_eq!(file.get("imatrix.chunk_size").unwrap().as_uint(), Some(8));
        // What it does not know of: a matrix in a layer is an error, a head is not.
        assert!(matches!(read.require(Role::FfnDown, 0, &spec, &path), Err(ImatrixError::Missing { .. })));
        assert_eq!(read.require(Role::TokenEmbedding, 0, &spec, &path).unwrap(), None);
        assert!(read.require(Role::AttnQ, 0, &spec, &path).unwrap().is_some());
        let wider = DecoderSpec { hidden: 32, ..spec };
        assert!(matches!(read.require(Role::AttnQ, 0, &wider, &path), Err(ImatrixError::Tensor { .. })));
    }

    #[test]
    fn other_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bad.gguf");
        let error = |fill: &dyn Fn(&mut GgufWriter<'_>)| {
            let mut file = GgufWriter::new();
            fill(&mut file);
            file.write_atomic(&path).unwrap();
            Imatrix::read(&path).unwrap_err().to_string()
        };
        assert!(error(&|_| ()).contains("general.type is ``, expected `imatrix`"));
        let with = |values: [f32; 3], count: Option<f32>| {
            error(&|file| {
                file.meta("general.type", &KIND.into()).unwrap();
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                file.tensor("x.in_sum2", &[3, 1], DType::F32, bytes).unwrap();
                if let Some(count) = count {
                    file.tensor("x.counts", &[1, 1], DType::F32, count.to_le_bytes().to_vec()).unwrap();
                }
            })
        };
        assert!(with([1.0, -1.0, 0.0], Some(1.0)).contains("holds -1 at 1, expected a sum of squares"));
        assert!(with([1.0, f32::NAN, 0.0], Some(1.0)).contains("holds NaN at 1"));
        assert!(with([1.0; 3], Some(0.0)).contains("is of 0 tokens"));
        assert!(with([1.0; 3], None).contains("`x.counts` is missing"));
        std::fs::write(&path, b"GGUF").unwrap();
        assert!(matches!(Imatrix::read(&path), Err(ImatrixError::Gguf { .. })));
        assert!(matches!(Imatrix::read(folder.path().join("no").as_path()), Err(ImatrixError::Io { .. })));
    }
}
