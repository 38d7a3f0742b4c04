//! What a teacher of another vocabulary says, in the student's tokens.
//!
//! Tokens that spell the same bytes are the same outcome on both sides; all others of the teacher's are one outcome,
//! as are all others of the student's. On this coarser distribution every divergence is defined.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::Head;
use super::side::{CHUNK, with_side};
use super::sparse::{SparseRow, SparseTargets, Sparsity};
use crate::train::ops::sums::{exponentiate, max};

/// A token of the teacher's that the student does not have.
pub const NOT_SHARED: u32 = u32::MAX;

/// The teacher's distributions at `temperature` after some of its final states `hidden` `[n, hidden]`, in the
/// student's tokens: for each pair of `rows` (the teacher's, the student's) the [`Sparsity::MOST`] likeliest tokens
/// that both have, and the mass of everything else. `shared[id]` is the student's token for the teacher's `id`, or
/// [`NOT_SHARED`]. The student has `count` rows; those that are in no pair stay empty.
///
/// # Errors
/// The shapes do not fit, or a row is none.
pub fn translated(
    hidden: &Tensor,
    head: &Head,
    shared: &[u32],
    rows: &[(usize, usize)],
    temperature: f64,
    count: usize,
) -> Result<SparseTargets> {
    with_side(hidden, head, |teacher| {
        if shared.len() != teacher.vocab {
            bail!("loss: a translation of {} tokens, the teacher has {}", shared.len(), teacher.vocab);
        }
        if let Some((theirs, own)) =
            rows.iter().find(|(theirs, own)| *theirs >= teacher.rows || *own >= count)
        {
            bail!("loss: rows {theirs} and {own}, there are {} and {count}", teacher.rows);
        }
        let mut targets = SparseTargets {
            sparsity: Sparsity::TopK(Sparsity::MOST),
            rows: vec![SparseRow::default(); count],
        };
        let mut buffer = vec![0.0; CHUNK.min(rows.len()) * teacher.vocab];
        for chunk in rows.chunks(CHUNK) {
            let asked: Vec<_> = chunk.iter().map(|(row, _)| (*row, 0)).collect();
            let logits = &mut buffer[..chunk.len() * teacher.vocab];
            teacher.logits(&asked, logits)?;
            let cool = (1.0 / temperature) as f32;
            let kept: Vec<_> =
                logits.par_chunks_mut(teacher.vocab).map(|logits| row(logits, shared, cool)).collect();
            for ((_, own), kept) in chunk.iter().zip(kept) {
                targets.rows[*own] = kept;
            }
        }
        Ok(targets)
    })
}

fn row(logits: &mut [f32], shared: &[u32], cool: f32) -> SparseRow {
    let highest = max(logits);
    let total = exponentiate(logits, highest, cool);
    let mut known: Vec<(u32, f32)> = shared
        .iter()
        .zip(&*logits)
        .filter(|(id, _)| **id != NOT_SHARED)
        .map(|(id, x)| (*id, (f64::from(*x) / total) as f32))
        .collect();
    if known.len() > Sparsity::MOST {
        known.select_nth_unstable_by(Sparsity::MOST - 1, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        known.truncate(Sparsity::MOST);
    }
    SparseRow::bucketed(known)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::{IGNORE, Objective, Target, loss};
    use super::*;
    use crate::train::ops::check;

    fn head(weight: Tensor) -> Head {
        Head { weight, tiles: None, soft_cap: 0.0 }
    }

    /// With the same vocabulary, renumbered, it is the loss against the whole distribution.
    #[test]
    fn renumbered_tokens_are_the_same_distribution() {
        let (hidden, student) = (check::matrix(1, 4, 8), head(check::matrix(2, 17, 8)));
        let (theirs, teacher) = (check::matrix(3, 4, 5), check::matrix(4, 17, 5));
        let text = [3, 0, 16, 5];
        let shared: Vec<u32> = (0..17).map(|id| (id * 5 + 2) % 17).collect();
        // The teacher's row `id` is the student's `shared[id]`.
        let order: Vec<u32> =
            (0..17).map(|own| shared.iter().position(|id| *id == own).unwrap() as u32).collect();
        let index = Tensor::new(order, teacher.device()).unwrap();
        let renumbered = head(teacher.index_select(&index, 0).unwrap());
        let objective = Objective { temperature: 2.0, alpha: 0.7, ..Objective::default() };
        let rows: Vec<_> = (0..4).map(|row| (row, row)).collect();
        let translated = translated(&theirs, &head(teacher), &shared, &rows, 2.0, 4).unwrap();
        let of = |target: Target<'_>| loss(&hidden, &student, target, &text, &objective, 1.0).unwrap().1;
        let (found, expected) =
            (of(Target::Sparse(&Arc::new(translated))), of(Target::Teacher(&theirs, &renumbered)));
        assert!((found.loss - expected.loss).abs() < 1e-5, "{found:?} {expected:?}");
        assert!((found.kl - expected.kl).abs() < 1e-5);
    }

    /// Tokens that only the teacher has are in the bucket; rows without a teacher are text; slopes are finite
    /// differences, of both.
    #[test]
    fn what_is_not_shared_is_one_outcome() {
        let (hidden, weight) = (check::matrix(1, 4, 8), check::matrix(2, 17, 8));
        let (theirs, teacher) = (check::matrix(3, 5, 5), head(check::matrix(4, 11, 5)));
        let text = [3, IGNORE, 16, 5];
        let shared: Vec<u32> = (0..11).map(|id| if id % 3 == 0 { NOT_SHARED } else { 16 - id }).collect();
        let targets = Arc::new(translated(&theirs, &teacher, &shared, &[(4, 0), (1, 2)], 1.0, 4).unwrap());
        let logits = teacher.logits(&theirs).unwrap().to_vec2::<f32>().unwrap();
        let sum: f32 = logits[4].iter().map(|x| x.exp()).sum();
        let bucket: f32 = logits[4].iter().step_by(3).map(|x| x.exp()).sum::<f32>() / sum;
        assert!((targets.rows[0].rest - bucket).abs() < 1e-5, "{} {bucket}", targets.rows[0].rest);
        assert_eq!(targets.rows[0].ids.len(), 7);
        assert!(targets.rows[1].is_text() && targets.rows[3].is_text());
        for (soft, alpha, temperature) in
            [("fkl", 1.0, 1.0), ("rkl=0.5,jsd=0.5", 0.6, 1.0), ("fkl", 0.5, 2.0)]
        {
            let objective =
                Objective { soft: soft.parse().unwrap(), alpha, temperature, ..Objective::default() };
            check::gradients(&[hidden.clone(), weight.clone()], |x| {
                let student = head(x[1].clone());
                Ok(loss(&x[0], &student, Target::Sparse(&targets), &text, &objective, 10.0)?.0)
            });
        }
        let student = head(weight);
        let parts = |targets: &Arc<SparseTargets>, alpha| {
            let objective = Objective { alpha, ..Objective::default() };
            loss(&hidden, &student, Target::Sparse(targets), &text, &objective, 1.0).unwrap().1
        };
        let nothing = Arc::new(SparseTargets { rows: vec![SparseRow::default(); 4], ..(*targets).clone() });
        let plain = loss(&hidden, &student, Target::Text, &text, &Objective::default(), 1.0).unwrap().1;
        assert_eq!(parts(&nothing, 1.0), plain);
        // Row 3 is learned as text whatever the share of the soft loss.
        assert!(parts(&targets, 1.0).loss > parts(&targets, 1.0).kl + 0.1);
    }

    /// As where a vocabulary ends texts with either of two tokens.
    #[test]
    fn tokens_that_mean_the_same_add_up() {
        let (theirs, teacher) = (check::matrix(3, 1, 5), head(check::matrix(4, 4, 5)));
        let one = translated(&theirs, &teacher, &[2, 0, 2, NOT_SHARED], &[(0, 0)], 1.0, 1).unwrap();
        let logits = teacher.logits(&theirs).unwrap().to_vec2::<f32>().unwrap();
        let sum: f32 = logits[0].iter().map(|x| x.exp()).sum();
        let p = |id: usize| logits[0][id].exp() / sum;
        assert_eq!(one.rows[0].ids, [0, 2]);
        for (found, expected) in one.rows[0].probabilities.iter().zip([p(1), p(0) + p(2)]) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (theirs, teacher) = (check::matrix(3, 5, 5), head(check::matrix(4, 11, 5)));
        let of = |shared: usize, rows: &[(usize, usize)]| {
            translated(&theirs, &teacher, &vec![0; shared], rows, 1.0, 4).is_err()
        };
        assert!(of(10, &[]) && of(11, &[(5, 0)]) && of(11, &[(0, 4)]));
        assert!(!of(11, &[]));
    }
}
