//! `chat.json`: the model's chat template for devices, which have no template engine.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::{BundleError, write};
use crate::profile::ModelFile;
use crate::text::{ChatTemplate, HostTokenizer};

/// Name of the file, beside the model.
pub const CHAT_FILE: &str = "chat.json";

/// Writes the pieces of `model`'s chat template ([`edge_run::ChatPieces`]) into `folder` and says so, or why
/// there is no such file: then one that an earlier model left is removed.
///
/// # Errors
/// The folder cannot be written.
pub fn write_chat(model: &ModelFile, folder: &Path) -> Result<String, BundleError> {
    let path = folder.join(CHAT_FILE);
    let missing = match HostTokenizer::of(model).map(|tokenizer| ChatTemplate::of(&tokenizer)) {
        Err(error) => error.to_string(),
        Ok(None) => "the model has no chat template".to_owned(),
        Ok(Some(template)) => match template.pieces() {
            Err(error) => error.to_string(),
            Ok(pieces) => {
                let io = |source| BundleError::Io { path: path.clone(), source };
                let text = serde_json::to_string_pretty(&pieces).map_err(|error| io(error.into()))? + "\n";
                write(&path, text.as_bytes())?;
                return Ok(format!("{CHAT_FILE}: the chat template as fixed texts"));
            }
        },
    };
    match fs::remove_file(&path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(BundleError::Io { path, source }),
        _ => Ok(format!("no {CHAT_FILE}: {missing}")),
    }
}
