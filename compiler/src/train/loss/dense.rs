//! The loss of one position against the teacher's whole distribution, or against the text alone.

use super::divergences::{At, With, formula};
use super::objective::Objective;
use crate::train::ops::sums::{exponentiate, max, sums_of_pairs, sums_of_triples};
use crate::train::ops::{exp, widest};

/// What one row adds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Row {
    /// KL(teacher || student) at the temperature.
    pub kl: f64,
    /// The weighted divergences at the temperature.
    pub soft: f64,
    /// Of the student with the target, at temperature 1.
    pub cross_entropy: f64,
    /// Of the teacher with the target, at temperature 1; only from [`statistics`].
    pub teacher_cross_entropy: f64,
}

/// How a row's gradient is weighed: `d/ds` of `alpha T^2 D` is `alpha T dD/dz` with `z = s / T`, of
/// `(1 - alpha)` cross-entropy it is `(1 - alpha)(q_1 - target)`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scales {
    pub objective: Objective,
    pub temperature: f32,
    /// Of `dD/dz`.
    pub soft: f32,
    /// Of `q_1 - target`.
    pub hard: f32,
    /// The same where there is nothing but the text.
    pub text: f32,
}

/// Compares one row of logits with the teacher's; both are spent.
pub(super) fn statistics(s: &mut [f32], t: &mut [f32], target: u32) -> Row {
    let (s_target, t_target) = (f64::from(s[target as usize]), f64::from(t[target as usize]));
    let both = Both::new(s, t, 1.0);
    let cross = |max: f32, sum: f64, target: f64| f64::from(max) + sum.ln() - target;
    Row {
        kl: both.kl,
        soft: both.kl,
        cross_entropy: cross(both.s_max, both.s_sum, s_target),
        teacher_cross_entropy: cross(both.t_max, both.t_sum, t_target),
    }
}

/// Two rows of logits that were turned into `exp((logit - max) / T)`.
struct Both {
    s_max: f32,
    t_max: f32,
    s_sum: f64,
    t_sum: f64,
    kl: f64,
}

impl Both {
    fn new(s: &mut [f32], t: &mut [f32], cool: f32) -> Self {
        let (s_max, t_max) = (max(s), max(t));
        let [s_sum, t_sum, difference] = sums_of_pairs(s, t, |s, t| {
            let difference = *t - *s;
            *s = exp((*s - s_max) * cool);
            *t = exp((*t - t_max) * cool);
            [*s, *t, *t * difference]
        });
        let normalizer = |max: f32, sum: f64| f64::from(max * cool) + sum.ln();
        let kl = difference / t_sum * f64::from(cool) - (normalizer(t_max, t_sum) - normalizer(s_max, s_sum));
        Self { s_max, t_max, s_sum, t_sum, kl }
    }
}

/// Turns one row of student logits into its gradient; without a teacher's row only the text counts. The
/// teacher's row is spent, `spare` is memory to use.
pub(super) fn row_gradient(
    s: &mut [f32],
    teacher: Option<&mut [f32]>,
    target: u32,
    scales: &Scales,
    spare: &mut Vec<f32>,
) -> Row {
    let Some(t) = teacher else {
        let cross_entropy = hard(s, target, scales.text, spare);
        s.copy_from_slice(spare);
        return Row { cross_entropy, ..Row::default() };
    };
    let target = target as usize;
    let logit = f64::from(s[target]);
    let (shared, apart) = text_part(s, target as u32, scales, spare);
    let (row, normalizer) = match scales.objective.soft.forward_only() {
        Some(weight) => forward(s, t, weight, scales, shared, spare),
        None => mixture(s, t, scales, shared, spare),
    };
    s[target] -= shared;
    Row { cross_entropy: apart.unwrap_or(normalizer - logit), ..row }
}

/// Cross-entropy is at temperature 1: only there do both losses share the student's exponentials. Answers the scale of
/// the target's gradient that is then still to be taken off; elsewhere the cross-entropy, its gradient in `spare`.
pub(super) fn text_part(s: &[f32], target: u32, scales: &Scales, spare: &mut Vec<f32>) -> (f32, Option<f64>) {
    if scales.temperature == 1.0 {
        spare.clear();
        (scales.hard, None)
    } else {
        (0.0, Some(hard(s, target, scales.hard, spare)))
    }
}

/// Cross-entropy with the target at temperature 1; its gradient, times `scale`, becomes `out`.
pub(super) fn hard(s: &[f32], target: u32, scale: f32, out: &mut Vec<f32>) -> f64 {
    let (logit, max) = (f64::from(s[target as usize]), max(s));
    out.clear();
    out.extend_from_slice(s);
    let sum = exponentiate(out, max, 1.0);
    let factor = (f64::from(scale) / sum) as f32;
    widest!(out.iter_mut().for_each(|x| *x *= factor));
    out[target as usize] -= scale;
    f64::from(max) + sum.ln() - logit
}

/// The forward KL divergence alone: its gradient is `q - p`, and the exponentials that its sums need are
/// all that it needs. Adds `shared * q` and the rest of a gradient, which may be empty; answers the student's
/// normalizer too.
fn forward(
    s: &mut [f32],
    t: &mut [f32],
    weight: f64,
    scales: &Scales,
    shared: f32,
    rest: &[f32],
) -> (Row, f64) {
    let cool = 1.0 / scales.temperature;
    let both = Both::new(s, t, cool);
    let soft = f64::from(scales.soft) * weight;
    let own = ((soft + f64::from(shared)) / both.s_sum) as f32;
    let theirs = (soft / both.t_sum) as f32;
    widest!({
        s.iter_mut().zip(t).for_each(|(s, t)| *s = *s * own - *t * theirs);
        s.iter_mut().zip(rest).for_each(|(s, rest)| *s += rest);
    });
    let row = Row { kl: both.kl, soft: weight * both.kl, ..Row::default() };
    (row, f64::from(both.s_max * cool) + both.s_sum.ln())
}

/// Any mixture of divergences, from logarithms of probabilities; the rest as for [`forward`], in `grad`.
fn mixture(s: &mut [f32], t: &mut [f32], scales: &Scales, shared: f32, grad: &mut Vec<f32>) -> (Row, f64) {
    let cool = 1.0 / scales.temperature;
    let (s_max, t_max) = (max(s), max(t));
    let [s_sum, t_sum] = sums_of_pairs(s, t, |s, t| [exp((*s - s_max) * cool), exp((*t - t_max) * cool)]);
    let (s_log, t_log) = (s_sum.ln() as f32, t_sum.ln() as f32);
    let [kl] = sums_of_pairs(s, t, |s, t| {
        *s = (*s - s_max) * cool - s_log;
        *t = (*t - t_max) * cool - t_log;
        [exp(*t) * (*t - *s)]
    });
    grad.resize(s.len(), 0.0);
    let (mut soft, mut mean) = (0.0, 0.0);
    for (kind, weight) in scales.objective.soft.terms() {
        let pull = Pull { s, t, grad, scale: scales.soft * weight as f32 };
        let [value, pulled] = formula(kind, &scales.objective, pull);
        soft += weight * value;
        mean += weight * pulled;
    }
    let own = (f64::from(shared) - f64::from(scales.soft) * mean) as f32;
    widest!(s.iter_mut().zip(grad).for_each(|(s, grad)| *s = *grad + exp(*s) * own));
    (Row { kl, soft, ..Row::default() }, f64::from(s_max * cool) + s_sum.ln())
}

/// Adds `scale * q g` of a row to its gradient; answers the sums of both parts of the formula.
struct Pull<'a> {
    s: &'a mut [f32],
    t: &'a mut [f32],
    grad: &'a mut [f32],
    scale: f32,
}

impl With for Pull<'_> {
    type Out = [f64; 2];

    fn with(self, f: impl Fn(f32, f32) -> At) -> [f64; 2] {
        let scale = self.scale;
        sums_of_triples(self.s, self.t, self.grad, |s, t, grad| {
            let at = f(*s, *t);
            *grad += scale * at[1];
            at
        })
    }
}
