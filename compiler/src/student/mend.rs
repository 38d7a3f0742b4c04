//! A cut student that makes up for what is gone, as far as two matrices a layer can: regressions, no training.
//!
//! What a block puts out of its attention and its feed-forward network is fitted so that the residual stream arrives as
//! the next layer that stayed knows it from the teacher (a linear map for dropped blocks as in Shopkhoev et al. 2025,
//! "ReplaceMe", arXiv 2505.02819; here all of both matrices is free, and layers are fitted one after the other, so that
//! each sees what the mended ones before it give, and makes up for that too).

use candle_core::{Device, Tensor};
use edge_models::Role;
use rayon::prelude::*;

use super::StudentError;
use crate::model::Model;
use crate::quantize::moments::{Factor, Moments};
use crate::train::Projection;
use crate::train::graph::Decoder;
use crate::train::ops::with_values;

/// Tokens for each column of a regression that would have it keep the weights that were there: its damping beside
/// those of the text. Measured on SmolLM2 with 8,192 and 65,536 tokens.
const HELD_TOKENS: f64 = 1.0;

/// How far the attention's output goes to where both matrices together would be best. That solution takes what goes
/// down for fixed, which it is not: the feed-forward network reads what the attention gives. All of the way is worse
/// than none.
const ATTENTION_STEP: f64 = 0.5;

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
    /// What the attention's output is made from in the layer under way, `[tokens, heads * head_dim]`.
    mixed: Tensor,
}

impl Group {
    /// The residual stream after attention.
    fn after_attention(&self, student: &Decoder, layer: usize) -> candle_core::Result<Tensor> {
        student.add_attention(layer, &self.state, &self.mixed)
    }
}

/// What goes down again, of a state after attention. Made anew where it is needed: to keep it would take more memory
/// than everything else.
fn gated(student: &Decoder, layer: usize, state: &Tensor) -> candle_core::Result<Tensor> {
    student.gate(layer, &student.ffn_input(layer, state)?)
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
    let begin = |ids: &[u32]| {
        let state = decoder.embed(ids)?;
        Ok(Group { tokens: ids.len(), wanted: whole.embed(ids)?, mixed: state.clone(), state })
    };
    let mut groups =
        ids.chunks(GROUP.div_ceil(length) * length).map(begin).collect::<candle_core::Result<Vec<_>>>()?;
    let mut walked = 0;
    for layer in 0..kept.len() {
        let end = kept.get(layer + 1).copied().unwrap_or(layers);
        for group in &mut groups {
            for layer in walked..end {
                group.wanted = whole.block(layer, &group.wanted, group.tokens / length, length)?;
            }
            group.mixed = decoder.mix(layer, &decoder.attention_input(layer, &group.state)?, length)?;
        }
        walked = end;
        // Behind a norm the matrices do not add to the stream itself.
        let fits = !student.spec.post_norms;
        if fits {
            fit_attention(&mut decoder, layer, &groups)?;
        }
        for group in &mut groups {
            group.state = group.after_attention(&decoder, layer)?;
        }
        if fits {
            fit_down(&mut decoder, layer, &groups)?;
            for role in [Role::AttnOut, Role::FfnDown] {
                mended.weights.insert(role, layer, decoder.matrix(role, layer)?.matrix()?);
            }
        }
        for group in &mut groups {
            group.state = decoder.add_ffn(layer, &group.state, &gated(&decoder, layer, &group.state)?)?;
        }
        progress(layer + 1, kept.len());
    }
    Ok(mended)
}

/// Moves the attention's output to where it serves best beside a down projection that is fitted with it.
fn fit_attention(decoder: &mut Decoder, layer: usize, groups: &[Group]) -> Result<(), StudentError> {
    let out = decoder.matrix(Role::AttnOut, layer)?.matrix()?;
    let both = Tensor::cat(&[&out, &decoder.matrix(Role::FfnDown, layer)?.matrix()?], 1)?;
    let mut moments = Moments::new(both.dim(1)?, both.dim(0)?);
    for group in groups {
        let gated = gated(decoder, layer, &group.after_attention(decoder, layer)?)?;
        let inputs = Tensor::cat(&[&group.mixed, &gated], 1)?;
        moments.add(&inputs, Some(&(&group.wanted - &group.state)?))?;
    }
    let fitted = fit(&both, &moments, groups)?.narrow(1, 0, out.dim(1)?)?;
    let moved = (&out + ((fitted - &out)? * ATTENTION_STEP)?)?;
    Ok(decoder.replace(Role::AttnOut, layer, Projection::Dense(moved))?)
}

/// Fits the down projection to states after attention.
fn fit_down(decoder: &mut Decoder, layer: usize, groups: &[Group]) -> Result<(), StudentError> {
    let down = decoder.matrix(Role::FfnDown, layer)?.matrix()?;
    let mut moments = Moments::new(down.dim(1)?, down.dim(0)?);
    for group in groups {
        let inputs = gated(decoder, layer, &group.state)?;
        moments.add(&inputs, Some(&(&group.wanted - &group.state)?))?;
    }
    let fitted = fit(&down, &moments, groups)?;
    Ok(decoder.replace(Role::FfnDown, layer, Projection::Dense(fitted))?)
}

/// All columns of `weight`, fitted on the tokens of `groups`.
fn fit(weight: &Tensor, moments: &Moments, groups: &[Group]) -> Result<Tensor, StudentError> {
    let columns: Vec<usize> = (0..weight.dim(1)?).collect();
    let tokens: usize = groups.iter().map(|group| group.tokens).sum();
    let damping = HELD_TOKENS * columns.len() as f64 / tokens as f64;
    Ok(regress(weight, moments, &columns, damping).ok_or(StudentError::NotFinite)??)
}

/// The columns `columns` of `weight`, `[out, columns]`, moved to where they put out the moments' targets best, with
/// no others beside them: `W + (C - W G)(G + damping)^-1`, all of these columns alone. `damping` is a share of the mean
/// of `G`'s diagonal. `None` if the moments are not finite.
pub(super) fn regress(
    weight: &Tensor,
    moments: &Moments,
    columns: &[usize],
    damping: f64,
) -> Option<candle_core::Result<Tensor>> {
    let (rows, cols) = weight.dims2().ok()?;
    let n = columns.len();
    let gram: Vec<f64> =
        columns.iter().flat_map(|&i| columns.iter().map(move |&j| moments.gram[i * cols + j])).collect();
    let factor = Factor::new(&gram, n, damping)?;
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
