//! What was done of a pipeline of commands: which stages are in its folder, and for what they were asked.
//!
//! A stage has a key: what it was asked, what its files hold, and the key of the stage before it. So a stage that
//! would come out otherwise, and all that follow it, are known by their keys; nothing else is ever done again.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::stages::hash_model;
use super::{Error, folder};
use crate::pack::hex;

const LEDGER: &str = "pipeline.json";

/// What a stage was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Its name, which is that of its folder.
    pub name: String,
    /// SHA-256 of everything that it depends on, hexadecimal.
    pub key: String,
}

/// How far a stage is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its result is there.
    Done,
    /// It was begun: it can be taken up where it was.
    Begun,
    /// There is nothing of it.
    New,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    stage: Stage,
    done: bool,
}

/// The stages in a folder, as `pipeline.json` in it says.
#[derive(Debug)]
pub struct Ledger {
    folder: PathBuf,
    entries: Vec<Entry>,
}

impl Stage {
    /// The stage `name` with these arguments, whose `inputs` are files or model folders, after the stage `before`.
    ///
    /// # Errors
    /// An input that is there cannot be read.
    pub fn new(
        name: &str,
        arguments: &[impl AsRef<OsStr>],
        inputs: &[PathBuf],
        before: Option<&Self>,
    ) -> Result<Self, Error> {
        let mut hash = Sha256::new();
        let mut add = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        add(env!("CARGO_PKG_VERSION").as_bytes());
        add(before.map_or("", |before| &before.key).as_bytes());
        add(name.as_bytes());
        arguments.iter().for_each(|argument| add(argument.as_ref().as_encoded_bytes()));
        // What is not there is the command's to refuse.
        for input in inputs.iter().filter(|input| input.exists()) {
            hash_model(input)?.iter().for_each(|(_, digest)| add(digest.as_bytes()));
        }
        Ok(Self { name: name.to_owned(), key: hex(&hash.finalize()) })
    }
}

impl Ledger {
    /// Opens the ledger of `folder`, which must be new or empty, or hold one.
    ///
    /// # Errors
    /// The folder is in use by something else; the ledger cannot be read.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(LEDGER);
        let entries = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| Error::Damaged { path, message: error.to_string() })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
                    let missing = "pipeline.json is missing, and the folder is not empty";
                    return Err(Error::NothingToResume { path: folder.into(), missing });
                }
                Vec::new()
            }
            Err(source) => return Err(Error::Io { path, source }),
        };
        Ok(Self { folder: folder.into(), entries })
    }

    /// How far each of `stages` is.
    pub fn states(&self, stages: &[Stage]) -> Vec<State> {
        let mut same = true;
        let states = stages.iter().enumerate().map(|(index, stage)| {
            let entry = self.entries.get(index).filter(|entry| entry.stage == *stage);
            same &= entry.is_some();
            match entry {
                Some(entry) if same && entry.done => State::Done,
                Some(_) if same => State::Begun,
                _ => State::New,
            }
        });
        states.collect()
    }

    /// Removes what was asked otherwise: from the first stage that is none of `stages` on, results and entries.
    /// Answers the names of what went.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn forget_others(&mut self, stages: &[Stage]) -> Result<Vec<String>, Error> {
        let pairs = self.entries.iter().zip(stages);
        let kept = pairs.take_while(|(entry, stage)| entry.stage == **stage).count();
        let gone: Vec<String> = self.entries.drain(kept..).map(|entry| entry.stage.name).collect();
        if gone.is_empty() {
            return Ok(gone);
        }
        // Entries go first: a folder without one is no result.
        self.write()?;
        for name in &gone {
            self.clear(name)?;
        }
        Ok(gone)
    }

    /// Removes what is in a stage's folder.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn clear(&self, name: &str) -> Result<(), Error> {
        let path = self.folder.join(name);
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io { path, source }),
            _ => Ok(()),
        }
    }

    /// Writes down that a stage begins.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn begin(&mut self, stage: &Stage) -> Result<(), Error> {
        fs::create_dir_all(&self.folder).map_err(|source| Error::Io { path: self.folder.clone(), source })?;
        self.entries.push(Entry { stage: stage.clone(), done: false });
        self.write()
    }

    /// Writes down that the last stage that was begun is done.
    ///
    /// # Errors
    /// The file system's refusal.
    pub fn finish(&mut self) -> Result<(), Error> {
        if let Some(last) = self.entries.last_mut() {
            last.done = true;
        }
        self.write()
    }

    fn write(&self) -> Result<(), Error> {
        folder::write_json(&self.folder, LEDGER, &self.entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stages(texts: &[(&str, &str)]) -> Vec<Stage> {
        let mut stages: Vec<Stage> = Vec::new();
        for (name, argument) in texts {
            stages.push(Stage::new(name, &[argument], &[], stages.last()).unwrap());
        }
        stages
    }

    #[test]
    fn a_changed_stage_and_all_that_follow_are_new() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let asked = stages(&[("synth", "a"), ("tune", "b"), ("distill", "c")]);
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.states(&asked), [State::New; 3]);
        for (index, stage) in asked.iter().enumerate() {
            ledger.begin(stage).unwrap();
            fs::create_dir_all(path.join(&stage.name)).unwrap();
            if index < 2 {
                ledger.finish().unwrap();
            }
        }
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!(ledger.states(&asked), [State::Done, State::Done, State::Begun]);
        assert!(ledger.forget_others(&asked).unwrap().is_empty());
        let changed = stages(&[("synth", "a"), ("tune", "B"), ("distill", "c")]);
        assert_eq!(ledger.states(&changed), [State::Done, State::New, State::New]);
        assert_eq!(ledger.forget_others(&changed).unwrap(), ["tune", "distill"]);
        assert!(path.join("synth").exists() && !path.join("tune").exists() && !path.join("distill").exists());
        assert_eq!(Ledger::open(&path).unwrap().states(&asked), [State::Done, State::New, State::New]);
        // A stage that is left out is none of the others.
        let fewer = stages(&[("distill", "c")]);
        assert_eq!(ledger.states(&fewer), [State::New]);
    }

    #[test]
    fn what_files_hold_is_part_of_a_key() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.txt");
        fs::write(&file, "one").unwrap();
        let key = |inputs: &[PathBuf]| Stage::new("tune", &["x"], inputs, None).unwrap().key;
        let before = key(std::slice::from_ref(&file));
        assert_eq!(before, key(std::slice::from_ref(&file)));
        fs::write(&file, "two").unwrap();
        assert_ne!(before, key(std::slice::from_ref(&file)));
        assert_eq!(key(&[]), key(&[folder.path().join("missing")]));
        let error = Ledger::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("pipeline.json is missing"), "{error}");
        fs::write(folder.path().join(LEDGER), "[1]").unwrap();
        let error = Ledger::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("pipeline.json"), "{error}");
    }
}
