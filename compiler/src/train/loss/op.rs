//! The head and the loss as one operation of the graph.
//!
//! Its gradients are computed in the forward pass and only scaled in the backward pass.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::dense::{Row, Scales, row_gradient};
use super::objective::Objective;
use super::side::{CHUNK, Side, scored, with_side};
use super::sparse::{SparseTargets, sparse_gradient};
use super::universal::{Universal, check_groups, group_gradient};
use super::{Head, LossParts};
use crate::train::gradients::into_buffer;
use crate::train::ops::{
    Matrix, Tiles, product, product_into, rows_cols, slope, tensor, threads, values, widest, with_values,
    zeros,
};

/// What the student is to say.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// The text.
    Text,
    /// What a teacher with these final hidden states and this head says, and the text.
    Teacher(&'a Tensor, &'a Head),
    /// What was kept of a teacher's distributions, and the text; where nothing was, the text alone.
    Sparse(&'a Arc<SparseTargets>),
    /// Sorted probabilities of a teacher of any vocabulary, and the text; outside of groups the text alone.
    Universal(&'a Arc<Universal>),
}

/// A [`Target`] that an operation can keep.
enum Owned {
    Text,
    Teacher(Tensor, Head),
    Sparse(Arc<SparseTargets>),
    Universal(Arc<Universal>),
}

impl From<Target<'_>> for Owned {
    fn from(target: Target<'_>) -> Self {
        match target {
            Target::Text => Self::Text,
            Target::Teacher(hidden, head) => Self::Teacher(hidden.clone(), head.clone()),
            Target::Sparse(rows) => Self::Sparse(rows.clone()),
            Target::Universal(targets) => Self::Universal(targets.clone()),
        }
    }
}

/// A teacher during one forward pass.
enum Beside<'a> {
    Text,
    Teacher(&'a Side<'a>),
    Sparse(&'a SparseTargets),
    Universal(&'a Universal, &'a Side<'a>),
}

impl Beside<'_> {
    /// Whether there is more than the text to be learned from a row of the batch.
    fn says(&self, row: usize) -> bool {
        match self {
            Self::Text => false,
            Self::Teacher(_) => true,
            Self::Sparse(targets) => !targets.rows[row].is_text(),
            Self::Universal(targets, _) => targets.group_of(row).is_some(),
        }
    }

    /// Parts of the scored rows whose logits exist together: groups are never torn.
    fn chunks<'r>(&self, scored: &'r [(usize, u32)]) -> Vec<&'r [(usize, u32)]> {
        let Self::Universal(targets, _) = self else { return scored.chunks(CHUNK).collect() };
        let mut chunks = Vec::new();
        let mut rest = scored;
        while rest.len() > CHUNK {
            let first = targets.group_of(rest[CHUNK].0).map_or(rest[CHUNK].0, |group| group.student.start);
            let (chunk, tail) = rest.split_at(rest.partition_point(|(row, _)| *row < first));
            chunks.push(chunk);
            rest = tail;
        }
        chunks.push(rest);
        chunks
    }
}

/// The loss, times `scale`, as a scalar to run backward from, and its parts (without `scale`).
///
/// `student_hidden` is `[n, hidden]`, a teacher's of its own width; `targets` are the `n` next tokens,
/// [`IGNORE`](super::IGNORE) where nothing is to be learned.
///
/// # Errors
/// The shapes do not fit, or a target lies outside the vocabulary.
pub fn loss(
    student_hidden: &Tensor,
    student_head: &Head,
    target: Target<'_>,
    targets: &[u32],
    objective: &Objective,
    scale: f64,
) -> Result<(Tensor, LossParts)> {
    let shared = Arc::new(Mutex::new(LossParts::default()));
    let op = HeadLoss {
        teacher: target.into(),
        targets: targets.to_vec(),
        soft_cap: student_head.soft_cap,
        tiles: student_head.tiles.clone(),
        trains_head: student_head.weight.track_op(),
        objective: *objective,
        scale,
        parts: shared.clone(),
        gradients: Mutex::new(None),
    };
    let loss = student_hidden.apply_op2(&student_head.weight, op)?;
    let parts = *shared.lock().unwrap_or_else(PoisonError::into_inner);
    Ok((loss, parts))
}

struct HeadLoss {
    teacher: Owned,
    targets: Vec<u32>,
    /// The student's.
    soft_cap: f32,
    /// What multiplies in place of its head.
    tiles: Option<Tiles>,
    /// The head needs a gradient too; one that is frozen does not.
    trains_head: bool,
    objective: Objective,
    scale: f64,
    parts: Arc<Mutex<LossParts>>,
    /// Gradients of the hidden states and, if it is trained, of the head, made in the forward pass.
    gradients: Mutex<Option<(Tensor, Option<Tensor>)>>,
}

impl HeadLoss {
    /// The loss and its gradients for the student's hidden states and head, the latter empty if it is frozen.
    fn forward(&self, student: &Side<'_>) -> Result<(LossParts, Vec<f32>, Vec<f32>)> {
        match &self.teacher {
            Owned::Text => self.forward_beside(student, &Beside::Text),
            Owned::Teacher(hidden, head) => with_side(hidden, head, |teacher| {
                student.must_match(teacher)?;
                self.forward_beside(student, &Beside::Teacher(teacher))
            }),
            Owned::Sparse(targets) => {
                check_sparse(targets, student)?;
                self.forward_beside(student, &Beside::Sparse(targets))
            }
            Owned::Universal(targets) => with_side(&targets.hidden, &targets.head, |teacher| {
                check_groups(targets, &self.targets, student, teacher)?;
                self.forward_beside(student, &Beside::Universal(targets, teacher))
            }),
        }
    }

    fn forward_beside(
        &self,
        student: &Side<'_>,
        teacher: &Beside<'_>,
    ) -> Result<(LossParts, Vec<f32>, Vec<f32>)> {
        let (vocab, width) = (student.vocab, student.width);
        let scored = scored(&self.targets, student.rows, vocab)?;
        let Objective { temperature, alpha, .. } = self.objective;
        let per_token = self.scale / scored.len().max(1) as f64;
        let scales = Scales {
            objective: self.objective,
            temperature: temperature as f32,
            soft: (per_token * alpha * temperature) as f32,
            hard: (per_token * (1.0 - alpha)) as f32,
            text: per_token as f32,
        };
        let (mut loss, mut sums) = (0.0, Row::default());
        let mut dhidden = vec![0.0; student.rows * width];
        let mut dhead = Vec::new();
        let size = CHUNK.min(scored.len()) * vocab;
        let mut s_buffer = zeros(size);
        let mut t_buffer = zeros(if matches!(teacher, Beside::Teacher(_)) { size } else { 0 });
        let mut before = Vec::new();
        for chunk in teacher.chunks(&scored) {
            let s = &mut s_buffer[..chunk.len() * vocab];
            student.logits(chunk, s)?;
            if student.soft_cap > 0.0 {
                before.clear();
                before.extend_from_slice(s);
            }
            // Added in order: the result does not depend on the threads.
            for (row, (number, _)) in
                gradients(s, vocab, chunk, teacher, &mut t_buffer, &scales)?.iter().zip(chunk)
            {
                let alpha = if teacher.says(*number) { alpha } else { 0.0 };
                loss += alpha * temperature * temperature * row.soft + (1.0 - alpha) * row.cross_entropy;
                sums.kl += row.kl;
                sums.cross_entropy += row.cross_entropy;
            }
            if student.soft_cap > 0.0 {
                let rows = s.chunks_mut(vocab).zip(before.chunks(vocab)).collect();
                threads::map(rows, |(grads, logits)| {
                    grads.iter_mut().zip(logits).for_each(|(g, x)| *g *= slope(*x, student.soft_cap));
                });
            }
            let dpicked = student.dhidden(s)?;
            if self.trains_head {
                let grad = Matrix::new(s, chunk.len(), vocab);
                let picked = student.pick(chunk);
                let picked = Matrix::new(&picked, chunk.len(), width);
                if dhead.is_empty() {
                    dhead = product(grad.t(), picked, 1.0)?;
                } else {
                    product_into(&mut dhead, grad.t(), picked, 1.0, true)?;
                }
            }
            for ((row, _), values) in chunk.iter().zip(dpicked.chunks_exact(width)) {
                dhidden[row * width..][..width].copy_from_slice(values);
            }
        }
        if self.trains_head {
            // Where there is nothing to learn.
            dhead.resize(vocab * width, 0.0);
        }
        let count = scored.len().max(1) as f64;
        let parts = LossParts {
            loss: loss / count,
            kl: sums.kl / count,
            cross_entropy: sums.cross_entropy / count,
            tokens: scored.len(),
        };
        Ok((parts, dhidden, dhead))
    }
}

/// Turns the logits of a chunk into their gradient.
fn gradients(
    s: &mut [f32],
    vocab: usize,
    chunk: &[(usize, u32)],
    teacher: &Beside<'_>,
    buffer: &mut [f32],
    scales: &Scales,
) -> Result<Vec<Row>> {
    let rows = s.chunks_mut(vocab).zip(chunk);
    Ok(match teacher {
        Beside::Text => threads::map(rows.collect(), |(s, (_, target))| {
            row_gradient(s, None, *target, scales, &mut Vec::new())
        }),
        Beside::Teacher(teacher) => {
            let t = &mut buffer[..chunk.len() * vocab];
            teacher.logits(chunk, t)?;
            threads::map(rows.zip(t.chunks_mut(vocab)).collect(), |((s, (_, target)), t)| {
                row_gradient(s, Some(t), *target, scales, &mut Vec::new())
            })
        }
        Beside::Sparse(SparseTargets { sparsity, rows: kept }) => {
            threads::map(rows.collect(), |(s, (row, target))| {
                let mut spare = Vec::new();
                match &kept[*row] {
                    kept if kept.is_text() => row_gradient(s, None, *target, scales, &mut spare),
                    kept => sparse_gradient(s, kept, *sparsity, *target, scales, &mut spare),
                }
            })
        }
        Beside::Universal(targets, teacher) => {
            let parts = split(s, vocab, chunk, targets);
            let rows = threads::map(parts, |(s, rows)| match targets.group_of(rows[0].0) {
                None => Ok(vec![row_gradient(s, None, rows[0].1, scales, &mut Vec::new())]),
                Some(group) => group_gradient(s, rows, group, targets, teacher, scales),
            });
            rows.into_iter().collect::<Result<Vec<_>>>()?.concat()
        }
    })
}

/// Logits of some rows, and the rows with their targets.
type Part<'s, 'r> = (&'s mut [f32], &'r [(usize, u32)]);

/// The logits of each group, and of each row outside of groups.
fn split<'s, 'r>(
    mut s: &'s mut [f32],
    vocab: usize,
    mut chunk: &'r [(usize, u32)],
    targets: &Universal,
) -> Vec<Part<'s, 'r>> {
    let mut parts = Vec::new();
    while let Some((row, _)) = chunk.first() {
        let count = targets.group_of(*row).map_or(1, |group| group.student.len());
        let (logits, tail) = s.split_at_mut(count * vocab);
        let (rows, rest) = chunk.split_at(count);
        parts.push((logits, rows));
        (s, chunk) = (tail, rest);
    }
    parts
}

fn check_sparse(targets: &SparseTargets, student: &Side<'_>) -> Result<()> {
    if targets.rows.len() != student.rows {
        bail!("loss: {} sparse targets for {} rows", targets.rows.len(), student.rows);
    }
    for (index, row) in targets.rows.iter().enumerate() {
        let ascending = row.ids.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = row.ids.last().is_none_or(|id| (*id as usize) < student.vocab);
        if !ascending || !inside || row.ids.len() != row.probabilities.len() {
            bail!("loss: sparse target {index} is none of a vocabulary of {}", student.vocab);
        }
    }
    Ok(())
}

impl CustomOp2 for HeadLoss {
    fn name(&self) -> &'static str {
        "head-loss"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        head: &CpuStorage,
        head_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (shape, head_shape) = (rows_cols(hidden_layout, "loss")?, rows_cols(head_layout, "loss")?);
        let hidden = values(hidden, hidden_layout, "loss")?;
        let head = values(head, head_layout, "loss")?;
        let mut student = Side::new(hidden, shape, head, head_shape)?;
        (student.soft_cap, student.tiles) = (self.soft_cap, self.tiles.as_ref());
        let (parts, dhidden, dhead) = self.forward(&student)?;
        let dhead = self.trains_head.then(|| tensor(dhead, head_shape.0, head_shape.1)).transpose()?;
        let gradients = (tensor(dhidden, shape.0, shape.1)?, dhead);
        *self.parts.lock().unwrap_or_else(PoisonError::into_inner) = parts;
        *self.gradients.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradients);
        Ok((CpuStorage::F32(vec![(parts.loss * self.scale) as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        _hidden: &Tensor,
        head: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((dhidden, dhead)) = gradients else { bail!("loss: backward ran twice") };
        let factor = grad.to_scalar::<f32>()?;
        let dhidden = if factor == 1.0 { dhidden } else { (dhidden * f64::from(factor))? };
        let Some(dhead) = dhead else { return Ok((Some(dhidden), None)) };
        let buffered = into_buffer(head, |sum, add| {
            with_values(&dhead, |dhead| {
                threads::map(sum.chunks_mut(1 << 16).zip(dhead.chunks(1 << 16)).collect(), |(sum, dhead)| {
                    widest!(for (sum, dhead) in sum.iter_mut().zip(dhead) {
                        *sum = dhead * factor + if add { *sum } else { 0.0 };
                    });
                });
                Ok(())
            })
        })?;
        let dhead = if buffered { None } else { Some((dhead * f64::from(factor))?) };
        Ok((Some(dhidden), dhead))
    }
}
