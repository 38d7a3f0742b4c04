//! A cut student that makes up for what is gone, as far as one matrix a layer can: a regression, no training.
//!
//! Where layers are missing behind a block, its down projection is fitted so that the residual stream arrives as the
//! next layer that stayed knows it from the teacher (a linear map for dropped blocks as in Shopkhoev et al. 2025,
//! "ReplaceMe", arXiv 2505.02819; here all of the matrix is free, and layers are fitted one after the other, so that
//! each sees what the mended ones before it give).

use candle_core::{Device, Tensor};
use edge_models::Role;
use rayon::prelude::*;

use super::StudentError;
use crate::model::Model;
use crate::quantize::moments::{Factor, Moments};
use crate::train::Projection;
use crate::train::graph::Decoder;
use crate::train::ops::with_values;

/// Added to the diagonal of a Gram matrix, as a share of its mean: how firmly a regression holds on to the weights
/// that were there.
const DAMPING: f64 = 0.02;

/// Tokens on which a model of common widths is well fitted; twice as many change little.
pub const MENDING_TOKENS: usize = 65_536;

/// Tokens that go through a layer at a time; only their residual streams are kept together.
const GROUP: usize = 8192;

/// Some windows of the text on their way through both models.
struct Group {
    tokens: usize,
    /// The teacher's residual stream, `[tokens, hidden]`.
    wanted: Tensor,
    /// The student's.
    state: Tensor,
}

impl Group {
    /// What goes down again, of its state after attention. Made anew where it is needed: to keep it would take more
    /// memory than everything else.
    fn gated(&self, student: &Decoder, layer: usize) -> candle_core::Result<Tensor> {
        student.gate(layer, &student.ffn_input(layer, &self.state)?)
    }
}

/// Fits `student`, which has the layers `kept` of `teacher`, to it on the tokens `calibration`, cut into windows of
/// `length`; what does not fill a window is left out. `progress` is told how many of how many layers are done.
///
/// # Errors
/// The two do not fit together, or the calibration text is too short or not the teacher's.
pub fn mend(
    teacher: &Model,
    student: &Model,
    kept: &[usize],
    calibration: &[u32],
    length: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Model, StudentError> {
    let layers = teacher.spec.layers;
    if kept.len() != student.spec.layers || kept.iter().any(|&layer| layer >= layers) {
        return Err(StudentError::Keep { found: format!("{kept:?}"), layers });
    }
    let ids = super::calibration_windows(&teacher.spec, calibration, length)?;
    let whole = Decoder::new(&teacher.spec, &teacher.weights)?;
    let mut decoder = Decoder::new(&student.spec, &student.weights)?;
    let mut mended = student.clone();
    let mut groups = ids
        .chunks(GROUP.div_ceil(length) * length)
        .map(|ids| Ok(Group { tokens: ids.len(), wanted: whole.embed(ids)?, state: decoder.embed(ids)? }))
        .collect::<candle_core::Result<Vec<_>>>()?;
    let mut walked = 0;
    for layer in 0..kept.len() {
        let end = kept.get(layer + 1).copied().unwrap_or(layers);
        // Behind a norm the matrix does not add to the stream itself.
        let fits = !student.spec.post_norms && end != kept[layer] + 1;
        for group in &mut groups {
            for layer in walked..end {
                group.wanted = whole.block(layer, &group.wanted, group.tokens / length, length)?;
            }
            let mixed = decoder.mix(layer, &decoder.attention_input(layer, &group.state)?, length)?;
            group.state = decoder.add_attention(layer, &group.state, &mixed)?;
        }
        walked = end;
        if fits {
            let weight = decoder.matrix(Role::FfnDown, layer)?.matrix()?;
            let (rows, cols) = weight.dims2()?;
            let mut moments = Moments::new(cols, rows);
            for group in &groups {
                moments.add(&group.gated(&decoder, layer)?, Some(&(&group.wanted - &group.state)?))?;
            }
            let columns: Vec<usize> = (0..cols).collect();
            let fitted = regress(&weight, &moments, &columns).ok_or(StudentError::NotFinite)??;
            decoder.replace(Role::FfnDown, layer, Projection::Dense(fitted.clone()))?;
            mended.weights.insert(Role::FfnDown, layer, fitted);
        }
        for group in &mut groups {
            let gated = group.gated(&decoder, layer)?;
            group.state = decoder.add_ffn(layer, &group.state, &gated)?;
        }
        progress(layer + 1, kept.len());
    }
    Ok(mended)
}

/// The columns `columns` of `weight`, `[out, columns]`, moved to where they put out the moments' targets best, with
/// no others beside them: `W + (C - W G)(G + damping)^-1`, all of these columns alone. `None` if the moments are not
/// finite.
pub(super) fn regress(
    weight: &Tensor,
    moments: &Moments,
    columns: &[usize],
) -> Option<candle_core::Result<Tensor>> {
    let (rows, cols) = weight.dims2().ok()?;
    let n = columns.len();
    let gram: Vec<f64> =
        columns.iter().flat_map(|&i| columns.iter().map(move |&j| moments.gram[i * cols + j])).collect();
    let factor = Factor::new(&gram, n, DAMPING)?;
    let fitted = with_values(weight, |weight| {
        let old: Vec<f64> =
            (0..rows).flat_map(|r| columns.iter().map(move |&c| f64::from(weight[r * cols + c]))).collect();
        let mut moved = vec![0.0; rows * n];
        moved.par_chunks_exact_mut(n).zip(old.par_chunks_exact(n)).enumerate().for_each(
            |(row, (moved, old))| {
                for (i, moved) in moved.iter_mut().enumerate() {
                    let there: f64 = old.iter().zip(&gram[i * n..][..n]).map(|(w, g)| w * g).sum();
                    *moved = moments.cross[row * cols + columns[i]] - there;
                }
            },
        );
        factor.solve(&mut moved);
        let values: Vec<f32> = old.iter().zip(moved).map(|(old, moved)| (old + moved) as f32).collect();
        Tensor::from_vec(values, (rows, n), &Device::Cpu)
    });
    Some(fitted)
}

/// Zeros of the shape of `weight`, with `values` in the columns `columns`.
pub(super) fn replace_columns(
    weight: &Tensor,
    columns: &[usize],
    values: &Tensor,
) -> candle_core::Result<Tensor> {
    let (rows, cols) = weight.dims2()?;
    let mut all = vec![0.0; rows * cols];
    with_values(values, |values| {
        for (row, values) in all.chunks_exact_mut(cols).zip(values.chunks_exact(columns.len())) {
            columns.iter().zip(values).for_each(|(&column, &value)| row[column] = value);
        }
        Ok(())
    })?;
    Tensor::from_vec(all, (rows, cols), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::student::cut;
    use crate::train::fixture::{text, tiny};

    /// Mean squared distance of the state before the final norm.
    fn distance(teacher: &Model, student: &Model, ids: &[u32]) -> f64 {
        let state = |model: &Model| {
            let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
            let mut x = decoder.embed(ids).unwrap();
            for layer in 0..model.spec.layers {
                x = decoder.block(layer, &x, ids.len() / 32, 32).unwrap();
            }
            x
        };
        let difference = (state(teacher) - state(student)).unwrap();
        f64::from(difference.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap())
    }

    #[test]
    fn a_mended_student_is_nearer_on_text_that_it_has_not_seen() {
        let teacher = tiny(5, 2);
        let ids = text(2048 + 256);
        let kept = [0, 2, 3];
        let student = cut(&teacher, &kept).unwrap();
        let mended = mend(&teacher, &student, &kept, &ids[..2048], 32, &mut |_, _| {}).unwrap();
        let (before, after) =
            (distance(&teacher, &student, &ids[2048..]), distance(&teacher, &mended, &ids[2048..]));
        assert!(after < 0.8 * before, "{after} after, {before} before");
        // Layer 2 is followed by its own neighbour and stays as it is.
        let id = |model: &Model| model.weights.get(Role::FfnDown, 1).unwrap().id();
        assert_eq!(id(&mended), id(&student));
    }

    #[test]
    fn bad_requests_are_refused() {
        let teacher = tiny(3, 1);
        let student = cut(&teacher, &[0, 2]).unwrap();
        for kept in [&[0][..], &[0, 3]] {
            assert!(mend(&teacher, &student, kept, &text(64), 32, &mut |_, _| {}).is_err(), "{kept:?}");
        }
        let error = mend(&teacher, &student, &[0, 2], &text(31), 32, &mut |_, _| {}).unwrap_err();
        assert!(matches!(error, StudentError::Calibration { .. }), "{error}");
    }
}
