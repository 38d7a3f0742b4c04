//! The matrix product with AVX-512, in the manner of BLIS (Van Zee and van de Geijn, 2015): a kernel keeps a tile
//! of the result in registers, and loops around it keep what it reads in the caches.
//!
//! One operand is broadcast, the other met in vectors. Training multiplies a few hundred tokens with matrices that
//! come from memory, so what matters is that those are read once and where they lie: rows along the inner axis can
//! be broadcast in place, rows along the outer axis can be met in place. `x W^T` has neither for `x` on the left;
//! it is computed as `(W x^T)^T`, which packs the tokens instead of the matrix and turns tiles as it stores them.
//!
//! Every element is summed in one order that depends on shapes alone, never on threads.

use std::arch::x86_64::*;
use std::array::from_fn;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::threads;
use super::{Matrix, is_empty};

/// Floats of a register.
const LANES: usize = 16;
/// Rows of a tile.
const ROWS: usize = 8;
/// Vectors of a row of a tile: 8 x 3 sums, 3 vectors and a broadcast value fit the 32 registers.
const VECTORS: usize = 3;
/// Longest stretch of the inner axis between two visits of a tile: 8 rows of it stay in the first cache.
const DEPTH: usize = 640;
/// Floats of the vector operand that are met by all rows of a task before the next: three quarters of the second cache.
const CACHED: usize = 3 << 17;
/// Two tiles, one upon the other, fill lines of the cache in a result that is turned and in rows that are packed.
const PAIR: usize = 2 * ROWS;
/// Tasks of a thread: few, since each reads the other operand anew, but enough for threads to end together.
const TASKS: usize = 4;
/// Most rows of a task.
const TASK_ROWS: usize = 48 * ROWS;
/// Most floats of a packed vector operand.
const PACKED: usize = 1 << 21;
/// Steps of the inner axis between the vectors that are multiplied and those that are fetched.
const AHEAD: usize = 8;
/// Times as many columns as rows from which on a result is turned rather than its vector operand packed.
const MANY: usize = 8;
/// Below this many multiplications threads cost more than they bring.
const SMALL: usize = 1 << 20;

/// Whether this CPU has what the kernel is made of.
pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
}

/// [`super::on_cpu`] on a CPU that is [`detected`].
pub(super) fn gemm(
    c: &mut [MaybeUninit<f32>],
    a: Matrix<'_>,
    b: Matrix<'_>,
    alpha: f32,
    accumulate: bool,
    threads: bool,
) {
    assert!(detected(), "a CPU with AVX-512");
    if is_empty(c, &a, &b, accumulate) {
        return;
    }
    let stride = b.cols;
    let transposed = if b.col_stride != 1 {
        // Either `b` is packed or the result is turned.
        a.col_stride != 1 || b.cols > MANY * a.rows
    } else {
        // A result of a single vector is turned, if that is met in place then.
        a.col_stride != 1 && b.cols <= LANES && a.rows > b.cols
    };
    let (a, b) = if transposed { (b.t(), a.t()) } else { (a, b) };
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let threads = threads && m * n * k >= SMALL;
    let out = Out { values: c.as_mut_ptr().cast(), stride, transposed, alpha };
    let product = Product { a, b, out, panels: panels(n) };
    if b.col_stride == 1 && n.is_multiple_of(LANES) && !aliased(b.row_stride) {
        return product.run(None, 0..k, accumulate, threads);
    }
    let width = n.next_multiple_of(LANES);
    let span = even(k, (PACKED / width).max(LANES));
    for start in (0..k).step_by(span) {
        let inner = start..k.min(start + span);
        with_scratch(width * inner.len(), |packed| {
            product.pack(packed, inner.clone(), threads);
            product.run(Some(packed), inner, accumulate || start > 0, threads);
        });
    }
}

/// Whether rows so far apart fall on the same few sets of the first cache and drive each other out.
fn aliased(stride: usize) -> bool {
    stride.is_multiple_of(512)
}

/// Where a result goes.
#[derive(Clone, Copy)]
struct Out {
    values: *mut f32,
    stride: usize,
    /// Whether rows of tiles are columns of it.
    transposed: bool,
    alpha: f32,
}

struct Product<'a> {
    a: Matrix<'a>,
    b: Matrix<'a>,
    out: Out,
    panels: Vec<Panel>,
}

// SAFETY: the pointer in `out` is the only part that is not `Sync`. It is written through by tasks alone, each to the
// rows or columns of the result that it was given, which `run` gives to no other; the caller of `gemm` waits for them
// all and has borrowed the result mutably.
unsafe impl Sync for Product<'_> {}

/// Columns of a tile.
#[derive(Clone, Copy)]
struct Panel {
    first: usize,
    vectors: usize,
}

/// Columns by threes of vectors; four at the end are two and two.
fn panels(n: usize) -> Vec<Panel> {
    let (mut panels, mut first, mut left) = (Vec::new(), 0, n.div_ceil(LANES));
    while left > 0 {
        let vectors = if left == 4 { 2 } else { left.min(VECTORS) };
        panels.push(Panel { first, vectors });
        first += vectors * LANES;
        left -= vectors;
    }
    panels
}

/// The length of parts of `length` that are at most `most` long and about equal.
fn even(length: usize, most: usize) -> usize {
    length.div_ceil(length.div_ceil(most)).next_multiple_of(LANES)
}

/// Stretches of the inner axis between two visits of a tile.
fn stretches(inner: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let step = even(inner.len(), DEPTH);
    inner.clone().step_by(step).map(move |start| start..inner.end.min(start + step))
}

fn for_each<T: Send>(tasks: impl Iterator<Item = T>, together: bool, run: impl Fn(T) + Send + Sync) {
    if together {
        threads::map(tasks.collect(), run);
    } else {
        tasks.for_each(run);
    }
}

impl Product<'_> {
    /// Packs the vector operand: stretch after stretch, therein panel after panel, therein row after row.
    fn pack(&self, packed: &mut [f32], inner: Range<usize>, threads: bool) {
        let mut parts = Vec::new();
        let mut rest = packed;
        for stretch in stretches(inner) {
            for panel in &self.panels {
                let (part, after) = rest.split_at_mut(panel.vectors * LANES * stretch.len());
                parts.push((part, stretch.clone(), panel));
                rest = after;
            }
        }
        let pack = |(part, stretch, panel): (&mut [f32], Range<usize>, &Panel)| {
            pack_panel(part, self.b, stretch, *panel);
        };
        for_each(parts.into_iter(), threads, pack);
    }

    /// The product over a part of the inner axis, with the vector operand `packed` or in place.
    fn run(&self, packed: Option<&[f32]>, inner: Range<usize>, accumulate: bool, threads: bool) {
        let m = self.a.rows;
        let parts = if threads { TASKS * rayon::current_num_threads() } else { 1 };
        // Whichever operand is larger is shared out, so that each thread reads its own part of it; but rows that must
        // be packed are packed once.
        if self.a.col_stride == 1 && m < self.b.cols {
            let tasks = self.panels.chunks(self.panels.len().div_ceil(parts));
            for_each(tasks, threads, |panels| self.task(packed, inner.clone(), accumulate, 0..m, panels));
        } else {
            let rows = m.div_ceil(parts).next_multiple_of(PAIR).min(TASK_ROWS);
            let tasks = (0..m).step_by(rows).map(|row| row..m.min(row + rows));
            for_each(tasks, threads, |rows| self.task(packed, inner.clone(), accumulate, rows, &self.panels));
        }
    }

    /// The part of the product that is some rows and panels.
    fn task(
        &self,
        packed: Option<&[f32]>,
        inner: Range<usize>,
        accumulate: bool,
        rows: Range<usize>,
        panels: &[Panel],
    ) {
        let width = self.b.cols.next_multiple_of(LANES);
        let in_place = self.a.col_stride == 1;
        with_scratch(if in_place { 0 } else { PAIR * inner.len().min(DEPTH + LANES) }, |strips| {
            for stretch in stretches(inner.clone()) {
                let depth = stretch.len();
                let packed =
                    packed.map(|packed| &packed[(stretch.start - inner.start) * width..][..depth * width]);
                for panels in panels.chunks((CACHED / (depth * LANES * VECTORS)).max(1)) {
                    for first in rows.clone().step_by(PAIR) {
                        let rows = first..rows.end.min(first + PAIR);
                        if !in_place {
                            pack_strips(strips, self.a, &rows, &stretch);
                        }
                        let block = Block {
                            strips: if in_place { None } else { Some(&*strips) },
                            packed,
                            add: accumulate || stretch.start > inner.start,
                            rows,
                            stretch: stretch.clone(),
                        };
                        for panel in panels {
                            for row in block.rows.clone().step_by(ROWS) {
                                self.tile(&block, row, *panel);
                            }
                        }
                    }
                }
            }
        });
    }

    /// One tile.
    fn tile(&self, block: &Block<'_>, row: usize, panel: Panel) {
        let (depth, start) = (block.stretch.len(), block.stretch.start);
        let rows = ROWS.min(block.rows.end - row);
        let strip = match block.strips {
            // What is beyond the last row is the last row again, and not stored.
            None => {
                from_fn(|i| &self.a.values[(row + i.min(rows - 1)) * self.a.row_stride + start..][..depth])
            }
            Some(strips) => {
                let strip = &strips[(row - block.rows.start) * depth..][..ROWS * depth];
                from_fn(|i| &strip[i..])
            }
        };
        let (vectors, step) = match block.packed {
            None => (&self.b.values[start * self.b.row_stride + panel.first..], self.b.row_stride),
            Some(packed) => (&packed[panel.first * depth..], panel.vectors * LANES),
        };
        assert!(vectors.len() >= (depth - 1) * step + panel.vectors * LANES, "panel beyond its slice");
        let cols = (self.b.cols - panel.first).min(panel.vectors * LANES);
        let tile = Tile {
            depth,
            strip,
            vectors,
            step,
            out: self.out,
            row,
            col: panel.first,
            rows,
            cols,
            add: block.add,
        };
        // SAFETY: `gemm` has asserted that the CPU has the features. The slices of `strip` were just made to hold
        // `depth` values in steps of 1 or `ROWS`, and `vectors` was found to hold `depth` rows of the panel. Rows
        // and columns of the tile are rows and columns of the result, which `is_empty` has found to have them
        // all, and which this task alone writes.
        unsafe {
            match (panel.vectors, block.strips) {
                (3, None) => tile.compute::<3, 1>(),
                (3, Some(_)) => tile.compute::<3, ROWS>(),
                (2, None) => tile.compute::<2, 1>(),
                (2, Some(_)) => tile.compute::<2, ROWS>(),
                (_, None) => tile.compute::<1, 1>(),
                (_, Some(_)) => tile.compute::<1, ROWS>(),
            }
        }
    }
}

/// What the tiles of a task share on one stretch.
struct Block<'a> {
    /// The broadcast operand, if it is not met in place.
    strips: Option<&'a [f32]>,
    /// The vector operand, likewise.
    packed: Option<&'a [f32]>,
    rows: Range<usize>,
    stretch: Range<usize>,
    /// Whether sums go on from what the result holds.
    add: bool,
}

struct Tile<'a> {
    depth: usize,
    /// Values to be broadcast, by row.
    strip: [&'a [f32]; ROWS],
    vectors: &'a [f32],
    /// Between the rows of `vectors`.
    step: usize,
    out: Out,
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
    add: bool,
}

impl Tile<'_> {
    /// Computes a tile of `W` vectors; values to be broadcast are `S` apart.
    ///
    /// # Safety
    /// The CPU has the features. Each slice of `strip` holds `depth` values `S` apart, `vectors` holds `depth` rows of
    /// `W` vectors `step` apart, and the result has the tile's rows and columns, which nothing else touches meanwhile.
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn compute<const W: usize, const S: usize>(&self) {
        self.fetch_result();
        let strip = self.strip.map(<[f32]>::as_ptr);
        let mut sums = [[_mm512_setzero_ps(); W]; ROWS];
        let mut vectors = self.vectors.as_ptr();
        let mut at = 0;
        let mut step = || {
            for v in 0..W {
                // Nothing is read: this may point beyond the slice.
                _mm_prefetch::<_MM_HINT_T0>(vectors.wrapping_add(AHEAD * self.step + v * LANES).cast());
            }
            // SAFETY: this is called `depth` times, so `vectors` is at one of the `depth` rows that the caller promises.
            let y: [__m512; W] = from_fn(|v| unsafe { _mm512_loadu_ps(vectors.add(v * LANES)) });
            for i in 0..ROWS {
                // SAFETY: likewise, `at` is one of the first `depth` multiples of `S`.
                let x = _mm512_set1_ps(unsafe { *strip[i].add(at) });
                for v in 0..W {
                    sums[i][v] = _mm512_fmadd_ps(x, y[v], sums[i][v]);
                }
            }
            vectors = vectors.wrapping_add(self.step);
            at += S;
        };
        for _ in 0..self.depth / 4 {
            step();
            step();
            step();
            step();
        }
        for _ in 0..self.depth % 4 {
            step();
        }
        let alpha = _mm512_set1_ps(self.out.alpha);
        let mut done = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        for i in 0..ROWS {
            for v in 0..W {
                done[i][v] = _mm512_mul_ps(sums[i][v], alpha);
            }
        }
        // SAFETY: the caller's promise about the result.
        unsafe { if self.out.transposed { self.store_turned(&done) } else { self.store(&done) } }
    }

    /// Where an element of the tile goes.
    fn place(&self, row: usize, col: usize) -> *mut f32 {
        let (row, col) = (self.row + row, self.col + col);
        let (row, col) = if self.out.transposed { (col, row) } else { (row, col) };
        self.out.values.wrapping_add(row * self.out.stride + col)
    }

    /// Calls for the lines that the tile will be stored to.
    #[target_feature(enable = "avx512f,avx512vl")]
    fn fetch_result(&self) {
        if self.out.transposed {
            for col in 0..self.cols {
                _mm_prefetch::<_MM_HINT_T0>(self.place(0, col).cast());
            }
        } else {
            for row in 0..self.rows {
                for col in (0..self.cols).step_by(LANES) {
                    _mm_prefetch::<_MM_HINT_T0>(self.place(row, col).cast());
                }
            }
        }
    }

    /// # Safety
    /// The CPU has the features, and the result the tile's rows and columns, which nothing else touches meanwhile.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn store(&self, sums: &[[__m512; VECTORS]; ROWS]) {
        for (row, sums) in sums.iter().enumerate().take(self.rows) {
            for (col, &sum) in (0..self.cols).step_by(LANES).zip(sums) {
                let (to, keep) = (self.place(row, col), first(self.cols - col));
                // SAFETY: masked lanes are not touched; the others are in the tile, and so in the result.
                unsafe {
                    let sum =
                        if self.add { _mm512_add_ps(_mm512_maskz_loadu_ps(keep, to), sum) } else { sum };
                    _mm512_mask_storeu_ps(to, keep, sum);
                }
            }
        }
    }

    /// # Safety
    /// As for [`Self::store`].
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512vl")]
    unsafe fn store_turned(&self, sums: &[[__m512; VECTORS]; ROWS]) {
        let keep = first(self.rows) as __mmask8;
        for (v, left) in (0..self.cols).step_by(LANES).enumerate() {
            let [a, b, c, d, e, f, g, h] = sums.map(|row| row[v]);
            let (upper, lower) = (turn_quarters([a, b, c, d]), turn_quarters([e, f, g, h]));
            for q in 0..4 {
                let (lower, upper) = (lower[q], upper[q]);
                let columns = [
                    quarters::<0>(lower, upper),
                    quarters::<1>(lower, upper),
                    quarters::<2>(lower, upper),
                    quarters::<3>(lower, upper),
                ];
                for (quarter, sum) in columns.into_iter().enumerate() {
                    let col = left + quarter * 4 + q;
                    if col < self.cols {
                        let to = self.place(0, col);
                        // SAFETY: masked lanes are not touched; the others are in the tile, and so in the result.
                        unsafe {
                            let sum = if self.add {
                                _mm256_add_ps(_mm256_maskz_loadu_ps(keep, to), sum)
                            } else {
                                sum
                            };
                            _mm256_mask_storeu_ps(to, keep, sum);
                        }
                    }
                }
            }
        }
    }
}

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

/// Calls `body` with values that nothing is known of. They are kept for the next call of this thread: fresh memory
/// costs more than packing into it. One call may come inside another, where a thread that waits takes another task.
fn with_scratch(length: usize, body: impl FnOnce(&mut [f32])) {
    thread_local! {
        static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
    }
    if length == 0 {
        return body(&mut []);
    }
    let mut lines = FREE.with_borrow_mut(Vec::pop).unwrap_or_default();
    let count = length.div_ceil(LANES);
    if lines.len() < count {
        lines.resize(count, Line([0.0; LANES]));
    }
    // SAFETY: the lines are `count * LANES >= length` initialized floats in a row, borrowed mutably.
    body(unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), length) });
    FREE.with_borrow_mut(|free| free.push(lines));
}

/// The first `count` lanes.
fn first(count: usize) -> __mmask16 {
    if count >= LANES { !0 } else { (1 << count) - 1 }
}

/// Packs the strips of at most `PAIR` rows of a matrix whose columns are contiguous: one after the other, therein
/// column after column. Both at once, for then a line of the matrix is read once.
fn pack_strips(strips: &mut [f32], a: Matrix<'_>, rows: &Range<usize>, stretch: &Range<usize>) {
    let (upper, lower) = strips.as_chunks_mut::<ROWS>().0.split_at_mut(stretch.len());
    for ((k, upper), lower) in stretch.clone().zip(upper).zip(lower) {
        let from = &a.values[k * a.col_stride + rows.start..][..rows.len()];
        if let Ok(from) = <&[f32; PAIR]>::try_from(from) {
            upper.copy_from_slice(&from[..ROWS]);
            lower.copy_from_slice(&from[ROWS..]);
        } else {
            let (from, rest) = from.split_at(ROWS.min(from.len()));
            upper[..from.len()].copy_from_slice(from);
            lower[..rest.len()].copy_from_slice(rest);
        }
    }
}

/// Packs some columns of a matrix, row after row; columns beyond its last are zeros.
fn pack_panel(packed: &mut [f32], b: Matrix<'_>, stretch: Range<usize>, panel: Panel) {
    let step = panel.vectors * LANES;
    if b.col_stride == 1 {
        let cols = step.min(b.cols - panel.first);
        for (k, to) in stretch.zip(packed.chunks_exact_mut(step)) {
            to[..cols].copy_from_slice(&b.values[k * b.row_stride + panel.first..][..cols]);
            to[cols..].fill(0.0);
        }
        return;
    }
    for vector in (0..step).step_by(LANES) {
        let first = panel.first + vector;
        let cols = LANES.min(b.cols.saturating_sub(first));
        for (k, to) in stretch.clone().step_by(LANES).zip(packed.chunks_mut(LANES * step)) {
            let depth = LANES.min(stretch.end - k);
            let rows =
                from_fn(
                    |i| if i < cols { &b.values[(first + i) * b.col_stride + k..][..depth] } else { &[] },
                );
            // SAFETY: `gemm`, from which every `Product` comes, has asserted that the CPU has the features.
            let turned = unsafe { turn(rows) };
            for (to, from) in to.chunks_exact_mut(step).zip(turned) {
                to[vector..][..LANES].copy_from_slice(&from);
            }
        }
    }
}

/// The columns of 16 rows of at most 16 values; what is missing is zero.
#[target_feature(enable = "avx512f")]
fn turn(rows: [&[f32]; LANES]) -> [[f32; LANES]; LANES] {
    // SAFETY: lanes beyond the slice are masked, and not read.
    let rows = rows.map(|row| unsafe { _mm512_maskz_loadu_ps(first(row.len()), row.as_ptr()) });
    let quarters: [[__m512; 4]; 4] = from_fn(|g| turn_quarters(from_fn(|i| rows[4 * g + i])));
    let mut turned = [_mm512_setzero_ps(); LANES];
    for q in 0..4 {
        let [a, b, c, d] = from_fn(|g| quarters[g][q]);
        let (even, even_below) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
        let (odd, odd_below) = (_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d));
        turned[q] = _mm512_shuffle_f32x4::<0x88>(even, even_below);
        turned[4 + q] = _mm512_shuffle_f32x4::<0x88>(odd, odd_below);
        turned[8 + q] = _mm512_shuffle_f32x4::<0xdd>(even, even_below);
        turned[12 + q] = _mm512_shuffle_f32x4::<0xdd>(odd, odd_below);
    }
    // SAFETY: both are 16 times 16 floats without padding, and every bit pattern is a float.
    unsafe { std::mem::transmute(turned) }
}

/// Of four rows, columns `q`, `4 + q`, `8 + q` and `12 + q` one after the other, for each `q`.
#[inline]
#[target_feature(enable = "avx512f")]
fn turn_quarters([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    let pairs =
        |a, b| (_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(a, b)));
    let ((ab, ab_high), (cd, cd_high)) = (pairs(a, b), pairs(c, d));
    [
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)),
        _mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)),
        _mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)),
    ]
}

/// Quarter `Q` of `high`, upon that of `low`.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters<const Q: i32>(high: __m512, low: __m512) -> __m256 {
    _mm256_set_m128(_mm512_extractf32x4_ps::<Q>(high), _mm512_extractf32x4_ps::<Q>(low))
}
