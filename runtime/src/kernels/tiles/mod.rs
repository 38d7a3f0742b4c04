//! Weights laid out ahead of time: sixteen rows side by side.
//!
//! A row after row layout, as GGUF has it, makes a kernel add up across a register for every row. In a
//! tile the lanes of a register are rows: sums stay where they are, one load of activations serves
//! sixteen rows, and nothing is shuffled. The layout (see [`crate::format`]) suits every instruction set that
//! multiplies four bytes into a lane, so one pack serves them all.
//!
//! Integer sums of a segment (32 weights, or 16 of Q6_K) are exact; what follows is one fused
//! multiply-add a segment, in the order of the columns, whatever the instruction set, the number of tokens
//! and the number of threads:
//!
//! `out = fma(integers, scale_w * scale_a, out)`, then `out = fma(min_w, sum_a * scale_a, out)`
//!
//! Therefore all tables agree bit for bit, and prefill with decode. With row kernels (`super::matmul`) they
//! agree up to the rounding of `f32` sums: those keep eight sums a row.

mod activations;
mod formats;
mod gemm;
mod gemv;
mod lanes;
mod pack;
mod scalar;

pub(crate) use activations::{Quad, SIDE, TileActs, padded_tokens, quantize};
pub(crate) use formats::{Format, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
pub(crate) use gemm::Panel;
#[cfg(target_arch = "x86_64")]
pub(crate) use gemm::multiply_quad;
#[cfg(target_arch = "aarch64")]
pub(crate) use gemm::{multiply_each, multiply_quads};
pub(crate) use lanes::Lanes;
pub(crate) use pack::put_q8_0;
pub use pack::{dequantize_tile_row, pack_tiles};

use super::activations::Activations;
use super::matmul::Matrix;
use super::output::Columns;

/// The rows of one part, for all tokens.
#[inline(always)]
pub(crate) fn multiply<S: Lanes, W: Format>(s: S, weight: &Matrix, acts: &Activations, out: &mut Columns) {
    if acts.tokens() == 1 {
        gemv::one_token::<S, W>(s, weight, &acts.tile_acts(), out);
    } else {
        gemm::many_tokens::<S, W>(s, weight, &acts.tile_acts(), out);
    }
}
