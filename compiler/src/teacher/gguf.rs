//! A GGUF file as a model in memory.

use std::fs::File;
use std::path::Path;

use candle_core::{Device, Tensor};
use edge_models::{DecoderSpec, Family, NameBuf, Role, Rope, RopeScaling, TensorRow, family_by_gguf_name};
use edge_runtime::format::{Gguf, GgufConfig, TensorInfo};
use edge_runtime::kernels::dequantize_row;
use rayon::prelude::*;

use super::{LoadError, check_finite};
use crate::model::{Model, Vocabulary, Weights};
use crate::pack::hex;

pub(super) fn load(path: &Path) -> Result<Model, LoadError> {
    let io = |source| LoadError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    // SAFETY: the map is read-only and private to this process, and every byte of it is checked by
    // `Gguf::parse` before it means anything. A file that is cut while it is mapped raises SIGBUS, as it
    // does for every tool that maps models.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    let gguf = Gguf::parse(&bytes).map_err(|source| LoadError::Gguf { path: path.into(), source })?;
    from_gguf(&gguf, path)
}

/// The model in a checked GGUF file; `path` is what errors call it.
///
/// # Errors
/// A pack, an unknown family, a missing or misshapen tensor, or one of a type that is not read.
pub fn from_gguf(gguf: &Gguf<'_>, path: &Path) -> Result<Model, LoadError> {
    if let Some(hash) = gguf.packed_from() {
        return Err(LoadError::Packed { path: path.into(), source_hash: hex(hash) });
    }
    let refuse = |source| LoadError::Gguf { path: path.into(), source };
    let architecture = gguf.architecture().map_err(refuse)?;
    let family = family_by_gguf_name(architecture)
        .ok_or_else(|| LoadError::UnknownFamily { path: path.into(), found: architecture.into() })?;
    let config = GgufConfig::new(*gguf).map_err(refuse)?;
    let prefix = || format!("{architecture}.");
    let spec = (family.from_gguf)(&config).map_err(|source| LoadError::Spec {
        path: path.into(),
        prefix: prefix(),
        source,
    })?;
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
    let infos: std::collections::HashMap<&str, TensorInfo<'_>> =
        gguf.tensors().map(|info| (info.name, info)).collect();
    let loaded: Vec<_> = wanted(spec.family, spec)
        .into_par_iter()
        .map(|(row, layer)| {
            let name = NameBuf::new(row.gguf, layer);
            let info = infos
                .get(name.as_str())
                .ok_or_else(|| LoadError::MissingTensor { path: path.into(), name: name.as_str().into() })?;
            Ok((row.role, layer, read(info, row, spec, path)?))
        })
        .collect::<Result<_, LoadError>>()?;
    let mut weights = Weights::default();
    for (role, layer, tensor) in loaded {
        weights.insert(role, layer, tensor);
    }
    Ok(weights)
}

/// The rows of the role of `row` in the tensor `info`.
fn read(
    info: &TensorInfo<'_>,
    row: &TensorRow,
    spec: &DecoderSpec,
    path: &Path,
) -> Result<Tensor, LoadError> {
    let role = row.role;
    let [rows, cols] = row.file_shape(spec);
    if (info.rows(), info.cols()) != (rows, cols) {
        return Err(LoadError::Shape {
            path: path.into(),
            name: info.name.into(),
            found: vec![info.rows(), info.cols()],
            expected: vec![rows, cols],
        });
    }
    let dtype = info.dtype.ok_or_else(|| LoadError::Type {
        path: path.into(),
        name: info.name.into(),
        found: format!("#{}", info.type_id),
        expected: "one that this tool reads",
    })?;
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
fn to_halves(values: &[f32], heads: usize, width: usize) -> Vec<f32> {
    let head_dim = values.len() / width / heads;
    let mut out = vec![0.0; values.len()];
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
