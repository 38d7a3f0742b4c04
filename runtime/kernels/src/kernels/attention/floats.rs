//! Attention over rows of floating-point numbers.
//!
//! Some rows at a time are widened to `f32` on the stack, laid out as the loops read them, for all queries of a
//! call: four of these meet sixteen keys at once, a number of each, then a value, sixteen numbers of it. So
//! a score is one chain of fused multiplications and additions, and no register is ever added up across.
#![allow(clippy::needless_range_loop, reason = "indices name registers")]

use super::{Cache, Elements, MAX_WIDTH, POSITIONS, Query, Row, Scores, State, Weigh};
use crate::kernels::float::{Element, load16, store16};
use crate::kernels::simd::{Op, Simd};
use core::hint::black_box;
use core::ops::Range;

/// Queries that share widened rows.
const LANES: usize = 96;
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
    // Behind the last query of a last tile it comes again, as often as there is room.
    let last = lanes.len() - 1;
    let places: [usize; LANES] = core::array::from_fn(|l| lanes[l.min(last)].at);
    let mut tiles = [const { 0..0 }; LANES / TILE];
    for (lanes, tile) in lanes.chunks(TILE).zip(&mut tiles) {
        *tile = seen(lanes);
    }
    let tiles = &tiles[..lanes.len().div_ceil(TILE)];
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
                let places = places.as_chunks::<TILE>().0;
                for (index, ((seen, places), scores)) in tiles.iter().zip(places).zip(&mut scores).enumerate()
                {
                    let Some(tile) = Tile::new(piece, block, seen, wide) else { continue };
                    let columns = columns.clone();
                    if let (true, Some(places), Some(scores)) =
                        (index * TILE == last, places.first_chunk(), scores.first_chunk_mut())
                    {
                        s.outline(Products::<1, 2> { tile, places, queries, columns, scale, scores });
                    } else {
                        s.outline(Products::<TILE, 1> { tile, places, queries, columns, scale, scores });
                    }
                }
            }
        });
        let (rows, soft_cap) = (scores.as_flattened_mut(), rule.soft_cap);
        s.outline(Weigh { lanes, block, soft_cap, scores: rows, states: &mut states });
        if !last.is_multiple_of(TILE) {
            for l in lanes.len()..lanes.len().next_multiple_of(TILE) {
                (rows[l], states[l]) = (rows[last], states[last]);
            }
        }
        let room = SIXTEENS / sixteens(cache.width);
        for_pieces(&cache, room, start - block, start, n, |piece| {
            widen_values(s, &cache, piece, room, wide);
            let places = places.as_chunks::<TILE>().0;
            let states = states.as_chunks_mut::<TILE>().0;
            let each = tiles.iter().zip(places).zip(scores.iter().zip(states));
            for (index, ((seen, places), (weights, states))) in each.enumerate() {
                let Some(tile) = Tile::new(piece, block, seen, wide) else { continue };
                let (width, keep) = (cache.width, states.map(|state| state.keep));
                if let (true, Some(places), Some(weights)) =
                    (index * TILE == last, places.first_chunk(), weights.first_chunk())
                {
                    s.outline(AddValues::<1> { tile, width, room, places, weights, keep: [keep[0]], out });
                } else {
                    s.outline(AddValues::<TILE> { tile, width, room, places, weights, keep, out });
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

/// Widened rows that some queries meet.
struct Tile<'x> {
    wide: &'x Wide,
    /// The place of the first widened row.
    at: usize,
    /// Those that any of the queries sees.
    rows: Range<usize>,
}

impl<'x> Tile<'x> {
    /// The rows of a piece among the positions `seen`, if there are any.
    #[inline(always)]
    fn new(piece: Piece, block: usize, seen: &Range<usize>, wide: &'x Wide) -> Option<Self> {
        let place = |position: usize| position.saturating_sub(block + piece.at).min(piece.count);
        let rows = place(seen.start)..place(seen.end);
        (!rows.is_empty()).then_some(Self { wide, at: piece.at, rows })
    }
}

/// `scores[l][at + r] = scale * dot(q[l], key[r])` for the rows of keys in sixteens, of `N` queries and `P` sixteens at a
/// time. The dot product goes on from the score unless `columns` are the first ones. Scores of other rows may be
/// overwritten.
struct Products<'x, const N: usize, const P: usize> {
    tile: Tile<'x>,
    /// Where the queries start.
    places: &'x [usize; N],
    queries: &'x [f32],
    columns: Range<usize>,
    scale: f32,
    scores: &'x mut [Row; N],
}

impl<S: Simd, const N: usize, const P: usize> Op<S> for Products<'_, N, P> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { tile: Tile { wide, at, rows }, places, queries, columns, scale, scores } = self;
        let q: [&[f32]; N] = places.map(|place| &queries[place..][columns.clone()]);
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
    /// Where the results start; those that are the same get the same.
    places: &'x [usize; N],
    weights: &'x [Row; N],
    keep: [f32; N],
    out: &'x mut [f32],
}

impl<S: Simd, const N: usize> Op<S> for AddValues<'_, N> {
    #[inline(always)]
    fn run(self, s: S) {
        let Self { tile: Tile { wide, at, rows }, width, room, places, weights, keep, out } = self;
        let weights: [&[f32]; N] =
            weights.each_ref().map(|weights| &weights[at + rows.start..][..rows.len()]);
        let most = out.len().checked_sub(width);
        assert!(places.iter().all(|place| most.is_some_and(|most| *place <= most)));
        let start = out.as_mut_ptr();
        let mut columns = wide.chunks_exact(room).map(|column| &column[rows.clone()]);
        for (first, column) in (0..width / 16).map(|index| 16 * index).zip(&mut columns) {
            // SAFETY: each is sixteen of the `width` numbers that are there from its place on, in `out`, which is borrowed
            // mutably and not used otherwise until then.
            unsafe {
                let to = places.map(|place| start.add(place + first).cast());
                add_column(s, weights, column, keep, to);
            }
        }
        if let (1.., Some(column)) = (width % 16, columns.next()) {
            let mut last = [[0.0; 16]; N];
            load_last(out, places, width, &mut last);
            // SAFETY: sixteen numbers each of an array that nothing else uses meanwhile.
            unsafe { add_column(s, weights, column, keep, last.each_mut().map(core::ptr::from_mut)) }
            store_last(&last, places, width, out);
        }
    }
}

/// Sixteen columns of [`AddValues`]. A function, because the compiler may leave a closure a call.
///
/// # Safety
/// Nothing else refers to the arrays meanwhile; of several that are the same the last is what stays.
#[inline(always)]
unsafe fn add_column<S: Simd, const N: usize>(
    s: S,
    weights: [&[f32]; N],
    column: &[[f32; 16]],
    keep: [f32; N],
    to: [*mut [f32; 16]; N],
) {
    let mut sums = [[[s.splat(0.0); 2]; 1]; N];
    for l in 0..N {
        // SAFETY: the caller's promise; no reference outlives its line.
        let [a, b] = load16(s, unsafe { &*to[l] });
        let keep = s.splat(keep[l]);
        sums[l][0] = [s.mul(a, keep), s.mul(b, keep)];
    }
    s.add_products(weights, [column], &mut sums);
    for l in 0..N {
        // SAFETY: as above.
        store16(s, sums[l][0], unsafe { &mut *to[l] });
    }
}

/// The last columns of several rows of `width`, fewer than sixteen. For these alone, so it need not be fast.
#[inline(never)]
fn load_last(out: &[f32], places: &[usize], width: usize, last: &mut [[f32; 16]]) {
    for (place, last) in places.iter().zip(last) {
        let row = &out[*place..][..width];
        last[..width % 16].copy_from_slice(&row[width / 16 * 16..]);
    }
}

/// [`load_last`] the other way round.
#[inline(never)]
fn store_last(last: &[[f32; 16]], places: &[usize], width: usize, out: &mut [f32]) {
    for (place, last) in places.iter().zip(last) {
        let row = &mut out[*place..][..width];
        row[width / 16 * 16..].copy_from_slice(&last[..width % 16]);
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
