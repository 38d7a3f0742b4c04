//! The folder of a run: who may write into it, and how the documents in it appear.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::Error;
use crate::atomic;

const RECIPE: &str = "recipe.json";

/// Takes a folder: a new run writes down its recipe, a resumed one must find the same.
///
/// # Errors
/// The folder is in use; there is nothing to resume, or a run that was asked for something else.
pub(super) fn open<R: Serialize + DeserializeOwned>(
    folder: &Path,
    resume: bool,
    recipe: &R,
) -> Result<(), Error> {
    let path = folder.join(RECIPE);
    if resume {
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let missing = "recipe.json is missing";
                return Err(Error::NothingToResume { path: folder.into(), missing });
            }
            Err(source) => return Err(Error::Io { path, source }),
        };
        let found: R = serde_json::from_slice(&text)
            .map_err(|error| Error::Damaged { path: path.clone(), message: error.to_string() })?;
        return match difference(&found, recipe) {
            None => atomic::tidy(folder).map_err(|source| Error::Io { path: folder.into(), source }),
            Some(difference) => Err(Error::OtherRecipe { path: folder.into(), difference }),
        };
    }
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::FolderInUse { path: folder.into() });
    }
    fs::create_dir_all(folder).map_err(|source| Error::Io { path: folder.into(), source })?;
    write_json(folder, RECIPE, recipe)
}

/// Leaves a folder as it was before [`open`]; `made` says that it was not there.
pub(super) fn abandon(folder: &Path, made: bool) {
    // This follows an error that is reported; whatever is left, the next run names.
    drop(fs::remove_file(folder.join(RECIPE)));
    if made {
        drop(fs::remove_dir(folder));
    }
}

/// Writes a document into a folder, whole or not at all.
///
/// # Errors
/// The file system's refusal.
pub(super) fn write_json(folder: &Path, name: &str, value: &impl Serialize) -> Result<(), Error> {
    let path = folder.join(name);
    atomic::write(&path, |file| {
        serde_json::to_writer_pretty(&mut *file, value)?;
        file.write_all(b"\n")
    })
    .map_err(|source| Error::Io { path, source })
}

/// In what two recipes differ, in words; `None` if in nothing.
pub(super) fn difference<R: Serialize>(found: &R, asked: &R) -> Option<String> {
    // What is inside a part of a recipe is named by itself.
    let fields = |recipe: &R| {
        let mut flat = Map::new();
        if let Ok(Value::Object(fields)) = serde_json::to_value(recipe) {
            for (key, value) in fields {
                match value {
                    Value::Object(inner) if ["train", "adapter"].contains(&key.as_str()) => {
                        flat.extend(inner)
                    }
                    value => drop(flat.insert(key, value)),
                }
            }
        }
        flat
    };
    let (found, asked) = (fields(found), fields(asked));
    let differing: Vec<String> = found
        .iter()
        .filter(|(key, value)| asked.get(*key) != Some(value))
        .map(|(key, value)| format!("{key} was {value}, now {}", asked.get(key).unwrap_or(&Value::Null)))
        .collect();
    (!differing.is_empty()).then(|| differing.join("; "))
}
