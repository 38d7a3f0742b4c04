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
//! Therefore all tables agree bit for bit, and prefill with decode, but for large batches ([`TileKernels::wide`]).
//! With row kernels (`super::matmul`) they agree up to the rounding of `f32` sums: those keep eight sums a row.

mod activations;
mod formats;
mod gemm;
mod gemv;
mod lanes;
mod pack;
mod scalar;

#[cfg(target_arch = "aarch64")]
pub(crate) use activations::Quads;
pub(crate) use activations::{Quad, RUN, SIDE, TileActs, padded_tokens, quantize};
#[cfg(target_arch = "aarch64")]
pub(crate) use formats::{AnyShare, shares};
pub(crate) use formats::{Format, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
#[cfg(target_arch = "aarch64")]
pub(crate) use gemm::multiply_each;
pub(crate) use gemm::{Fill, Multiply, MultiplyWide, Panel, fill, multiply};
#[cfg(target_arch = "x86_64")]
pub(crate) use gemm::{MultiplyPair, multiply_pair, multiply_quad};
pub(crate) use gemv::one_token;
pub(crate) use lanes::Lanes;
pub use pack::put_q8_0;
pub use pack::{dequantize_tile_row, pack_tiles};

use super::activations::Activations;
use super::matmul::{ByType, Matrix, RowsKernel};
use super::output::Columns;
use crate::format::{DType, Factors, Geometry};

/// The kernels of one instruction set, for each quantized type.
///
/// Those for many tokens are two: unpacking, and products of what was unpacked, in which types hardly differ. So
/// instruction sets share the first and types the second, and a library has each once.
pub(crate) struct TileKernels {
    /// One token.
    pub one_token: &'static ByType<RowsKernel>,
    /// Many tokens: unpacks the weights of a tile.
    pub fill: &'static ByType<Fill>,
    /// Many tokens: adds the products of unpacked weights.
    pub multiply: &'static ByType<Multiply>,
    /// Many tokens: the same of two tiles at once, where registers hold the sums of both.
    #[cfg(target_arch = "x86_64")]
    pub pair: Option<&'static ByType<MultiplyPair>>,
    /// Many tokens, wide, for types with one scale a block and no minimum, where it is faster: `fill` knows of it, too.
    ///
    /// Of a run's blocks only the scales of weights differ, `w`, not those of a token's activations, `a`. With `s` the
    /// exact sum of products of each block and `S` that of all blocks of the run so far, the run's product is
    /// `a * sum of w[k] * s[k] = a * sum of (w[k] - w[k + 1]) * S[k]`, `w` being 0 behind the run's end. So
    /// nothing is cleared or multiplied by `a` in a block.
    ///
    /// This is the one kernel that does not agree with the others bit for bit: a scale for a run is coarser where
    /// magnitudes differ, and sums are rounded otherwise, within `2e-6` of the sum of the products' magnitudes, each taken
    /// with the largest weight of the row. A weight's scale that is not finite makes the sum NaN or infinite.
    pub wide: Option<MultiplyWide>,
}

/// Least tokens of a batch whose activations are quantized wide. Fewer are computed as each alone is: what a draft
/// proposes is verified as decode computes it.
const WIDE_TOKENS: usize = 32;

/// The kernels for one type.
#[derive(Clone, Copy)]
pub(crate) struct TileKernel {
    one_token: RowsKernel,
    fill: Fill,
    multiply: Multiply,
    #[cfg(target_arch = "x86_64")]
    pair: Option<MultiplyPair>,
    wide: Option<MultiplyWide>,
}

impl TileKernels {
    /// The kernels for a type; `None` for floats.
    pub fn of(&self, dtype: DType) -> Option<TileKernel> {
        let (one_token, fill) = (self.one_token.of(dtype)?, self.fill.of(dtype)?);
        let wide = self.wide.filter(|_| one_scale(dtype));
        Some(TileKernel {
            one_token,
            fill,
            multiply: self.multiply.of(dtype)?,
            #[cfg(target_arch = "x86_64")]
            pair: self.pair.and_then(|pair| pair.of(dtype)),
            wide,
        })
    }

    /// Whether a batch of `tokens` that meets weights of these types is to be quantized wide.
    pub fn takes_wide(&self, tokens: usize, mut types: impl Iterator<Item = DType>) -> bool {
        self.wide.is_some() && tokens >= WIDE_TOKENS && types.all(one_scale)
    }
}

/// Whether blocks of a type have one scale and no minimum; floats, which need no quantized activations, count too.
fn one_scale(dtype: DType) -> bool {
    Geometry::of(dtype).is_none_or(|geometry| matches!(geometry.factors, Factors::Scale))
}

impl TileKernel {
    /// The rows of one part, for all tokens.
    ///
    /// # Safety
    /// The CPU must be able to run the kernels.
    pub unsafe fn run(self, weight: &Matrix, acts: &Activations, out: &mut Columns) {
        // SAFETY: the caller's promise.
        unsafe {
            if acts.tokens() == 1 {
                return (self.one_token)(weight, acts, out);
            }
            #[cfg(target_arch = "x86_64")]
            if let Some(pair) = self.pair {
                let multiply = (self.multiply, pair);
                return gemm::many_tokens_by_pairs(self.fill, multiply, weight, &acts.tile_acts(), out);
            }
            let wide = self.wide.filter(|_| acts.wide());
            gemm::many_tokens(self.fill, self.multiply, wide, weight, &acts.tile_acts(), out);
        }
    }
}
