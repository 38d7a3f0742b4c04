//! Attention of one query head over the cached positions, in one pass and without a score buffer.
//!
//! Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over blocks of 64 positions: a block's
//! scores live on the stack; when a block brings a new maximum, what was summed before is scaled down.

use super::exp::exp_lanes;
use super::float::{Element, dot, dot_lanes, soft_cap};
use super::simd::Simd;

/// Positions in a block of scores.
const POSITIONS: usize = 64;

/// The cached keys and values of one layer, from the first element of a head on.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum KeyValues<'a> {
    /// The bits of half-precision numbers.
    Half { keys: &'a [u16], values: &'a [u16] },
    /// `f32`.
    Full { keys: &'a [f32], values: &'a [f32] },
}

/// The cached rows of one key-value head: row `p` starts at element `p * stride` of both slices.
#[derive(Clone, Copy)]
pub(crate) struct Cache<'a, T> {
    pub keys: &'a [T],
    pub values: &'a [T],
    pub stride: usize,
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
    /// The rows and how many of them, at most `len`, hold `width` elements.
    pub(super) fn new(
        keys: &'a [T],
        values: &'a [T],
        stride: usize,
        width: usize,
        len: usize,
    ) -> (Self, usize) {
        let rows = match keys.len().min(values.len()).checked_sub(width) {
            Some(rest) => rest.checked_div(stride).unwrap_or(0) + 1,
            None => 0,
        };
        debug_assert!(len > 0 && len <= rows);
        (Self { keys, values, stride }, len.min(rows))
    }
}

/// `out = softmax(scores(q K^T)) V` over the first `len` rows, all of which must be in the cache.
#[inline(always)]
pub(crate) fn attention<S: Simd, T: Element>(
    s: S,
    q: &[f32],
    cache: Cache<T>,
    len: usize,
    rule: Scores,
    out: &mut [f32],
) {
    out.fill(0.0);
    let (mut highest, mut total) = (f32::NEG_INFINITY, 0.0);
    let mut start = 0;
    while start < len {
        let n = (len - start).min(POSITIONS);
        let mut weights = [f32::NEG_INFINITY; POSITIONS];
        scores(s, q, cache, start, rule.scale, &mut weights[..n]);
        if rule.soft_cap > 0.0 {
            soft_cap(s, &mut weights[..n], rule.soft_cap);
        }
        let peak = weights.iter().fold(highest, |peak, x| if *x > peak { *x } else { peak });
        let keep = exp1(s, highest - peak);
        total = total * keep + exponentials(s, peak, &mut weights);
        weighted_sum(s, &weights[..n], cache, start, keep, out);
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

/// `scores[i] = scale * dot(q, key[start + i])`.
#[inline(always)]
fn scores<S: Simd, T: Element>(
    s: S,
    q: &[f32],
    cache: Cache<T>,
    start: usize,
    scale: f32,
    scores: &mut [f32],
) {
    let key = |position: usize| &cache.keys[position * cache.stride..][..q.len()];
    let (eights, rest) = scores.as_chunks_mut::<8>();
    let rest_at = start + eights.len() * 8;
    for (i, eight) in eights.iter_mut().enumerate() {
        let mut lanes = [s.splat(0.0); 8];
        for (j, lanes) in lanes.iter_mut().enumerate() {
            *lanes = dot_lanes(s, q, key(start + i * 8 + j));
        }
        s.store(s.mul(s.sums(lanes), s.splat(scale)), eight);
    }
    for (j, score) in rest.iter_mut().enumerate() {
        *score = dot(s, q, key(rest_at + j)) * scale;
    }
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

/// `out = out * keep + sum of weights[i] * value[start + i]`.
#[inline(always)]
fn weighted_sum<S: Simd, T: Element>(
    s: S,
    weights: &[f32],
    cache: Cache<T>,
    start: usize,
    keep: f32,
    out: &mut [f32],
) {
    let rows = &cache.values[start * cache.stride..];
    let (wide, rest) = out.as_chunks_mut::<32>();
    let rest_at = wide.len() * 32;
    for (c, out) in wide.iter_mut().enumerate() {
        let out = out.as_chunks_mut::<8>().0;
        let mut sums = [s.splat(0.0); 4];
        for (sum, out) in sums.iter_mut().zip(out.iter()) {
            *sum = s.mul(s.load(out), s.splat(keep));
        }
        for (i, weight) in weights.iter().enumerate() {
            let value = rows[i * cache.stride + c * 32..][..32].as_chunks::<8>().0;
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
            *out += weight * rows[i * cache.stride + rest_at + c].to_f32();
        }
    }
}
