//! The head and the loss, fused: `alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy`
//! (Hinton et al., 2015), averaged over the scored tokens.
//!
//! Logits over a whole vocabulary are the largest thing in a step. They exist for [`CHUNK`] tokens at a
//! time, once for the teacher and once for the student; the student's buffer becomes the gradient in
//! place and is spent on both weight and input gradients before the next chunk. The gradients are
//! therefore computed in the forward pass and only scaled in the backward pass.

use std::sync::Mutex;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::gradients::into_buffer;
use super::ops::{Matrix, capped, exp, gemm, linear, rows_cols, slope, tensor, values, with_values};

/// Tokens whose logits exist at one time.
const CHUNK: usize = 128;

/// A target that is not scored.
pub const IGNORE: u32 = u32::MAX;

/// What makes logits of final hidden states.
#[derive(Clone, Debug)]
pub struct Head {
    /// `[vocab, hidden]`.
    pub weight: Tensor,
    /// Logits `x` become `cap * tanh(x / cap)`; 0 if they stay as they are.
    pub soft_cap: f32,
}

impl Head {
    /// Logits `[n, vocab]` of hidden states `[n, hidden]`, all at once and with a gradient.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = linear(hidden, &self.weight)?;
        if self.soft_cap == 0.0 {
            return Ok(logits);
        }
        let cap = f64::from(self.soft_cap);
        (logits / cap)?.tanh()? * cap
    }
}

/// What is minimized.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// Share of the soft loss, 0 to 1.
    pub alpha: f64,
    /// Temperature of the soft loss, above 0.
    pub temperature: f64,
}

/// A loss and what it is made of, averaged over the scored tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossParts {
    /// The loss.
    pub loss: f64,
    /// KL(teacher || student) at the temperature, in nats; 0 without a teacher.
    pub kl: f64,
    /// Cross-entropy with the targets, in nats.
    pub cross_entropy: f64,
    /// Scored tokens.
    pub tokens: usize,
}

/// How far a student is from its teacher, averaged over the scored tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Divergence {
    /// KL(teacher || student) in nats.
    pub kl: f64,
    /// Cross-entropy of the teacher with the targets, in nats.
    pub teacher_cross_entropy: f64,
    /// Cross-entropy of the student with the targets, in nats.
    pub student_cross_entropy: f64,
    /// Share of tokens at which both prefer the same next token.
    pub top1_agreement: f64,
    /// Scored tokens.
    pub tokens: usize,
}

/// The loss, times `scale`, as a scalar to run backward from, and its parts (without `scale`).
///
/// `student_hidden` is `[n, hidden]`, `teacher` the same pair of its own width, `targets` the `n` next tokens, [`IGNORE`] where nothing is to be learned.
///
/// # Errors
/// The shapes do not fit, or a target lies outside the vocabulary.
pub fn loss(
    student_hidden: &Tensor,
    student_head: &Head,
    teacher: Option<(&Tensor, &Head)>,
    targets: &[u32],
    objective: &Objective,
    scale: f64,
) -> Result<(Tensor, LossParts)> {
    let shared = std::sync::Arc::new(Mutex::new(LossParts::default()));
    let op = HeadLoss {
        teacher: teacher.map(|(hidden, head)| (hidden.clone(), head.clone())),
        targets: targets.to_vec(),
        soft_cap: student_head.soft_cap,
        trains_head: student_head.weight.track_op(),
        objective: *objective,
        scale,
        parts: shared.clone(),
        gradients: Mutex::new(None),
    };
    let loss = student_hidden.apply_op2(&student_head.weight, op)?;
    let parts = *shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok((loss, parts))
}

/// Compares a student with its teacher without any gradient; arguments as for [`loss`].
///
/// # Errors
/// As for [`loss`].
pub fn divergence(
    student_hidden: &Tensor,
    student_head: &Head,
    teacher_hidden: &Tensor,
    teacher_head: &Head,
    targets: &[u32],
) -> Result<Divergence> {
    with_side(student_hidden, student_head, |student| {
        with_side(teacher_hidden, teacher_head, |teacher| compare(student, teacher, targets))
    })
}

fn compare(student: &Side<'_>, teacher: &Side<'_>, targets: &[u32]) -> Result<Divergence> {
    let scored = scored(targets, student.rows, student.vocab)?;
    student.must_match(teacher)?;
    let mut sums = Divergence::default();
    let vocab = student.vocab;
    let mut buffers = [vec![0.0; CHUNK * vocab], vec![0.0; CHUNK * vocab]];
    for chunk in scored.chunks(CHUNK) {
        let [s, t] = &mut buffers;
        let (s, t) = (&mut s[..chunk.len() * vocab], &mut t[..chunk.len() * vocab]);
        student.logits(chunk, s);
        teacher.logits(chunk, t);
        let rows: Vec<(Row, bool)> = s
            .par_chunks_mut(vocab)
            .zip(t.par_chunks_mut(vocab))
            .zip(chunk)
            .map(|((s, t), &(_, target))| {
                let agree = argmax(s) == argmax(t);
                (Row::new(s, Some(t), target, 1.0), agree)
            })
            .collect();
        for (row, agree) in rows {
            sums.kl += row.kl;
            sums.student_cross_entropy += row.cross_entropy;
            sums.teacher_cross_entropy += row.teacher_cross_entropy;
            sums.top1_agreement += f64::from(u8::from(agree));
        }
    }
    let count = scored.len().max(1) as f64;
    Ok(Divergence {
        kl: sums.kl / count,
        teacher_cross_entropy: sums.teacher_cross_entropy / count,
        student_cross_entropy: sums.student_cross_entropy / count,
        top1_agreement: sums.top1_agreement / count,
        tokens: scored.len(),
    })
}

/// Rows with something to learn, and their targets.
fn scored(targets: &[u32], rows: usize, vocab: usize) -> Result<Vec<(usize, u32)>> {
    if targets.len() != rows {
        bail!("loss: {} targets for {rows} rows", targets.len());
    }
    let scored: Vec<_> =
        targets.iter().copied().enumerate().filter(|(_, target)| *target != IGNORE).collect();
    match scored.iter().find(|(_, target)| *target as usize >= vocab) {
        Some((row, target)) => bail!("loss: target {target} in row {row}, the vocabulary has {vocab}"),
        None => Ok(scored),
    }
}

/// First index of the largest value.
fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = index;
        }
    }
    best
}

/// Final hidden states and the head of one model.
struct Side<'a> {
    hidden: &'a [f32],
    head: &'a [f32],
    soft_cap: f32,
    rows: usize,
    width: usize,
    vocab: usize,
}

/// Calls `body` with a pair of tensors as a [`Side`].
fn with_side<T>(hidden: &Tensor, head: &Head, body: impl FnOnce(&Side<'_>) -> Result<T>) -> Result<T> {
    let (shape, head_shape) = (hidden.dims2()?, head.weight.dims2()?);
    with_values(hidden, |hidden| {
        with_values(&head.weight, |weight| {
            body(&Side { soft_cap: head.soft_cap, ..Side::new(hidden, shape, weight, head_shape)? })
        })
    })
}

impl<'a> Side<'a> {
    fn new(
        hidden: &'a [f32],
        (rows, width): (usize, usize),
        head: &'a [f32],
        (vocab, head_width): (usize, usize),
    ) -> Result<Self> {
        if width != head_width {
            bail!("loss: hidden states of {width}, a head of {head_width}");
        }
        Ok(Self { hidden, head, soft_cap: 0.0, rows, width, vocab })
    }

    fn must_match(&self, teacher: &Side<'_>) -> Result<()> {
        if (teacher.rows, teacher.vocab) != (self.rows, self.vocab) {
            bail!(
                "loss: teacher [{}, {}], student [{}, {}]",
                teacher.rows,
                teacher.vocab,
                self.rows,
                self.vocab
            );
        }
        Ok(())
    }

    /// Hidden states of the scored rows, one after the other.
    fn pick(&self, chunk: &[(usize, u32)]) -> Vec<f32> {
        chunk.iter().flat_map(|(row, _)| &self.hidden[row * self.width..][..self.width]).copied().collect()
    }

    /// Logits of the scored rows, `[chunk.len(), vocab]`.
    fn logits(&self, chunk: &[(usize, u32)], out: &mut [f32]) {
        let hidden = self.pick(chunk);
        let hidden = Matrix::new(&hidden, chunk.len(), self.width);
        gemm(out, hidden, Matrix::new(self.head, self.vocab, self.width).t(), 1.0, false, true);
        if self.soft_cap > 0.0 {
            out.par_chunks_mut(self.vocab).flatten().for_each(|x| *x = capped(*x, self.soft_cap));
        }
    }
}

/// What one row adds, and what its gradient needs.
struct Row {
    kl: f64,
    cross_entropy: f64,
    teacher_cross_entropy: f64,
    /// One over the sum of the exponentials that the student's buffer now holds.
    student_scale: f32,
    /// The same for the teacher's.
    teacher_scale: f32,
}

impl Row {
    /// Sums up one row of logits. Afterwards both buffers hold `exp((logit - max) / T)`.
    fn new(s: &mut [f32], teacher: Option<&mut [f32]>, target: u32, temperature: f32) -> Self {
        let target = target as usize;
        let cool = 1.0 / temperature;
        let (s_target, s_max) = (f64::from(s[target]), max(s));
        // Cross-entropy is at temperature 1, whatever the soft loss is at.
        let sum_at_one = if temperature == 1.0 { None } else { Some(sum(s, |x| exp(x - s_max))) };
        let mut row = Self {
            kl: 0.0,
            cross_entropy: 0.0,
            teacher_cross_entropy: 0.0,
            student_scale: 0.0,
            teacher_scale: 0.0,
        };
        let s_sum = match teacher {
            None => exponentiate(s, s_max, cool),
            Some(t) => {
                let (t_target, t_max) = (f64::from(t[target]), max(t));
                let t_cross = |sum: f64| f64::from(t_max) + sum.ln() - t_target;
                let t_sum_at_one = sum_at_one.map(|_| sum(t, |x| exp(x - t_max)));
                let sums = exponentiate_both(s, s_max, t, t_max, cool);
                let normalizer = |max: f32, sum: f64| f64::from(max * cool) + sum.ln();
                row.kl = sums.difference / sums.teacher * f64::from(cool)
                    - (normalizer(t_max, sums.teacher) - normalizer(s_max, sums.student));
                row.teacher_cross_entropy = t_cross(t_sum_at_one.unwrap_or(sums.teacher));
                row.teacher_scale = (1.0 / sums.teacher) as f32;
                sums.student
            }
        };
        row.cross_entropy = f64::from(s_max) + sum_at_one.unwrap_or(s_sum).ln() - s_target;
        row.student_scale = (1.0 / s_sum) as f32;
        row
    }
}

/// Lanes of a sum: independent chains that a compiler keeps in vectors.
const LANES: usize = 16;

fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Sum of `f(x)`: in f32 over short runs, in f64 over the whole.
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0;
    for run in values.chunks(4096) {
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = run.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += f(*value);
            }
        }
        total += f64::from(lanes.iter().sum::<f32>() + rest.iter().map(|x| f(*x)).sum::<f32>());
    }
    total
}

/// `x = exp((x - max) / T)` in place; answers the sum.
fn exponentiate(values: &mut [f32], max: f32, cool: f32) -> f64 {
    values.iter_mut().for_each(|x| *x = exp((*x - max) * cool));
    sum(values, |x| x)
}

struct BothSums {
    student: f64,
    teacher: f64,
    /// Sum of `exp((t - t_max) / T) * (t - s)`.
    difference: f64,
}

/// [`exponentiate`] for student and teacher at once, with the cross term of the divergence.
fn exponentiate_both(s: &mut [f32], s_max: f32, t: &mut [f32], t_max: f32, cool: f32) -> BothSums {
    let mut sums = BothSums { student: 0.0, teacher: 0.0, difference: 0.0 };
    for (s, t) in s.chunks_mut(4096).zip(t.chunks_mut(4096)) {
        let mut lanes = [[0f32; LANES]; 3];
        let mut one = |lane: usize, s: &mut f32, t: &mut f32| {
            let difference = *t - *s;
            *s = exp((*s - s_max) * cool);
            *t = exp((*t - t_max) * cool);
            lanes[0][lane] += *s;
            lanes[1][lane] += *t;
            lanes[2][lane] += *t * difference;
        };
        let ((s, s_rest), (t, t_rest)) = (s.as_chunks_mut::<LANES>(), t.as_chunks_mut::<LANES>());
        for (s, t) in s.iter_mut().zip(t) {
            for lane in 0..LANES {
                one(lane, &mut s[lane], &mut t[lane]);
            }
        }
        for (s, t) in s_rest.iter_mut().zip(t_rest) {
            one(0, s, t);
        }
        let [student, teacher, difference] = lanes.map(|lanes| f64::from(lanes.iter().sum::<f32>()));
        sums.student += student;
        sums.teacher += teacher;
        sums.difference += difference;
    }
    sums
}

struct HeadLoss {
    teacher: Option<(Tensor, Head)>,
    targets: Vec<u32>,
    /// The student's.
    soft_cap: f32,
    /// The head needs a gradient too; one that is frozen does not.
    trains_head: bool,
    objective: Objective,
    scale: f64,
    parts: std::sync::Arc<Mutex<LossParts>>,
    /// Gradients of the hidden states and, if it is trained, of the head, made in the forward pass.
    gradients: Mutex<Option<(Tensor, Option<Tensor>)>>,
}

impl HeadLoss {
    /// The loss and its gradients for the student's hidden states and head, the latter empty if it is frozen.
    fn forward(&self, student: &Side<'_>) -> Result<(LossParts, Vec<f32>, Vec<f32>)> {
        match &self.teacher {
            None => self.forward_beside(student, None),
            Some((hidden, head)) => {
                with_side(hidden, head, |teacher| self.forward_beside(student, Some(teacher)))
            }
        }
    }

    fn forward_beside(
        &self,
        student: &Side<'_>,
        teacher: Option<&Side<'_>>,
    ) -> Result<(LossParts, Vec<f32>, Vec<f32>)> {
        let (vocab, width) = (student.vocab, student.width);
        teacher.map_or(Ok(()), |teacher| student.must_match(teacher))?;
        let scored = scored(&self.targets, student.rows, vocab)?;
        let alpha = if teacher.is_some() { self.objective.alpha } else { 0.0 };
        let temperature = self.objective.temperature;
        let per_token = self.scale / scored.len().max(1) as f64;
        // d/ds of alpha T^2 KL is alpha T (q_T - p_T); of (1 - alpha) CE it is (1 - alpha)(q_1 - target).
        let soft = (per_token * alpha * temperature) as f32;
        let hard = (per_token * (1.0 - alpha)) as f32;

        let mut sums = LossParts { tokens: scored.len(), ..LossParts::default() };
        let mut dhidden = vec![0.0; student.rows * width];
        let mut dhead = vec![0.0; if self.trains_head { vocab * width } else { 0 }];
        let size = CHUNK.min(scored.len()) * vocab;
        let mut s_buffer = vec![0.0; size];
        let mut t_buffer = vec![0.0; if teacher.is_some() { size } else { 0 }];
        let mut before = Vec::new();
        for chunk in scored.chunks(CHUNK) {
            let s = &mut s_buffer[..chunk.len() * vocab];
            student.logits(chunk, s);
            if student.soft_cap > 0.0 {
                before.clear();
                before.extend_from_slice(s);
            }
            let rows: Vec<Row> = match teacher {
                Some(teacher) => {
                    let t = &mut t_buffer[..chunk.len() * vocab];
                    teacher.logits(chunk, t);
                    s.par_chunks_mut(vocab)
                        .zip(t.par_chunks_mut(vocab))
                        .zip(chunk)
                        .map_init(Vec::new, |spare, ((s, t), &(_, target))| {
                            row_gradient(s, Some(t), target, temperature as f32, soft, hard, spare)
                        })
                        .collect()
                }
                None => s
                    .par_chunks_mut(vocab)
                    .zip(chunk)
                    .map_init(Vec::new, |spare, (s, &(_, target))| {
                        row_gradient(s, None, target, 1.0, 0.0, hard, spare)
                    })
                    .collect(),
            };
            for row in rows {
                sums.kl += row.kl;
                sums.cross_entropy += row.cross_entropy;
            }
            if student.soft_cap > 0.0 {
                let rows = s.par_chunks_mut(vocab).zip(before.par_chunks(vocab));
                rows.for_each(|(grads, logits)| {
                    grads.iter_mut().zip(logits).for_each(|(g, x)| *g *= slope(*x, student.soft_cap));
                });
            }
            let grad = Matrix::new(s, chunk.len(), vocab);
            let mut dpicked = vec![0.0; chunk.len() * width];
            gemm(&mut dpicked, grad, Matrix::new(student.head, vocab, width), 1.0, false, true);
            if self.trains_head {
                let picked = student.pick(chunk);
                gemm(&mut dhead, grad.t(), Matrix::new(&picked, chunk.len(), width), 1.0, true, true);
            }
            for ((row, _), values) in chunk.iter().zip(dpicked.chunks_exact(width)) {
                dhidden[row * width..][..width].copy_from_slice(values);
            }
        }
        let count = scored.len().max(1) as f64;
        sums.kl /= count;
        sums.cross_entropy /= count;
        sums.loss = alpha * temperature * temperature * sums.kl + (1.0 - alpha) * sums.cross_entropy;
        Ok((sums, dhidden, dhead))
    }
}

/// Turns one row of student logits into its gradient.
fn row_gradient(
    s: &mut [f32],
    mut teacher: Option<&mut [f32]>,
    target: u32,
    temperature: f32,
    soft: f32,
    hard: f32,
    spare: &mut Vec<f32>,
) -> Row {
    let mixed = temperature != 1.0 && hard != 0.0;
    if mixed {
        // The hard loss needs the student at temperature 1 as well.
        spare.clear();
        let max = max(s);
        spare.extend(s.iter().map(|x| exp(x - max)));
    }
    let row = Row::new(s, teacher.as_deref_mut(), target, temperature);
    let own = row.student_scale * if mixed { soft } else { soft + hard };
    match teacher {
        Some(t) => {
            let theirs = row.teacher_scale * soft;
            s.iter_mut().zip(t).for_each(|(s, t)| *s = *s * own - *t * theirs);
        }
        None => s.iter_mut().for_each(|s| *s *= own),
    }
    if mixed {
        let scale = (f64::from(hard) / sum(spare, |x| x)) as f32;
        s.iter_mut().zip(spare.iter()).for_each(|(s, x)| *s += *x * scale);
    }
    s[target as usize] -= hard;
    row
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
        let student = Side { soft_cap: self.soft_cap, ..Side::new(hidden, shape, head, head_shape)? };
        let (parts, dhidden, dhead) = self.forward(&student)?;
        let dhead = self.trains_head.then(|| tensor(dhead, head_shape.0, head_shape.1)).transpose()?;
        let gradients = (tensor(dhidden, shape.0, shape.1)?, dhead);
        *self.parts.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = parts;
        *self.gradients.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(gradients);
        Ok((CpuStorage::F32(vec![(parts.loss * self.scale) as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        _hidden: &Tensor,
        head: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradients = self.gradients.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some((dhidden, dhead)) = gradients else { bail!("loss: backward ran twice") };
        let factor = grad.to_scalar::<f32>()?;
        let dhidden = if factor == 1.0 { dhidden } else { (dhidden * f64::from(factor))? };
        let Some(dhead) = dhead else { return Ok((Some(dhidden), None)) };
        let buffered = into_buffer(head, |sum, add| {
            with_values(&dhead, |dhead| {
                sum.par_chunks_mut(1 << 14).zip(dhead.par_chunks(1 << 14)).for_each(|(sum, dhead)| {
                    for (sum, dhead) in sum.iter_mut().zip(dhead) {
                        *sum = dhead * factor + if add { *sum } else { 0.0 };
                    }
                });
                Ok(())
            })
        })?;
        let dhead = if buffered { None } else { Some((dhead * f64::from(factor))?) };
        Ok((Some(dhidden), dhead))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    const TARGETS: [u32; 6] = [3, IGNORE, 0, 16, 5, 16];

    fn head(weight: &Tensor, soft_cap: f32) -> Head {
        Head { weight: weight.clone(), soft_cap }
    }

    fn objective(alpha: f64, temperature: f64) -> Objective {
        Objective { alpha, temperature }
    }

    #[test]
    fn gradients_of_every_mix() {
        let (hidden, weight) = (check::matrix(1, 6, 8), check::matrix(2, 17, 8));
        let (teacher_hidden, teacher_weight) = (check::matrix(3, 6, 5), check::matrix(4, 17, 5));
        for (alpha, temperature) in [(1.0, 1.0), (0.7, 1.0), (1.0, 2.0), (0.4, 3.0), (0.0, 1.0)] {
            for cap in [0.0, 1.5] {
                let teacher_head = head(&teacher_weight, 2.0 * cap);
                check::gradients(&[hidden.clone(), weight.clone()], |x| {
                    let (student, teacher) = (head(&x[1], cap), Some((&teacher_hidden, &teacher_head)));
                    Ok(loss(&x[0], &student, teacher, &TARGETS, &objective(alpha, temperature), 10.0)?.0)
                });
            }
        }
        check::gradients(&[hidden, weight], |x| {
            Ok(loss(&x[0], &head(&x[1], 0.0), None, &TARGETS, &objective(1.0, 1.0), 10.0)?.0)
        });
    }

    /// The hidden states get the same gradient beside a head that is frozen, and that head none.
    #[test]
    fn a_frozen_head_gets_no_gradient() {
        let hidden = candle_core::Var::from_tensor(&check::matrix(1, 6, 8)).unwrap();
        let weight = candle_core::Var::from_tensor(&check::matrix(2, 17, 8)).unwrap();
        let gradients = |weight: &Tensor| {
            let value =
                loss(&hidden, &head(weight, 1.5), None, &TARGETS, &objective(0.0, 1.0), 1.0).unwrap().0;
            let store = value.backward().unwrap();
            (store.get(&hidden).unwrap().to_vec2::<f32>().unwrap(), store.get(weight).is_some())
        };
        let (trained, frozen) = (gradients(&weight), gradients(&weight.as_tensor().detach()));
        assert_eq!(trained.0, frozen.0);
        assert!(trained.1 && !frozen.1);
    }

    /// `ln softmax(logits / T)` in f64, from the definition.
    fn log_softmax(hidden: &Tensor, head: &Head, temperature: f64) -> Vec<Vec<f64>> {
        let logits = head.logits(hidden).unwrap().to_vec2::<f32>().unwrap();
        logits
            .iter()
            .map(|row| {
                let row: Vec<f64> = row.iter().map(|&x| f64::from(x) / temperature).collect();
                let sum: f64 = row.iter().map(|x| x.exp()).sum();
                row.iter().map(|x| x - sum.ln()).collect()
            })
            .collect()
    }

    #[test]
    fn parts_agree_with_the_definition_over_many_chunks() {
        let rows = 2 * CHUNK + 3;
        let (hidden, student_head) = (check::matrix(1, rows, 8), head(&check::matrix(2, 50, 8), 0.9));
        let (teacher_hidden, teacher_head) = (check::matrix(3, rows, 8), head(&check::matrix(4, 50, 8), 0.0));
        let targets: Vec<u32> =
            (0..rows as u32).map(|i| if i % 7 == 0 { IGNORE } else { i * 13 % 50 }).collect();
        let scored: Vec<usize> = (0..rows).filter(|i| i % 7 != 0).collect();
        let mean = |f: &dyn Fn(usize) -> f64| scored.iter().map(|&i| f(i)).sum::<f64>() / scored.len() as f64;
        for temperature in [1.0, 2.5] {
            let (p, q) = (
                log_softmax(&teacher_hidden, &teacher_head, temperature),
                log_softmax(&hidden, &student_head, temperature),
            );
            let q_one = log_softmax(&hidden, &student_head, 1.0);
            let kl = mean(&|i| p[i].iter().zip(&q[i]).map(|(p, q)| p.exp() * (p - q)).sum());
            let ce = mean(&|i| -q_one[i][targets[i] as usize]);
            let teacher = Some((&teacher_hidden, &teacher_head));
            let (value, parts) =
                loss(&hidden, &student_head, teacher, &targets, &objective(0.3, temperature), 2.0).unwrap();
            assert!((parts.kl - kl).abs() < 1e-5, "{} {kl}", parts.kl);
            assert!((parts.cross_entropy - ce).abs() < 1e-5, "{} {ce}", parts.cross_entropy);
            let expected = 0.3 * temperature * temperature * kl + 0.7 * ce;
            assert!((parts.loss - expected).abs() < 1e-5);
            assert!((f64::from(value.to_scalar::<f32>().unwrap()) - 2.0 * expected).abs() < 1e-4);
            assert_eq!(parts.tokens, scored.len());
        }
        let found = divergence(&hidden, &student_head, &teacher_hidden, &teacher_head, &targets).unwrap();
        let p = log_softmax(&teacher_hidden, &teacher_head, 1.0);
        let q = log_softmax(&hidden, &student_head, 1.0);
        let kl = mean(&|i| p[i].iter().zip(&q[i]).map(|(p, q)| p.exp() * (p - q)).sum());
        assert!((found.kl - kl).abs() < 1e-5);
        assert!((found.teacher_cross_entropy - mean(&|i| -p[i][targets[i] as usize])).abs() < 1e-5);
        let same = divergence(&hidden, &student_head, &hidden, &student_head, &targets).unwrap();
        assert!(same.kl.abs() < 1e-6 && same.top1_agreement == 1.0);
    }

    #[test]
    fn bad_shapes_and_targets_are_refused() {
        let (hidden, student) = (check::matrix(1, 2, 8), head(&check::matrix(2, 17, 8), 0.0));
        let plain = objective(0.0, 1.0);
        assert!(loss(&hidden, &student, None, &[1], &plain, 1.0).is_err());
        assert!(loss(&hidden, &student, None, &[1, 17], &plain, 1.0).is_err());
        let other = head(&check::matrix(3, 16, 8), 0.0);
        assert!(loss(&hidden, &student, Some((&hidden, &other)), &[1, 2], &plain, 1.0).is_err());
    }
}
