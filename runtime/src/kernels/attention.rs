//! Attention of one query head over the cached positions, in one pass and without a score buffer.
//!
//! Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over blocks of 64 positions: a block's
//! scores live on the stack; when a block brings a new maximum, what was summed before is scaled down.
//! The rows may be a ring: where a block runs over its end it is done in two parts, with the same sums in
//! the same order.

use super::exp::exp_lanes;
use super::float::{Element, dot, dot_lanes, soft_cap};
use super::integers::{BLOCK, quantize};
use super::simd::Simd;
use crate::format::f16_to_f32;
use core::ops::Range;

/// Positions in a block of scores.
const POSITIONS: usize = 64;
/// Blocks of the widest head that a specification allows.
const MAX_BLOCKS: usize = 1024 / BLOCK;

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

/// Which cached rows a query sees: position `i` of `len` is row `(first + i) % rows`.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Elements (or blocks) from one row to the next.
    pub stride: usize,
    /// Rows of the ring.
    pub rows: usize,
    /// Row of the first position.
    pub first: usize,
    /// Number of positions, at most `rows`.
    pub len: usize,
}

impl Span {
    /// `len` rows from the first of the cache on.
    pub fn new(stride: usize, len: usize) -> Self {
        Self { stride, rows: len, first: 0, len }
    }

    /// The rows of the positions `start .. start + n`: at most two runs, each with the positions' places
    /// among the `n` and its first row.
    #[inline(always)]
    fn runs(&self, start: usize, n: usize) -> [(Range<usize>, usize); 2] {
        let row = self.first + start;
        let row = if row >= self.rows { row - self.rows } else { row };
        let before_end = n.min(self.rows - row);
        [(0..before_end, row), (before_end..n, 0)]
    }
}

/// The cached rows of one key-value head.
#[derive(Clone, Copy)]
pub(crate) struct Cache<'a, T> {
    pub keys: &'a [T],
    pub values: &'a [T],
    pub span: Span,
}

/// How the products of a query with keys become scores.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    /// They are multiplied by this.
    pub scale: f32,
    /// Then they become `soft_cap * tanh(x / soft_cap)`, unless it is 0.
    pub soft_cap: f32,
}

impl<'a, T> Cache<'a, T> {
    /// The rows of `width` elements, as far as they lie within both slices.
    pub(super) fn new(keys: &'a [T], values: &'a [T], span: Span, width: usize) -> Self {
        let whole = match keys.len().min(values.len()).checked_sub(width) {
            Some(rest) => rest.checked_div(span.stride).unwrap_or(0) + 1,
            None => 0,
        };
        debug_assert!(span.len > 0 && span.len <= span.rows && span.rows <= whole && span.first < span.rows);
        let rows = span.rows.min(whole);
        let first = span.first.checked_rem(rows).unwrap_or(0);
        Self { keys, values, span: Span { rows, first, len: span.len.min(rows), ..span } }
    }
}

/// `out = softmax(scores(q K^T)) V`.
#[inline(always)]
pub(crate) fn attention<S: Simd, T: Element>(
    s: S,
    q: &[f32],
    cache: Cache<T>,
    rule: Scores,
    out: &mut [f32],
) {
    let stride = cache.span.stride;
    online_softmax(
        s,
        cache.span,
        rule,
        out,
        |row, scores| products(s, q, &cache.keys[row * stride..], stride, rule.scale, scores),
        |row, weights, keep, out| weighted_sum(s, weights, &cache.values[row * stride..], stride, keep, out),
    );
}

/// [`attention`] over blocks: keys meet the query as integers too, and their sums are exact.
#[inline(always)]
pub(crate) fn attention_blocks<S: Simd>(
    s: S,
    q: &[f32],
    cache: Cache<Q8Block>,
    rule: Scores,
    out: &mut [f32],
) {
    let stride = cache.span.stride;
    let mut query = [(0.0, [0; 64]); MAX_BLOCKS];
    let blocks = (q.len() / BLOCK).min(MAX_BLOCKS);
    for ((scale, doubled), q) in query.iter_mut().zip(q.as_chunks::<BLOCK>().0) {
        let quants;
        (*scale, quants) = quantize(q);
        // Both keys of a pair meet the same integers.
        for (i, quant) in quants.into_iter().enumerate() {
            let at = i / 16 * 32 + i % 16;
            doubled[at] = quant;
            doubled[at + 16] = quant;
        }
    }
    let query = &query[..blocks];
    online_softmax(
        s,
        cache.span,
        rule,
        out,
        |row, scores| block_products(s, query, &cache.keys[row * stride..], stride, rule.scale, scores),
        |row, weights, keep, out| {
            block_weighted_sum(s, weights, &cache.values[row * stride..], stride, keep, out);
        },
    );
}

/// One pass over all positions; `products(row, scores)` gives the scores of the rows from `row` on,
/// `add(row, weights, keep, out)` is `out = out * keep + weights V`.
#[inline(always)]
fn online_softmax<S: Simd>(
    s: S,
    span: Span,
    rule: Scores,
    out: &mut [f32],
    products: impl Fn(usize, &mut [f32]),
    add: impl Fn(usize, &[f32], f32, &mut [f32]),
) {
    out.fill(0.0);
    let (mut highest, mut total) = (f32::NEG_INFINITY, 0.0);
    let mut start = 0;
    while start < span.len {
        let n = (span.len - start).min(POSITIONS);
        let runs = span.runs(start, n);
        let mut weights = [f32::NEG_INFINITY; POSITIONS];
        for (range, row) in runs.clone() {
            if !range.is_empty() {
                products(row, &mut weights[range]);
            }
        }
        if rule.soft_cap > 0.0 {
            soft_cap(s, &mut weights[..n], rule.soft_cap);
        }
        let peak = weights.iter().fold(highest, |peak, x| if *x > peak { *x } else { peak });
        let mut keep = exp1(s, highest - peak);
        total = total * keep + exponentials(s, peak, &mut weights);
        for (range, row) in runs {
            if !range.is_empty() {
                add(row, &weights[range], keep, out);
                keep = 1.0;
            }
        }
        highest = peak;
        start += n;
    }
    let inverse = 1.0 / total;
    for out in out {
        *out *= inverse;
    }
}

/// One exponential.
#[inline(always)]
fn exp1<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; 8];
    s.store(exp_lanes(s, s.splat(x)), &mut lanes);
    lanes[0]
}

/// `scores[i] = scale * dot(q, key[i])`.
#[inline(always)]
fn products<S: Simd, T: Element>(s: S, q: &[f32], keys: &[T], stride: usize, scale: f32, scores: &mut [f32]) {
    let key = |position: usize| &keys[position * stride..][..q.len()];
    let (eights, rest) = scores.as_chunks_mut::<8>();
    let rest_at = eights.len() * 8;
    for (i, eight) in eights.iter_mut().enumerate() {
        let mut lanes = [s.splat(0.0); 8];
        for (j, lanes) in lanes.iter_mut().enumerate() {
            *lanes = dot_lanes(s, q, key(i * 8 + j));
        }
        s.store(s.mul(s.sums(lanes), s.splat(scale)), eight);
    }
    for (j, score) in rest.iter_mut().enumerate() {
        *score = dot(s, q, key(rest_at + j)) * scale;
    }
}

/// [`products`] of a query in blocks with keys in blocks, eight at a time.
#[inline(always)]
fn block_products<S: Simd>(
    s: S,
    query: &[(f32, [i8; 64])],
    keys: &[Q8Block],
    stride: usize,
    scale: f32,
    scores: &mut [f32],
) {
    for (i, eight) in scores.chunks_mut(8).enumerate() {
        let mut sums = s.splat(0.0);
        for (b, (query_scale, query)) in query.iter().enumerate() {
            let key = |j: usize| -> &Q8Block {
                if j < eight.len() { &keys[(i * 8 + j) * stride + b] } else { &[0; 34] }
            };
            let mut pairs = [s.no_products(); 4];
            for (pair, products) in pairs.iter_mut().enumerate() {
                let (even, odd) = (key(2 * pair), key(2 * pair + 1));
                let half = |h: usize| s.pair(half(even, h), half(odd, h));
                *products = s.dot_signed([half(0), half(1)], query);
            }
            let scales = core::array::from_fn(|j| scale_bits(key(j)));
            let scales = s.mul(s.f16_bits(scales), s.splat(*query_scale));
            sums = s.add(sums, s.mul(s.totals(pairs), scales));
        }
        let mut lanes = [0.0; 8];
        s.store(s.mul(sums, s.splat(scale)), &mut lanes);
        eight.copy_from_slice(&lanes[..eight.len()]);
    }
}

/// The bits of a block's scale.
#[inline(always)]
fn scale_bits(block: &Q8Block) -> u16 {
    u16::from_le_bytes([block[0], block[1]])
}

/// The first or second 16 integers of a block.
#[inline(always)]
fn half(block: &Q8Block, index: usize) -> &[u8; 16] {
    block[2 + 16 * index..].first_chunk().unwrap_or(&[0; 16])
}

/// `x = exp(x - peak)`; returns their sum.
#[inline(always)]
fn exponentials<S: Simd>(s: S, peak: f32, x: &mut [f32; POSITIONS]) -> f32 {
    let mut sum = s.splat(0.0);
    for x in x.as_chunks_mut::<8>().0 {
        let y = exp_lanes(s, s.sub(s.load(x), s.splat(peak)));
        sum = s.add(sum, y);
        s.store(y, x);
    }
    s.sum(sum)
}

/// `out = out * keep + sum of weights[i] * value[i]`.
#[inline(always)]
fn weighted_sum<S: Simd, T: Element>(
    s: S,
    weights: &[f32],
    rows: &[T],
    stride: usize,
    keep: f32,
    out: &mut [f32],
) {
    let (wide, rest) = out.as_chunks_mut::<32>();
    let rest_at = wide.len() * 32;
    for (c, out) in wide.iter_mut().enumerate() {
        let out = out.as_chunks_mut::<8>().0;
        let mut sums = [s.splat(0.0); 4];
        for (sum, out) in sums.iter_mut().zip(out.iter()) {
            *sum = s.mul(s.load(out), s.splat(keep));
        }
        for (i, weight) in weights.iter().enumerate() {
            let value = rows[i * stride + c * 32..][..32].as_chunks::<8>().0;
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum = s.add(*sum, s.mul(s.splat(*weight), T::load8(s, value)));
            }
        }
        for (sum, out) in sums.into_iter().zip(out) {
            s.store(sum, out);
        }
    }
    for (c, out) in rest.iter_mut().enumerate() {
        *out *= keep;
        for (i, weight) in weights.iter().enumerate() {
            *out += weight * rows[i * stride + rest_at + c].to_f32();
        }
    }
}

/// [`weighted_sum`] of rows in blocks.
#[inline(always)]
fn block_weighted_sum<S: Simd>(
    s: S,
    weights: &[f32],
    rows: &[Q8Block],
    stride: usize,
    keep: f32,
    out: &mut [f32],
) {
    for (b, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let out = out.as_chunks_mut::<8>().0;
        let mut sums = [s.splat(0.0); 4];
        for (sum, out) in sums.iter_mut().zip(out.iter()) {
            *sum = s.mul(s.load(out), s.splat(keep));
        }
        for (i, weight) in weights.iter().enumerate() {
            let block = &rows[i * stride + b];
            let factor = s.splat(weight * f16_to_f32(scale_bits(block)));
            for (sum, quants) in sums.iter_mut().zip(block[2..].as_chunks::<8>().0) {
                // Signed bytes as unsigned ones with an offset, both exact.
                let value = s.sub(s.f32_from_u8(quants.map(|q| q ^ 0x80)), s.splat(128.0));
                *sum = s.add(*sum, s.mul(factor, value));
            }
        }
        for (sum, out) in sums.into_iter().zip(out) {
            s.store(sum, out);
        }
    }
}
