//! Attention over rows of floating-point numbers.
//!
//! Some rows at a time are widened to `f32` on the stack, laid out as the loops read them, for all queries of a
//! call: four of these meet sixteen keys at once, a number of each, then a value, sixteen numbers of it. So
//! a score is one chain of fused multiplications and additions, and no register is ever added up across.
#![allow(clippy::needless_range_loop, reason = "indices name registers")]

use super::{Cache, Elements, MAX_WIDTH, POSITIONS, Query, Row, Scores, State, Weigh};
use crate::kernels::float::{Element, load16};
use crate::kernels::simd::{Op, Simd};
use core::hint::black_box;
use core::ops::Range;

/// Queries that share widened rows.
const LANES: usize = 48;
/// Queries of a tile.
const TILE: usize = 4;
/// Widened numbers, in sixteens: 16 KiB, sixteen rows of a quarter of the widest head or four of all of it.
const SIXTEENS: usize = MAX_WIDTH / 4;
type Wide = [[f32; 16]; SIXTEENS];

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
    let mut wide = [[0.0; 16]; SIXTEENS];
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
    wide: &mut Wide,
    out: &mut [f32],
) {
    let mut scores: [[Row; TILE]; LANES / TILE] = [[[0.0; _]; _]; _];
    let mut states = [State::START; LANES];
    for lane in lanes {
        out[lane.at..][..cache.width].fill(0.0);
    }
    let Range { start: first, end } = seen(lanes);
    for block in (first / POSITIONS * POSITIONS..end).step_by(POSITIONS) {
        let start = block.max(first);
        let n = end.min(block + POSITIONS) - start;
        let columns = cache.width.min(SIXTEENS);
        for_pieces(&cache, SIXTEENS / columns * 16, start - block, start, n, |piece| {
            for first in (0..cache.width).step_by(columns) {
                let columns = first..cache.width.min(first + columns);
                widen_keys(s, &cache, piece, columns.clone(), wide);
                let scale = if columns.end == cache.width { rule.scale } else { 1.0 };
                for (lanes, scores) in lanes.chunks(TILE).zip(&mut scores) {
                    let rows = rows_of(piece, block, lanes);
                    if rows.is_empty() {
                        continue;
                    }
                    let (columns, tile) = (columns.clone(), Tile { lanes, wide, at: piece.at, rows });
                    if let ([_], Some(scores)) = (lanes, scores.first_chunk_mut()) {
                        s.outline(Products::<1, 2> { tile, queries, columns, scale, scores });
                    } else {
                        s.outline(Products::<TILE, 1> { tile, queries, columns, scale, scores });
                    }
                }
            }
        });
        let (scores, soft_cap) = (scores.as_flattened_mut(), rule.soft_cap);
        s.outline(Weigh { lanes, block, soft_cap, scores, states: &mut states });
        let room = SIXTEENS / sixteens(cache.width);
        for_pieces(&cache, room, start - block, start, n, |piece| {
            widen_values(s, &cache, piece, room, wide);
            let tiles = lanes.chunks(TILE).zip(scores.as_chunks::<TILE>().0).zip(states.as_chunks_mut().0);
            for ((lanes, weights), states) in tiles {
                let rows = rows_of(piece, block, lanes);
                if rows.is_empty() {
                    continue;
                }
                let (width, tile) = (cache.width, Tile { lanes, wide, at: piece.at, rows });
                if let ([_], Some(weights)) = (lanes, weights.first_chunk()) {
                    s.outline(AddValues::<1> { tile, width, room, weights, states, out });
                } else {
                    s.outline(AddValues::<TILE> { tile, width, room, weights, states, out });
                }
                states.iter_mut().for_each(|state: &mut State| state.keep = 1.0);
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

/// Sixteens of a row, the last one filled up.
#[inline(always)]
fn sixteens(width: usize) -> usize {
    width.div_ceil(16).max(1)
}

/// The rows of the positions `start .. start + n`, the first of which is at `place` of its block, at most `room` at a
/// time.
#[inline(always)]
fn for_pieces(
    cache: &Cache<Elements>,
    room: usize,
    place: usize,
    start: usize,
    n: usize,
    mut job: impl FnMut(Piece),
) {
    for (range, row) in cache.runs(start, n) {
        for first in range.clone().step_by(room) {
            let count = room.min(range.end - first);
            job(Piece { at: place + first, row: row + first - range.start, count });
        }
    }
}

/// Widens some columns of keys, see [`WidenKeys`].
#[inline(always)]
fn widen_keys<S: Simd>(
    s: S,
    &Cache { keys, stride, .. }: &Cache<Elements>,
    piece: Piece,
    columns: Range<usize>,
    wide: &mut Wide,
) {
    match keys {
        Elements::Half(elements) => s.outline(WidenKeys { elements, stride, piece, columns, wide }),
        Elements::Full(elements) => s.outline(WidenKeys { elements, stride, piece, columns, wide }),
    }
}

/// Widens values, see [`WidenValues`].
#[inline(always)]
fn widen_values<S: Simd>(
    s: S,
    &Cache { values, stride, width, .. }: &Cache<Elements>,
    piece: Piece,
    room: usize,
    wide: &mut Wide,
) {
    match values {
        Elements::Half(elements) => s.outline(WidenValues { elements, stride, width, piece, room, wide }),
        Elements::Full(elements) => s.outline(WidenValues { elements, stride, width, piece, room, wide }),
    }
}

/// Keys, sixteen rows at a time: the first number of each, then the second of each, and so on. Behind the last row it
/// comes again.
struct WidenKeys<'x, T> {
    elements: &'x [T],
    stride: usize,
    piece: Piece,
    columns: Range<usize>,
    wide: &'x mut Wide,
}

impl<S: Simd, T: Element> Op<S> for WidenKeys<'_, T> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { elements, stride, piece, columns, wide } = self;
        let groups = wide.chunks_exact_mut(columns.len().max(1));
        for (to, first) in groups.zip((0..piece.count).step_by(16)) {
            for half in 0..2 {
                let rows: [&[T]; 8] = core::array::from_fn(|i| {
                    let row = piece.row + (first + 8 * half + i).min(piece.count - 1);
                    &elements[row * stride..][columns.clone()]
                });
                let eights = columns.len() / 8;
                let whole = rows.map(|row| &row.as_chunks::<8>().0[..eights]);
                let (to, rest) = to.split_at_mut(eights * 8);
                for (c, to) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    // Not by `map`, which the compiler may leave a call.
                    let row = |i: usize| T::load8(s, &whole[i][c]);
                    let columns =
                        s.transpose([row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)]);
                    for (to, column) in to.iter_mut().zip(columns) {
                        s.store(column, &mut to.as_chunks_mut().0[half]);
                    }
                }
                if !rest.is_empty() {
                    for (i, row) in rows.iter().enumerate() {
                        let mut last = [0.0; 8];
                        s.store(T::load8(s, &filled_up(&row[eights * 8..])), &mut last);
                        for (to, x) in rest.iter_mut().zip(last) {
                            to[8 * half + i] = x;
                        }
                    }
                }
            }
        }
    }
}

/// Values with the same sixteen numbers of all rows side by side, for which there is room; the last ones are filled up.
struct WidenValues<'x, T> {
    elements: &'x [T],
    stride: usize,
    width: usize,
    piece: Piece,
    room: usize,
    wide: &'x mut Wide,
}

impl<S: Simd, T: Element> Op<S> for WidenValues<'_, T> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { elements, stride, width, piece, room, wide } = self;
        for r in 0..piece.count {
            let (row, rest) = elements[(piece.row + r) * stride..][..width].as_chunks::<16>();
            let mut to = wide[r..].iter_mut().step_by(room);
            for (row, to) in row.iter().zip(&mut to) {
                store16(s, load16(s, row), to);
            }
            if let (false, Some(to)) = (rest.is_empty(), to.next()) {
                store16(s, load16(s, &filled_up(rest)), to);
            }
        }
    }
}

/// Writes sixteen numbers.
#[inline(always)]
fn store16<S: Simd>(s: S, x: [S::F; 2], to: &mut [f32; 16]) {
    for (x, to) in x.into_iter().zip(to.as_chunks_mut().0) {
        s.store(x, to);
    }
}

/// Queries that meet widened rows.
struct Tile<'x> {
    /// Fewer than there are registers for leave some of these with what nobody asks for.
    lanes: &'x [Query],
    wide: &'x Wide,
    /// The place of the first widened row.
    at: usize,
    /// Those that any of the queries sees.
    rows: Range<usize>,
}

/// `scores[l][at + r] = scale * dot(q[l], key[r])` for the rows of keys in sixteens, of `N` queries and `P` sixteens at a
/// time. The dot product goes on from the score unless `columns` are the first ones. Scores of other rows may be
/// overwritten.
struct Products<'x, const N: usize, const P: usize> {
    tile: Tile<'x>,
    queries: &'x [f32],
    columns: Range<usize>,
    scale: f32,
    scores: &'x mut [Row; N],
}

impl<S: Simd, const N: usize, const P: usize> Op<S> for Products<'_, N, P> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { tile: Tile { lanes, wide, at, rows }, queries, columns, scale, scores } = self;
        // Behind the last query the last one again.
        let q: [&[f32]; N] =
            core::array::from_fn(|l| &queries[lanes[l.min(lanes.len() - 1)].at..][columns.clone()]);
        let (width, last) = (columns.len(), (rows.end - 1) / 16);
        for group in (rows.start / 16..last + 1).step_by(P) {
            let keys = core::array::from_fn(|p| &wide[(group + p).min(last) * width..][..width]);
            let to = |p| at + 16 * (group + p);
            let mut sums = [[[s.splat(0.0); 2]; P]; N];
            // Hidden, and without another branch, because the compiler would make a loop for each answer.
            if black_box(columns.start > 0) {
                for l in 0..N {
                    for p in 0..P {
                        let Some(before) = scores[l][to(p).min(POSITIONS)..].first_chunk() else { continue };
                        sums[l][p] = load16(s, before);
                    }
                }
            }
            s.add_products(q, keys, &mut sums);
            for l in 0..N {
                for p in 0..P {
                    let to = scores[l].get_mut(to(p)..).and_then(|row| row.first_chunk_mut());
                    if let Some(to) = to {
                        store16(s, sums[l][p].map(|sum| s.mul(sum, s.splat(scale))), to);
                    }
                }
            }
        }
    }
}

/// `out[l] = out[l] * keep[l] + sum of weights[l][at + r] * value[r]` over the rows of values, of `N` queries.
struct AddValues<'x, const N: usize> {
    tile: Tile<'x>,
    width: usize,
    /// Rows that there is room for.
    room: usize,
    weights: &'x [Row; N],
    states: &'x [State; TILE],
    out: &'x mut [f32],
}

impl<S: Simd, const N: usize> Op<S> for AddValues<'_, N> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { tile: Tile { lanes, wide, at, rows }, width, room, weights, states, out } = self;
        // Behind the last query the last one again, with the same results.
        let lane = |l: usize| l.min(lanes.len() - 1);
        let weights: [&[f32]; N] =
            core::array::from_fn(|l| &weights[lane(l)][at + rows.start..][..rows.len()]);
        let mut last = [[0.0; 16]; N];
        let places: [usize; N] = core::array::from_fn(|l| lanes[lane(l)].at);
        assert!(places.iter().all(|place| *place <= out.len() && width <= out.len() - place));
        for (column, first) in wide.chunks_exact(room).zip((0..width).step_by(16)) {
            let start = out.as_mut_ptr();
            // SAFETY: `first` of the `width` numbers that are there from each place on. If sixteen are left, these are
            // what is read, then written; otherwise `last` is.
            let mut to = places.map(|place| unsafe { start.add(place + first) }.cast::<[f32; 16]>());
            let left = width - first;
            if left < 16 {
                load_last(out, &places, first, left, &mut last);
                for l in 0..N {
                    to[l] = &mut last[l];
                }
            }
            let mut sums = [[[s.splat(0.0); 2]; 1]; N];
            for l in 0..N {
                let keep = s.splat(states[lane(l)].keep);
                // SAFETY: see there.
                sums[l][0] = load16(s, unsafe { &*to[l] }).map(|sum| s.mul(sum, keep));
            }
            s.add_products(weights, [&column[rows.clone()]], &mut sums);
            for l in 0..N {
                // SAFETY: see there.
                store16(s, sums[l][0], unsafe { &mut *to[l] });
            }
            if left < 16 {
                store_last(&last, left, &places, first, out);
            }
        }
    }
}

/// The last columns of several rows, fewer than sixteen from `first` on. For these alone, so it need not be fast.
#[inline(never)]
fn load_last(out: &[f32], places: &[usize], first: usize, count: usize, last: &mut [[f32; 16]]) {
    for (place, last) in places.iter().zip(last) {
        for (to, from) in last.iter_mut().zip(&out[place + first..][..count]) {
            *to = *from;
        }
    }
}

/// [`load_last`] the other way round.
#[inline(never)]
fn store_last(last: &[[f32; 16]], count: usize, places: &[usize], first: usize, out: &mut [f32]) {
    for (place, last) in places.iter().zip(last) {
        for (to, from) in out[place + first..][..count].iter_mut().zip(last) {
            *to = *from;
        }
    }
}

/// At most `N` numbers, and zeros. For last columns alone, so it need not be fast.
#[inline(never)]
fn filled_up<T: Element, const N: usize>(rest: &[T]) -> [T; N] {
    let mut all = [T::default(); N];
    for (to, from) in all.iter_mut().zip(rest) {
        *to = *from;
    }
    all
}
