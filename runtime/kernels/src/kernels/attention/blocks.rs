//! Attention of one query over a cache of blocks: keys meet the query as integers, and their sums are exact.

use super::{Cache, MAX_WIDTH, POSITIONS, Q8Block, Query, Row, Scores, State, Weigh};
use crate::format::f16_to_f32;
use crate::kernels::activations::BLOCK;
use crate::kernels::integers::quantize;
use crate::kernels::simd::Simd;
use core::slice::{from_mut, from_ref};

/// Blocks of the widest head.
const MAX_BLOCKS: usize = MAX_WIDTH / BLOCK;

/// `out = softmax(scores(q K^T)) V`, for one query after the other.
#[inline(always)]
pub(crate) fn attention_blocks<S: Simd>(
    s: S,
    queries: &[f32],
    lanes: &[Query],
    cache: Cache<&[Q8Block]>,
    rule: Scores,
    out: &mut [f32],
) {
    for lane in lanes {
        let q = &queries[lane.at..][..cache.width];
        one_query(s, q, lane, cache, rule, &mut out[lane.at..][..cache.width]);
    }
}

#[inline(always)]
fn one_query<S: Simd>(
    s: S,
    q: &[f32],
    lane: &Query,
    cache: Cache<&[Q8Block]>,
    rule: Scores,
    out: &mut [f32],
) {
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
    let stride = cache.stride;
    out.fill(0.0);
    let mut state = State::START;
    for start in (lane.first..lane.end).step_by(POSITIONS) {
        let n = (lane.end - start).min(POSITIONS);
        let mut weights: Row = [f32::NEG_INFINITY; _];
        for (range, row) in cache.runs(start, n) {
            let keys = &cache.keys[row * stride..];
            block_products(s, query, keys, stride, rule.scale, &mut weights[range]);
        }
        s.outline(Weigh {
            lanes: from_ref(lane),
            block: start,
            soft_cap: rule.soft_cap,
            scores: from_mut(&mut weights),
            states: from_mut(&mut state),
        });
        let mut keep = state.keep;
        for (range, row) in cache.runs(start, n) {
            block_weighted_sum(s, &weights[range], &cache.values[row * stride..], stride, keep, out);
            keep = 1.0;
        }
    }
    let inverse = 1.0 / state.total;
    for out in out {
        *out *= inverse;
    }
}

/// `scores[i] = scale * dot(q, key[i])`, eight at a time.
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
            sums = s.fma(s.totals(pairs), scales, sums);
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

/// `out = out * keep + sum of weights[i] * value[i]`.
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
                *sum = s.fma(factor, value, *sum);
            }
        }
        for (sum, out) in sums.into_iter().zip(out) {
            s.store(sum, out);
        }
    }
}
