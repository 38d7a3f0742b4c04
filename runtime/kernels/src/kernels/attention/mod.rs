//! Attention of some query heads over the cached positions of one key-value head, in one pass and without a
//! score buffer.
//!
//! Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over blocks of 64 positions: a block's
//! scores live on the stack; when a block brings a new maximum, what was summed before is scaled down.
//! Queries that share keys and values - heads of a group, neighbouring tokens - are taken together, so that a
//! row is loaded and widened once for them; every query's sums are formed in the order that they have when it
//! is alone. The rows may be a ring.

mod blocks;
mod floats;

pub(crate) use blocks::attention_blocks;
pub(crate) use floats::attention;

use super::exp::exp_below;
use super::float::soft_cap;
use super::simd::{Op, Simd};
use core::ops::Range;

/// The widest head, which is also what a specification allows.
pub(super) const MAX_WIDTH: usize = 1024;

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

/// Floating-point numbers.
#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    /// The bits of half-precision ones.
    Half(&'a [u16]),
    Full(&'a [f32]),
}

/// The cached rows of one key-value head.
#[derive(Clone, Copy)]
pub(crate) struct Cache<T> {
    pub keys: T,
    pub values: T,
    pub stride: usize,
    pub rows: usize,
    /// Values of a head.
    pub width: usize,
}

impl<T> Cache<T> {
    /// Whether all that `lanes` see lies within slices of `elements` elements, a head being `len` of them.
    pub(super) fn holds(&self, lanes: &[Query], len: usize, elements: usize) -> bool {
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

/// Where online softmax has come to for one query.
#[derive(Clone, Copy)]
struct State {
    highest: f32,
    /// The sum of all weights so far, relative to the highest score.
    total: f32,
    /// What the sums so far are to be multiplied by.
    keep: f32,
}

impl State {
    const START: Self = Self { highest: f32::NEG_INFINITY, total: 0.0, keep: 1.0 };
}

/// Scores of a block, and room behind the last ones for those of a whole step.
type Row = [f32; POSITIONS + 16];

/// Turns the scores of a block of positions into weights, of which those of places that a lane does not see are zeros:
/// once for all types of caches, which make up a block otherwise.
struct Weigh<'x> {
    lanes: &'x [Query],
    /// The block's first position.
    block: usize,
    soft_cap: f32,
    scores: &'x mut [Row],
    states: &'x mut [State],
}

impl<S: Simd> Op<S> for Weigh<'_> {
    #[inline(always)]
    fn run(self, s: S) {
        let place = |position: usize| position.saturating_sub(self.block).min(POSITIONS);
        for ((lane, scores), state) in self.lanes.iter().zip(self.scores).zip(self.states) {
            if let Some(scores) = scores.first_chunk_mut() {
                weigh(s, scores, place(lane.first)..place(lane.end), self.soft_cap, state);
            }
        }
    }
}

/// [`Weigh`] for one lane that sees the places `seen`.
#[inline(always)]
fn weigh<S: Simd>(s: S, scores: &mut [f32; POSITIONS], seen: Range<usize>, cap: f32, state: &mut State) {
    if seen.is_empty() {
        scores.fill(0.0);
        return;
    }
    if cap > 0.0 {
        soft_cap(s, &mut scores[seen.clone()], cap);
    }
    // Whole registers around what is seen; the others' exponentials are zeros.
    let (before, after) = (seen.start / 8 * 8, seen.end.next_multiple_of(8));
    scores[before..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..after].fill(f32::NEG_INFINITY);
    // Most blocks are seen whole, and to fill nothing takes a call.
    if before > 0 {
        scores[..before].fill(0.0);
    }
    if after < POSITIONS {
        scores[after..].fill(0.0);
    }
    let weights = &mut scores[before..after];
    let peak = peak(s, state.highest, weights);
    state.keep = match state.highest - peak {
        0.0 => 1.0,
        f32::NEG_INFINITY => 0.0,
        step => exp1(s, step),
    };
    state.total = state.total * state.keep + exponentials(s, peak, weights);
    state.highest = peak;
}

/// One exponential, of what is not above 0.
#[inline(always)]
fn exp1<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; 8];
    s.store(exp_below(s, s.splat(x)), &mut lanes);
    lanes[0]
}

/// The highest of `highest` and `x`, whose length is a multiple of 8; what is not a number is none of them.
#[inline(always)]
fn peak<S: Simd>(s: S, highest: f32, x: &[f32]) -> f32 {
    let mut lanes = s.splat(highest);
    for x in x.as_chunks().0 {
        lanes = s.higher(lanes, s.load(x));
    }
    s.highest(lanes)
}

/// `x = exp(x - peak)`, of a multiple of 8; returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(s: S, peak: f32, x: &mut [f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for x in x.as_chunks_mut::<8>().0 {
        let y = exp_below(s, s.sub(s.load(x), s.splat(peak)));
        sum = s.add(sum, y);
        s.store(y, x);
    }
    s.sum(sum)
}
