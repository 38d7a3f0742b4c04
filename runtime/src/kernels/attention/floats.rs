//! Attention over rows of floating-point numbers.

use super::{Cache, POSITIONS, Query, Scores, exp1, exponentials};
use crate::kernels::float::{Element, soft_cap};
use crate::kernels::simd::Simd;

/// `out = softmax(scores(q K^T)) V` of all lanes.
#[inline(always)]
pub(crate) fn attention<S: Simd, T: Element>(
    s: S,
    queries: &[f32],
    lanes: &[Query],
    cache: Cache<T>,
    rule: Scores,
    out: &mut [f32],
) {
    // A tile has eight registers of sums, whatever its number of queries.
    let (fours, rest) = lanes.as_chunks::<4>();
    for lanes in fours {
        tile::<S, T, 4, 2>(s, queries, lanes, cache, rule, out);
    }
    let (twos, rest) = rest.as_chunks::<2>();
    for lanes in twos {
        tile::<S, T, 2, 4>(s, queries, lanes, cache, rule, out);
    }
    for lanes in rest.as_chunks::<1>().0 {
        tile::<S, T, 1, 8>(s, queries, lanes, cache, rule, out);
    }
}

/// `N` queries, `M = 8 / N` rows or registers of values at a time. Blocks of positions are those from multiples of
/// 64 on, so that they are the same for every query.
#[inline(always)]
fn tile<S: Simd, T: Element, const N: usize, const M: usize>(
    s: S,
    queries: &[f32],
    lanes: &[Query; N],
    cache: Cache<T>,
    rule: Scores,
    out: &mut [f32],
) {
    let mut q: [&[f32]; N] = [&[]; N];
    for (q, lane) in q.iter_mut().zip(lanes) {
        *q = &queries[lane.at..][..cache.width];
        out[lane.at..][..cache.width].fill(0.0);
    }
    let first = lanes.iter().fold(usize::MAX, |first, lane| first.min(lane.first));
    let end = lanes.iter().fold(0, |end, lane| end.max(lane.end));
    let (mut highest, mut total) = ([f32::NEG_INFINITY; N], [0.0; N]);
    for block in (first / POSITIONS * POSITIONS..end).step_by(POSITIONS) {
        let start = block.max(first);
        let n = end.min(block + POSITIONS) - start;
        let mut weights = [[f32::NEG_INFINITY; POSITIONS]; N];
        for (range, row) in cache.runs(start, n) {
            let (keys, at) = (&cache.keys[row * cache.stride..], start - block + range.start);
            products::<S, T, N, M>(s, q, keys, cache.stride, rule.scale, &mut weights, at, range.len());
        }
        let mut keep = [1.0; N];
        for (l, lane) in lanes.iter().enumerate() {
            let weights = &mut weights[l];
            if rule.soft_cap > 0.0 {
                soft_cap(s, &mut weights[start - block..][..n], rule.soft_cap);
            }
            // What this lane does not see of what the others do.
            let place = |position: usize| position.saturating_sub(block).min(POSITIONS);
            let seen = place(lane.first)..place(lane.end);
            weights[..seen.start].fill(f32::NEG_INFINITY);
            weights[seen.end..].fill(f32::NEG_INFINITY);
            if seen.is_empty() {
                weights.fill(0.0);
                continue;
            }
            let peak = weights.iter().fold(highest[l], |peak, x| if *x > peak { *x } else { peak });
            keep[l] = exp1(s, highest[l] - peak);
            total[l] = total[l] * keep[l] + exponentials(s, peak, weights);
            highest[l] = peak;
        }
        for (range, row) in cache.runs(start, n) {
            let (values, at) = (&cache.values[row * cache.stride..], start - block + range.start);
            add_values::<S, T, N, M>(s, &weights, at, range.len(), values, cache, lanes, keep, out);
            keep = [1.0; N];
        }
    }
    for (lane, total) in lanes.iter().zip(total) {
        let inverse = 1.0 / total;
        out[lane.at..][..cache.width].iter_mut().for_each(|out| *out *= inverse);
    }
}

/// The eight elements from `at` on, filled up with zeros.
#[inline(always)]
fn eight<S: Simd, T: Element>(s: S, x: &[T], at: usize) -> S::F {
    if let Some(whole) = x[at..].first_chunk() {
        return T::load8(s, whole);
    }
    let mut padded = [T::default(); 8];
    padded[..x.len() - at].copy_from_slice(&x[at..]);
    T::load8(s, &padded)
}

/// `scores[l][at + i] = scale * dot(q[l], key[i])` for `count` rows.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "registers, not an interface")]
fn products<S: Simd, T: Element, const N: usize, const M: usize>(
    s: S,
    q: [&[f32]; N],
    keys: &[T],
    stride: usize,
    scale: f32,
    scores: &mut [[f32; POSITIONS]; N],
    at: usize,
    count: usize,
) {
    let width = q[0].len();
    for i in (0..count).step_by(M) {
        let mut rows: [&[T]; M] = [&[]; M];
        for (j, row) in rows.iter_mut().enumerate() {
            // Behind the last one the last one again.
            *row = &keys[(i + j).min(count - 1) * stride..][..width];
        }
        let mut sums = [s.splat(0.0); 8];
        for at in (0..width).step_by(8) {
            let mut row = [s.splat(0.0); M];
            for (row, from) in row.iter_mut().zip(rows) {
                *row = eight(s, from, at);
            }
            for l in 0..N {
                let q = eight(s, q[l], at);
                for j in 0..M {
                    sums[l * M + j] = s.fma(q, row[j], sums[l * M + j]);
                }
            }
        }
        let mut lanes = [0.0; 8];
        s.store(s.mul(s.sums(sums), s.splat(scale)), &mut lanes);
        let here = M.min(count - i);
        for (scores, lanes) in scores.iter_mut().zip(lanes.as_chunks::<M>().0) {
            scores[at + i..][..here].copy_from_slice(&lanes[..here]);
        }
    }
}

/// `out[l] = out[l] * keep[l] + sum of weights[l][at + i] * value[i]` over `count` rows.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "registers, not an interface")]
fn add_values<S: Simd, T: Element, const N: usize, const M: usize>(
    s: S,
    weights: &[[f32; POSITIONS]; N],
    at: usize,
    count: usize,
    values: &[T],
    cache: Cache<T>,
    lanes: &[Query; N],
    keep: [f32; N],
    out: &mut [f32],
) {
    let whole = cache.width / (8 * M) * (8 * M);
    for column in (0..whole).step_by(8 * M) {
        columns::<S, T, N, M>(
            s,
            weights,
            at,
            count,
            &values[column..],
            cache.stride,
            lanes,
            column,
            keep,
            out,
        );
    }
    for column in (whole..cache.width / 8 * 8).step_by(8) {
        columns::<S, T, N, 1>(
            s,
            weights,
            at,
            count,
            &values[column..],
            cache.stride,
            lanes,
            column,
            keep,
            out,
        );
    }
    for column in cache.width / 8 * 8..cache.width {
        for (l, lane) in lanes.iter().enumerate() {
            let mut sum = out[lane.at + column] * keep[l];
            for (i, weight) in weights[l][at..][..count].iter().enumerate() {
                sum = libm::fmaf(*weight, values[i * cache.stride + column].to_f32(), sum);
            }
            out[lane.at + column] = sum;
        }
    }
}

/// `8 * M` columns of [`add_values`], from `column` on.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "registers, not an interface")]
fn columns<S: Simd, T: Element, const N: usize, const M: usize>(
    s: S,
    weights: &[[f32; POSITIONS]; N],
    at: usize,
    count: usize,
    values: &[T],
    stride: usize,
    lanes: &[Query; N],
    column: usize,
    keep: [f32; N],
    out: &mut [f32],
) {
    let mut sums = [[s.splat(0.0); M]; N];
    for (l, lane) in lanes.iter().enumerate() {
        let out = out[lane.at + column..][..8 * M].as_chunks::<8>().0;
        for (sum, out) in sums[l].iter_mut().zip(out) {
            *sum = s.mul(s.load(out), s.splat(keep[l]));
        }
    }
    for i in 0..count {
        let row = values[i * stride..][..8 * M].as_chunks::<8>().0;
        let mut value = [s.splat(0.0); M];
        for (value, row) in value.iter_mut().zip(row) {
            *value = T::load8(s, row);
        }
        for l in 0..N {
            let weight = s.splat(weights[l][at + i]);
            for j in 0..M {
                sums[l][j] = s.fma(weight, value[j], sums[l][j]);
            }
        }
    }
    for (l, lane) in lanes.iter().enumerate() {
        let out = out[lane.at + column..][..8 * M].as_chunks_mut::<8>().0;
        for (sum, out) in sums[l].iter().zip(out) {
            s.store(*sum, out);
        }
    }
}
