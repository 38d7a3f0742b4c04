//! `manifest.json`: what went into a run, what came out, and how well it agrees.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::Recipe;
use crate::pack::hex;
use crate::profile::eval::Outcome;
use crate::report::Summary;

/// What a run's folder holds and where it came from.
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    /// Version of this tool.
    pub edgec: String,
    /// What was asked.
    pub recipe: Recipe,
    /// Hash of each input: name, SHA-256 in hexadecimal.
    pub inputs: Vec<(String, String)>,
    /// Layers of the teacher that the student kept; empty for a student given by the user.
    pub kept_layers: Vec<usize>,
    /// What came out.
    pub artifacts: Vec<Artifact>,
    /// The measurements of the report.
    pub summary: Summary,
}

/// One file of a run, and how far its predictions are from those of the trained weights.
#[derive(Clone, Debug, Serialize)]
pub struct Artifact {
    /// Path inside the run's folder.
    pub path: String,
    /// Bytes of the file, or of all files in the folder.
    pub bytes: u64,
    /// SHA-256 of the file in hexadecimal; of the weights for a model folder.
    pub sha256: String,
    /// The artifact against the trained weights in f32: `kl` is KL(trained || artifact).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parity: Option<Outcome>,
}

impl Artifact {
    /// The file `path` of the run in `folder`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn new(folder: &Path, path: &str, parity: Option<Outcome>) -> io::Result<Self> {
        let file = folder.join(path);
        Ok(Self { path: path.to_owned(), bytes: file.metadata()?.len(), sha256: sha256(&file)?, parity })
    }
}

/// SHA-256 of a file in hexadecimal.
///
/// # Errors
/// The file cannot be read.
pub fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}
