//! Universal logit distillation: a loss between models of different vocabularies.
//!
//! Which token is which is not known, so probabilities are compared by rank: `sum |q_(i) - p_(i)|` over both
//! distributions in descending order, the shorter one filled up with zeros (Boizard et al., "Towards cross-tokenizer
//! distillation: the universal logit distillation loss for LLMs", TMLR 2025, arXiv 2402.12030).
//!
//! Positions are compared in groups that begin and end at the same bytes of the text (GOLD: Patiño et al., "Unlocking
//! on-policy distillation for any model family", 2025). A group's distribution is that of its first token, times the
//! probabilities that the model gives to the tokens that follow in the group: what it says of the text itself is then
//! the probability of the same bytes on both sides, by the chain rule.

use std::ops::Range;

use candle_core::{Result, Tensor, bail};

use super::dense::{Row, Scales, hard};
use super::side::Side;
use super::sums::{exponentiate, max};
use super::{Head, IGNORE};

/// Most rows of a group on either side.
pub const LONGEST_GROUP: usize = 32;

/// Rows whose tokens spell the same bytes: row `i` predicts a token, the last row of a group the one with which it
/// ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Rows of the student.
    pub student: Range<usize>,
    /// Rows of the teacher.
    pub teacher: Range<usize>,
}

/// A teacher of another vocabulary beside a batch.
#[derive(Clone, Debug)]
pub struct Universal {
    /// The teacher's final hidden states `[rows, hidden]`.
    pub hidden: Tensor,
    /// Its head.
    pub head: Head,
    /// The token of the teacher's that follows each of its rows.
    pub next: Vec<u32>,
    /// Rising on the student's side, each with a row on both sides and at most [`LONGEST_GROUP`].
    pub groups: Vec<Group>,
}

impl Universal {
    /// The group of a row of the student.
    pub(super) fn group_of(&self, row: usize) -> Option<&Group> {
        let after = self.groups.partition_point(|group| group.student.start <= row);
        self.groups[..after].last().filter(|group| group.student.contains(&row))
    }
}

/// Refuses groups that are none of these models, or that reach where nothing is to be learned.
pub(super) fn check_groups(
    targets: &Universal,
    text: &[u32],
    student: &Side<'_>,
    teacher: &Side<'_>,
) -> Result<()> {
    if targets.next.len() != teacher.rows || text.len() != student.rows {
        bail!("loss: {} and {} targets for {} and {} rows", text.len(), targets.next.len(), student.rows, teacher.rows);
    }
    let mut free = 0;
    for group in &targets.groups {
        let whole = |range: &Range<usize>, rows| (1..=LONGEST_GROUP).contains(&range.len()) && range.end <= rows;
        let learned = |rows: &Range<usize>| text[rows.clone()].iter().all(|target| *target != IGNORE);
        let known = |rows: &Range<usize>| {
            targets.next[rows.clone()].iter().all(|token| (*token as usize) < teacher.vocab)
        };
        if group.student.start < free
            || !whole(&group.student, student.rows)
            || !whole(&group.teacher, teacher.rows)
            || !learned(&group.student)
            || !known(&group.teacher)
        {
            bail!("loss: {group:?} is no group of {} and {} rows", student.rows, teacher.rows);
        }
        free = group.student.end;
    }
    Ok(())
}

/// Turns the student's logits of a group's `rows` into their gradient.
///
/// With `c` the product of the probabilities of the tokens behind the first, and `g_i` the sign of
/// `c q_(i) - c_t p_(i)`: `dD/dz = c q (g - sum(q g))` at the first row, and `c sum(q g) (token - q)` at the others.
pub(super) fn group_gradient(
    s: &mut [f32],
    rows: &[(usize, u32)],
    group: &Group,
    targets: &Universal,
    teacher: &Side<'_>,
    scales: &Scales,
) -> Vec<Row> {
    let cool = 1.0 / scales.temperature;
    let vocab = s.len() / rows.len();
    let asked: Vec<_> = group.teacher.clone().map(|row| (row, targets.next[row])).collect();
    let mut t = vec![0.0; asked.len() * teacher.vocab];
    teacher.logits(&asked, &mut t);
    let theirs = chain(&mut t, teacher.vocab, &asked, cool);
    let mut spoken: Vec<f32> = t[..teacher.vocab].to_vec();
    spoken.sort_unstable_by(|a, b| b.total_cmp(a));

    let mut text = Vec::with_capacity(s.len());
    let mut spare = Vec::new();
    let mut out = Vec::with_capacity(rows.len());
    for (s, (_, target)) in s.chunks_exact(vocab).zip(rows) {
        out.push(Row { cross_entropy: hard(s, *target, scales.hard, &mut spare), ..Row::default() });
        text.extend_from_slice(&spare);
    }
    let own = chain(s, vocab, rows, cool);
    let mut order: Vec<u32> = (0..vocab as u32).collect();
    order.sort_unstable_by(|a, b| s[*b as usize].total_cmp(&s[*a as usize]));
    let (mut distance, mut pulled) = (0.0, 0.0);
    let mut signs = vec![0f64; vocab];
    for (rank, token) in order.iter().enumerate() {
        let q = f64::from(s[*token as usize]);
        let difference = own * q - theirs * spoken.get(rank).copied().map_or(0.0, f64::from);
        let sign = if difference == 0.0 { 0.0 } else { difference.signum() };
        signs[*token as usize] = sign;
        distance += difference.abs();
        pulled += sign * q;
    }
    // Ranks that the student has not.
    distance += theirs * spoken.iter().skip(vocab).map(|p| f64::from(*p)).sum::<f64>();
    out[0].soft = distance;
    let scale = f64::from(scales.soft) * own;
    let (first, others) = s.split_at_mut(vocab);
    for (q, sign) in first.iter_mut().zip(&signs) {
        *q = (scale * f64::from(*q) * (sign - pulled)) as f32;
    }
    for (q, (_, token)) in others.chunks_exact_mut(vocab).zip(&rows[1..]) {
        q.iter_mut().for_each(|q| *q = (-scale * pulled * f64::from(*q)) as f32);
        q[*token as usize] += (scale * pulled) as f32;
    }
    s.iter_mut().zip(&text).for_each(|(s, text)| *s += text);
    out
}

/// Turns logits into probabilities; answers the product of those of the tokens behind the first.
fn chain(logits: &mut [f32], vocab: usize, rows: &[(usize, u32)], cool: f32) -> f64 {
    let mut product = 1.0;
    for (index, (logits, (_, token))) in logits.chunks_exact_mut(vocab).zip(rows).enumerate() {
        let highest = max(logits);
        let total = exponentiate(logits, highest, cool);
        logits.iter_mut().for_each(|x| *x = (f64::from(*x) / total) as f32);
        if index > 0 {
            product *= f64::from(logits[*token as usize]);
        }
    }
    product
}
