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
use super::{Head, IGNORE};
use crate::train::ops::sums::{exponentiate, max};

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
        bail!(
            "loss: {} and {} targets for {} and {} rows",
            text.len(),
            targets.next.len(),
            student.rows,
            teacher.rows
        );
    }
    let mut free = 0;
    for group in &targets.groups {
        let whole =
            |range: &Range<usize>, rows| (1..=LONGEST_GROUP).contains(&range.len()) && range.end <= rows;
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
) -> Result<Vec<Row>> {
    let cool = 1.0 / scales.temperature;
    let vocab = s.len() / rows.len();
    let asked: Vec<_> = group.teacher.clone().map(|row| (row, targets.next[row])).collect();
    let mut t = vec![0.0; asked.len() * teacher.vocab];
    teacher.logits(&asked, &mut t)?;
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
    Ok(out)
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::Var;

    use super::super::side::CHUNK;
    use super::super::{Objective, Target, loss};
    use super::*;
    use crate::train::ops::check;

    const VOCAB: usize = 23;
    const TEXT: [u32; 6] = [3, 7, IGNORE, 16, 5, 20];

    fn objective(alpha: f64, temperature: f64) -> Objective {
        Objective { alpha, temperature, universal: true, ..Objective::default() }
    }

    /// Rows 0 and 1 beside teacher's 0; row 3 beside 1 to 3; row 4 beside 4; row 5 is text, row 2 nothing.
    fn targets(vocab: usize) -> Universal {
        let group = |student, teacher| Group { student, teacher };
        Universal {
            hidden: check::matrix(3, 6, 5),
            head: Head { weight: check::matrix(4, vocab, 5), tiles: None, soft_cap: 0.0 },
            next: vec![1, 2, 9, 4, 0, 8],
            groups: vec![group(0..2, 0..1), group(3..4, 1..4), group(4..5, 4..5)],
        }
    }

    /// Probabilities in f64, from the definition.
    fn softmax(hidden: &[f64], head: &[Vec<f64>], temperature: f64) -> Vec<f64> {
        let logits: Vec<f64> = head
            .iter()
            .map(|row| row.iter().zip(hidden).map(|(w, x)| w * x).sum::<f64>() / temperature)
            .collect();
        let sum: f64 = logits.iter().map(|x| x.exp()).sum();
        logits.iter().map(|x| x.exp() / sum).collect()
    }

    fn rows(tensor: &Tensor) -> Vec<Vec<f64>> {
        let rows = tensor.to_vec2::<f32>().unwrap();
        rows.iter().map(|row| row.iter().map(|x| f64::from(*x)).collect()).collect()
    }

    fn merged(probabilities: &[Vec<f64>], next: &[u32], rows: &Range<usize>) -> Vec<f64> {
        let others: f64 = rows.clone().skip(1).map(|row| probabilities[row][next[row] as usize]).product();
        let mut sorted: Vec<f64> = probabilities[rows.start].iter().map(|p| p * others).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted
    }

    fn defined(hidden: &[Vec<f64>], head: &[Vec<f64>], targets: &Universal, objective: &Objective) -> f64 {
        let Objective { alpha, temperature, .. } = *objective;
        let at = |temperature| -> Vec<Vec<f64>> {
            hidden.iter().map(|row| softmax(row, head, temperature)).collect()
        };
        let (q, plain) = (at(temperature), at(1.0));
        let (theirs, weight) = (rows(&targets.hidden), rows(&targets.head.weight));
        let p: Vec<Vec<f64>> = theirs.iter().map(|row| softmax(row, &weight, temperature)).collect();
        let text = |row: usize| -plain[row][TEXT[row] as usize].ln();
        let mut sum = text(5);
        for group in &targets.groups {
            let (own, said) = (merged(&q, &TEXT, &group.student), merged(&p, &targets.next, &group.teacher));
            let distance: f64 = (0..own.len().max(said.len()))
                .map(|rank| (own.get(rank).unwrap_or(&0.0) - said.get(rank).unwrap_or(&0.0)).abs())
                .sum();
            sum += alpha * temperature * temperature * distance;
            sum += (1.0 - alpha) * group.student.clone().map(text).sum::<f64>();
        }
        sum / 5.0
    }

    /// Value and gradients beside the definition and its finite differences, with a teacher of fewer, as many and
    /// more tokens.
    #[test]
    fn gradients_are_slopes_of_the_definition() {
        let (hidden, weight) = (check::matrix(1, 6, 8), check::matrix(2, VOCAB, 8));
        for vocab in [11, VOCAB, 40] {
            let targets = Arc::new(targets(vocab));
            for objective in [objective(1.0, 1.0), objective(0.6, 1.0), objective(0.8, 2.0)] {
                let (x, w) = (Var::from_tensor(&hidden).unwrap(), Var::from_tensor(&weight).unwrap());
                let head = Head { weight: w.as_tensor().clone(), tiles: None, soft_cap: 0.0 };
                let (value, parts) =
                    loss(&x, &head, Target::Universal(&targets), &TEXT, &objective, 1.0).unwrap();
                let expected = defined(&rows(&hidden), &rows(&weight), &targets, &objective);
                assert!((parts.loss - expected).abs() < 1e-5, "{vocab}: {} {expected}", parts.loss);
                let store = value.backward().unwrap();
                for (var, first) in [(&x, true), (&w, false)] {
                    let found = rows(store.get(var).unwrap());
                    for (row, values) in found.iter().enumerate() {
                        for (col, found) in values.iter().enumerate() {
                            let moved = |step: f64| {
                                let (mut hidden, mut weight) = (rows(&hidden), rows(&weight));
                                if first {
                                    hidden[row][col] += step
                                } else {
                                    weight[row][col] += step
                                }
                                defined(&hidden, &weight, &targets, &objective)
                            };
                            let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                            assert!(
                                (found - slope).abs() < 2e-5,
                                "{vocab} {objective:?} [{row}, {col}]: {found}, slope {slope}"
                            );
                        }
                    }
                }
            }
        }
    }

    /// The same model, cut the same way, is no distance away; where nothing is grouped there is only the text.
    #[test]
    fn the_same_distribution_is_no_distance() {
        let (hidden, weight) = (check::matrix(1, 6, 8), check::matrix(2, VOCAB, 8));
        let head = Head { weight, tiles: None, soft_cap: 0.0 };
        let alone = |row: usize| Group { student: row..row + 1, teacher: row..row + 1 };
        let of = |groups: Vec<Group>, alpha| {
            let next = TEXT.iter().map(|&token| if token == IGNORE { 0 } else { token }).collect();
            let targets = Universal { hidden: hidden.clone(), head: head.clone(), next, groups };
            loss(&hidden, &head, Target::Universal(&targets.into()), &TEXT, &objective(alpha, 1.0), 1.0)
                .unwrap()
                .1
        };
        assert!(of([0, 1, 3, 4, 5].map(alone).to_vec(), 1.0).loss < 1e-6);
        let text = of(vec![], 1.0);
        assert_eq!(text.loss, text.cross_entropy);
        assert!(text.loss > 1.0);
    }

    #[test]
    fn groups_are_never_torn_between_chunks() {
        let rows = 2 * CHUNK + 9;
        let (hidden, head) =
            (check::matrix(1, rows, 4), Head { weight: check::matrix(2, 9, 4), tiles: None, soft_cap: 0.0 });
        let text: Vec<u32> = (0..rows as u32).map(|row| row % 9).collect();
        let group = |at: usize| Group { student: at * 3..at * 3 + 3, teacher: at * 3..at * 3 + 3 };
        let groups: Vec<_> = (0..rows / 3).map(group).collect();
        let whole = |groups: Vec<Group>| {
            let targets =
                Universal { hidden: hidden.clone(), head: head.clone(), next: text.clone(), groups };
            loss(&hidden, &head, Target::Universal(&targets.into()), &text, &objective(1.0, 1.0), 1.0)
                .unwrap()
                .1
        };
        assert!(whole(groups.clone()).loss < 0.05, "only the rows behind the last group are text");
        // Each group by itself, on the whole batch.
        let text_alone = whole(vec![]).loss;
        let lonely: f64 = groups.iter().map(|group| text_alone - whole(vec![group.clone()]).loss).sum();
        let left = text_alone - whole(groups).loss;
        assert!((lonely - left).abs() < 1e-3, "{lonely} {left}");
    }

    #[test]
    fn what_are_no_groups_is_refused() {
        let (hidden, weight) = (check::matrix(1, 6, 8), check::matrix(2, VOCAB, 8));
        let refused = |change: &dyn Fn(&mut Universal)| {
            let mut targets = targets(VOCAB);
            change(&mut targets);
            let head = Head { weight: weight.clone(), tiles: None, soft_cap: 0.0 };
            loss(&hidden, &head, Target::Universal(&targets.into()), &TEXT, &objective(1.0, 1.0), 1.0)
                .is_err()
        };
        assert!(!refused(&|_| ()));
        assert!(refused(&|targets| targets.groups.swap(0, 1)));
        assert!(refused(&|targets| targets.groups[0].student = 1..3), "row 2 is not learned");
        assert!(refused(&|targets| targets.groups[0].student = 0..0));
        assert!(refused(&|targets| targets.groups[2].student = 4..7));
        assert!(refused(&|targets| targets.groups[2].teacher = 5..7));
        assert!(refused(&|targets| targets.next[1] = VOCAB as u32));
        assert!(refused(&|targets| targets.next.truncate(5)));
    }
}
