//! The few operations on sixteen rows side by side that tile kernels are made of.
//!
//! As with [`Simd`](crate::kernels::simd::Simd), every operation has one exact result, so all
//! instruction sets agree bit for bit; `fma` rounds once.

use super::gemm::Panel;
use super::{Format, Quad};

/// A token of an instruction set: holding one proves that the CPU has it.
pub(crate) trait Lanes: Copy {
    /// 64 bytes, four for each row.
    type W: Copy;
    /// Sixteen activations.
    type A: Copy;
    /// Integer sums of a segment on the way.
    type P: Copy;
    /// An `f32` for each row.
    type F: Copy;

    /// What [`Lanes::signed`] adds to a signed byte so that [`Lanes::dot`] can take it.
    const SIGNED_BIAS: i32;
    /// Whether panels keep quants with their bias taken off; else the products of the bias are.
    const PANEL_WITHOUT_BIAS: bool;

    /// Four bytes for each row.
    fn bytes(self, w: &[u8; 64]) -> Self::W;
    /// The low nibbles.
    fn low(self, w: Self::W) -> Self::W;
    /// The high nibbles.
    fn high(self, w: Self::W) -> Self::W;
    /// `w | (from << LEFT >> RIGHT & mask)` in each byte, one of the two being 0; `mask` must clear what
    /// comes from a neighbouring byte, and `w` is 0 where `mask` is 1.
    fn insert<const LEFT: i32, const RIGHT: i32>(self, w: Self::W, from: Self::W, mask: u8) -> Self::W;
    /// Signed bytes as [`Lanes::dot`] takes them: with [`Lanes::SIGNED_BIAS`] added.
    fn signed(self, w: Self::W) -> Self::W;

    /// Sixteen activations, in four lanes of four.
    fn activations(self, a: &[i8; 16]) -> Self::A;
    /// No products yet, and `bias`.
    fn start(self, bias: i32) -> Self::P;
    /// Adds the products of each row's four weights with lane `LANE` of the activations. Weights are within
    /// `0..64`, and there are at most 8 calls from [`Lanes::start`] to [`Lanes::finish`].
    fn dot<const LANE: i32>(self, p: Self::P, w: Self::W, a: Self::A) -> Self::P;
    /// As [`Lanes::dot`], for any bytes that came through [`Lanes::signed`].
    #[inline(always)]
    fn dot_wide<const LANE: i32>(self, p: Self::P, w: Self::W, a: Self::A) -> Self::P {
        self.dot::<LANE>(p, w, a)
    }
    /// The sums and the `bias` that [`Lanes::start`] got, below 2^24.
    fn finish(self, p: Self::P, bias: i32) -> Self::F;
    /// As [`Lanes::finish`], after [`Lanes::dot_wide`].
    #[inline(always)]
    fn finish_wide(self, p: Self::P, bias: i32) -> Self::F {
        self.finish(p, bias)
    }

    /// `x` for all rows.
    fn splat(self, x: f32) -> Self::F;
    /// One number for each row.
    fn load(self, x: &[f32; 16]) -> Self::F;
    /// Writes one number for each row.
    fn store(self, x: Self::F, to: &mut [f32; 16]);
    /// Half-precision numbers, widened.
    fn halves(self, x: &[u8; 32]) -> Self::F;
    /// Unsigned bytes, converted.
    fn unsigned_bytes(self, x: &[u8; 16]) -> Self::F;
    /// Signed bytes, converted.
    fn signed_bytes(self, x: &[u8; 16]) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// Keeps the weights of eight columns for the product with many tokens, `bias` taken off each if
    /// [`Lanes::PANEL_WITHOUT_BIAS`].
    fn keep(self, w: [Self::W; 2], bias: i32, to: &mut [[u8; 64]; 2]);
    /// Adds the products of a panel with four tokens to `out`.
    fn multiply_quad<W: Format>(self, panel: &Panel, acts: Quad, out: [&mut [f32; 16]; 4]);
}
