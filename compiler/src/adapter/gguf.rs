//! An adapter as a GGUF LoRA, for the runtime and for llama.cpp.

use std::path::Path;

use edge_models::{DecoderSpec, NameBuf};
use edge_runtime::format::DType;
use edge_runtime::session::ADAPTER_BASE;

use super::{Adapter, AdapterError, Pair};
use crate::export::gguf::{GgufWriteError, GgufWriter, MetaValue, source_row};
use crate::pack::hex;

/// Writes `adapter` to `path`, whole or not at all; answers how many bytes the file has.
///
/// # Errors
/// [`AdapterError::Dora`]; the file system's refusal.
pub fn export(adapter: &Adapter, spec: &DecoderSpec, path: &Path) -> Result<u64, AdapterError> {
    Ok(assemble(adapter, spec)?.write_atomic(path)?)
}

/// As [`export`], for the file with the SHA-256 `base` alone: with another, or one packed from another, the adapter
/// is refused.
///
/// # Errors
/// As [`export`].
pub fn export_for(
    adapter: &Adapter,
    spec: &DecoderSpec,
    base: &[u8; 32],
    path: &Path,
) -> Result<u64, AdapterError> {
    let mut file = assemble(adapter, spec)?;
    file.meta(ADAPTER_BASE, &hex(base).as_str().into())?;
    Ok(file.write_atomic(path)?)
}

/// The bytes that [`export`] would write.
///
/// # Errors
/// [`AdapterError::Dora`].
pub fn export_to_vec(adapter: &Adapter, spec: &DecoderSpec) -> Result<Vec<u8>, AdapterError> {
    let path = adapter.path.display().to_string();
    Ok(assemble(adapter, spec)?.to_vec().map_err(|source| GgufWriteError::Io { path, source })?)
}

fn assemble(adapter: &Adapter, spec: &DecoderSpec) -> Result<GgufWriter<'static>, AdapterError> {
    if adapter.is_dora() {
        return Err(AdapterError::Dora { path: adapter.path.clone() });
    }
    // The format has one alpha for all pairs, and a scale of alpha / rank. Where a pair's scale is another
    // (rsLoRA at several ranks, patterns of alpha), its `B` makes up for it.
    let alpha = adapter.pairs.first().map_or(1.0, |pair| pair.scale * pair.rank as f32);
    let mut file = GgufWriter::new();
    let name = adapter.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    for (key, value) in [
        ("general.architecture", spec.family.gguf_architecture.into()),
        ("general.type", "adapter".into()),
        ("general.name", MetaValue::from(name.as_str())),
        ("adapter.type", "lora".into()),
        ("adapter.lora.alpha", MetaValue::F32(alpha)),
    ] {
        file.meta(key, &value)?;
    }
    for pair in &adapter.pairs {
        let [rows, cols] = pair.row.file_shape(spec).map(|n| n as u64);
        let (matrix, rank) = (NameBuf::new(pair.row.gguf, pair.layer), pair.rank as u64);
        let name = |half: &str| format!("{}.{half}", matrix.as_str());
        file.tensor(&name("lora_a"), &[cols, rank], DType::F32, bytes(&pair.down, 1.0))?;
        let folded = pair.scale / (alpha / pair.rank as f32);
        file.tensor(&name("lora_b"), &[rank, rows], DType::F32, bytes(&permuted(pair, spec), folded))?;
    }
    Ok(file)
}

fn bytes(values: &[f32], factor: f32) -> Vec<u8> {
    values.iter().flat_map(|value| (value * factor).to_le_bytes()).collect()
}

/// The rows of `B` in the order in which GGUF has those of the matrix.
fn permuted(pair: &Pair, spec: &DecoderSpec) -> Vec<f32> {
    let mut permuted = Vec::with_capacity(pair.up.len());
    let mut before = 0;
    for role in pair.row.members() {
        let rows = role.shape(spec)[0];
        for row in 0..rows {
            let from = role.permuted_heads(spec).map_or(row, |heads| source_row(row, rows / heads));
            permuted.extend_from_slice(&pair.up[(before + from) * pair.rank..][..pair.rank]);
        }
        before += rows;
    }
    permuted
}
