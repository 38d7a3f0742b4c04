//! A GGUF file as a model in memory.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use candle_core::{Device, Tensor};
use edge_models::{DecoderSpec, Family, NameBuf, Role, Rope, RopeScaling, TensorRow, family_by_gguf_name};
use edge_runtime::format::{DType, Gguf, GgufConfig, TensorInfo};
use edge_runtime::kernels::dequantize_row;
use rayon::prelude::*;

use super::{LoadError, check_finite};
use crate::model::{Model, Vocabulary, Weights};
use crate::pack::hex;
use crate::quantize::{Blocks, HeldModel, Mix, hold};

pub(super) fn load(path: &Path) -> Result<Model, LoadError> {
    with_file(path, |gguf| from_gguf(gguf, path))
}

/// As [`held_from_gguf`], of a file.
pub(super) fn held(path: &Path, mix: Mix) -> Result<HeldModel, LoadError> {
    with_file(path, |gguf| held_from_gguf(gguf, path, mix))
}

fn with_file<T>(path: &Path, read: impl FnOnce(&Gguf<'_>) -> Result<T, LoadError>) -> Result<T, LoadError> {
    let io = |source| LoadError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is read-only and private to this process, and every byte of it is checked by
    // `Gguf::parse` before it means anything. A file that is cut while it is mapped raises SIGBUS, as it
    // does for every tool that maps models.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    read(&Gguf::parse(&bytes).map_err(|source| LoadError::Gguf { path: path.into(), source })?)
}

/// The model in a checked GGUF file; `path` is what errors call it.
///
/// # Errors
/// A pack, an unknown family, a missing or misshapen tensor, or one of a type that is not read.
pub fn from_gguf(gguf: &Gguf<'_>, path: &Path) -> Result<Model, LoadError> {
    let spec = specification(gguf, path)?;
    let mut weights = weights(gguf, &spec, path)?;
    let spec = with_named_scaling(spec, &mut weights).map_err(tensor_error(path))?;
    let name = gguf.get("general.name").and_then(|value| value.as_str()).filter(|name| !name.is_empty());
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Model {
        spec,
        weights,
        vocabulary: Vocabulary::from_gguf(gguf),
        name: name.map_or(stem, str::to_owned),
    })
}

/// The hyper-parameters in a checked file.
fn specification(gguf: &Gguf<'_>, path: &Path) -> Result<DecoderSpec, LoadError> {
    if let Some(hash) = gguf.packed_from() {
        return Err(LoadError::Packed { path: path.into(), source_hash: hex(hash) });
    }
    let refuse = |source| LoadError::Gguf { path: path.into(), source };
    let architecture = gguf.architecture().map_err(refuse)?;
    let family = family_by_gguf_name(architecture)
        .ok_or_else(|| LoadError::UnknownFamily { path: path.into(), found: architecture.into() })?;
    let config = GgufConfig::new(*gguf).map_err(refuse)?;
    let prefix = || format!("{architecture}.");
    (family.from_gguf)(&config).map_err(|source| LoadError::Spec {
        path: path.into(),
        prefix: prefix(),
        source,
    })
}

/// The model in a checked GGUF file with its matrices in blocks: as the file has them if it is quantized, and in the
/// types of `mix` if all its matrices are floating-point numbers, one matrix after another.
///
/// # Errors
/// As [`from_gguf`]; a value that a type cannot hold.
pub fn held_from_gguf(gguf: &Gguf<'_>, path: &Path, mix: Mix) -> Result<HeldModel, LoadError> {
    let spec = specification(gguf, path)?;
    let (vectors, matrices): (Vec<_>, Vec<_>) =
        wanted(spec.family, &spec).into_iter().partition(|(row, _)| row.role.is_vector());
    let infos = index(gguf);
    let mut kept = Weights::default();
    for (row, layer) in vectors {
        kept.insert(row.role, layer, read(find(&infos, row, layer, path)?, row, &spec, path)?);
    }
    let found: Vec<_> = matrices
        .into_iter()
        .map(|(row, layer)| Ok((row, layer, find(&infos, row, layer, path)?)))
        .collect::<Result<_, LoadError>>()?;
    let as_in_file = found.iter().any(|(.., info)| info.dtype.is_some_and(|dtype| !dtype.is_float()));
    let held = found.into_par_iter().map(|(row, layer, info)| {
        let blocks = if as_in_file {
            read_blocks(info, row, &spec, path)?
        } else {
            let tensor = read(info, row, &spec, path)?;
            let values = tensor.flatten_all().and_then(|flat| flat.to_vec1()).map_err(tensor_error(path))?;
            hold(&values, row.role, layer, &spec, mix)
                .map_err(|source| quantize_error(path, info.name, source))?
        };
        Ok(((row.role, layer), blocks))
    });
    let matrices = held.collect::<Result<_, LoadError>>()?;
    let spec = with_named_scaling(spec, &mut kept).map_err(tensor_error(path))?;
    Ok(HeldModel { spec, vectors: kept, matrices, as_in_file })
}

pub(super) fn quantize_error(path: &Path, name: &str, source: crate::quantize::QuantizeError) -> LoadError {
    LoadError::Quantize { path: path.into(), name: name.into(), source }
}

type Index<'g> = HashMap<&'g str, TensorInfo<'g>>;

/// The tensors by name.
fn index<'g>(gguf: &Gguf<'g>) -> Index<'g> {
    gguf.tensors().map(|info| (info.name, info)).collect()
}

/// The tensor that holds a row of the family table.
fn find<'i, 'g>(
    infos: &'i Index<'g>,
    row: &TensorRow,
    layer: usize,
    path: &Path,
) -> Result<&'i TensorInfo<'g>, LoadError> {
    let name = NameBuf::new(row.gguf, layer);
    let missing = || LoadError::MissingTensor { path: path.into(), name: name.as_str().into() };
    infos.get(name.as_str()).ok_or_else(missing)
}

fn tensor_error(path: &Path) -> impl Fn(candle_core::Error) -> LoadError + '_ {
    |source| LoadError::Tensor { path: path.into(), source }
}

/// Every tensor that `spec` asks for, and its place in the model.
fn wanted(family: &'static Family, spec: &DecoderSpec) -> Vec<(&'static TensorRow, usize)> {
    family
        .tensors
        .iter()
        .filter(|row| row.role.required(spec))
        .flat_map(|row| {
            (0..if row.role.per_layer() { spec.layers } else { 1 }).map(move |layer| (row, layer))
        })
        .collect()
}

fn weights(gguf: &Gguf<'_>, spec: &DecoderSpec, path: &Path) -> Result<Weights, LoadError> {
    let infos = index(gguf);
    let loaded: Vec<_> = wanted(spec.family, spec)
        .into_par_iter()
        .map(|(row, layer)| Ok((row.role, layer, read(find(&infos, row, layer, path)?, row, spec, path)?)))
        .collect::<Result<_, LoadError>>()?;
    let mut weights = Weights::default();
    for (role, layer, tensor) in loaded {
        weights.insert(role, layer, tensor);
    }
    Ok(weights)
}

/// The blocks of the role of `row` in the tensor `info`, as they are but for the order of rows.
fn read_blocks(
    info: &TensorInfo<'_>,
    row: &TensorRow,
    spec: &DecoderSpec,
    path: &Path,
) -> Result<Blocks, LoadError> {
    let dtype = checked(info, row, spec, path)?;
    let [rows, cols] = row.file_shape(spec);
    let (size, span) = (info.data.len() / rows, row.span(spec));
    let mut bytes = info.data[span.start * size..span.end * size].to_vec();
    if let Some(heads) = row.role.permuted_heads(spec) {
        bytes = to_halves(&bytes, heads, size);
    }
    let blocks = Blocks::new(dtype, [span.len(), cols], bytes)
        .map_err(|source| quantize_error(path, info.name, source))?;
    let mut values = vec![0.0; cols];
    for row in 0..span.len() {
        blocks.row(row, &mut values).map_err(|source| LoadError::Gguf { path: path.into(), source })?;
        check_finite(path, info.name, &values)?;
    }
    Ok(blocks)
}

/// The type of the tensor `info`, which must have the shape of `row`.
fn checked(
    info: &TensorInfo<'_>,
    row: &TensorRow,
    spec: &DecoderSpec,
    path: &Path,
) -> Result<DType, LoadError> {
    let [rows, cols] = row.file_shape(spec);
    if (info.rows(), info.cols()) != (rows, cols) {
        return Err(LoadError::Shape {
            path: path.into(),
            name: info.name.into(),
            found: vec![info.rows(), info.cols()],
            expected: vec![rows, cols],
        });
    }
    info.dtype.ok_or_else(|| LoadError::Type {
        path: path.into(),
        name: info.name.into(),
        found: format!("#{}", info.type_id),
        expected: "one that this tool reads",
    })
}

/// The rows of the role of `row` in the tensor `info`.
fn read(
    info: &TensorInfo<'_>,
    row: &TensorRow,
    spec: &DecoderSpec,
    path: &Path,
) -> Result<Tensor, LoadError> {
    let role = row.role;
    let dtype = checked(info, row, spec, path)?;
    let [rows, cols] = row.file_shape(spec);
    let (bytes, span) = (info.data.len() / rows, row.span(spec));
    let mut values = vec![0.0; span.len() * cols];
    for (row, out) in span.clone().zip(values.chunks_exact_mut(cols)) {
        dequantize_row(dtype, &info.data[row * bytes..][..bytes], out)
            .map_err(|source| LoadError::Gguf { path: path.into(), source })?;
    }
    check_finite(path, info.name, &values)?;
    if let Some(heads) = role.permuted_heads(spec) {
        // A bias is one row of elements; a matrix moves whole rows.
        let width = if role.is_vector() { 1 } else { cols };
        values = to_halves(&values, heads, width);
    }
    let shape = if role.is_vector() { vec![cols] } else { vec![span.len(), cols] };
    Tensor::from_vec(values, shape, &Device::Cpu).map_err(tensor_error(path))
}

/// Rows of each head from neighbours (row `2i + s`) to halves (row `i + s * head_dim / 2`).
fn to_halves<T: Copy + Default>(values: &[T], heads: usize, width: usize) -> Vec<T> {
    let head_dim = values.len() / width / heads;
    let mut out = vec![T::default(); values.len()];
    for head in 0..heads {
        for i in 0..head_dim / 2 {
            for s in 0..2 {
                let from = (head * head_dim + 2 * i + s) * width;
                let to = (head * head_dim + i + s * head_dim / 2) * width;
                out[to..to + width].copy_from_slice(&values[from..from + width]);
            }
        }
    }
    out
}

/// A table of rope divisors as the Llama 3 parameters that made it, where some did.
///
/// GGUF keeps only the divisors. Hugging Face's format needs the parameters, so the ones that models
/// use are tried; a table that none of them makes stays a table.
fn with_named_scaling(spec: DecoderSpec, weights: &mut Weights) -> candle_core::Result<DecoderSpec> {
    let Some(table) = weights.get(Role::RopeFreqs, 0) else { return Ok(spec) };
    let divisors = table.to_vec1::<f32>()?;
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    for exponent in 5..=20 {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: f64::from(1u32 << exponent),
        };
        let fits = divisors.iter().enumerate().all(|(i, &divisor)| {
            let frequency = spec.rope.theta.powf(-2.0 * i as f64 / spec.rope_dims as f64);
            let made = scaling.divisor(frequency);
            (made - f64::from(divisor)).abs() <= 1e-4 * made
        });
        if fits {
            weights.remove(Role::RopeFreqs, 0);
            return Ok(DecoderSpec { rope: Rope { scaling, ..spec.rope }, ..spec });
        }
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_halves() {
        let rows: Vec<f32> = (0..12).map(|i| i as f32).collect();
        assert_eq!(to_halves(&rows, 2, 1), [0., 2., 4., 1., 3., 5., 6., 8., 10., 7., 9., 11.]);
        assert_eq!(to_halves(&rows, 1, 3), [0., 1., 2., 6., 7., 8., 3., 4., 5., 9., 10., 11.]);
    }
}
