//! Columns that matter made larger before rounding, and what feeds them smaller by as much: the model says the same,
//! and rounding hurts it less.
//!
//! AWQ (Lin et al. 2024): column `j` of the matrices that read the same inputs is multiplied by
//! `s_j = rms(x_j)^alpha`, and `x_j` divided by it where it comes from: in the weights of a norm, in the rows of
//! values, in the rows of up. `alpha` is searched for each place by the output error that plain rounding leaves.
//! Knows no text: only the mean squares of [`Imatrix`], which it keeps true.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use edge_models::Role;
use edge_runtime::format::DType;
use edge_runtime::kernels::dequantize_row;
use rayon::prelude::*;

use super::calibrate::{CalibrationError, Progress};
use super::{Encoding, Imatrix, quantize_rows};
use crate::model::Model;

/// Exponents that are tried: 0, which changes nothing, to 1 in these steps.
const STEPS: usize = 10;

/// Matrices that read the same, and the weights whose entries (or rows) make that.
struct Place {
    readers: &'static [Role],
    sources: &'static [Role],
}

const PLACES: [Place; 4] = [
    Place { readers: &[Role::AttnQ, Role::AttnK, Role::AttnV], sources: &[Role::AttnNorm] },
    Place { readers: &[Role::AttnOut], sources: &[Role::AttnV, Role::AttnVBias] },
    Place { readers: &[Role::FfnGate, Role::FfnUp], sources: &[Role::FfnNorm] },
    Place { readers: &[Role::FfnDown], sources: &[Role::FfnUp] },
];

/// Scales the columns of `model` for the types of `encoding`; `importance` becomes that of the scaled model. The
/// model computes the same function, up to the rounding of f32.
///
/// # Errors
/// A weight or its importance is missing, or a value is beyond what a type holds.
pub fn scale(
    model: &mut Model,
    importance: &mut Imatrix,
    encoding: &Encoding,
    progress: Progress<'_>,
) -> Result<(), CalibrationError> {
    let layers = model.spec.layers;
    for layer in 0..layers {
        for place in &PLACES {
            if place.readers.iter().any(|role| encoding.dtype(*role, layer, &model.spec).is_float()) {
                continue;
            }
            if let Some(scales) = search(model, layer, place, importance, encoding)? {
                fold(model, layer, place, &scales)?;
                place.readers.iter().for_each(|role| importance.scale(*role, layer, &model.spec, &scales));
            }
        }
        progress(layer + 1, layers, &format!("layer {layer}"));
    }
    Ok(())
}

/// The scales of a place's columns that leave the least output error; `None` if all being 1 does.
fn search(
    model: &Model,
    layer: usize,
    place: &Place,
    importance: &Imatrix,
    encoding: &Encoding,
) -> Result<Option<Vec<f32>>, CalibrationError> {
    let spec = &model.spec;
    let missing =
        |role: Role| candle_core::Error::msg(format!("nothing is known of {role:?} of layer {layer}"));
    let first = place.readers[0];
    let squares = importance.importance(first, layer, spec).ok_or_else(|| missing(first))?;
    let mut readers = Vec::new();
    for role in place.readers {
        let weight = model.weights.get(*role, layer).ok_or_else(|| missing(*role))?;
        readers.push((*role, weight.flatten_all()?.to_vec1::<f32>()?, encoding.dtype(*role, layer, spec)));
    }
    let repeated = if place.sources[0] == Role::AttnV { Some((spec.heads, spec.kv_heads)) } else { None };
    let rms = shared(&squares, spec.head_dim, repeated);
    let (mut best, mut found) = (f64::INFINITY, None);
    for step in 0..=STEPS {
        let scales = scales(&rms, step as f32 / STEPS as f32);
        let mut error = 0.0;
        for (role, weight, dtype) in &readers {
            error += output_error(*dtype, weight, &squares, &scales)
                .map_err(|source| CalibrationError::Quantize { role: *role, layer, source })?;
        }
        if error < best {
            (best, found) = (error, (step > 0).then_some(scales));
        }
    }
    Ok(found)
}

/// Root mean squares of columns. With `heads` `(query, key/value)`, columns that come from the same value are taken
/// together.
fn shared(squares: &[f32], head_dim: usize, heads: Option<(usize, usize)>) -> Vec<f32> {
    let Some((heads, kv_heads)) = heads else { return squares.iter().map(|square| square.sqrt()).collect() };
    let group = heads / kv_heads;
    let of = |column: usize| {
        let (kv_head, within) = (column / head_dim / group, column % head_dim);
        let members = (0..group).map(|member| squares[(kv_head * group + member) * head_dim + within]);
        (members.sum::<f32>() / group as f32).sqrt()
    };
    (0..squares.len()).map(of).collect()
}

/// `rms^alpha`, around 1; columns that nothing comes through stay as they are.
fn scales(rms: &[f32], alpha: f32) -> Vec<f32> {
    let powers: Vec<f32> = rms.iter().map(|rms| if *rms > 0.0 { rms.powf(alpha) } else { 1.0 }).collect();
    let (low, high) = powers.iter().fold((f32::MAX, f32::MIN_POSITIVE), |(l, h), p| (l.min(*p), h.max(*p)));
    let middle = (low * high).sqrt();
    // Within what half-precision scales of blocks and f32 weights take without loss.
    powers.iter().map(|power| (power / middle).clamp(1e-3, 1e3)).collect()
}

/// `sum(squares_j (w_j - Q(w_j s_j) / s_j)^2)`.
fn output_error(
    dtype: DType,
    weight: &[f32],
    squares: &[f32],
    scales: &[f32],
) -> Result<f64, super::QuantizeError> {
    let cols = scales.len();
    let mut scaled = weight.to_vec();
    scaled.par_chunks_mut(cols).for_each(|row| row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s));
    let blocks = quantize_rows(dtype, &scaled, cols, None)?;
    let row_bytes = blocks.len() / (weight.len() / cols);
    let rows = scaled.par_chunks(cols).zip(blocks.par_chunks(row_bytes)).map(|(row, blocks)| {
        let mut values = vec![0.0; cols];
        // Blocks of whole rows, as they were just made.
        let _ = dequantize_row(dtype, blocks, &mut values);
        let terms = row.iter().zip(values).zip(squares.iter().zip(scales));
        terms.map(|((w, q), (square, s))| f64::from(square * ((w - q) / s).powi(2))).sum::<f64>()
    });
    // In order: the same on any number of threads.
    Ok(rows.collect::<Vec<f64>>().into_iter().sum())
}

/// Multiplies the columns of the readers and divides the sources.
fn fold(model: &mut Model, layer: usize, place: &Place, scales: &[f32]) -> Result<(), CalibrationError> {
    let spec = model.spec;
    let factors = Tensor::from_slice(scales, (1, scales.len()), &Device::Cpu)?;
    let mut changed = BTreeMap::new();
    for role in place.readers {
        if let Some(weight) = model.weights.get(*role, layer) {
            changed.insert(*role, weight.broadcast_mul(&factors)?);
        }
    }
    // One value head feeds a group of query heads, whose scales are the same.
    let inverse: Vec<f32> = if place.sources[0] == Role::AttnV {
        let group = spec.heads / spec.kv_heads;
        let first = |row: usize| row / spec.head_dim * group * spec.head_dim + row % spec.head_dim;
        (0..spec.kv_width()).map(|row| 1.0 / scales[first(row)]).collect()
    } else {
        scales.iter().map(|scale| 1.0 / scale).collect()
    };
    for role in place.sources {
        let Some(weight) = model.weights.get(*role, layer) else { continue };
        let shape = if role.is_vector() { vec![inverse.len()] } else { vec![inverse.len(), 1] };
        let inverse = Tensor::from_slice(&inverse, shape, &Device::Cpu)?;
        changed.insert(*role, weight.broadcast_mul(&inverse)?);
    }
    changed.into_iter().for_each(|(role, weight)| model.weights.insert(role, layer, weight));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::Mix;
    use crate::quantize::calibrate::{Sample, imatrix};
    use crate::train::fixture::{text, tiny_in_blocks};
    use crate::train::graph::Decoder;

    fn logits(model: &Model, ids: &[u32]) -> Vec<f32> {
        let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
        decoder.logits(ids, 1, ids.len()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    /// A model some of whose columns matter much more than others.
    fn uneven() -> Model {
        let mut model = tiny_in_blocks(2, 5);
        for layer in 0..2 {
            for role in [Role::AttnNorm, Role::FfnNorm] {
                let weight: Vec<f32> = (0..64).map(|i| if i % 16 == 3 { 8.0 } else { 1.0 }).collect();
                model.weights.insert(role, layer, Tensor::new(weight, &Device::Cpu).unwrap());
            }
        }
        model
    }

    fn error(model: &Model, known: &Imatrix) -> f64 {
        let mut total = 0.0;
        for (role, layer, weight) in
            model.weights.iter().filter(|(role, ..)| role.per_layer() && !role.is_vector())
        {
            let squares = known.importance(role, layer, &model.spec).unwrap();
            let weight = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            total += output_error(DType::Q4_0, &weight, &squares, &vec![1.0; squares.len()]).unwrap();
        }
        total
    }

    #[test]
    fn the_model_stays_what_it_was_and_rounds_better() {
        let model = uneven();
        let ids = text(1024);
        let sample = Sample { ids: &ids, length: 32, bos: None };
        let known = imatrix(&model, sample, &mut |_, _, _| {}).unwrap();
        let (mut scaled, mut scaled_known) = (model.clone(), known.clone());
        scale(&mut scaled, &mut scaled_known, &Mix::Q4_0.into(), &mut |_, _, _| {}).unwrap();
        let changed = model.weights.iter().filter(|(role, layer, weight)| {
            let after = scaled.weights.get(*role, *layer).unwrap();
            let difference = (*weight - after).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            difference.to_scalar::<f32>().unwrap() > 0.0
        });
        assert!(changed.count() > 8);
        let (before, after) = (logits(&model, &ids[..48]), logits(&scaled, &ids[..48]));
        let largest = before.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (before, after) in before.iter().zip(&after) {
            assert!((before - after).abs() < 1e-4 * largest, "{before} {after}");
        }
        assert!(error(&scaled, &scaled_known) < 0.9 * error(&model, &known));
        // The importance is that of the scaled model.
        let measured = imatrix(&scaled, sample, &mut |_, _, _| {}).unwrap();
        for role in [Role::AttnQ, Role::AttnOut, Role::FfnUp, Role::FfnDown] {
            let pair =
                [&measured, &scaled_known].map(|known| known.importance(role, 1, &model.spec).unwrap());
            for (measured, kept) in pair[0].iter().zip(&pair[1]) {
                assert!((measured - kept).abs() < 1e-3 * measured, "{role:?}: {measured} {kept}");
            }
        }
    }
}
