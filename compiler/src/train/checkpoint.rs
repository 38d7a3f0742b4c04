//! One file from which a stopped run goes on as if it had never stopped.
//!
//! A safetensors file (so that any tool can look into it) with each parameter and its two moments, and
//! a header that says where the run was and what it was asked to do. It replaces its predecessor only
//! when it is whole and on the disk, and it is accepted only by a run that was asked for the same. Data
//! order and learning rate are functions of the step, so there is no further state to keep.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::ops::with_values;
use super::optimizer::AdamW;
use crate::atomic;

/// Name of the file inside a run's folder.
pub const FILE: &str = "checkpoint.safetensors";

/// Key of [`Header`] in the file's metadata.
const HEADER_KEY: &str = "edgec.checkpoint";

/// Longest header that is read, in bytes; a model of 512 layers needs about 4 MB.
const MAX_HEADER: u64 = 1 << 25;

/// What a run was asked to do, by the name of the setting; any difference forbids a resume.
pub type Recipe = BTreeMap<String, String>;

/// Where a run was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of this layout.
    pub version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Windows of the data consumed.
    pub position: u64,
    /// Threads of the pool; with another number sums may round differently.
    pub threads: usize,
    /// Processes of the run; the same holds for them.
    #[serde(default = "one")]
    pub processes: usize,
    /// SHA-256 of `recipe`, hexadecimal.
    pub recipe_hash: String,
    /// What the run was asked to do.
    pub recipe: Recipe,
}

impl Header {
    /// Version that is written and the only one that is read.
    pub const VERSION: u32 = 1;

    /// The header of a run of `processes` that stands after `step` steps and `position` windows.
    pub fn new(step: u64, position: u64, processes: usize, recipe: Recipe) -> Self {
        let recipe_hash = recipe_hash(&recipe);
        Self {
            version: Self::VERSION,
            step,
            position,
            threads: rayon::current_num_threads(),
            processes,
            recipe_hash,
            recipe,
        }
    }
}

/// What headers from before there were several mean.
fn one() -> usize {
    1
}

/// SHA-256 of a recipe, hexadecimal.
pub fn recipe_hash(recipe: &Recipe) -> String {
    let mut hash = Sha256::new();
    for (name, value) in recipe {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update((value.len() as u64).to_le_bytes());
        hash.update(value);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why a checkpoint could not be written or resumed from.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error("checkpoint {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it answered.
        source: io::Error,
    },
    /// The file is not a checkpoint, or not a whole one.
    #[error("checkpoint {}: {found}, expected {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What belongs there.
        expected: String,
    },
    /// The checkpoint belongs to a run that was asked for something else.
    #[error("checkpoint {} belongs to another run: {differences}", path.display())]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// Each setting that differs, with both values.
        differences: String,
    },
}

/// Writes the state of a run into `folder`, replacing the checkpoint before it.
///
/// # Errors
/// The disk is full or the folder cannot be written; the earlier checkpoint is then still there.
pub fn save(folder: &Path, header: &Header, optimizer: &AdamW) -> Result<(), CheckpointError> {
    let path = folder.join(FILE);
    let write = || -> io::Result<()> {
        let text = layout(optimizer, Some(header))?;
        atomic::write(&path, |file| {
            file.write_all(&(text.len() as u64).to_le_bytes())?;
            file.write_all(text.as_bytes())?;
            for (parameter, moments) in optimizer.parameters().iter().zip(optimizer.moments()) {
                with_values(&parameter.var, |values| Ok(write_f32(file, values)))
                    .map_err(io::Error::other)??;
                write_f32(file, &moments.first)?;
                write_f32(file, &moments.second)?;
            }
            Ok(())
        })
    };
    write().map_err(|source| CheckpointError::Io { path: path.clone(), source })
}

/// The header of the checkpoint in `folder`, or `None` if there is no such file.
///
/// # Errors
/// The file cannot be read or is not a checkpoint.
pub fn peek(folder: &Path) -> Result<Option<Header>, CheckpointError> {
    let path = folder.join(FILE);
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CheckpointError::Io { path, source }),
        Ok(file) => Ok(Some(Opened::new(path, file)?.header)),
    }
}

/// Puts the state in `folder` into the optimizer and its parameters; `None` if there is no checkpoint.
///
/// # Errors
/// The file is damaged, or was made by a run whose recipe is not `recipe`. Nothing is changed then,
/// unless the file cannot be read to its end.
pub fn load(
    folder: &Path,
    recipe: &Recipe,
    optimizer: &mut AdamW,
) -> Result<Option<Header>, CheckpointError> {
    let path = folder.join(FILE);
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(CheckpointError::Io { path, source }),
        Ok(file) => file,
    };
    let Opened { mut reader, header, tensors } = Opened::new(path.clone(), file)?;
    let differences = differences(&header.recipe, recipe);
    if !differences.is_empty() {
        return Err(CheckpointError::OtherRun { path, differences });
    }
    let io = |source| CheckpointError::Io { path: path.clone(), source };
    let expected: Map<String, Value> =
        serde_json::from_str(&layout(optimizer, None).map_err(io)?).map_err(|e| io(e.into()))?;
    if let Some((name, expected)) = expected.iter().find(|(name, entry)| tensors.get(*name) != Some(entry)) {
        let found = tensors.get(name).map_or("no such tensor".to_owned(), Value::to_string);
        return Err(CheckpointError::Malformed {
            path,
            found: format!("tensor `{name}`: {found}"),
            expected: expected.to_string(),
        });
    }
    let mut read = || -> io::Result<()> {
        for index in 0..optimizer.parameters().len() {
            let var = optimizer.parameters()[index].var.clone();
            let mut values = vec![0f32; var.elem_count()];
            read_f32(&mut reader, &mut values)?;
            let stored = Tensor::from_vec(values, var.shape(), &Device::Cpu).map_err(io::Error::other)?;
            var.set(&stored).map_err(io::Error::other)?;
            let moments = &mut optimizer.moments_mut()[index];
            read_f32(&mut reader, &mut moments.first)?;
            read_f32(&mut reader, &mut moments.second)?;
        }
        Ok(())
    };
    read().map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
    optimizer.set_steps(header.step);
    Ok(Some(header))
}

/// Removes the checkpoint of an earlier run and what a killed process left half-written beside it.
///
/// # Errors
/// The file system refuses; a file that is not there is no error.
pub fn discard(folder: &Path) -> Result<(), CheckpointError> {
    let path = folder.join(FILE);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(CheckpointError::Io { path, source }),
        _ => Ok(()),
    }
}

/// An open checkpoint whose header was read and whose length is right.
struct Opened {
    reader: BufReader<File>,
    header: Header,
    tensors: Map<String, Value>,
}

impl Opened {
    fn new(path: PathBuf, file: File) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io { path: path.clone(), source };
        let malformed = |found: String, expected: &str| CheckpointError::Malformed {
            path: path.clone(),
            found,
            expected: expected.into(),
        };
        let length = file.metadata().map_err(io)?.len();
        let mut reader = BufReader::with_capacity(1 << 20, file);
        if length < 8 {
            return Err(malformed(format!("{length} bytes"), "a whole checkpoint"));
        }
        let mut prefix = [0u8; 8];
        reader.read_exact(&mut prefix).map_err(io)?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > MAX_HEADER || header_length > length - 8 {
            return Err(malformed(format!("a header of {header_length} bytes"), "one inside the file"));
        }
        let mut text = vec![0u8; header_length as usize];
        reader.read_exact(&mut text).map_err(io)?;
        let mut tensors: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|error| malformed(error.to_string(), "a safetensors header"))?;
        let header = tensors
            .remove("__metadata__")
            .and_then(|metadata| metadata.get(HEADER_KEY)?.as_str().map(str::to_owned))
            .ok_or_else(|| malformed(format!("no metadata `{HEADER_KEY}`"), "a checkpoint"))?;
        let header: Header = serde_json::from_str(&header)
            .map_err(|error| malformed(error.to_string(), "a checkpoint's header"))?;
        if header.version != Header::VERSION {
            return Err(malformed(format!("version {}", header.version), "version 1"));
        }
        let end = tensors.values().filter_map(|entry| entry["data_offsets"][1].as_u64()).max().unwrap_or(0);
        let expected = end.saturating_add(8 + header_length);
        if length != expected {
            return Err(malformed(
                format!("{length} bytes"),
                &format!("{expected} (the file is cut short?)"),
            ));
        }
        Ok(Self { reader, header, tensors })
    }
}

/// The safetensors header for the optimizer's state, padded to a multiple of 8 bytes.
fn layout(optimizer: &AdamW, header: Option<&Header>) -> io::Result<String> {
    let mut entries = Map::new();
    if let Some(header) = header {
        entries.insert("__metadata__".into(), json!({ HEADER_KEY: serde_json::to_string(header)? }));
    }
    let mut offset = 0;
    for parameter in optimizer.parameters() {
        let bytes = parameter.var.elem_count() * size_of::<f32>();
        for suffix in ["", ".exp_avg", ".exp_avg_sq"] {
            let entry = json!({
                "dtype": "F32", "shape": parameter.var.dims(), "data_offsets": [offset, offset + bytes]
            });
            entries.insert(format!("{}{suffix}", parameter.name), entry);
            offset += bytes;
        }
    }
    let mut text = serde_json::to_string(&entries)?;
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    Ok(text)
}

/// Each setting in which two recipes differ, in words; empty if they are the same.
pub(super) fn differences(stored: &Recipe, asked: &Recipe) -> String {
    let names: std::collections::BTreeSet<&String> = stored.keys().chain(asked.keys()).collect();
    let differing: Vec<String> = names
        .into_iter()
        .filter(|name| stored.get(*name) != asked.get(*name))
        .map(|name| {
            let shown = |recipe: &Recipe| recipe.get(name).cloned().unwrap_or("absent".into());
            format!("{name} was {}, now {}", shown(stored), shown(asked))
        })
        .collect();
    differing.join("; ")
}

fn write_f32(file: &mut dyn Write, values: &[f32]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(1 << 16);
    for chunk in values.chunks(1 << 14) {
        bytes.clear();
        bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
        file.write_all(&bytes)?;
    }
    Ok(())
}

fn read_f32(file: &mut impl Read, values: &mut [f32]) -> io::Result<()> {
    let mut bytes = [0u8; 1 << 14];
    for chunk in values.chunks_mut(1 << 12) {
        let bytes = &mut bytes[..chunk.len() * 4];
        file.read_exact(bytes)?;
        for (value, bytes) in chunk.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::optimizer::{AdamWConfig, Parameter};
    use super::*;
    use candle_core::Var;

    fn optimizer(fill: f32) -> AdamW {
        let parameter = |name: &str, shape: &[usize]| Parameter {
            name: name.into(),
            var: Var::from_tensor(&Tensor::full(fill, shape, &Device::Cpu).unwrap()).unwrap(),
            decay: true,
        };
        let config = AdamWConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1 };
        let mut optimizer = AdamW::new(vec![parameter("a", &[3, 5]), parameter("b", &[7])], config);
        for (i, moments) in optimizer.moments_mut().iter_mut().enumerate() {
            moments.first.fill(fill + i as f32);
            moments.second.fill(fill * 2.0 + i as f32);
        }
        optimizer.set_steps(fill as u64);
        optimizer
    }

    fn recipe(lr: &str) -> Recipe {
        Recipe::from([("lr".into(), lr.into()), ("seed".into(), "1".into())])
    }

    #[test]
    fn comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let saved = optimizer(4.0);
        let header = Header::new(4, 32, 1, recipe("1e-3"));
        save(folder.path(), &header, &saved).unwrap();
        let mut restored = optimizer(0.0);
        assert_eq!(load(folder.path(), &recipe("1e-3"), &mut restored).unwrap(), Some(header));
        assert_eq!(restored.steps(), 4);
        for (a, b) in saved.moments().iter().zip(restored.moments()) {
            assert_eq!((&a.first, &a.second), (&b.first, &b.second));
        }
        for (a, b) in saved.parameters().iter().zip(restored.parameters()) {
            let flat = |p: &Parameter| p.var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(flat(a), flat(b));
        }
        // Other tools read it too.
        let bytes = fs::read(folder.path().join(FILE)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("a.exp_avg").unwrap().shape(), [3, 5]);
        discard(folder.path()).unwrap();
        discard(folder.path()).unwrap();
        assert_eq!(peek(folder.path()).unwrap(), None);
    }

    #[test]
    fn another_run_is_told_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &Header::new(4, 32, 1, recipe("1e-3")), &optimizer(4.0)).unwrap();
        let error = load(folder.path(), &recipe("2e-3"), &mut optimizer(0.0)).unwrap_err().to_string();
        assert!(error.contains("lr was 1e-3, now 2e-3") && !error.contains("seed"), "{error}");
    }

    #[test]
    fn every_truncation_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        save(folder.path(), &Header::new(4, 32, 1, recipe("1e-3")), &optimizer(4.0)).unwrap();
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let error = load(folder.path(), &recipe("1e-3"), &mut optimizer(0.0)).unwrap_err();
            assert!(matches!(error, CheckpointError::Malformed { .. }), "{length}: {error}");
        }
        fs::write(&path, [whole.as_slice(), &[0]].concat()).unwrap();
        assert!(load(folder.path(), &recipe("1e-3"), &mut optimizer(0.0)).is_err());
    }

    #[test]
    fn a_tensor_of_another_shape_is_named() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), &Header::new(4, 32, 1, recipe("1e-3")), &optimizer(4.0)).unwrap();
        let config = AdamWConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1 };
        let var = Var::from_tensor(&Tensor::full(0f32, &[5, 3], &Device::Cpu).unwrap()).unwrap();
        let mut other = AdamW::new(vec![Parameter { name: "a".into(), var, decay: true }], config);
        let error = load(folder.path(), &recipe("1e-3"), &mut other).unwrap_err().to_string();
        assert!(error.contains("tensor `a`") && error.contains("[5,3]"), "{error}");
    }
}
