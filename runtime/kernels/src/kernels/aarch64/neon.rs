//! NEON as every ARMv8-A has it, without the dot product extension.
//!
//! Bytes are multiplied into 16 bits, where at least two products of signed bytes fit (128 * 127 * 2), and
//! widened to 32 bits by pairwise addition.

use super::products::add_products;
use crate::kernels::simd::{self, Op, Simd};
use core::arch::aarch64::*;
use core::arch::asm;

/// NEON belongs to the build's baseline, so this needs no proof.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// Evaluates NEON intrinsics.
macro_rules! neon {
    ($($body:tt)*) => {
        // SAFETY: this module is compiled only where NEON belongs to the baseline; pointers come from
        // references to arrays of the width of the access, which needs no alignment.
        unsafe { $($body)* }
    };
}

type F = [float32x4_t; 2];
type B = [uint8x16_t; 2];

impl Neon {
    /// Sixteen activations.
    #[inline(always)]
    fn activations(self, a: &[i8; 64], at: usize) -> int8x16_t {
        let a: &[i8; 16] = a[at..at + 16].as_array().unwrap_or(&[0; 16]);
        neon!(vld1q_s8(a.as_ptr()))
    }

    /// Sums of two products each of 16 bytes.
    #[inline(always)]
    fn products(self, w: uint8x16_t, a: int8x16_t) -> int16x8_t {
        neon!({
            let w = vreinterpretq_s8_u8(w);
            vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(a)), w, a)
        })
    }

    /// `sums` and two more products each of 16 bytes.
    #[inline(always)]
    fn add_products(self, sums: int16x8_t, w: uint8x16_t, a: int8x16_t) -> int16x8_t {
        neon!({
            let w = vreinterpretq_s8_u8(w);
            vmlal_high_s8(vmlal_s8(sums, vget_low_s8(w), vget_low_s8(a)), w, a)
        })
    }

    /// One block of small weights: four products of at most 31 * 127 fit 16 bits.
    #[inline(always)]
    fn block_small(self, first: uint8x16_t, second: uint8x16_t, a: [int8x16_t; 2]) -> int32x4_t {
        let sums = self.add_products(self.products(first, a[0]), second, a[1]);
        neon!(vpaddlq_s16(sums))
    }

    /// One block of any weights.
    #[inline(always)]
    fn block_signed(self, first: uint8x16_t, second: uint8x16_t, a: [int8x16_t; 2]) -> int32x4_t {
        neon!(vpadalq_s16(vpaddlq_s16(self.products(first, a[0])), self.products(second, a[1])))
    }

    /// One block of weights within ±32 with a factor for each half.
    #[inline(always)]
    fn block_factors(
        self,
        first: uint8x16_t,
        second: uint8x16_t,
        k: [i32; 2],
        a: [int8x16_t; 2],
    ) -> int32x4_t {
        neon!({
            let sums = vmulq_n_s32(vpaddlq_s16(self.products(first, a[0])), k[0]);
            vmlaq_n_s32(sums, vpaddlq_s16(self.products(second, a[1])), k[1])
        })
    }

    /// Eight half-precision numbers, widened.
    #[inline(always)]
    fn widen(self, halves: uint16x8_t) -> F {
        neon!([
            vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))),
            vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves))),
        ])
    }

    /// Byte `i` is 16 where bit `i` is set.
    #[inline(always)]
    fn spread_block(self, bits: u16) -> uint8x16_t {
        let [low, high] = bits.to_le_bytes();
        neon!({
            let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
            let bytes = vcombine_u8(vdup_n_u8(low), vdup_n_u8(high));
            vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(16))
        })
    }
}

/// Lane `j` of register `i` as lane `i` of register `j`.
#[inline(always)]
fn four_by_four([a, b, c, d]: [float32x4_t; 4]) -> [float32x4_t; 4] {
    neon!({
        let wide = |x| vreinterpretq_f64_f32(x);
        let (even, odd) = ([vtrn1q_f32(a, b), vtrn1q_f32(c, d)], [vtrn2q_f32(a, b), vtrn2q_f32(c, d)]);
        let ([a, c], [b, d]) = (even.map(wide), odd.map(wide));
        [vtrn1q_f64(a, c), vtrn1q_f64(b, d), vtrn2q_f64(a, c), vtrn2q_f64(b, d)]
            .map(|x| vreinterpretq_f32_f64(x))
    })
}

impl Simd for Neon {
    type F = F;
    type B = B;
    /// 32-bit sums of the even block and of the odd one.
    type P = [int32x4_t; 2];
    /// Factors of the even block's halves, then of the odd one's.
    type K = [[i32; 2]; 2];

    #[inline(never)]
    fn outline<O: Op<Self>>(self, op: O) {
        op.run(self);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        neon!([vdupq_n_f32(x); 2])
    }

    #[inline(always)]
    fn summands(self, x: &[[f32; 4]; 6]) -> [F; 5] {
        // Loads, where the compiler would copy registers: an addition overwrites what it adds to.
        let (a, b, c, d, e, f, g, h, i, j);
        // SAFETY: NEON belongs to the baseline; the 96 bytes of `x` are read, and nothing is written but the registers
        // named.
        unsafe {
            asm!(
                "ld1 {{v16.4s, v17.4s, v18.4s, v19.4s}}, [{x}]",
                "ld1 {{v20.4s, v21.4s, v22.4s, v23.4s}}, [{x}]",
                "ldp {i:q}, {j:q}, [{x}, #64]",
                x = in(reg) x.as_ptr(),
                i = out(vreg) i,
                j = out(vreg) j,
                out("v16") a, out("v17") b, out("v18") c, out("v19") d,
                out("v20") e, out("v21") f, out("v22") g, out("v23") h,
                options(nostack, readonly, preserves_flags),
            );
        }
        [[a, e], [b, f], [c, g], [d, h], [i, j]]
    }

    #[inline(always)]
    fn load(self, x: &[f32; 8]) -> F {
        neon!([vld1q_f32(x.as_ptr()), vld1q_f32(x.as_ptr().add(4))])
    }

    #[inline(always)]
    fn load2(self, x: &[f32; 16]) -> [F; 2] {
        let x = neon!(vld1q_f32_x4(x.as_ptr()));
        [[x.0, x.1], [x.2, x.3]]
    }

    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; 8]) {
        neon!({
            vst1q_f32(to.as_mut_ptr(), x[0]);
            vst1q_f32(to.as_mut_ptr().add(4), x[1]);
        })
    }

    #[inline(always)]
    fn f32_bytes(self, bytes: &[u8; 32]) -> F {
        neon!([
            vreinterpretq_f32_u8(vld1q_u8(bytes.as_ptr())),
            vreinterpretq_f32_u8(vld1q_u8(bytes.as_ptr().add(16))),
        ])
    }

    #[inline(always)]
    fn f16_bytes(self, bytes: &[u8; 16]) -> F {
        self.widen(neon!(vreinterpretq_u16_u8(vld1q_u8(bytes.as_ptr()))))
    }

    #[inline(always)]
    fn bf16_bytes(self, bytes: &[u8; 16]) -> F {
        neon!({
            let halves = vreinterpretq_u16_u8(vld1q_u8(bytes.as_ptr()));
            [
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(halves))),
                vreinterpretq_f32_u32(vshll_high_n_u16::<16>(halves)),
            ]
        })
    }

    #[inline(always)]
    fn f16_bits(self, bits: [u16; 8]) -> F {
        self.widen(neon!(vld1q_u16(bits.as_ptr())))
    }

    #[inline(always)]
    fn to_f16(self, x: F) -> [u16; 8] {
        neon!({
            let halves = vcombine_u16(
                vreinterpret_u16_f16(vcvt_f16_f32(x[0])),
                vreinterpret_u16_f16(vcvt_f16_f32(x[1])),
            );
            let mut out = [0; 8];
            vst1q_u16(out.as_mut_ptr(), halves);
            out
        })
    }

    #[inline(always)]
    fn f32_from_u8(self, x: [u8; 8]) -> F {
        neon!({
            let wide = vmovl_u8(vcreate_u8(u64::from_le_bytes(x)));
            [vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))]
        })
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        neon!([vaddq_f32(a[0], b[0]), vaddq_f32(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        neon!([vsubq_f32(a[0], b[0]), vsubq_f32(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        neon!([vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])])
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        neon!([vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])])
    }

    #[inline(always)]
    fn add_products<const N: usize, const P: usize>(
        self,
        w: [&[f32]; N],
        x: [&[[f32; 16]]; P],
        sums: &mut [[[F; 2]; P]; N],
    ) {
        if let (Some(w), [x], Some(sums)) = (w.as_array(), &x[..], sums.as_flattened_mut().as_mut_array()) {
            add_products(*w, x, sums);
        } else {
            simd::add_products(self, w, x, sums);
        }
    }

    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        neon!([vdivq_f32(a[0], b[0]), vdivq_f32(a[1], b[1])])
    }

    #[inline(always)]
    fn select_less(self, a: F, b: F, yes: F, no: F) -> F {
        neon!([
            vbslq_f32(vcltq_f32(a[0], b[0]), yes[0], no[0]),
            vbslq_f32(vcltq_f32(a[1], b[1]), yes[1], no[1]),
        ])
    }

    #[inline(always)]
    fn higher(self, a: F, x: F) -> F {
        // The number where one is none.
        neon!([vmaxnmq_f32(a[0], x[0]), vmaxnmq_f32(a[1], x[1])])
    }

    #[inline(always)]
    fn highest(self, x: F) -> f32 {
        neon!(vmaxnmvq_f32(vmaxnmq_f32(x[0], x[1])))
    }

    #[inline(always)]
    fn add_exponent(self, x: F, n: F) -> F {
        neon!({
            let low = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n[0]));
            let high = vshlq_n_u32::<23>(vreinterpretq_u32_f32(n[1]));
            [
                vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x[0]), low)),
                vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(x[1]), high)),
            ]
        })
    }

    #[inline(always)]
    fn sum(self, x: F) -> f32 {
        neon!({
            let pairs = vpaddq_f32(x[0], x[1]);
            let fours = vpaddq_f32(pairs, pairs);
            vpadds_f32(vget_low_f32(fours))
        })
    }

    #[inline(always)]
    fn sums(self, x: [F; 8]) -> F {
        neon!({
            let [a, b, c, d, e, f, g, h] = x;
            let ab = vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(b[0], b[1]));
            let cd = vpaddq_f32(vpaddq_f32(c[0], c[1]), vpaddq_f32(d[0], d[1]));
            let ef = vpaddq_f32(vpaddq_f32(e[0], e[1]), vpaddq_f32(f[0], f[1]));
            let gh = vpaddq_f32(vpaddq_f32(g[0], g[1]), vpaddq_f32(h[0], h[1]));
            [vpaddq_f32(ab, cd), vpaddq_f32(ef, gh)]
        })
    }

    #[inline(always)]
    fn transpose(self, x: [F; 8]) -> [F; 8] {
        let [a, b, c, d, e, f, g, h] = x;
        let quarter = |i: usize, j: usize| {
            let rows = if j == 0 { [a, b, c, d] } else { [e, f, g, h] };
            four_by_four(rows.map(|row| row[i]))
        };
        let ([a, b, c, d], [e, f, g, h]) = (quarter(0, 0), quarter(0, 1));
        let ([i, j, k, l], [m, n, o, p]) = (quarter(1, 0), quarter(1, 1));
        [[a, e], [b, f], [c, g], [d, h], [i, m], [j, n], [k, o], [l, p]]
    }

    #[inline(always)]
    fn peak(self, x: &[[f32; 32]]) -> u32 {
        neon!({
            // Without the sign, floats are ordered as their bits are.
            let magnitude = vdupq_n_u32(0x7fff_ffff);
            let mut peak = vdupq_n_u32(0);
            for x in x {
                for x in x.as_chunks::<4>().0 {
                    peak =
                        vmaxq_u32(peak, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x.as_ptr())), magnitude));
                }
            }
            vmaxvq_u32(peak)
        })
    }

    #[inline(always)]
    fn round_i8(self, x: [F; 2]) -> [i8; 16] {
        neon!({
            // Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the low byte.
            let shift = vdupq_n_f32(12_582_912.0);
            let bits = |x| vreinterpretq_u8_f32(vaddq_f32(x, shift));
            let even = |a, b| vuzp1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b));
            let (a, b) = (even(bits(x[0][0]), bits(x[0][1])), even(bits(x[1][0]), bits(x[1][1])));
            let bytes = vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
            let mut out = [0; 16];
            vst1q_s8(out.as_mut_ptr(), vreinterpretq_s8_u8(bytes));
            out
        })
    }

    #[inline(always)]
    fn round_blocks(self, x: &[[f32; 32]], factor: f32, side: usize, to: &mut [[i8; 8]]) {
        if x.is_empty() {
            return;
        }
        assert!((4 * x.len() - 1) * side < to.len());
        // SAFETY: NEON belongs to the baseline. A round reads the 128 bytes of a block and writes four times 8 bytes, each
        // `side` times 8 behind the ones before, of which the last ones are within `to`.
        unsafe {
            asm!(
                "2:",
                "ld1 {{v16.4s, v17.4s, v18.4s, v19.4s}}, [{x}], #64",
                "ld1 {{v20.4s, v21.4s, v22.4s, v23.4s}}, [{x}], #64",
                "fmul v16.4s, v16.4s, {factor:v}.s[0]", "fmul v17.4s, v17.4s, {factor:v}.s[0]",
                "fmul v18.4s, v18.4s, {factor:v}.s[0]", "fmul v19.4s, v19.4s, {factor:v}.s[0]",
                "fmul v20.4s, v20.4s, {factor:v}.s[0]", "fmul v21.4s, v21.4s, {factor:v}.s[0]",
                "fmul v22.4s, v22.4s, {factor:v}.s[0]", "fmul v23.4s, v23.4s, {factor:v}.s[0]",
                // As in `round_i8`.
                "fadd v16.4s, v16.4s, {shift:v}.4s", "fadd v17.4s, v17.4s, {shift:v}.4s",
                "fadd v18.4s, v18.4s, {shift:v}.4s", "fadd v19.4s, v19.4s, {shift:v}.4s",
                "fadd v20.4s, v20.4s, {shift:v}.4s", "fadd v21.4s, v21.4s, {shift:v}.4s",
                "fadd v22.4s, v22.4s, {shift:v}.4s", "fadd v23.4s, v23.4s, {shift:v}.4s",
                "uzp1 v16.8h, v16.8h, v17.8h", "uzp1 v18.8h, v18.8h, v19.8h",
                "uzp1 v20.8h, v20.8h, v21.8h", "uzp1 v22.8h, v22.8h, v23.8h",
                "uzp1 v16.16b, v16.16b, v18.16b", "uzp1 v20.16b, v20.16b, v22.16b",
                "st1 {{v16.d}}[0], [{to}], {side}",
                "st1 {{v16.d}}[1], [{to}], {side}",
                "st1 {{v20.d}}[0], [{to}], {side}",
                "st1 {{v20.d}}[1], [{to}], {side}",
                "sub {blocks}, {blocks}, #1",
                "cbnz {blocks}, 2b",
                blocks = inout(reg) x.len() => _,
                x = inout(reg) x.as_ptr() => _,
                to = inout(reg) to.as_mut_ptr() => _,
                side = in(reg) 8 * side,
                factor = in(vreg) vdupq_n_f32(factor),
                shift = in(vreg) vdupq_n_f32(12_582_912.0),
                out("v16") _, out("v17") _, out("v18") _, out("v19") _,
                out("v20") _, out("v21") _, out("v22") _, out("v23") _,
                options(nostack, preserves_flags),
            );
        }
    }

    #[inline(always)]
    fn sum_i8(self, x: &[i8; 16]) -> i32 {
        neon!(i32::from(vaddlvq_s8(vld1q_s8(x.as_ptr()))))
    }

    #[inline(always)]
    fn pair(self, even: &[u8; 16], odd: &[u8; 16]) -> B {
        neon!([vld1q_u8(even.as_ptr()), vld1q_u8(odd.as_ptr())])
    }

    #[inline(always)]
    fn both(self, x: &[u8; 16]) -> B {
        neon!([vld1q_u8(x.as_ptr()); 2])
    }

    #[inline(always)]
    fn bits<const EVEN: i32, const ODD: i32>(self, x: B, mask: u8) -> B {
        neon!({
            let mask = vdupq_n_u8(mask);
            let even = vshlq_u8(x[0], vdupq_n_s8(-EVEN as i8));
            let odd = vshlq_u8(x[1], vdupq_n_s8(-ODD as i8));
            [vandq_u8(even, mask), vandq_u8(odd, mask)]
        })
    }

    #[inline(always)]
    fn shl4(self, x: B) -> B {
        neon!([vshlq_n_u8::<4>(x[0]), vshlq_n_u8::<4>(x[1])])
    }

    #[inline(always)]
    fn or(self, a: B, b: B) -> B {
        neon!([vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1])])
    }

    #[inline(always)]
    fn sub_i8(self, x: B, y: i8) -> B {
        neon!({
            let y = vdupq_n_u8(y as u8);
            [vsubq_u8(x[0], y), vsubq_u8(x[1], y)]
        })
    }

    #[cfg(feature = "low-bit")]
    #[inline(always)]
    fn choose(self, x: B, from: &[i8; 16]) -> B {
        let [from, _] = self.both(&from.map(|number| number as u8));
        neon!([vqtbl1q_u8(from, x[0]), vqtbl1q_u8(from, x[1])])
    }

    #[inline(always)]
    fn spread(self, even: u16, odd: u16) -> B {
        [self.spread_block(even), self.spread_block(odd)]
    }

    #[inline(always)]
    fn factors(self, even: [i8; 2], odd: [i8; 2]) -> [[i32; 2]; 2] {
        [[i32::from(even[0]), i32::from(even[1])], [i32::from(odd[0]), i32::from(odd[1])]]
    }

    #[inline(always)]
    fn dot_small(self, w: [B; 2], a: &[i8; 64]) -> [int32x4_t; 2] {
        [
            self.block_small(w[0][0], w[1][0], [self.activations(a, 0), self.activations(a, 32)]),
            self.block_small(w[0][1], w[1][1], [self.activations(a, 16), self.activations(a, 48)]),
        ]
    }

    #[inline(always)]
    fn dot_signed(self, w: [B; 2], a: &[i8; 64]) -> [int32x4_t; 2] {
        [
            self.block_signed(w[0][0], w[1][0], [self.activations(a, 0), self.activations(a, 32)]),
            self.block_signed(w[0][1], w[1][1], [self.activations(a, 16), self.activations(a, 48)]),
        ]
    }

    #[inline(always)]
    fn dot_factors(self, w: [B; 2], k: [[i32; 2]; 2], a: &[i8; 64]) -> [int32x4_t; 2] {
        [
            self.block_factors(w[0][0], w[1][0], k[0], [self.activations(a, 0), self.activations(a, 32)]),
            self.block_factors(w[0][1], w[1][1], k[1], [self.activations(a, 16), self.activations(a, 48)]),
        ]
    }

    #[inline(always)]
    fn no_products(self) -> [int32x4_t; 2] {
        neon!([vdupq_n_s32(0); 2])
    }

    #[inline(always)]
    fn totals(self, p: [[int32x4_t; 2]; 4]) -> F {
        neon!([
            vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(p[0][0], p[0][1]), vpaddq_s32(p[1][0], p[1][1]))),
            vcvtq_f32_s32(vpaddq_s32(vpaddq_s32(p[2][0], p[2][1]), vpaddq_s32(p[3][0], p[3][1]))),
        ])
    }
}

crate::kernels::table::kernel_table!("neon", Neon,);
