//! Attention over rows of floating-point numbers.

use super::{Cache, POSITIONS, Query, Rule, Sums};
use crate::kernels::float::Element;
use crate::kernels::simd::Simd;
use core::ops::Range;

/// `out = softmax(scores(q K^T)) V` of all lanes.
#[inline(always)]
pub(crate) fn attention<S: Simd, T: Element>(
    s: S,
    queries: &[f32],
    lanes: &[Query],
    cache: Cache<T>,
    rule: Rule,
    out: &mut [f32],
) {
    // A tile has eight registers of sums, whatever its number of queries. Several queries go together where a row is
    // a whole number of registers; what is left of other rows is computed in one place, that for one query.
    let together = |multiple| T::TOGETHER && cache.width.is_multiple_of(multiple);
    let (fours, rest) = if together(16) { lanes.as_chunks::<4>() } else { (&[][..], lanes) };
    for lanes in fours {
        tile::<S, T, 4, 2>(s, queries, lanes, cache, rule, out);
    }
    let (twos, rest) = if together(32) { rest.as_chunks::<2>() } else { (&[][..], rest) };
    for lanes in twos {
        tile::<S, T, 2, 4>(s, queries, lanes, cache, rule, out);
    }
    for lanes in rest.as_chunks::<1>().0 {
        tile::<S, T, 1, 8>(s, queries, lanes, cache, rule, out);
    }
}

/// `N` queries, `M = 8 / N` rows or registers of values at a time; a row is a multiple of `8 * M` elements wide, unless
/// there is one query. Blocks of positions are those from multiples of 64 on, so that they are the same for every query.
#[inline(always)]
fn tile<S: Simd, T: Element, const N: usize, const M: usize>(
    s: S,
    queries: &[f32],
    lanes: &[Query; N],
    cache: Cache<T>,
    rule: Rule,
    out: &mut [f32],
) {
    let mut q: [&[f32]; N] = [&[]; N];
    for (q, lane) in q.iter_mut().zip(lanes) {
        *q = &queries[lane.at..][..cache.width];
        out[lane.at..][..cache.width].fill(0.0);
    }
    let first = lanes.iter().fold(usize::MAX, |first, lane| first.min(lane.first));
    let end = lanes.iter().fold(0, |end, lane| end.max(lane.end));
    let mut sums = [Sums::NONE; N];
    for block in (first / POSITIONS * POSITIONS..end).step_by(POSITIONS) {
        let start = block.max(first);
        let n = end.min(block + POSITIONS) - start;
        let mut weights = [[f32::NEG_INFINITY; POSITIONS]; N];
        for (range, row) in cache.runs(start, n) {
            let (keys, at) = (&cache.keys[row * cache.stride..], start - block + range.start);
            products::<S, T, N, M>(
                s,
                q,
                keys,
                cache.stride,
                rule.scores.scale,
                &mut weights,
                at,
                range.len(),
            );
        }
        let mut keep = [1.0; N];
        for (l, lane) in lanes.iter().enumerate() {
            // What this lane does not see of what the others do.
            let place = |position: usize| position.saturating_sub(block).min(POSITIONS);
            keep[l] = rule.soften(&mut weights[l], place(lane.first)..place(lane.end), &mut sums[l]);
        }
        for (range, row) in cache.runs(start, n) {
            let (values, at) = (&cache.values[row * cache.stride..], start - block + range.start);
            add_values::<S, T, N, M>(s, &weights, at, range.len(), values, cache, lanes, keep, out);
            keep = [1.0; N];
        }
    }
    for (lane, sums) in lanes.iter().zip(sums) {
        let inverse = 1.0 / sums.total;
        out[lane.at..][..cache.width].iter_mut().for_each(|out| *out *= inverse);
    }
}

/// Elements `8 * c..8 * c + 8` of each row.
#[inline(always)]
fn eights<S: Simd, T: Element, const N: usize>(s: S, rows: [&[T]; N], c: usize) -> [S::F; N] {
    let mut lanes = [s.splat(0.0); N];
    for (lanes, row) in lanes.iter_mut().zip(rows) {
        *lanes = T::load8(s, &row.as_chunks().0[c]);
    }
    lanes
}

/// The elements in `range`, fewer than eight, of each row, filled up with zeros.
#[inline(always)]
fn lasts<S: Simd, T: Element, const N: usize>(s: S, rows: [&[T]; N], range: &Range<usize>) -> [S::F; N] {
    let mut lanes = [s.splat(0.0); N];
    for (lanes, row) in lanes.iter_mut().zip(rows) {
        let mut eight = [T::default(); 8];
        for (to, from) in eight.iter_mut().zip(&row[range.clone()]) {
            *to = *from;
        }
        *lanes = T::load8(s, &eight);
    }
    lanes
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
    let (whole, rest) = (width / 8, width / 8 * 8..width);
    for i in (0..count).step_by(M) {
        let mut rows: [&[T]; M] = [&[]; M];
        for (j, row) in rows.iter_mut().enumerate() {
            // Behind the last one the last one again.
            *row = &keys[(i + j).min(count - 1) * stride..][..width];
        }
        let mut sums = [s.splat(0.0); 8];
        for c in 0..whole {
            add_products(s, eights(s, q, c), eights(s, rows, c), &mut sums);
        }
        if N == 1 && !rest.is_empty() {
            add_products(s, lasts(s, q, &rest), lasts(s, rows, &rest), &mut sums);
        }
        let mut lanes = [0.0; 8];
        s.store(s.mul(s.sums(sums), s.splat(scale)), &mut lanes);
        let here = M.min(count - i);
        for (scores, lanes) in scores.iter_mut().zip(lanes.as_chunks::<M>().0) {
            match scores[at + i..].first_chunk_mut::<M>() {
                Some(scores) if here == M => *scores = *lanes,
                _ => scores[at + i..][..here].copy_from_slice(&lanes[..here]),
            }
        }
    }
}

/// `sums[l * M + j] += q[l] * row[j]`, eight lanes each.
#[inline(always)]
fn add_products<S: Simd, const N: usize, const M: usize>(
    s: S,
    q: [S::F; N],
    row: [S::F; M],
    sums: &mut [S::F; 8],
) {
    for l in 0..N {
        for j in 0..M {
            sums[l * M + j] = s.fma(q[l], row[j], sums[l * M + j]);
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
    if N > 1 {
        return;
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
