//! An adapter in the weights: `W' = W + scale * B A`, for DoRA with every row brought to its length.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use edge_models::Role;

use super::{Adapter, AdapterError, Pair};
use crate::model::Model;

/// Changes the weights of `model` as `adapter`, which was read for it, says; `scale` multiplies the update.
///
/// # Errors
/// A matrix that the model has not.
pub fn merge(model: &mut Model, adapter: &Adapter, scale: f32) -> Result<(), AdapterError> {
    for pair in &adapter.pairs {
        for (role, weight, part) in matrices(model, pair, &adapter.path)? {
            let merged = merged(&weight, pair, part, scale)?;
            model.weights.insert(role, pair.layer, merged);
        }
    }
    Ok(())
}

/// A matrix of a pair, and what of the pair it is: its first row, its rows and its columns.
type Part = (Role, Tensor, [usize; 3]);

/// The matrices that a pair changes, one below the other; `path` is what errors call the adapter.
pub(super) fn matrices(model: &Model, pair: &Pair, path: &Path) -> Result<Vec<Part>, AdapterError> {
    let mut before = 0;
    let part = |role: &Role| {
        let [rows, cols] = role.shape(&model.spec);
        let Some(weight) = model.weights.get(*role, pair.layer) else {
            let name = format!("{role:?} of layer {}", pair.layer);
            let message = "the model has no such matrix".into();
            return Err(AdapterError::Tensor { path: path.into(), name, message });
        };
        before += rows;
        Ok((*role, weight.clone(), [before - rows, rows, cols]))
    };
    pair.row.members().iter().map(part).collect()
}

/// Changes the weights of `model` as all of `adapters`, each with a scale, say together: the sum of what each
/// would add to the model alone, so that their order does not matter.
///
/// # Errors
/// As [`merge`]; several DoRAs, each of which scales what the others leave.
pub fn merge_all(model: &mut Model, adapters: &[(Adapter, f32)]) -> Result<(), AdapterError> {
    let (doras, loras): (Vec<_>, Vec<_>) = adapters.iter().partition(|(adapter, _)| adapter.is_dora());
    if let [_, (second, _), ..] = doras[..] {
        let message = "a second DoRA adapter, expected at most one".into();
        return Err(AdapterError::File { path: second.path.clone(), message });
    }
    // A DoRA scales the rows of the model's own weights.
    doras.into_iter().chain(loras).try_for_each(|(adapter, scale)| merge(model, adapter, *scale))
}

/// `weight`, which is the rows `first..first + rows` of the pair's matrix, with the update.
pub(super) fn merged(
    weight: &Tensor,
    pair: &Pair,
    [first, rows, cols]: [usize; 3],
    scale: f32,
) -> candle_core::Result<Tensor> {
    let down = Tensor::from_slice(&pair.down, (pair.rank, cols), &Device::Cpu)?;
    let up = &pair.up[first * pair.rank..][..rows * pair.rank];
    let up = Tensor::from_slice(up, (rows, pair.rank), &Device::Cpu)?;
    // One number at the end of a product loses less than one on each factor.
    let update = (up.matmul(&down)? * f64::from(pair.scale * scale))?;
    let sum = (weight + update)?;
    let Some(magnitude) = &pair.magnitude else { return Ok(sum) };
    let wanted = Tensor::from_slice(&magnitude[first..][..rows], (rows, 1), &Device::Cpu)?;
    let lengths = sum.to_dtype(DType::F64)?.sqr()?.sum_keepdim(1)?.sqrt()?.to_dtype(DType::F32)?;
    sum.broadcast_mul(&(wanted / lengths)?)
}
