//! A cut student that makes up for what is gone, as far as two matrices a layer can: regressions, no training.
//!
//! What a block puts out of its attention and its feed-forward network is fitted so that the residual stream arrives as
//! the next layer that stayed knows it from the teacher (a linear map for dropped blocks as in Shopkhoev et al. 2025,
//! "ReplaceMe", arXiv 2505.02819; here all of both matrices is free, and layers are fitted one after the other, so that
//! each sees what the mended ones before it give, and makes up for that too).
//!
//! The square error of the stream is not what counts, and the fit takes for fixed what it moves: so of each fit only as
//! much is taken as serves the predictions on windows that no regression has seen, when the teacher's own layers go on
//! from there.

use candle_core::{Device, Tensor};
use edge_models::Role;
use rayon::prelude::*;

use super::StudentError;
use super::layers::Reference;
use crate::model::Model;
use crate::quantize::moments::{Factor, Moments, dot};
use crate::train::Projection;
use crate::train::graph::Decoder;
use crate::train::ops::with_values;

/// Tokens for each column of a regression that would have it keep the weights that were there: its damping beside
/// those of the text. Measured on SmolLM2 with 8,192 and 65,536 tokens.
const HELD_TOKENS: f64 = 1.0;

/// How far a matrix may go to what a regression finds. None of the way and all of it are among them.
const STEPS: [f64; 3] = [0.0, 0.5, 1.0];

/// Tokens on which a model of common widths is well fitted; twice as many change little.
pub const MENDING_TOKENS: usize = 65_536;

/// Tokens that go through a layer at a time; only their residual streams are kept together.
const GROUP: usize = 8192;

/// Windows that fits are judged by, at most: an eighth of all.
const JUDGES: usize = 4;

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
    fn new(teacher: &Decoder, student: &Decoder, ids: &[u32]) -> candle_core::Result<Self> {
        let state = student.embed(ids)?;
        Ok(Self { tokens: ids.len(), wanted: teacher.embed(ids)?, mixed: state.clone(), state })
    }

    /// The residual stream after attention.
    fn after_attention(&self, student: &Decoder, layer: usize) -> candle_core::Result<Tensor> {
        student.add_attention(layer, &self.state, &self.mixed)
    }

    /// The residual stream after the whole layer.
    fn after_layer(&self, student: &Decoder, layer: usize) -> candle_core::Result<Tensor> {
        let state = self.after_attention(student, layer)?;
        student.add_ffn(layer, &state, &gated(student, layer, &state)?)
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
/// Where norms stand behind the blocks, the matrices do not add to the stream itself, and `student` comes back as it is.
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
    if student.spec.post_norms {
        return Ok(student.clone());
    }
    let mut mended = student.clone();
    let mut mending = Mending::new(teacher, student, ids, length)?;
    let ends = kept[1..].iter().copied().chain([layers]);
    for (layer, end) in ends.enumerate() {
        mending.walk_teacher(layer, end)?;
        mending.fit(layer)?;
        for role in [Role::AttnOut, Role::FfnDown] {
            mended.weights.insert(role, layer, mending.student.matrix(role, layer)?.matrix()?);
        }
        progress(layer + 1, kept.len());
    }
    Ok(mended)
}

/// Both models on their way through the text.
struct Mending {
    teacher: Decoder,
    student: Decoder,
    length: usize,
    groups: Vec<Group>,
    /// Windows that are in no regression.
    judges: Group,
    /// What the teacher says of these.
    reference: Reference,
    /// The teacher's layers that all windows have gone through.
    walked: usize,
}

impl Mending {
    fn new(teacher: &Model, student: &Model, ids: &[u32], length: usize) -> Result<Self, StudentError> {
        let windows = ids.len() / length;
        // A single window judges itself.
        let judges = if windows == 1 { 0 } else { (windows / 8).clamp(1, JUDGES) };
        let (fitted, judging) = ids.split_at((windows - judges) * length);
        let judging = if judges == 0 { fitted } else { judging };
        let teacher = Decoder::new(&teacher.spec, &teacher.weights)?;
        let student = Decoder::new(&student.spec, &student.weights)?;
        let groups = fitted.chunks(GROUP.div_ceil(length) * length);
        let groups = groups.map(|ids| Group::new(&teacher, &student, ids)).collect::<Result<_, _>>()?;
        let hidden = teacher.hidden(judging, judging.len() / length, length)?;
        let reference = Reference::new(&hidden, &teacher.head()?, (0..judging.len()).collect())?;
        let judges = Group::new(&teacher, &student, judging)?;
        Ok(Self { teacher, student, length, groups, judges, reference, walked: 0 })
    }

    /// Brings the teacher before its layer `end`, and the student into the attention of its own.
    fn walk_teacher(&mut self, layer: usize, end: usize) -> candle_core::Result<()> {
        let (teacher, student, length) = (&self.teacher, &self.student, self.length);
        for group in self.groups.iter_mut().chain([&mut self.judges]) {
            for layer in self.walked..end {
                group.wanted = teacher.block(layer, &group.wanted, group.tokens / length, length)?;
            }
            group.mixed = student.mix(layer, &student.attention_input(layer, &group.state)?, length)?;
        }
        self.walked = end;
        Ok(())
    }

    /// Fits the two matrices of `layer` and goes through it.
    fn fit(&mut self, layer: usize) -> Result<(), StudentError> {
        let before = [self.matrix(Role::AttnOut, layer)?, self.matrix(Role::FfnDown, layer)?];
        let untouched = self.divergence(layer)?;
        // How far the attention goes shows only with a down projection that goes with it: one of a few tokens will do.
        let fitted = self.fit_attention(layer)?;
        let mut best = (f64::INFINITY, before[0].clone());
        for step in STEPS {
            let moved = between(&before[0], &fitted, step)?;
            self.replace(Role::AttnOut, layer, &moved)?;
            self.replace(Role::FfnDown, layer, &self.fit_down(layer, &before[1], &self.groups[..1])?)?;
            let divergence = self.divergence(layer)?;
            if divergence < best.0 {
                best = (divergence, moved);
            }
        }
        self.replace(Role::AttnOut, layer, &best.1)?;
        let attention = best.1;
        let fitted = self.fit_down(layer, &before[1], &self.groups)?;
        let mut best = (untouched, before.clone());
        for step in STEPS {
            let moved = between(&before[1], &fitted, step)?;
            self.replace(Role::FfnDown, layer, &moved)?;
            let divergence = self.divergence(layer)?;
            if divergence < best.0 {
                best = (divergence, [attention.clone(), moved]);
            }
        }
        for (role, matrix) in [Role::AttnOut, Role::FfnDown].into_iter().zip(&best.1) {
            self.replace(role, layer, matrix)?;
        }
        for group in self.groups.iter_mut().chain([&mut self.judges]) {
            group.state = group.after_layer(&self.student, layer)?;
        }
        Ok(())
    }

    fn norm_eps(&self) -> f32 {
        self.teacher.spec().norm_eps
    }

    fn matrix(&self, role: Role, layer: usize) -> candle_core::Result<Tensor> {
        self.student.matrix(role, layer)?.matrix()
    }

    fn replace(&mut self, role: Role, layer: usize, matrix: &Tensor) -> candle_core::Result<()> {
        self.student.replace(role, layer, Projection::Dense(matrix.clone()))
    }

    /// KL(teacher || student's layers up to `layer`, then the teacher's), nats per token of the judges.
    fn divergence(&self, layer: usize) -> Result<f64, StudentError> {
        let (teacher, group) = (&self.teacher, &self.judges);
        let mut state = group.after_layer(&self.student, layer)?;
        for layer in self.walked..teacher.spec().layers {
            state = teacher.block(layer, &state, group.tokens / self.length, self.length)?;
        }
        self.reference.divergence(&teacher.final_norm(&state)?, &teacher.head()?)
    }

    /// The attention's output where it serves best beside a down projection that is fitted with it.
    fn fit_attention(&self, layer: usize) -> Result<Tensor, StudentError> {
        let out = self.matrix(Role::AttnOut, layer)?;
        let both = Tensor::cat(&[&out, &self.matrix(Role::FfnDown, layer)?], 1)?;
        let mut moments = Moments::new(both.dim(1)?, both.dim(0)?);
        for group in &self.groups {
            let gated = gated(&self.student, layer, &group.after_attention(&self.student, layer)?)?;
            add(
                &mut moments,
                &Tensor::cat(&[&group.mixed, &gated], 1)?,
                group,
                &group.state,
                self.norm_eps(),
            )?;
        }
        Ok(fit(&both, &moments, &self.groups)?.narrow(1, 0, out.dim(1)?)?.contiguous()?)
    }

    /// The down projection `down` fitted to states after attention.
    fn fit_down(&self, layer: usize, down: &Tensor, groups: &[Group]) -> Result<Tensor, StudentError> {
        let mut moments = Moments::new(down.dim(1)?, down.dim(0)?);
        for group in groups {
            let state = group.after_attention(&self.student, layer)?;
            add(&mut moments, &gated(&self.student, layer, &state)?, group, &state, self.norm_eps())?;
        }
        fit(down, &moments, groups)
    }
}

/// `from`, moved by `step` of the way to `to`.
fn between(from: &Tensor, to: &Tensor, step: f64) -> candle_core::Result<Tensor> {
    from + ((to - from)? * step)?
}

/// Adds what leads from `inputs` to what `state` lacks. The next norm divides a token by its size, and so do we: else
/// the few tokens of enormous states would be all that counts.
fn add(
    moments: &mut Moments,
    inputs: &Tensor,
    group: &Group,
    state: &Tensor,
    norm_eps: f32,
) -> candle_core::Result<()> {
    let weight = (group.wanted.sqr()?.mean_keepdim(1)? + f64::from(norm_eps))?.powf(-0.5)?;
    let lacks = (&group.wanted - state)?;
    moments.add(&inputs.broadcast_mul(&weight)?, Some(&lacks.broadcast_mul(&weight)?))
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
                    *moved = moments.cross[row * cols + columns[i]] - dot(old, &gram[i * n..][..n]);
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
