//! Which model file an adapter was made for: its SHA-256, which a GGUF LoRA and every pack can name.

use edge_runtime::session::ADAPTER_BASE;
use sha2::{Digest, Sha256};

use super::AdapterError;
use crate::pack::hex;
use crate::profile::ModelFile;

/// The SHA-256 of the GGUF file that `model` is, or that it was packed from; `None` for one that was laid out in
/// memory, which no other file has come from.
pub fn base_of(model: &ModelFile) -> Option<[u8; 32]> {
    if !model.path().is_file() {
        return None;
    }
    let packed_from = model.parse().ok()?.packed_from().copied();
    Some(packed_from.unwrap_or_else(|| Sha256::digest(model.bytes()).into()))
}

/// Refuses a GGUF LoRA that names another file than `model`. What names none, and what is no adapter at all, is left
/// to the runtime.
///
/// # Errors
/// [`AdapterError::Base`] with both hashes.
pub fn check_base(adapter: &ModelFile, model: &ModelFile) -> Result<(), AdapterError> {
    let Ok(file) = adapter.parse() else { return Ok(()) };
    let Some(made_for) = file.get(ADAPTER_BASE).and_then(|value| value.as_str()) else { return Ok(()) };
    match base_of(model).map(|hash| hex(&hash)) {
        Some(found) if !found.eq_ignore_ascii_case(made_for) => Err(AdapterError::Base {
            path: adapter.path().into(),
            made_for: made_for.into(),
            model: model.path().into(),
            found,
        }),
        _ => Ok(()),
    }
}
