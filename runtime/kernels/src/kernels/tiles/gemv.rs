//! One token: decode.

use super::activations::{TileActs, integer};
use super::formats::{AnyShare, Format, bias, scales, shares};
use super::lanes::Lanes;
use crate::format::TILE_ROWS as ROWS;
use crate::kernels::activations::{Activations, BLOCK};
use crate::kernels::matmul::Matrix;
use crate::kernels::output::Columns;

/// The rows of one part, for one token.
#[inline(always)]
pub(crate) fn one_token<W: Format>(s: impl Lanes, weight: &Matrix, acts: &Activations, out: &mut Columns) {
    let (rows, acts) = (out.rows(), acts.tile_acts());
    for first in rows.step_by(ROWS) {
        let Some(bytes) = weight.tile(first) else { return };
        let mut sums = [0.0; ROWS];
        s.store(tile::<_, W>(s, bytes, &acts), &mut sums);
        out.set_rows(0, first, &sums);
    }
}

/// The products of a tile's rows with the token.
#[inline(always)]
fn tile<S: Lanes, W: Format>(s: S, bytes: &[u8], acts: &TileActs) -> S::F {
    let mut out = s.splat(0.0);
    let quants = acts.quants.as_chunks::<BLOCK>().0;
    let n = W::Share::BLOCKS;
    if n > 2 {
        // Super-blocks are whole.
        let tokens = quants.chunks_exact(n).zip(acts.scales.chunks_exact(n));
        let sums = acts.sums.chunks_exact(n).zip(acts.halves.chunks_exact(n));
        for (share, ((a, scales), (sums, halves))) in shares::<W>(bytes).iter().zip(tokens.zip(sums)) {
            for i in 0..n {
                out = add_block::<S, W>(s, share, i, &a[i], [scales[i], sums[i], halves[i]], out);
            }
        }
        return out;
    }
    let mut blocks = quants.iter().zip(acts.scales).zip(acts.sums.iter().zip(acts.halves));
    for share in shares::<W>(bytes) {
        // The compiler leaves a short loop a loop, which costs a tenth. A last share may have one block more than the
        // token.
        let Some(((a, scale), (sum, half))) = blocks.next() else { break };
        out = add_block::<S, W>(s, share, 0, a, [*scale, *sum, *half], out);
        let Some(((a, scale), (sum, half))) = blocks.next() else { break };
        out = add_block::<S, W>(s, share, 1, a, [*scale, *sum, *half], out);
    }
    out
}

/// Adds the products of one block of a share; the numbers are those of the token's block.
#[inline(always)]
fn add_block<S: Lanes, W: Format>(
    s: S,
    share: &W::Share,
    block: usize,
    a: &[i8; BLOCK],
    [scale_a, sum, half]: [f32; 3],
    mut out: S::F,
) -> S::F {
    let (factors, quants) = (share.factors(), share.quants(block));
    let (sum, half) = (integer(sum), integer(half));
    let ([a0, a1], _) = a.as_chunks::<16>() else { return out };
    let (a0, a1) = (s.activations(a0), s.activations(a1));
    if W::SEGMENTS == 1 {
        let start = -bias::<S, W>() * sum;
        let p = whole_block::<S, W>(s, s.start(start), quants, a0, a1);
        let (scale, min) = scales::<S, W>(s, factors, block, 0);
        out = s.fma(finish::<S, W>(s, p, start), s.mul(scale, s.splat(scale_a)), out);
        if W::MINS {
            out = s.fma(min, s.splat(sum as f32 * scale_a), out);
        }
        return out;
    }
    for (segment, a, sum) in [(0, a0, half), (1, a1, sum - half)] {
        let start = -bias::<S, W>() * sum;
        let p = s.start(start);
        let p = if segment == 0 {
            half_block::<S, W, false>(s, p, quants, a)
        } else {
            half_block::<S, W, true>(s, p, quants, a)
        };
        let (scale, _) = scales::<S, W>(s, factors, block, segment);
        out = s.fma(finish::<S, W>(s, p, start), s.mul(scale, s.splat(scale_a)), out);
    }
    out
}

/// [`Lanes::dot`] or [`Lanes::dot_wide`], as the type needs it.
#[inline(always)]
pub(super) fn dot<S: Lanes, W: Format, const LANE: i32>(s: S, p: S::P, w: S::W, a: S::A) -> S::P {
    if W::WIDE { s.dot_wide::<LANE>(p, w, a) } else { s.dot::<LANE>(p, w, a) }
}

/// [`Lanes::finish`] or [`Lanes::finish_wide`], as the type needs it.
#[inline(always)]
pub(super) fn finish<S: Lanes, W: Format>(s: S, p: S::P, bias: i32) -> S::F {
    if W::WIDE { s.finish_wide(p, bias) } else { s.finish(p, bias) }
}

/// The products of a block. Low and high nibbles alternate, so that a vector is loaded once.
#[inline(always)]
fn whole_block<S: Lanes, W: Format>(s: S, mut p: S::P, quants: &[[u8; 64]], a0: S::A, a1: S::A) -> S::P {
    p = dot::<S, W, 0>(s, p, W::group::<S, 0>(s, quants), a0);
    p = dot::<S, W, 0>(s, p, W::group::<S, 4>(s, quants), a1);
    p = dot::<S, W, 1>(s, p, W::group::<S, 1>(s, quants), a0);
    p = dot::<S, W, 1>(s, p, W::group::<S, 5>(s, quants), a1);
    p = dot::<S, W, 2>(s, p, W::group::<S, 2>(s, quants), a0);
    p = dot::<S, W, 2>(s, p, W::group::<S, 6>(s, quants), a1);
    p = dot::<S, W, 3>(s, p, W::group::<S, 3>(s, quants), a0);
    dot::<S, W, 3>(s, p, W::group::<S, 7>(s, quants), a1)
}

/// The products of the first or second half of a block.
#[inline(always)]
fn half_block<S: Lanes, W: Format, const SECOND: bool>(
    s: S,
    mut p: S::P,
    quants: &[[u8; 64]],
    a: S::A,
) -> S::P {
    if SECOND {
        p = dot::<S, W, 0>(s, p, W::group::<S, 4>(s, quants), a);
        p = dot::<S, W, 1>(s, p, W::group::<S, 5>(s, quants), a);
        p = dot::<S, W, 2>(s, p, W::group::<S, 6>(s, quants), a);
        dot::<S, W, 3>(s, p, W::group::<S, 7>(s, quants), a)
    } else {
        p = dot::<S, W, 0>(s, p, W::group::<S, 0>(s, quants), a);
        p = dot::<S, W, 1>(s, p, W::group::<S, 1>(s, quants), a);
        p = dot::<S, W, 2>(s, p, W::group::<S, 2>(s, quants), a);
        dot::<S, W, 3>(s, p, W::group::<S, 3>(s, quants), a)
    }
}
