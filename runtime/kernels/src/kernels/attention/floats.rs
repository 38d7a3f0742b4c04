//! Attention over rows of floating-point numbers.
//!
//! Some rows at a time are widened to `f32` on the stack, laid out as the loops read them, for all queries of a
//! call: four of these meet two keys at once, then four values.
#![allow(clippy::needless_range_loop, reason = "indices name registers")]

use super::{Cache, Elements, MAX_WIDTH, POSITIONS, Query, Scores, State, Weigh};
use crate::kernels::float::Element;
use crate::kernels::simd::{Op, Simd};
use core::ops::Range;

/// Queries that share widened rows.
const LANES: usize = 32;
/// Queries of a tile.
const TILE: usize = 4;
/// Widened numbers, in eights: 16 KiB, and four rows of the widest head.
const EIGHTS: usize = MAX_WIDTH / 8 * 4;
/// Scores of a block, and room behind the last ones for those of a whole step.
type Row = [f32; POSITIONS + 8];

/// Some rows of a block of positions.
#[derive(Clone, Copy)]
struct Piece {
    /// The place of the first among the block's positions.
    at: usize,
    /// Its row in the cache.
    row: usize,
    count: usize,
}

/// `out = softmax(scores(q K^T)) V` of all lanes.
#[inline(always)]
pub(crate) fn attention<S: Simd>(
    s: S,
    queries: &[f32],
    lanes: &[Query],
    cache: Cache<Elements>,
    rule: Scores,
    out: &mut [f32],
) {
    let mut wide = [[0.0; 8]; EIGHTS];
    for lanes in lanes.chunks(LANES) {
        together(s, queries, lanes, cache, rule, &mut wide, out);
    }
}

/// [`attention`] of at most [`LANES`] queries. Blocks of positions are those from multiples of 64 on, so that they are
/// the same for every query.
#[inline(always)]
fn together<S: Simd>(
    s: S,
    queries: &[f32],
    lanes: &[Query],
    cache: Cache<Elements>,
    rule: Scores,
    wide: &mut [[f32; 8]; EIGHTS],
    out: &mut [f32],
) {
    let mut scores: [[Row; TILE]; LANES / TILE] = [[[0.0; POSITIONS + 8]; TILE]; LANES / TILE];
    let mut states = [State::START; LANES];
    for lane in lanes {
        out[lane.at..][..cache.width].fill(0.0);
    }
    let Range { start: first, end } = seen(lanes);
    for block in (first / POSITIONS * POSITIONS..end).step_by(POSITIONS) {
        let start = block.max(first);
        let n = end.min(block + POSITIONS) - start;
        for_pieces(&cache, start - block, start, n, |piece| {
            widen_keys(s, &cache, piece, wide);
            for (lanes, scores) in lanes.chunks(TILE).zip(&mut scores) {
                let rows = rows_of(piece, block, lanes);
                if rows.is_empty() {
                    continue;
                }
                let (scale, tile) =
                    (rule.scale, Tile { lanes, width: cache.width, wide, at: piece.at, rows });
                if let ([_], Some(scores)) = (lanes, scores.first_chunk_mut()) {
                    s.outline(Products::<1, 4> { tile, queries, scale, scores });
                } else {
                    s.outline(Products::<TILE, 1> { tile, queries, scale, scores });
                }
            }
        });
        for ((lane, scores), state) in lanes.iter().zip(scores.as_flattened_mut()).zip(&mut states) {
            let place = |position: usize| position.saturating_sub(block).min(POSITIONS);
            let seen = place(lane.first)..place(lane.end);
            if let Some(scores) = scores.first_chunk_mut() {
                s.outline(Weigh { scores, seen, soft_cap: rule.soft_cap, state });
            }
        }
        for_pieces(&cache, start - block, start, n, |piece| {
            let room = widen_values(s, &cache, piece, wide);
            let tiles = lanes.chunks(TILE).zip(&scores).zip(states.as_chunks_mut::<TILE>().0);
            for ((lanes, weights), states) in tiles {
                let rows = rows_of(piece, block, lanes);
                if rows.is_empty() {
                    continue;
                }
                let tile = Tile { lanes, width: cache.width, wide, at: piece.at, rows };
                if let ([_], Some(weights)) = (lanes, weights.first_chunk()) {
                    s.outline(AddValues::<1> { tile, room, weights, states, out });
                } else {
                    s.outline(AddValues::<TILE> { tile, room, weights, states, out });
                }
                states.iter_mut().for_each(|state| state.keep = 1.0);
            }
        });
    }
    for (lane, state) in lanes.iter().zip(states) {
        let inverse = 1.0 / state.total;
        out[lane.at..][..cache.width].iter_mut().for_each(|out| *out *= inverse);
    }
}

/// The positions that any of the lanes sees.
#[inline(always)]
fn seen(lanes: &[Query]) -> Range<usize> {
    let first = lanes.iter().fold(usize::MAX, |first, lane| first.min(lane.first));
    first..lanes.iter().fold(0, |end, lane| end.max(lane.end))
}

/// The rows of a piece that any of the lanes sees.
#[inline(always)]
fn rows_of(piece: Piece, block: usize, lanes: &[Query]) -> Range<usize> {
    let Range { start, end } = seen(lanes);
    let place = |position: usize| position.saturating_sub(block + piece.at).min(piece.count);
    place(start)..place(end)
}

/// Eights of a row, the last one filled up.
#[inline(always)]
fn eights(width: usize) -> usize {
    width.div_ceil(8).max(1)
}

/// Rows that there is room for, in pairs.
#[inline(always)]
fn rows_at_once(width: usize) -> usize {
    EIGHTS / eights(width) / 2 * 2
}

/// The rows of the positions `start .. start + n`, the first of which is at `place` of its block, as many at a time as
/// there is room for.
#[inline(always)]
fn for_pieces(cache: &Cache<Elements>, place: usize, start: usize, n: usize, mut job: impl FnMut(Piece)) {
    let room = rows_at_once(cache.width);
    for (range, row) in cache.runs(start, n) {
        for first in range.clone().step_by(room) {
            let count = room.min(range.end - first);
            job(Piece { at: place + first, row: row + first - range.start, count });
        }
    }
}

/// Keys in pairs of rows: eight numbers of the first, eight of the second, and so on.
#[inline(always)]
fn widen_keys<S: Simd>(s: S, cache: &Cache<Elements>, piece: Piece, wide: &mut [[f32; 8]; EIGHTS]) {
    widen(s, cache.keys, cache, piece, [eights(cache.width), 2], wide);
}

/// Values with the same eight numbers of all rows side by side; answers how many rows have room there.
#[inline(always)]
fn widen_values<S: Simd>(
    s: S,
    cache: &Cache<Elements>,
    piece: Piece,
    wide: &mut [[f32; 8]; EIGHTS],
) -> usize {
    let room = rows_at_once(cache.width);
    widen(s, cache.values, cache, piece, [1, room], wide);
    room
}

/// Widens the rows of a piece, see [`Widen`].
#[inline(always)]
fn widen<S: Simd>(
    s: S,
    elements: Elements,
    &Cache { stride, width, .. }: &Cache<Elements>,
    piece: Piece,
    steps: [usize; 2],
    wide: &mut [[f32; 8]; EIGHTS],
) {
    match elements {
        Elements::Half(elements) => s.outline(Widen { elements, stride, width, piece, steps, wide }),
        Elements::Full(elements) => s.outline(Widen { elements, stride, width, piece, steps, wide }),
    }
}

/// Widens the rows of a piece by twos: `steps` are from a row to the next and from eight numbers of it, the last ones
/// filled up, to the next. The second row's come behind the first one's; behind the last row it comes again.
struct Widen<'x, T> {
    elements: &'x [T],
    stride: usize,
    width: usize,
    piece: Piece,
    steps: [usize; 2],
    wide: &'x mut [[f32; 8]; EIGHTS],
}

impl<S: Simd, T: Element> Op<S> for Widen<'_, T> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { elements, stride, width, piece, steps, wide } = self;
        for r in (0..piece.count).step_by(2) {
            let pair = [piece.row + r, piece.row + (r + 1).min(piece.count - 1)];
            let [(a, a_rest), (b, b_rest)] = pair.map(|row| elements[row * stride..][..width].as_chunks());
            let mut to = wide[r * steps[0]..].chunks_mut(steps[1]).filter_map(|to| to.first_chunk_mut::<2>());
            for ((a, b), to) in a.iter().zip(b).zip(&mut to) {
                s.store(T::load8(s, a), &mut to[0]);
                s.store(T::load8(s, b), &mut to[1]);
            }
            if let (false, Some(to)) = (a_rest.is_empty(), to.next()) {
                for (rest, to) in [a_rest, b_rest].into_iter().zip(to) {
                    let mut eight = [T::default(); 8];
                    eight[..rest.len()].copy_from_slice(rest);
                    s.store(T::load8(s, &eight), to);
                }
            }
        }
    }
}

/// Queries that meet widened rows.
struct Tile<'x> {
    /// Fewer than there are registers for leave some of these with what nobody asks for.
    lanes: &'x [Query],
    width: usize,
    wide: &'x [[f32; 8]; EIGHTS],
    /// The place of the first widened row.
    at: usize,
    /// Those that any of the queries sees.
    rows: Range<usize>,
}

/// `scores[l][at + r] = scale * dot(q[l], key[r])` for the rows of keys in pairs, of `N` queries and `P` pairs at a
/// time, `N * P = 4`. Scores of other rows may be overwritten.
struct Products<'x, const N: usize, const P: usize> {
    tile: Tile<'x>,
    queries: &'x [f32],
    scale: f32,
    scores: &'x mut [Row; N],
}

impl<S: Simd, const N: usize, const P: usize> Op<S> for Products<'_, N, P> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { tile: Tile { lanes, width, wide, at, rows }, queries, scale, scores } = self;
        let mut q: [&[f32]; N] = [&[]; N];
        for (l, q) in q.iter_mut().enumerate() {
            // Behind the last one the last one again.
            *q = &queries[lanes[l.min(lanes.len() - 1)].at..][..width];
        }
        let (keys, eights, fours) = (wide.as_chunks::<2>().0, eights(width), width / 32);
        let q4 = q.map(|q| &q.as_chunks::<32>().0[..fours]);
        let last = (rows.end - 1) / 2;
        for pair in (rows.start / 2..last + 1).step_by(P) {
            let mut pairs: [&[[[f32; 8]; 2]]; P] = [&[]; P];
            for (p, keys_of) in pairs.iter_mut().enumerate() {
                *keys_of = &keys[(pair + p).min(last) * eights..][..eights];
            }
            let k4 = pairs.map(|keys| &keys.as_chunks::<4>().0[..fours]);
            let mut sums = [s.splat(0.0); 8];
            for i in 0..fours {
                for c in 0..4 {
                    let mut x = [s.splat(0.0); N];
                    for l in 0..N {
                        x[l] = s.load(&q4[l][i].as_chunks().0[c]);
                    }
                    for p in 0..P {
                        add_products(s, x, &k4[p][i][c], &mut sums, p * 2);
                    }
                }
            }
            for c in fours * 4..eights {
                let mut x = [s.splat(0.0); N];
                for l in 0..N {
                    x[l] = load(s, q[l], c);
                }
                for p in 0..P {
                    add_products(s, x, &pairs[p][c], &mut sums, p * 2);
                }
            }
            let mut results = [0.0; 8];
            s.store(s.mul(s.sums(sums), s.splat(scale)), &mut results);
            for (l, scores) in scores.iter_mut().enumerate() {
                for p in 0..P {
                    if let Some(two) = scores[at + 2 * (pair + p)..].first_chunk_mut::<2>() {
                        *two = results.as_chunks().0[l * P + p];
                    }
                }
            }
        }
    }
}

/// `sums[first + l * 8 / N + j] += q[l] * keys[j]`, eight lanes each.
#[inline(always)]
fn add_products<S: Simd, const N: usize>(
    s: S,
    q: [S::F; N],
    keys: &[[f32; 8]; 2],
    sums: &mut [S::F; 8],
    first: usize,
) {
    for (j, key) in keys.iter().enumerate() {
        let key = s.load(key);
        for l in 0..N {
            let sum = &mut sums[first + l * (8 / N) + j];
            *sum = s.fma(q[l], key, *sum);
        }
    }
}

/// Numbers `8 * c..8 * c + 8` of a row, zeros behind its end.
#[inline(always)]
fn load<S: Simd>(s: S, row: &[f32], c: usize) -> S::F {
    let rest = &row[8 * c..];
    match rest.first_chunk() {
        Some(eight) => s.load(eight),
        None => s.load(&filled_up(rest)),
    }
}

/// Fewer than eight numbers, and zeros.
#[cold]
#[inline(never)]
fn filled_up(rest: &[f32]) -> [f32; 8] {
    let mut eight = [0.0; 8];
    for (to, from) in eight.iter_mut().zip(rest) {
        *to = *from;
    }
    eight
}

/// `out[l] = out[l] * keep[l] + sum of weights[l][at + r] * value[r]` over the rows of values, of `N` queries.
struct AddValues<'x, const N: usize> {
    tile: Tile<'x>,
    /// Rows that there is room for.
    room: usize,
    weights: &'x [Row; N],
    states: &'x [State; TILE],
    out: &'x mut [f32],
}

impl<S: Simd, const N: usize> Op<S> for AddValues<'_, N> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { tile: Tile { lanes, width, wide, at, rows }, room, weights, states, out } = self;
        let weights = weights.each_ref().map(|weights| &weights[at + rows.start..][..rows.len()]);
        let (fours, rest) = (rows.len() / 4, rows.len() / 4 * 4);
        let weights4 = weights.map(|weights| &weights.as_chunks::<4>().0[..fours]);
        for (c, column) in wide.chunks_exact(room).take(eights(width)).enumerate() {
            let column = &column[rows.clone()];
            let mut sums = [s.splat(0.0); N];
            for l in 0..N.min(lanes.len()) {
                sums[l] = s.mul(load(s, &out[lanes[l].at..][..width], c), s.splat(states[l].keep));
            }
            for (i, values) in column.as_chunks::<4>().0[..fours].iter().enumerate() {
                let x = [s.load(&values[0]), s.load(&values[1]), s.load(&values[2]), s.load(&values[3])];
                for l in 0..N {
                    sums[l] = s.fma4(&weights4[l][i], x, sums[l]);
                }
            }
            for (i, value) in column.iter().enumerate().skip(rest) {
                let x = s.load(value);
                for l in 0..N {
                    sums[l] = s.fma(s.splat(weights[l][i]), x, sums[l]);
                }
            }
            for l in 0..N.min(lanes.len()) {
                let out = &mut out[lanes[l].at..][..width][8 * c..];
                match out.first_chunk_mut() {
                    Some(out) => s.store(sums[l], out),
                    None => {
                        let mut eight = [0.0; 8];
                        s.store(sums[l], &mut eight);
                        out.copy_from_slice(&eight[..out.len()]);
                    }
                }
            }
        }
    }
}
