//! What a teacher says about a text, kept in one file so that the teacher need not be there while its student
//! trains.
//!
//! The file is a header, which says for which teacher, text and settings it was made, and windows of the text
//! in the order in which they were computed, each with its place and a checksum. A window is written in one
//! piece; what a killed process left of its last one is cut off and computed again. Anything else that is not
//! right is refused. Windows are found by their place in the text, so the order of training does not matter.

mod fill;
mod record;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::loss::{IGNORE, SparseRow, SparseTargets, Sparsity};
use record::Layout;

pub use fill::fill;

/// Name of the file inside a run's folder.
pub const FILE: &str = "teacher.cache";

/// Begins the file.
const MAGIC: [u8; 8] = *b"EDGECTCH";

/// Version that is written and the only one that is read.
const VERSION: u32 = 1;

/// Bytes of a checksum: the first ones of a SHA-256.
const CHECK: usize = 16;

/// Bytes of a hash, as hexadecimal digits.
const HASH: usize = 64;

/// Bytes of the header: magic, version, form, tokens, vocabulary, window, temperature, seed, two hashes, checksum.
const HEADER: usize = 8 + 5 * 4 + 2 * 8 + 2 * HASH + CHECK;

/// Bytes before and after the positions of a window: its place, its checksum.
const AROUND: usize = 8 + CHECK;

/// Why a cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("teacher cache {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it answered.
        source: io::Error,
    },
    /// The file is no cache, or a damaged one.
    #[error("teacher cache {}: {place} is {found}, expected {expected} (delete the file to make it anew)", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        place: String,
        /// What is there.
        found: String,
        /// What belongs there.
        expected: String,
    },
    /// The cache was made for something else.
    #[error("teacher cache {} was made for another run: {differences}", path.display())]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// What differs.
        differences: String,
    },
}

/// What a cache was made for.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// What is kept of each position.
    pub sparsity: Sparsity,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Tokens of a window.
    pub length: usize,
    /// Temperature of the distributions.
    pub temperature: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// SHA-256 of the teacher, hexadecimal.
    pub teacher: String,
    /// SHA-256 of the text and of what of it is scored, hexadecimal.
    pub text: String,
}

impl Key {
    fn header(&self) -> Vec<u8> {
        let form = match self.sparsity {
            Sparsity::TopK(_) => 1,
            Sparsity::Sampled(_) => 2,
        };
        let mut bytes = MAGIC.to_vec();
        for number in [VERSION, form, self.sparsity.tokens() as u32, self.vocab as u32, self.length as u32] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.temperature.to_le_bytes());
        bytes.extend_from_slice(&self.seed.to_le_bytes());
        for hash in [&self.teacher, &self.text] {
            debug_assert_eq!(hash.len(), HASH);
            bytes.extend_from_slice(hash.as_bytes());
        }
        let check = checksum(&[&bytes]);
        bytes.extend_from_slice(&check);
        bytes
    }

    /// The key of a header whose checksum is right.
    fn read(bytes: &[u8; HEADER]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let long = |at: usize| std::array::from_fn(|i| bytes[at + i]);
        let text = |at: usize| Some(std::str::from_utf8(&bytes[at..at + HASH]).ok()?.to_owned());
        let tokens = word(16) as usize;
        Some(Self {
            sparsity: match word(12) {
                1 => Sparsity::TopK(tokens),
                2 => Sparsity::Sampled(tokens),
                _ => return None,
            },
            vocab: word(20) as usize,
            length: word(24) as usize,
            temperature: f64::from_le_bytes(long(28)),
            seed: u64::from_le_bytes(long(36)),
            teacher: text(44)?,
            text: text(44 + HASH)?,
        })
    }

    /// In what the key of a file differs from this one, in words.
    fn differences(&self, found: &Self) -> String {
        let named = |key: &Self| {
            let values: [(&str, String); 7] = [
                ("form", key.sparsity.to_string()),
                ("vocabulary", key.vocab.to_string()),
                ("length", key.length.to_string()),
                ("temperature", key.temperature.to_string()),
                ("seed", key.seed.to_string()),
                ("teacher", key.teacher.clone()),
                ("text", key.text.clone()),
            ];
            values
        };
        let differing = named(found).into_iter().zip(named(self)).filter(|((_, was), (_, now))| was != now);
        let words = differing.map(|((name, was), (_, now))| format!("{name} was {was}, now {now}"));
        words.collect::<Vec<_>>().join("; ")
    }
}

/// An open cache.
#[derive(Debug)]
pub struct Cache {
    path: PathBuf,
    file: File,
    key: Key,
    layout: Layout,
    /// Checksum of the header, which every other one begins with.
    header: [u8; CHECK],
    /// Number in the file of the window that begins at a token.
    windows: BTreeMap<u64, u64>,
}

impl Cache {
    /// Opens the cache in `path`, or begins one. Every window in it is checked.
    ///
    /// # Errors
    /// See [`CacheError`]; a file that is refused is left as it is.
    pub fn open(path: &Path, key: Key) -> Result<Self, CacheError> {
        let io = |source| CacheError::Io { path: path.into(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        let header = key.header();
        let length = file.metadata().map_err(io)?.len();
        // What a process left that was killed before it had written the header is none yet.
        let mut begun = vec![0; (length as usize).min(HEADER)];
        file.read_exact(&mut begun).map_err(io)?;
        let fresh = begun.len() < HEADER && header.starts_with(&begun);
        if fresh {
            file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&header)).map_err(io)?;
        }
        let layout = Layout::new(key.sparsity, key.vocab);
        let check = std::array::from_fn(|i| header[HEADER - CHECK + i]);
        let mut cache =
            Self { path: path.into(), file, key, layout, header: check, windows: BTreeMap::new() };
        if !fresh {
            cache.check_header(&begun)?;
        }
        cache.scan()?;
        Ok(cache)
    }

    /// What it was made for.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Whether the window that begins at token `start` is there.
    pub fn has(&self, start: u64) -> bool {
        self.windows.contains_key(&start)
    }

    /// Windows in it.
    pub fn windows(&self) -> usize {
        self.windows.len()
    }

    fn io(&self, source: io::Error) -> CacheError {
        CacheError::Io { path: self.path.clone(), source }
    }

    fn malformed(&self, place: String, found: String, expected: &str) -> CacheError {
        CacheError::Malformed { path: self.path.clone(), place, found, expected: expected.into() }
    }

    /// Bytes of a window in the file.
    fn window_bytes(&self) -> usize {
        self.key.length * self.layout.bytes() + AROUND
    }

    fn check_header(&self, begun: &[u8]) -> Result<(), CacheError> {
        let place = || "the header".to_owned();
        let Ok(bytes) = <&[u8; HEADER]>::try_from(begun) else {
            return Err(self.malformed(
                place(),
                format!("{} bytes", begun.len()),
                &format!("{HEADER} bytes"),
            ));
        };
        if bytes[..8] != MAGIC {
            let found = bytes[..8].escape_ascii().to_string();
            return Err(self.malformed("the magic".into(), found, &MAGIC.escape_ascii().to_string()));
        }
        let version = u32::from_le_bytes(std::array::from_fn(|i| bytes[8 + i]));
        if version != VERSION {
            return Err(self.malformed("the version".into(), version.to_string(), &VERSION.to_string()));
        }
        let right = checksum(&[&bytes[..HEADER - CHECK]]) == bytes[HEADER - CHECK..];
        let Some(found) = Key::read(bytes).filter(|_| right) else {
            return Err(self.malformed(place(), "damaged".into(), "one with its checksum"));
        };
        let differences = self.key.differences(&found);
        if differences.is_empty() {
            return Ok(());
        }
        Err(CacheError::OtherRun { path: self.path.clone(), differences })
    }

    /// Finds and checks the windows, and cuts off what a killed process left.
    fn scan(&mut self) -> Result<(), CacheError> {
        let length = self.file.metadata().map_err(|source| self.io(source))?.len();
        let size = self.window_bytes();
        let whole = (length - HEADER as u64) / size as u64;
        let mut reader = BufReader::with_capacity(size.max(1 << 16), &self.file);
        reader.seek(SeekFrom::Start(HEADER as u64)).map_err(|source| self.io(source))?;
        let mut windows = BTreeMap::new();
        let mut bytes = vec![0; size];
        for number in 0..whole {
            reader.read_exact(&mut bytes).map_err(|source| self.io(source))?;
            let start = self.checked(&bytes, number)?;
            if windows.insert(start, number).is_some() {
                let found = format!("token {start} again");
                return Err(self.malformed(format!("window {number}"), found, "each token once"));
            }
        }
        drop(reader);
        self.windows = windows;
        let end = HEADER as u64 + whole * size as u64;
        self.file.set_len(end).map_err(|source| self.io(source))
    }

    /// Where the window begins, if its checksum is right.
    fn checked(&self, bytes: &[u8], number: u64) -> Result<u64, CacheError> {
        let (body, check) = bytes.split_at(bytes.len() - CHECK);
        if checksum(&[&self.header, body]) != check {
            let place = format!("window {number}");
            return Err(self.malformed(place, "damaged".into(), "one with its checksum"));
        }
        Ok(u64::from_le_bytes(std::array::from_fn(|i| body[i])))
    }

    /// Adds the window that begins at token `start`; rows that are not scored may be empty.
    ///
    /// # Errors
    /// The disk is full; what was written of the window is cut off by the next [`Cache::open`].
    pub fn append(&mut self, start: u64, rows: &[SparseRow]) -> Result<(), CacheError> {
        let number = self.windows.len() as u64;
        let mut bytes = start.to_le_bytes().to_vec();
        for row in rows {
            if row.ids.is_empty() {
                bytes.resize(bytes.len() + self.layout.bytes(), 0);
            } else {
                bytes.extend_from_slice(&self.layout.encode(row));
            }
        }
        let check = checksum(&[&self.header, &bytes]);
        bytes.extend_from_slice(&check);
        let at = HEADER as u64 + number * self.window_bytes() as u64;
        (&self.file)
            .seek(SeekFrom::Start(at))
            .and_then(|_| (&self.file).write_all(&bytes))
            .map_err(|source| self.io(source))?;
        self.windows.insert(start, number);
        Ok(())
    }

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// The disk is full.
    pub fn sync(&self) -> Result<(), CacheError> {
        self.file.sync_data().map_err(|source| self.io(source))
    }

    /// Targets for the windows that begin at `starts`; `targets` are the next tokens of all of them, rows
    /// without one stay empty.
    ///
    /// # Errors
    /// A window is missing or damaged.
    pub fn read(&self, starts: &[usize], targets: &[u32]) -> Result<SparseTargets, CacheError> {
        let mut rows = Vec::with_capacity(targets.len());
        let mut bytes = vec![0; self.window_bytes()];
        for (start, targets) in starts.iter().zip(targets.chunks(self.key.length)) {
            let Some(&number) = self.windows.get(&(*start as u64)) else {
                let place = format!("the window of token {start}");
                return Err(self.malformed(place, "missing".into(), "one of all windows of the run"));
            };
            (&self.file)
                .seek(SeekFrom::Start(HEADER as u64 + number * bytes.len() as u64))
                .and_then(|_| (&self.file).read_exact(&mut bytes))
                .map_err(|source| self.io(source))?;
            self.checked(&bytes, number)?;
            let positions = bytes[8..].chunks_exact(self.layout.bytes());
            for (index, (position, target)) in positions.zip(targets).enumerate() {
                if *target == IGNORE {
                    rows.push(SparseRow::default());
                    continue;
                }
                let row = self.layout.decode(position).ok_or_else(|| {
                    let place = format!("position {index} of window {number}");
                    self.malformed(place, "no distribution".into(), &self.key.sparsity.to_string())
                })?;
                rows.push(row);
            }
        }
        Ok(SparseTargets { sparsity: self.key.sparsity, rows })
    }
}

fn checksum(parts: &[&[u8]]) -> [u8; CHECK] {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    let hash = hash.finalize();
    std::array::from_fn(|i| hash[i])
}
