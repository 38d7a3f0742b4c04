//! The portable instruction set: plain Rust, and the definition of what every other one computes.

mod dequantize;

use super::simd::{Op, Simd};
use crate::format::{bf16_to_f32, f16_to_f32, f32_to_f16};

pub use dequantize::dequantize_row;
#[cfg(feature = "low-bit")]
pub use dequantize::{IQ4_NL_VALUES, q3_k_scale};
pub(crate) use dequantize::{fifth_bit, nibble, scale_min};

/// No vector unit at all.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

type F = [f32; 8];

/// Eight results of `f`.
#[inline(always)]
fn map2(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    core::array::from_fn(|i| f(a[i], b[i]))
}

/// The sum of the products of one half of a pair.
#[inline(always)]
fn half_products(w: [[u8; 32]; 2], a: &[i8; 64], block: usize, half: usize) -> i32 {
    let weights = &w[half][block * 16..][..16];
    let activations = &a[half * 32 + block * 16..][..16];
    weights.iter().zip(activations).map(|(w, a)| i32::from(*w as i8) * i32::from(*a)).sum()
}

impl Simd for Scalar {
    type F = F;
    type B = [u8; 32];
    type P = [i32; 2];
    type K = [[i8; 2]; 2];

    #[inline(never)]
    fn outline<O: Op<Self>>(self, op: O) {
        op.run(self);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 8]
    }

    #[inline(always)]
    fn load(self, x: &[f32; 8]) -> F {
        *x
    }

    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; 8]) {
        *to = x;
    }

    #[inline(always)]
    fn f32_bytes(self, bytes: &[u8; 32]) -> F {
        core::array::from_fn(|i| {
            f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        })
    }

    #[inline(always)]
    fn f16_bytes(self, bytes: &[u8; 16]) -> F {
        core::array::from_fn(|i| f16_to_f32(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
    }

    #[inline(always)]
    fn bf16_bytes(self, bytes: &[u8; 16]) -> F {
        core::array::from_fn(|i| bf16_to_f32(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])))
    }

    #[inline(always)]
    fn f16_bits(self, bits: [u16; 8]) -> F {
        bits.map(f16_to_f32)
    }

    #[inline(always)]
    fn to_f16(self, x: F) -> [u16; 8] {
        x.map(f32_to_f16)
    }

    #[inline(always)]
    fn f32_from_u8(self, x: [u8; 8]) -> F {
        x.map(f32::from)
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        core::array::from_fn(|i| libm::fmaf(a[i], b[i], c[i]))
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn select_less(self, a: F, b: F, yes: F, no: F) -> F {
        core::array::from_fn(|i| if a[i] < b[i] { yes[i] } else { no[i] })
    }

    #[inline(always)]
    fn higher(self, a: F, x: F) -> F {
        map2(a, x, |a, x| if a < x { x } else { a })
    }

    #[inline(always)]
    fn add_exponent(self, x: F, n: F) -> F {
        map2(x, n, |x, n| f32::from_bits(x.to_bits().wrapping_add(n.to_bits() << 23)))
    }

    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
    }

    #[inline(always)]
    fn sums(self, x: [F; 8]) -> F {
        x.map(|x| self.sum(x))
    }

    #[inline(always)]
    fn peak(self, x: &[[f32; 32]]) -> u32 {
        x.as_flattened().iter().fold(0, |peak, x| peak.max(x.to_bits() & 0x7fff_ffff))
    }

    #[inline(always)]
    fn round_i8(self, x: [F; 2]) -> [i8; 16] {
        // Adding 1.5 * 2^23 leaves no bits for a fraction, so the adder rounds to nearest even.
        const SHIFT: f32 = 12_582_912.0;
        core::array::from_fn(|i| (x[i / 8][i % 8] + SHIFT).to_bits() as i8)
    }

    #[inline(always)]
    fn sum_i8(self, x: &[i8; 16]) -> i32 {
        x.iter().map(|x| i32::from(*x)).sum()
    }

    #[inline(always)]
    fn pair(self, even: &[u8; 16], odd: &[u8; 16]) -> [u8; 32] {
        core::array::from_fn(|i| if i < 16 { even[i] } else { odd[i - 16] })
    }

    #[inline(always)]
    fn both(self, x: &[u8; 16]) -> [u8; 32] {
        self.pair(x, x)
    }

    #[inline(always)]
    fn bits<const EVEN: i32, const ODD: i32>(self, x: [u8; 32], mask: u8) -> [u8; 32] {
        core::array::from_fn(|i| x[i] >> (if i < 16 { EVEN } else { ODD }) & mask)
    }

    #[inline(always)]
    fn shl4(self, x: [u8; 32]) -> [u8; 32] {
        x.map(|x| x << 4)
    }

    #[inline(always)]
    fn or(self, a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
        core::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn sub_i8(self, x: [u8; 32], y: i8) -> [u8; 32] {
        x.map(|x| x.wrapping_sub(y as u8))
    }

    #[cfg(feature = "low-bit")]
    #[inline(always)]
    fn choose(self, x: [u8; 32], from: &[i8; 16]) -> [u8; 32] {
        x.map(|x| from[usize::from(x & 15)] as u8)
    }

    #[inline(always)]
    fn spread(self, even: u16, odd: u16) -> [u8; 32] {
        core::array::from_fn(|i| (if i < 16 { even >> i } else { odd >> (i - 16) } as u8 & 1) << 4)
    }

    #[inline(always)]
    fn factors(self, even: [i8; 2], odd: [i8; 2]) -> [[i8; 2]; 2] {
        [even, odd]
    }

    #[inline(always)]
    fn dot_small(self, w: [[u8; 32]; 2], a: &[i8; 64]) -> [i32; 2] {
        self.dot_signed(w, a)
    }

    #[inline(always)]
    fn dot_signed(self, w: [[u8; 32]; 2], a: &[i8; 64]) -> [i32; 2] {
        [0, 1].map(|block| half_products(w, a, block, 0) + half_products(w, a, block, 1))
    }

    #[inline(always)]
    fn dot_factors(self, w: [[u8; 32]; 2], k: [[i8; 2]; 2], a: &[i8; 64]) -> [i32; 2] {
        [0, 1].map(|block| {
            half_products(w, a, block, 0) * i32::from(k[block][0])
                + half_products(w, a, block, 1) * i32::from(k[block][1])
        })
    }

    #[inline(always)]
    fn no_products(self) -> [i32; 2] {
        [0; 2]
    }

    #[inline(always)]
    fn totals(self, p: [[i32; 2]; 4]) -> F {
        core::array::from_fn(|i| p[i / 2][i % 2] as f32)
    }
}

super::table::kernel_table!("generic", Scalar,);
