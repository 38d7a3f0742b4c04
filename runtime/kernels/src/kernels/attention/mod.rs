//! Attention of some query heads over the cached positions of one key-value head, in one pass and without a
//! score buffer.
//!
//! Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over blocks of 64 positions: a block's
//! scores live on the stack; when a block brings a new maximum, what was summed before is scaled down.
//! Queries that share keys and values - heads of a group, neighbouring tokens - are taken up to four at a
//! time, so that a row is loaded once for them; every query's sums are formed in the order that they have
//! when it is alone. The rows may be a ring.

mod blocks;
mod floats;

pub(crate) use blocks::attention_blocks;
pub(crate) use floats::attention;

use super::exp::exp_lanes;
use super::float::soft_cap;
use super::simd::Simd;
use core::ops::Range;

/// Positions in a block of scores.
const POSITIONS: usize = 64;

/// 32 values of ggml's type Q8_0: a half-precision scale, then integers.
pub type Q8Block = [u8; 34];

/// The cached keys and values of one layer, from the first element of a head on.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum KeyValues<'a> {
    /// The bits of half-precision numbers.
    Half { keys: &'a [u16], values: &'a [u16] },
    /// `f32`.
    Full { keys: &'a [f32], values: &'a [f32] },
    /// Blocks of 32; a head is a whole number of them.
    Blocks { keys: &'a [Q8Block], values: &'a [Q8Block] },
}

/// One query head.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// Where it starts among the queries, and its result in the output.
    pub at: usize,
    /// The first position that it sees.
    pub first: usize,
    /// Behind the last.
    pub end: usize,
}

/// Where cached rows are: that of position `p` is row `p % rows`.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Elements (or blocks) from one row to the next.
    pub stride: usize,
    /// Rows.
    pub rows: usize,
}

/// How the products of a query with keys become scores.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// They are multiplied by this.
    pub scale: f32,
    /// Then they become `soft_cap * tanh(x / soft_cap)`, unless it is 0.
    pub soft_cap: f32,
}

/// [`Scores`], and what makes weights of them: a kernel of its own, so that all that attend have it once.
#[derive(Clone, Copy)]
pub(crate) struct Rule {
    scores: Scores,
    soften: Soften,
}

/// [`soften`] of an instruction set.
pub(crate) type Soften = unsafe fn(&mut [f32; POSITIONS], Range<usize>, f32, &mut Sums) -> f32;

/// What a query has of the blocks so far.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    /// The highest score.
    highest: f32,
    /// The sum of all weights, relative to that.
    total: f32,
}

impl Sums {
    const NONE: Self = Self { highest: f32::NEG_INFINITY, total: 0.0 };
}

impl Rule {
    /// # Safety
    /// The CPU must be able to run `soften` for as long as this lives.
    pub(super) unsafe fn new(scores: Scores, soften: Soften) -> Self {
        Self { scores, soften }
    }

    /// [`soften`].
    fn soften(&self, scores: &mut [f32; POSITIONS], seen: Range<usize>, sums: &mut Sums) -> f32 {
        // SAFETY: `new`'s caller promised that the CPU can run it.
        unsafe { (self.soften)(scores, seen, self.scores.soft_cap, sums) }
    }
}

/// Makes weights of the scores of a block, `exp(score - highest)`, 0 outside of `seen`; adds them to `sums`, and
/// returns what everything before them is to be multiplied by.
#[inline(always)]
pub(crate) fn soften<S: Simd>(
    s: S,
    scores: &mut [f32; POSITIONS],
    seen: Range<usize>,
    cap: f32,
    sums: &mut Sums,
) -> f32 {
    // Whole registers around what is seen; the exponentials of the others in them are zeros.
    let (first, last) = (seen.start / 8, seen.end.div_ceil(8));
    let (before, rest) = scores.split_at_mut(first * 8);
    let (scores, after) = rest.split_at_mut((last - first) * 8);
    before.fill(0.0);
    after.fill(0.0);
    if seen.is_empty() {
        scores.fill(0.0);
        return 1.0;
    }
    if cap > 0.0 {
        soft_cap(s, scores, cap);
    }
    scores[..seen.start - first * 8].fill(f32::NEG_INFINITY);
    scores[seen.end - first * 8..].fill(f32::NEG_INFINITY);
    let peak = peak(s, sums.highest, scores);
    let keep = exp1(s, sums.highest - peak);
    *sums = Sums { highest: peak, total: sums.total * keep + exponentials(s, peak, scores) };
    keep
}

/// The cached rows of one key-value head.
#[derive(Clone, Copy)]
pub(crate) struct Cache<'a, T> {
    pub keys: &'a [T],
    pub values: &'a [T],
    pub stride: usize,
    pub rows: usize,
    /// Values of a head.
    pub width: usize,
}

impl<T> Cache<'_, T> {
    /// Whether all that `lanes` see lies within both slices, a head being `len` elements.
    pub(super) fn holds(&self, lanes: &[Query], len: usize) -> bool {
        let elements = self.keys.len().min(self.values.len());
        let all = self.rows.checked_sub(1).and_then(|last| last.checked_mul(self.stride)?.checked_add(len));
        all.is_some_and(|all| all <= elements)
            && lanes.iter().all(|lane| lane.first < lane.end && lane.end - lane.first <= self.rows)
    }

    /// The rows of the positions `start .. start + n`: at most two runs, each with the positions' places
    /// among the `n` and its first row.
    #[inline(always)]
    fn runs(&self, start: usize, n: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
        let row = start % self.rows;
        let before_end = n.min(self.rows - row);
        [(0..before_end, row), (before_end..n, 0)].into_iter().filter(|(range, _)| !range.is_empty())
    }
}

/// One exponential.
#[inline(always)]
fn exp1<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; 8];
    s.store(exp_lanes(s, s.splat(x)), &mut lanes);
    lanes[0]
}

/// The highest of `highest` and `x`, whose length is a multiple of 8; what is not a number is none of them.
#[inline(always)]
fn peak<S: Simd>(s: S, highest: f32, x: &[f32]) -> f32 {
    let mut lanes = s.splat(highest);
    for x in x.as_chunks().0 {
        let x = s.load(x);
        lanes = s.select_less(lanes, x, x, lanes);
    }
    let mut eight = [0.0; 8];
    s.store(lanes, &mut eight);
    eight.into_iter().fold(highest, |peak, x| if x > peak { x } else { peak })
}

/// `x = exp(x - peak)`, of a multiple of 8; returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(s: S, peak: f32, x: &mut [f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for x in x.as_chunks_mut::<8>().0 {
        let y = exp_lanes(s, s.sub(s.load(x), s.splat(peak)));
        sum = s.add(sum, y);
        s.store(y, x);
    }
    s.sum(sum)
}
