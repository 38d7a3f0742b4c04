//! What a teacher of another vocabulary says, in the student's tokens.
//!
//! Tokens that spell the same bytes are the same outcome on both sides; all others of the teacher's are one outcome,
//! as are all others of the student's. On this coarser distribution every divergence is defined.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::Head;
use super::side::{CHUNK, with_side};
use super::sparse::{SparseRow, SparseTargets, Sparsity};
use super::sums::{exponentiate, max};

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
        if let Some((theirs, own)) = rows.iter().find(|(theirs, own)| *theirs >= teacher.rows || *own >= count) {
            bail!("loss: rows {theirs} and {own}, there are {} and {count}", teacher.rows);
        }
        let mut targets =
            SparseTargets { sparsity: Sparsity::TopK(Sparsity::MOST), rows: vec![SparseRow::default(); count] };
        let mut buffer = vec![0.0; CHUNK.min(rows.len()) * teacher.vocab];
        for chunk in rows.chunks(CHUNK) {
            let asked: Vec<_> = chunk.iter().map(|(row, _)| (*row, 0)).collect();
            let logits = &mut buffer[..chunk.len() * teacher.vocab];
            teacher.logits(&asked, logits);
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
