//! Targets that say of a teacher's distribution only what is worth keeping.
//!
//! Two forms: the `k` likeliest tokens, with the mass of all others in one bucket (a coarser distribution,
//! on which every divergence is defined and never larger than on the whole one), and `k` tokens drawn from
//! the distribution, whose shares are an unbiased estimate of it (Anshumann et al., "Sparse logit sampling:
//! accelerating knowledge distillation in LLMs", ACL 2025, with the teacher itself as the proposal).

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Head;
use super::dense::{Row, Scales, text_part};
use super::divergences::{At, With, formula};
use super::side::{CHUNK, scored, with_side};
use crate::train::ops::sums::{exponentiate, max, sum};
use crate::train::ops::{exp, widest};
use crate::train::random::SplitMix64;

/// What is kept of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Sparsity {
    /// So many of the likeliest tokens, and the mass of the rest.
    TopK(usize),
    /// So many tokens drawn with replacement.
    Sampled(usize),
}

impl Sparsity {
    /// Most tokens of a position.
    pub const MOST: usize = 1024;

    /// Tokens kept of a position.
    pub fn tokens(self) -> usize {
        match self {
            Self::TopK(tokens) | Self::Sampled(tokens) => tokens,
        }
    }
}

impl std::fmt::Display for Sparsity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TopK(tokens) => write!(f, "top-k={tokens}"),
            Self::Sampled(tokens) => write!(f, "sampled={tokens}"),
        }
    }
}

impl std::str::FromStr for Sparsity {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (form, tokens) = text.split_once('=').unwrap_or((text, "50"));
        let tokens = match tokens.trim().parse() {
            Ok(tokens) if (1..=Self::MOST).contains(&tokens) => tokens,
            _ => return Err(format!("`{tokens}` tokens a position, expected 1 to {}", Self::MOST)),
        };
        match form.trim() {
            "top-k" => Ok(Self::TopK(tokens)),
            "sampled" => Ok(Self::Sampled(tokens)),
            other => Err(format!("`{other}`, expected top-k=N or sampled=N")),
        }
    }
}

impl TryFrom<String> for Sparsity {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Sparsity> for String {
    fn from(sparsity: Sparsity) -> Self {
        sparsity.to_string()
    }
}

/// What is kept of one position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseRow {
    /// Tokens in ascending order, each once.
    pub ids: Vec<u32>,
    /// Their probabilities: of the teacher, or as estimated by the draws.
    pub probabilities: Vec<f32>,
    /// The mass of all other tokens ([`Sparsity::TopK`]), or the entropy of the whole distribution in nats
    /// ([`Sparsity::Sampled`]).
    pub rest: f32,
}

impl SparseRow {
    /// A row of nothing: the text alone is learned.
    pub fn is_text(&self) -> bool {
        self.ids.is_empty()
    }

    /// The row of some tokens with their probabilities, in any order; those of a token that is there again add up. What
    /// they leave of 1 is the bucket's.
    pub fn bucketed(mut known: Vec<(u32, f32)>) -> Self {
        known.sort_unstable_by_key(|(id, _)| *id);
        known.dedup_by(|again, kept| {
            let same = again.0 == kept.0;
            if same {
                kept.1 += again.1;
            }
            same
        });
        let sum: f64 = known.iter().map(|(_, p)| f64::from(*p)).sum();
        // Rounded logarithms may sum to a little more than 1.
        let scale = 1.0 / sum.max(1.0);
        Self {
            ids: known.iter().map(|(id, _)| *id).collect(),
            probabilities: known.iter().map(|(_, p)| (f64::from(*p) * scale) as f32).collect(),
            rest: (1.0 - sum).max(0.0) as f32,
        }
    }
}

/// Sparse targets for the rows of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct SparseTargets {
    /// What was kept.
    pub sparsity: Sparsity,
    /// One for each row; of an empty one the text alone is learned.
    pub rows: Vec<SparseRow>,
}

impl SparseTargets {
    /// What `sparsity` keeps of a teacher's distributions at `temperature` after the final states `hidden`
    /// `[n, hidden]`; rows whose target is [`IGNORE`](super::IGNORE) stay empty. Draws for row `i` depend on `seed` and
    /// `first + i` alone.
    ///
    /// # Errors
    /// The shapes do not fit, or the vocabulary is smaller than what is to be kept.
    pub fn of(
        hidden: &Tensor,
        head: &Head,
        sparsity: Sparsity,
        temperature: f64,
        seed: u64,
        first: u64,
        targets: &[u32],
    ) -> Result<Self> {
        with_side(hidden, head, |teacher| {
            let vocab = teacher.vocab;
            if matches!(sparsity, Sparsity::TopK(k) if k > vocab) {
                bail!("{sparsity} of a vocabulary of {vocab} tokens");
            }
            let scored = scored(targets, teacher.rows, vocab)?;
            let mut buffer = vec![0.0; CHUNK.min(scored.len()) * vocab];
            let mut rows = vec![SparseRow::default(); teacher.rows];
            for chunk in scored.chunks(CHUNK) {
                let logits = &mut buffer[..chunk.len() * vocab];
                teacher.logits(chunk, logits)?;
                let cool = (1.0 / temperature) as f32;
                let kept = logits.par_chunks_mut(vocab).zip(chunk).map(|(logits, (row, _))| match sparsity {
                    Sparsity::TopK(k) => top(logits, k, cool),
                    Sparsity::Sampled(n) => {
                        draw(logits, n, cool, &mut SplitMix64::new(seed, first + *row as u64))
                    }
                });
                for ((row, _), kept) in chunk.iter().zip(kept.collect::<Vec<_>>()) {
                    rows[*row] = kept;
                }
            }
            Ok(Self { sparsity, rows })
        })
    }
}

/// The `k` likeliest tokens; of equals the one with the lower number.
fn top(logits: &mut [f32], k: usize, cool: f32) -> SparseRow {
    let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let mut best: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
    if k < best.len() {
        best.select_nth_unstable_by(k - 1, order);
        best.truncate(k);
    }
    best.sort_unstable_by_key(|(_, id)| *id);
    let highest = max(logits);
    exponentiate(logits, highest, cool);
    let kept: Vec<f32> = best.iter().map(|(_, id)| std::mem::take(&mut logits[*id as usize])).collect();
    // The rest is summed by itself: as a difference to 1 it would be noise where it is small.
    let rest = sum(logits, |x| x);
    let total = rest + kept.iter().map(|x| f64::from(*x)).sum::<f64>();
    SparseRow {
        ids: best.into_iter().map(|(_, id)| id).collect(),
        probabilities: kept.into_iter().map(|x| (f64::from(x) / total) as f32).collect(),
        rest: (rest / total) as f32,
    }
}

/// `n` draws with replacement, by the inverse of the cumulative distribution at sorted uniform numbers.
fn draw(logits: &mut [f32], n: usize, cool: f32, random: &mut SplitMix64) -> SparseRow {
    let highest = max(logits);
    let weighted = sum(logits, |x| {
        let z = (x - highest) * cool;
        exp(z) * z
    });
    let total = exponentiate(logits, highest, cool);
    let entropy = total.ln() - weighted / total;
    // The cumulative sum ends where the sum in one pass does only up to rounding: it is its own measure.
    let mass: f64 = logits.iter().map(|x| f64::from(*x)).sum();
    let mut marks: Vec<f64> = (0..n).map(|_| random.unit() * mass).collect();
    marks.sort_unstable_by(f64::total_cmp);
    let (mut row, mut sum, mut next) = (SparseRow { rest: entropy as f32, ..SparseRow::default() }, 0.0, 0);
    for (id, weight) in logits.iter().enumerate() {
        sum += f64::from(*weight);
        let first = next;
        while next < n && marks[next] <= sum {
            next += 1;
        }
        if next > first {
            row.ids.push(id as u32);
            row.probabilities.push((next - first) as f32 / n as f32);
        }
        if next == n {
            break;
        }
    }
    row
}

/// Turns one row of student logits into its gradient against a sparse target; the rest as for
/// [`row_gradient`](super::dense::row_gradient).
pub(super) fn sparse_gradient(
    s: &mut [f32],
    teacher: &SparseRow,
    sparsity: Sparsity,
    target: u32,
    scales: &Scales,
    spare: &mut Vec<f32>,
) -> Row {
    let target = target as usize;
    let logit = f64::from(s[target]);
    let (shared, apart) = text_part(s, target as u32, scales, spare);
    let (row, normalizer) = match sparsity {
        Sparsity::TopK(_) => bucketed(s, teacher, scales, shared),
        Sparsity::Sampled(_) => sampled(s, teacher, scales, shared),
    };
    s[target] -= shared;
    s.iter_mut().zip(spare.iter()).for_each(|(s, rest)| *s += rest);
    Row { cross_entropy: apart.unwrap_or(normalizer - logit), ..row }
}

/// Divergences over `k + 1` outcomes: the kept tokens, and all others as one. A token of the bucket pulls as
/// the bucket does: `dD/dz = q (g(bucket) - sum(q g))`.
fn bucketed(s: &mut [f32], teacher: &SparseRow, scales: &Scales, shared: f32) -> (Row, f64) {
    let cool = 1.0 / scales.temperature;
    let highest = max(s);
    exponentiate(s, highest, cool);
    let mut kept: Vec<f32> = teacher.ids.iter().map(|id| std::mem::take(&mut s[*id as usize])).collect();
    let bucket = sum(s, |x| x);
    let total = bucket + kept.iter().map(|x| f64::from(*x)).sum::<f64>();
    let q = |mass: f64| (mass / total).max(f64::from(f32::MIN_POSITIVE)).ln() as f32;
    let p = |mass: f32| mass.max(f32::MIN_POSITIVE).ln();
    let outcomes = || {
        let tokens = kept.iter().zip(&teacher.probabilities).map(|(x, mass)| (q(f64::from(*x)), p(*mass)));
        // Where everything was kept there is no bucket.
        let rest = (bucket > 0.0).then(|| (q(bucket), p(teacher.rest)));
        tokens.chain(rest)
    };
    let kl = outcomes().map(|(lq, lp)| f64::from(lp.exp() * (lp - lq))).sum();
    let mut pulls = vec![0f64; kept.len() + 1];
    let mut soft = 0.0;
    for (kind, weight) in scales.objective.soft.terms() {
        soft += weight * formula(kind, &scales.objective, Outcomes(outcomes(), &mut pulls, weight));
    }
    let mean: f64 = pulls.iter().sum();
    let scale = f64::from(scales.soft);
    // `q g` of the bucket, for each unit of its mass.
    let of_bucket = if bucket > 0.0 { pulls[kept.len()] / bucket } else { 0.0 };
    let own = f64::from(shared) - scale * mean;
    let factor = (own / total + scale * of_bucket) as f32;
    widest!(s.iter_mut().for_each(|s| *s *= factor));
    for (x, pull) in kept.iter_mut().zip(&pulls) {
        *x = (f64::from(*x) / total * own + scale * pull) as f32;
    }
    for (id, x) in teacher.ids.iter().zip(kept) {
        s[*id as usize] = x;
    }
    (Row { kl, soft, ..Row::default() }, f64::from(highest * cool) + total.ln())
}

/// Sums up a divergence over a few outcomes and adds `weight * q g` of each to the second field.
struct Outcomes<'a, I>(I, &'a mut [f64], f64);

impl<I: Iterator<Item = (f32, f32)>> With for Outcomes<'_, I> {
    type Out = f64;

    fn with(self, f: impl Fn(f32, f32) -> At) -> f64 {
        let Self(outcomes, pulls, weight) = self;
        let mut value = 0.0;
        for ((lq, lp), pull) in outcomes.zip(pulls) {
            let [summand, pulled] = f(lq, lp);
            value += f64::from(summand);
            *pull += weight * f64::from(pulled);
        }
        value
    }
}

/// The forward KL divergence, in which the teacher's probabilities are linear: with an unbiased estimate in
/// their place the gradient `q - p` is unbiased, and so is the value beside the true entropy.
fn sampled(s: &mut [f32], teacher: &SparseRow, scales: &Scales, shared: f32) -> (Row, f64) {
    let cool = 1.0 / scales.temperature;
    let highest = max(s);
    let cross: f64 = teacher
        .ids
        .iter()
        .zip(&teacher.probabilities)
        .map(|(id, p)| f64::from(*p) * f64::from((s[*id as usize] - highest) * cool))
        .sum();
    let total = exponentiate(s, highest, cool);
    let kl = total.ln() - cross - f64::from(teacher.rest);
    let weight = scales.objective.soft.total();
    let soft = f64::from(scales.soft) * weight;
    let own = ((soft + f64::from(shared)) / total) as f32;
    widest!(s.iter_mut().for_each(|s| *s *= own));
    for (id, p) in teacher.ids.iter().zip(&teacher.probabilities) {
        s[*id as usize] -= (soft * f64::from(*p)) as f32;
    }
    (Row { kl, soft: weight * kl, ..Row::default() }, f64::from(highest * cool) + total.ln())
}
