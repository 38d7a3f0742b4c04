//! Many tokens: prefill.
//!
//! The weights of a tile are unpacked for up to 768 columns at a time into a panel on the stack, over which
//! all tokens pass, four side by side. Sums wait in the output between two panels, so a token's sums are
//! formed in the same order as alone.

use super::activations::{Quad, Quads, RUN, SIDE, TileActs, integer};
use super::formats::{AnyShare, Format, bias, scales, shares};
use super::gemv::{dot, finish};
use super::lanes::Lanes;
use crate::format::{Geometry, TILE_ROWS as ROWS};
use crate::kernels::matmul::Matrix;
use crate::kernels::output::{Columns, Strip};

/// Most blocks of a panel, a whole number of shares and of runs.
pub(crate) const BLOCKS: usize = 24;

/// The unpacked weights of one tile. In this order, so that weights are aligned.
#[repr(C, align(64))]
pub(crate) struct Panel {
    /// For each block, the weights of its eight groups of four columns as [`Lanes::keep`] wrote them; an instruction
    /// set may want each two groups in another order.
    pub weights: [[[[u8; 64]; 2]; 4]; BLOCKS],
    /// Scales of each block's segments; an instruction set may want each twice.
    pub scales: [[[f32; 2 * ROWS]; 2]; BLOCKS],
    /// Minimums of each block.
    pub mins: [[f32; ROWS]; BLOCKS],
    /// Blocks that are filled.
    pub blocks: usize,
    /// Whether they are a row's first ones, so that sums begin at zero.
    pub first: bool,
    /// Whether they are for wide activations.
    pub wide: bool,
}

impl Panel {
    /// Zeros alone: anything else would be kept as 20 KiB of constants.
    const EMPTY: Self = Self {
        blocks: 0,
        first: false,
        wide: false,
        weights: [[[[0; 64]; 2]; 4]; BLOCKS],
        scales: [[[0.0; 2 * ROWS]; 2]; BLOCKS],
        mins: [[0.0; ROWS]; BLOCKS],
    };

    /// Unpacks blocks `first..first + count` of a tile, whole shares from the first on.
    #[inline(always)]
    fn fill<S: Lanes, W: Format>(&mut self, s: S, bytes: &[u8], first: usize, count: usize) {
        let n = W::Share::BLOCKS;
        self.blocks = count;
        for (index, share) in shares::<W>(bytes).iter().skip(first / n).take(count.div_ceil(n)).enumerate() {
            for i in 0..n {
                // Blocks behind the last, which a last share may have, are filled and never read.
                let block = index * n + i;
                let (factors, quants) = (share.factors(), share.quants(i));
                let bias = bias::<S, W>();
                let [a, b, c, d] = &mut self.weights[block];
                s.keep([W::group::<S, 0>(s, quants), W::group::<S, 1>(s, quants)], bias, a);
                s.keep([W::group::<S, 2>(s, quants), W::group::<S, 3>(s, quants)], bias, b);
                s.keep([W::group::<S, 4>(s, quants), W::group::<S, 5>(s, quants)], bias, c);
                s.keep([W::group::<S, 6>(s, quants), W::group::<S, 7>(s, quants)], bias, d);
                for segment in 0..W::SEGMENTS {
                    let (scale, min) = scales::<S, W>(s, factors, i, segment);
                    if let Some(to) = self.scales[block][segment].first_chunk_mut() {
                        s.store(scale, to);
                    }
                    if W::MINS {
                        s.store(min, &mut self.mins[block]);
                    }
                }
            }
        }
    }
}

/// Unpacks blocks `first..first + count` of a tile's bytes, whole shares from the first on.
pub(crate) type Fill = unsafe fn(panel: &mut Panel, tile: &[u8], first: usize, count: usize);

/// Adds the products of a panel with four tokens to `out`.
pub(crate) type Multiply = unsafe fn(panel: &Panel, acts: Quad, out: [&mut [f32; ROWS]; SIDE]);

/// Adds the products of the panels of two neighbouring tiles with four tokens to `out`.
#[cfg(target_arch = "x86_64")]
pub(crate) type MultiplyPair = unsafe fn(panels: &[Panel; 2], acts: Quad, out: [&mut [f32; 2 * ROWS]; SIDE]);

/// Adds the products of a wide panel with fours of tokens, wide too, to `out`, which has all of them; sums begin at
/// zero if the panel is a row's first.
pub(crate) type MultiplyWide = unsafe fn(panel: &Panel, acts: Quads, out: Strip<ROWS>);

/// [`Fill`] with the operations of an instruction set.
#[inline(always)]
pub(crate) fn fill<W: Format>(s: impl Lanes, panel: &mut Panel, tile: &[u8], first: usize, count: usize) {
    panel.fill::<_, W>(s, tile, first, count);
}

/// [`Multiply`] with the operations of an instruction set.
#[inline(always)]
pub(crate) fn multiply<W: Format>(s: impl Lanes, panel: &Panel, acts: Quad, out: [&mut [f32; ROWS]; SIDE]) {
    s.multiply_quad::<W>(panel, acts, out);
}

/// [`MultiplyPair`] with the operations of an instruction set.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn multiply_pair<W: Format>(
    s: impl Lanes,
    [even, odd]: &[Panel; 2],
    acts: Quad,
    out: [&mut [f32; 2 * ROWS]; SIDE],
) {
    multiply_tiles::<_, W, 2>(s, [even, odd], acts, out.map(|out| out.as_chunks_mut().0));
}

/// Blocks of a panel: panels of a row are of about one size, each a whole number of shares, and of runs of wide
/// activations.
fn panel_blocks(weight: &Matrix, acts: &TileActs) -> usize {
    let whole = Geometry::of(weight.dtype()).map_or(1, |geometry| geometry.factors.blocks()) * RUN;
    debug_assert!(BLOCKS.is_multiple_of(whole));
    let panels = acts.blocks.div_ceil(BLOCKS).max(1);
    acts.blocks.div_ceil(panels).next_multiple_of(whole).max(1)
}

/// The rows of one part, for several tokens, two tiles at a time: what is loaded of the activations serves both.
///
/// # Safety
/// The CPU must be able to run the functions.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn many_tokens_by_pairs(
    fill: Fill,
    (multiply, multiply_pair): (Multiply, MultiplyPair),
    weight: &Matrix,
    acts: &TileActs,
    out: &mut Columns,
) {
    const N: usize = 2 * ROWS;
    let (rows, size) = (out.rows(), panel_blocks(weight, acts));
    let mut panels = [Panel::EMPTY; 2];
    for row in rows.clone().step_by(N) {
        if row + N > rows.end {
            // SAFETY: the caller's promise.
            return unsafe { many_tokens(fill, multiply, None, weight, acts, &mut out.from(row)) };
        }
        for first in (0..acts.blocks).step_by(size) {
            let count = size.min(acts.blocks - first);
            for (panel, row) in panels.iter_mut().zip([row, row + ROWS]) {
                let Some(bytes) = weight.tile(row) else { return };
                // SAFETY: as above.
                unsafe { fill(panel, bytes, first, count) }
            }
            for quad in 0..acts.tokens.div_ceil(SIDE) {
                let token = quad * SIDE;
                let multiply = |mut sums: [&mut [f32; N]; SIDE]| {
                    if first == 0 {
                        sums.iter_mut().for_each(|sums| **sums = [0.0; N]);
                    }
                    // SAFETY: as above.
                    unsafe { multiply_pair(&panels, acts.quad(quad, first, count), sums) }
                };
                if let Some(mut strip) = out.strip(row)
                    && let Some(out) = strip.tokens_mut(token)
                {
                    multiply(out);
                    strip.fetch(token + SIDE..token + 2 * SIDE);
                    continue;
                }
                // Tokens that are not there.
                let mut sums = [[0.0; N]; SIDE];
                for (lane, sums) in sums.iter_mut().enumerate() {
                    out.get_rows(token + lane, row, sums);
                }
                multiply(sums.each_mut());
                for (lane, sums) in sums.iter().enumerate() {
                    out.set_rows(token + lane, row, sums);
                }
            }
        }
    }
}

/// The rows of one part, for several tokens.
///
/// # Safety
/// The CPU must be able to run the functions.
pub(crate) unsafe fn many_tokens(
    fill: Fill,
    multiply: Multiply,
    wide: Option<MultiplyWide>,
    weight: &Matrix,
    acts: &TileActs,
    out: &mut Columns,
) {
    let (rows, size) = (out.rows(), panel_blocks(weight, acts));
    let mut panel = Panel::EMPTY;
    panel.wide = wide.is_some();
    for row in rows.step_by(ROWS) {
        let Some(bytes) = weight.tile(row) else { return };
        for first in (0..acts.blocks).step_by(size) {
            let count = size.min(acts.blocks - first);
            // SAFETY: the caller's promise.
            unsafe { fill(&mut panel, bytes, first, count) };
            panel.first = first == 0;
            let mut quads = 0..acts.tokens.div_ceil(SIDE);
            if let (Some(multiply), Some(out)) = (wide, out.strip(row)) {
                quads.start = out.tokens() / SIDE;
                // SAFETY: as above.
                unsafe { multiply(&panel, acts.quads(0..quads.start, first, count), out) }
            }
            for quad in quads {
                let token = quad * SIDE;
                let multiply = |mut sums: [&mut [f32; ROWS]; SIDE]| {
                    if panel.first {
                        sums.iter_mut().for_each(|sums| **sums = [0.0; ROWS]);
                    }
                    // SAFETY: as above.
                    unsafe { multiply(&panel, acts.quad(quad, first, count), sums) }
                };
                if let (None, Some(mut strip)) = (wide, out.strip(row))
                    && let Some(out) = strip.tokens_mut(token)
                {
                    multiply(out);
                    continue;
                }
                // Tokens or rows that are not there.
                let mut sums = [[0.0; ROWS]; SIDE];
                for (lane, sums) in sums.iter_mut().enumerate() {
                    out.get_rows(token + lane, row, sums);
                }
                match wide {
                    None => multiply(sums.each_mut()),
                    Some(multiply) => {
                        let quads = acts.quads(quad..quad + 1, first, count);
                        // SAFETY: as above.
                        unsafe { multiply(&panel, quads, Strip::of(&mut sums)) }
                    }
                }
                for (lane, sums) in sums.iter().enumerate() {
                    out.set_rows(token + lane, row, sums);
                }
            }
        }
    }
}

/// [`Lanes::multiply_quad`] for instruction sets whose registers hold it as it is written.
#[inline(always)]
pub(crate) fn multiply_quad<S: Lanes, W: Format>(
    s: S,
    panel: &Panel,
    acts: Quad,
    out: [&mut [f32; ROWS]; SIDE],
) {
    multiply_tiles::<_, W, 1>(s, [panel], acts, out.map(core::slice::from_mut));
}

/// Adds the products of the panels of `N` neighbouring tiles with four tokens to `out`, of which each has `N` arrays.
#[allow(clippy::needless_range_loop, reason = "indices name registers")]
#[inline(always)]
fn multiply_tiles<S: Lanes, W: Format, const N: usize>(
    s: S,
    panels: [&Panel; N],
    acts: Quad,
    mut out: [&mut [[f32; ROWS]]; SIDE],
) {
    let mut sums = [[s.splat(0.0); N]; SIDE];
    for (sums, out) in sums.iter_mut().zip(&out) {
        for (sums, out) in sums.iter_mut().zip(&**out) {
            *sums = s.load(out);
        }
    }
    // Not by `map` anywhere here, which the compiler may leave a call.
    let blocks = panels[0].blocks;
    let numbers = acts.scales.iter().zip(acts.sums).zip(acts.halves);
    for (block, (quants, ((scales_a, all), halves))) in
        acts.quants.iter().zip(numbers).take(blocks).enumerate()
    {
        for segment in 0..W::SEGMENTS {
            let pairs = 4 / W::SEGMENTS;
            let mut starts = [0; SIDE];
            if !S::PANEL_WITHOUT_BIAS && bias::<S, W>() != 0 {
                for (lane, start) in starts.iter_mut().enumerate() {
                    let (all, half) = (integer(all[lane]), integer(halves[lane]));
                    let sum = match (W::SEGMENTS, segment) {
                        (1, _) => all,
                        (_, 0) => half,
                        _ => all - half,
                    };
                    *start = -bias::<S, W>() * sum;
                }
            }
            let mut p = [[s.start(0); N]; SIDE];
            for (p, start) in p.iter_mut().zip(starts) {
                *p = [s.start(start); N];
            }
            for pair in segment * pairs..(segment + 1) * pairs {
                let ([a01, a23], _) = quants[pair].as_chunks::<16>() else { continue };
                let (a01, a23) = (s.activations(a01), s.activations(a23));
                for tile in 0..N {
                    let even = s.bytes(&panels[tile].weights[block][pair][0]);
                    p[0][tile] = dot::<S, W, 0>(s, p[0][tile], even, a01);
                    p[1][tile] = dot::<S, W, 2>(s, p[1][tile], even, a01);
                    p[2][tile] = dot::<S, W, 0>(s, p[2][tile], even, a23);
                    p[3][tile] = dot::<S, W, 2>(s, p[3][tile], even, a23);
                }
                for tile in 0..N {
                    let odd = s.bytes(&panels[tile].weights[block][pair][1]);
                    p[0][tile] = dot::<S, W, 1>(s, p[0][tile], odd, a01);
                    p[1][tile] = dot::<S, W, 3>(s, p[1][tile], odd, a01);
                    p[2][tile] = dot::<S, W, 1>(s, p[2][tile], odd, a23);
                    p[3][tile] = dot::<S, W, 3>(s, p[3][tile], odd, a23);
                }
            }
            for tile in 0..N {
                let scales = &panels[tile].scales[block][segment];
                let scale = s.load(scales.first_chunk().unwrap_or(&[0.0; ROWS]));
                for lane in 0..SIDE {
                    let integers = finish::<S, W>(s, p[lane][tile], starts[lane]);
                    let scale = s.mul(scale, s.splat(scales_a[lane]));
                    sums[lane][tile] = s.fma(integers, scale, sums[lane][tile]);
                }
            }
        }
        if W::MINS {
            for tile in 0..N {
                let mins = s.load(&panels[tile].mins[block]);
                for lane in 0..SIDE {
                    let sum = s.splat(integer(all[lane]) as f32 * scales_a[lane]);
                    sums[lane][tile] = s.fma(mins, sum, sums[lane][tile]);
                }
            }
        }
    }
    for (sums, out) in sums.into_iter().zip(&mut out) {
        for (sums, out) in sums.into_iter().zip(&mut **out) {
            s.store(sums, out);
        }
    }
}

/// [`Lanes::multiply_quad`] for instruction sets that have no registers for more than one token.
#[cfg_attr(not(target_arch = "aarch64"), expect(dead_code, reason = "for NEON"))]
#[inline(always)]
pub(crate) fn multiply_each<S: Lanes, W: Format>(
    s: S,
    panel: &Panel,
    acts: Quad,
    mut out: [&mut [f32; ROWS]; SIDE],
) {
    for (pair, [even, odd]) in out.as_chunks_mut().0.iter_mut().enumerate() {
        one_of_two::<S, W, false>(s, panel, acts, pair, even);
        one_of_two::<S, W, true>(s, panel, acts, pair, odd);
    }
}

/// Adds the products of a panel whose bias was taken off with the first or second token of one of two pairs.
#[inline(always)]
fn one_of_two<S: Lanes, W: Format, const SECOND: bool>(
    s: S,
    panel: &Panel,
    acts: Quad,
    pair_of_tokens: usize,
    out: &mut [f32; ROWS],
) {
    debug_assert!(S::PANEL_WITHOUT_BIAS);
    let token = (2 * pair_of_tokens + usize::from(SECOND)) % SIDE;
    let mut sums = s.load(out);
    let weights = panel.weights[..panel.blocks].iter().zip(&panel.scales).zip(&panel.mins);
    let numbers = acts.scales.iter().zip(acts.sums);
    for ((((weights, scales), mins), quants), (scales_a, all)) in weights.zip(acts.quants).zip(numbers) {
        for (segment, scales) in scales[..W::SEGMENTS].iter().enumerate() {
            let pairs = 4 / W::SEGMENTS;
            let mut p = s.start(0);
            for pair in segment * pairs..(segment + 1) * pairs {
                let Some(a) = quants[pair].as_chunks::<16>().0.get(pair_of_tokens) else { continue };
                let a = s.activations(a);
                let [even, odd] = &weights[pair];
                let (even, odd) = (s.bytes(even), s.bytes(odd));
                p = if SECOND {
                    dot::<S, W, 3>(s, dot::<S, W, 2>(s, p, even, a), odd, a)
                } else {
                    dot::<S, W, 1>(s, dot::<S, W, 0>(s, p, even, a), odd, a)
                };
            }
            let scale = s.mul(s.load(scales.first_chunk().unwrap_or(&[0.0; ROWS])), s.splat(scales_a[token]));
            sums = s.fma(finish::<S, W>(s, p, 0), scale, sums);
        }
        if W::MINS {
            sums = s.fma(s.load(mins), s.splat(integer(all[token]) as f32 * scales_a[token]), sums);
        }
    }
    s.store(sums, out);
}
