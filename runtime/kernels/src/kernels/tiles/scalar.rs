//! The portable instruction set: the definition of what every other one computes.

use super::activations::{Quad, SIDE};
use super::formats::Format;
use super::gemm::{Panel, multiply_quad};
use super::lanes::Lanes;
use crate::format::{TILE_ROWS as ROWS, f16_to_f32};
use crate::kernels::generic::Scalar;

type F = [f32; ROWS];

/// Two bytes of `x` as the number at `index`.
fn half(x: &[u8; 32], index: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([x[2 * index], x[2 * index + 1]]))
}

impl Lanes for Scalar {
    type W = [u8; 64];
    type A = [i8; 16];
    type P = [i32; ROWS];
    type F = F;

    const SIGNED_BIAS: i32 = 0;
    const PANEL_WITHOUT_BIAS: bool = false;

    fn bytes(self, w: &[u8; 64]) -> [u8; 64] {
        *w
    }

    fn low(self, w: [u8; 64]) -> [u8; 64] {
        w.map(|w| w & 15)
    }

    fn high(self, w: [u8; 64]) -> [u8; 64] {
        w.map(|w| w >> 4)
    }

    fn insert<const LEFT: i32, const RIGHT: i32>(self, w: [u8; 64], from: [u8; 64], mask: u8) -> [u8; 64] {
        core::array::from_fn(|i| w[i] | from[i] << LEFT >> RIGHT & mask)
    }

    fn signed(self, w: [u8; 64]) -> [u8; 64] {
        w
    }

    fn activations(self, a: &[i8; 16]) -> [i8; 16] {
        *a
    }

    fn start(self, bias: i32) -> [i32; ROWS] {
        [bias; ROWS]
    }

    fn dot<const LANE: i32>(self, p: [i32; ROWS], w: [u8; 64], a: [i8; 16]) -> [i32; ROWS] {
        let a = &a[LANE as usize * 4..][..4];
        core::array::from_fn(|row| {
            let products = w[4 * row..][..4].iter().zip(a).map(|(w, a)| i32::from(*w as i8) * i32::from(*a));
            p[row] + products.sum::<i32>()
        })
    }

    fn finish(self, p: [i32; ROWS], _: i32) -> F {
        p.map(|p| p as f32)
    }

    fn splat(self, x: f32) -> F {
        [x; ROWS]
    }

    fn load(self, x: &F) -> F {
        *x
    }

    fn store(self, x: F, to: &mut F) {
        *to = x;
    }

    fn halves(self, x: &[u8; 32]) -> F {
        core::array::from_fn(|i| half(x, i))
    }

    fn unsigned_bytes(self, x: &[u8; 16]) -> F {
        x.map(f32::from)
    }

    fn signed_bytes(self, x: &[u8; 16]) -> F {
        x.map(|x| f32::from(x as i8))
    }

    fn mul(self, a: F, b: F) -> F {
        core::array::from_fn(|i| a[i] * b[i])
    }

    fn fma(self, a: F, b: F, c: F) -> F {
        core::array::from_fn(|i| libm::fmaf(a[i], b[i], c[i]))
    }

    fn keep(self, w: [[u8; 64]; 2], _: i32, to: &mut [[u8; 64]; 2]) {
        *to = w;
    }

    fn multiply_quad<W: Format>(self, panel: &Panel, acts: Quad, out: [&mut F; SIDE]) {
        multiply_quad::<Self, W>(self, panel, acts, out);
    }
}
