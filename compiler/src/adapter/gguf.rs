//! An adapter as a GGUF LoRA, as the runtime and llama.cpp have it: out, and in for merging.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use edge_models::{DecoderSpec, NameBuf, TensorRow};
use edge_runtime::format::{DType, Gguf, TensorInfo, Value};
use edge_runtime::kernels::dequantize_row;
use edge_runtime::session::ADAPTER_BASE;

use super::{Adapter, AdapterError, Pair, linear};
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
    let order = order(pair.row, spec);
    order.iter().flat_map(|from| &pair.up[from * pair.rank..][..pair.rank]).copied().collect()
}

/// For each row of a matrix in GGUF, which row in Hugging Face's order it is.
fn order(row: &TensorRow, spec: &DecoderSpec) -> Vec<usize> {
    let mut order = Vec::new();
    let mut before = 0;
    for role in row.members() {
        let rows = role.shape(spec)[0];
        let heads = role.permuted_heads(spec);
        let source = |row| heads.map_or(row, |heads| source_row(row, rows / heads));
        order.extend((0..rows).map(|row| before + source(row)));
        before += rows;
    }
    order
}

/// Reads a GGUF LoRA for models with `spec`.
///
/// # Errors
/// A file that is no LoRA for this family, a tensor that is surplus, misshapen, without its other half or not
/// finite.
pub(super) fn read(path: &Path, spec: &DecoderSpec) -> Result<Adapter, AdapterError> {
    let bytes = std::fs::read(path).map_err(|source| AdapterError::Io { path: path.into(), source })?;
    let refuse = |message| AdapterError::File { path: path.into(), message };
    let file = Gguf::parse(&bytes).map_err(|error| refuse(error.to_string()))?;
    let infos = file.tensors().map(|info| (info.name, info)).collect();
    let reader = Reader { file: &file, infos, path };
    reader.require("general.type", "adapter")?;
    reader.require("adapter.type", "lora")?;
    reader.require("general.architecture", spec.family.gguf_architecture)?;
    let alpha = file.get("adapter.lora.alpha").and_then(|value| value.as_float());
    let Some(alpha) = alpha.filter(|alpha| alpha.is_finite()) else {
        return Err(refuse("`adapter.lora.alpha` is missing, expected a finite number".into()));
    };
    let mut pairs = Vec::new();
    for (row, layer) in linear(spec) {
        pairs.extend(reader.pair(row, layer, alpha, spec)?);
    }
    let halves = |pair: &Pair| {
        let matrix = NameBuf::new(pair.row.gguf, pair.layer);
        ["lora_a", "lora_b"].map(|half| format!("{}.{half}", matrix.as_str()))
    };
    let known: HashSet<String> = pairs.iter().flat_map(halves).collect();
    match file.tensors().find(|info| !known.contains(info.name)) {
        Some(info) => {
            Err(reader
                .tensor(info.name, format!("no linear layer of this {} model takes it", spec.family.name)))
        }
        None if pairs.is_empty() => Err(refuse("the adapter has no tensors".into())),
        None => Ok(Adapter { path: path.into(), pairs, rs: false }),
    }
}

struct Reader<'f> {
    file: &'f Gguf<'f>,
    infos: HashMap<&'f str, TensorInfo<'f>>,
    path: &'f Path,
}

impl Reader<'_> {
    fn tensor(&self, name: &str, message: String) -> AdapterError {
        AdapterError::Tensor { path: self.path.into(), name: name.into(), message }
    }

    fn require(&self, key: &'static str, expected: &'static str) -> Result<(), AdapterError> {
        let found = self.file.get(key);
        let text = found.as_ref().and_then(Value::as_str);
        if text == Some(expected) {
            return Ok(());
        }
        let found = text.map_or("absent or no text".to_owned(), |text| format!("`{text}`"));
        Err(AdapterError::Key { path: self.path.into(), key: key.into(), found, expected })
    }

    /// The pair of a matrix, if the file has it.
    fn pair(
        &self,
        row: &'static TensorRow,
        layer: usize,
        alpha: f64,
        spec: &DecoderSpec,
    ) -> Result<Option<Pair>, AdapterError> {
        let matrix = NameBuf::new(row.gguf, layer);
        let [a, b] = ["lora_a", "lora_b"].map(|half| format!("{}.{half}", matrix.as_str()));
        let (down, up) = match (self.infos.get(&*a), self.infos.get(&*b)) {
            (None, None) => return Ok(None),
            (Some(down), Some(up)) => (down, up),
            (Some(_), None) => return Err(self.tensor(&a, format!("its other half `{b}` is missing"))),
            (None, Some(_)) => return Err(self.tensor(&b, format!("its other half `{a}` is missing"))),
        };
        let [rows, cols] = row.file_shape(spec);
        let rank = up.cols();
        let down = self.values(down, [rank, cols])?;
        let stored = self.values(up, [rows, rank])?;
        let mut up = vec![0.0; stored.len()];
        for (values, to) in stored.chunks_exact(rank).zip(order(row, spec)) {
            up[to * rank..][..rank].copy_from_slice(values);
        }
        let scale = (alpha / rank as f64) as f32;
        Ok(Some(Pair { row, layer, rank, down, up, scale, magnitude: None }))
    }

    /// The values of a tensor of a known shape.
    fn values(&self, info: &TensorInfo<'_>, [rows, cols]: [usize; 2]) -> Result<Vec<f32>, AdapterError> {
        let found = [info.rows(), info.cols()];
        if found != [rows, cols] || rows == 0 || cols == 0 {
            return Err(
                self.tensor(info.name, format!("its shape is {found:?}, expected {:?}", [rows, cols]))
            );
        }
        let Some(dtype) = info.dtype else {
            return Err(self.tensor(info.name, format!("its type is #{}, which is not read", info.type_id)));
        };
        let mut values = vec![0.0; rows * cols];
        for (bytes, out) in info.data.chunks_exact(info.data.len() / rows).zip(values.chunks_exact_mut(cols))
        {
            dequantize_row(dtype, bytes, out).map_err(|error| self.tensor(info.name, error.to_string()))?;
        }
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => {
                let message =
                    format!("it holds {} at element {index}, expected finite numbers", values[index]);
                Err(self.tensor(info.name, message))
            }
        }
    }
}
