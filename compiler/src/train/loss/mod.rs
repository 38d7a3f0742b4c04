//! The head and the loss, fused: `alpha * T^2 * sum(weight * divergence) + (1 - alpha) * cross-entropy`
//! (Hinton et al., 2015), averaged over the scored tokens.
//!
//! Logits over a whole vocabulary are the largest thing in a step. They exist for 256 tokens at a time, once
//! for the teacher and once for the student; the student's buffer becomes the gradient in place and is spent
//! on both weight and input gradients before the next chunk.
//!
//! [`objective`] says what there is to minimize, `divergences` has the formulas, `dense` and `sparse` apply
//! them to one position, `op` to a batch. Nothing here knows where a teacher comes from.

mod dense;
mod divergences;
mod hidden;
mod objective;
mod op;
mod side;
mod sparse;
mod translated;
mod universal;

#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor};
use rayon::prelude::*;

pub use hidden::{HiddenTerms, hidden_loss};
pub use objective::{Kind, Mixture, Objective, ULD};
pub use op::{Target, loss};
pub use sparse::{SparseRow, SparseTargets, Sparsity};
pub use translated::{NOT_SHARED, translated};
pub use universal::{Group, LONGEST_GROUP, Universal};

use super::ops::{Tiles, linear};
use dense::{Row, statistics};
use side::{CHUNK, Side, scored, with_side};

/// A target that is not scored.
pub const IGNORE: u32 = u32::MAX;

/// What makes logits of final hidden states.
#[derive(Clone, Debug)]
pub struct Head {
    /// `[vocab, hidden]`.
    pub weight: Tensor,
    /// The same for int8 kernels, where those multiply with it.
    pub tiles: Option<Tiles>,
    /// Logits `x` become `cap * tanh(x / cap)`; 0 if they stay as they are.
    pub soft_cap: f32,
}

impl Head {
    /// Logits `[n, vocab]` of hidden states `[n, hidden]`, all at once, with a gradient unless tiles make them.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = match &self.tiles {
            Some(tiles) => tiles.apply(hidden)?,
            None => linear(hidden, &self.weight)?,
        };
        if self.soft_cap == 0.0 {
            return Ok(logits);
        }
        let cap = f64::from(self.soft_cap);
        (logits / cap)?.tanh()? * cap
    }
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
        student.logits(chunk, s)?;
        teacher.logits(chunk, t)?;
        let rows: Vec<(Row, bool)> = s
            .par_chunks_mut(vocab)
            .zip(t.par_chunks_mut(vocab))
            .zip(chunk)
            .map(|((s, t), &(_, target))| {
                let agree = argmax(s) == argmax(t);
                (statistics(s, t, target), agree)
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
