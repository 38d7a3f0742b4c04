//! Sixteen rows side by side in four NEON registers: what all 64-bit ARM tables share.

use core::arch::aarch64::*;

/// Four rows in each of four registers.
pub(super) type W = [uint8x16_t; 4];
pub(super) type F = [float32x4_t; 4];

/// Evaluates NEON intrinsics.
macro_rules! neon {
    ($($body:tt)*) => {
        // SAFETY: this module is compiled only where NEON belongs to the baseline; pointers come from
        // references to arrays of at least the width of the access, which needs no alignment.
        unsafe { $($body)* }
    };
}
pub(super) use neon;

/// The methods of [`Lanes`](crate::kernels::tiles::Lanes) that do not multiply integers.
macro_rules! shared_lanes {
    () => {
        const SIGNED_BIAS: i32 = 0;
        const PANEL_WITHOUT_BIAS: bool = true;

        #[inline(always)]
        fn bytes(self, w: &[u8; 64]) -> W {
            let w = neon!(vld1q_u8_x4(w.as_ptr()));
            [w.0, w.1, w.2, w.3]
        }

        #[inline(always)]
        fn low(self, w: W) -> W {
            // Not by `map`, which the compiler may leave a call.
            let low = |w| neon!(vandq_u8(w, vdupq_n_u8(15)));
            [low(w[0]), low(w[1]), low(w[2]), low(w[3])]
        }

        #[inline(always)]
        fn high(self, w: W) -> W {
            let high = |w| neon!(vshrq_n_u8::<4>(w));
            [high(w[0]), high(w[1]), high(w[2]), high(w[3])]
        }

        #[inline(always)]
        fn insert<const LEFT: i32, const RIGHT: i32>(self, w: W, from: W, mask: u8) -> W {
            neon!({
                let mask = vdupq_n_u8(mask);
                let moved = |from| match (LEFT, RIGHT) {
                    (0, 0) => from,
                    (_, 0) => vshlq_u8(from, vdupq_n_s8(LEFT as i8)),
                    _ => vshlq_u8(from, vdupq_n_s8(-RIGHT as i8)),
                };
                [
                    vbslq_u8(mask, moved(from[0]), w[0]),
                    vbslq_u8(mask, moved(from[1]), w[1]),
                    vbslq_u8(mask, moved(from[2]), w[2]),
                    vbslq_u8(mask, moved(from[3]), w[3]),
                ]
            })
        }

        #[inline(always)]
        fn signed(self, w: W) -> W {
            w
        }

        #[inline(always)]
        fn activations(self, a: &[i8; 16]) -> int8x16_t {
            neon!(vld1q_s8(a.as_ptr()))
        }

        #[inline(always)]
        fn splat(self, x: f32) -> F {
            neon!([vdupq_n_f32(x); 4])
        }

        #[inline(always)]
        fn load(self, x: &[f32; 16]) -> F {
            neon!([
                vld1q_f32(x.as_ptr()),
                vld1q_f32(x.as_ptr().add(4)),
                vld1q_f32(x.as_ptr().add(8)),
                vld1q_f32(x.as_ptr().add(12)),
            ])
        }

        #[inline(always)]
        fn store(self, x: F, to: &mut [f32; 16]) {
            neon!({
                vst1q_f32(to.as_mut_ptr(), x[0]);
                vst1q_f32(to.as_mut_ptr().add(4), x[1]);
                vst1q_f32(to.as_mut_ptr().add(8), x[2]);
                vst1q_f32(to.as_mut_ptr().add(12), x[3]);
            })
        }

        #[inline(always)]
        fn halves(self, x: &[u8; 32]) -> F {
            neon!({
                let first = vreinterpretq_f16_u8(vld1q_u8(x.as_ptr()));
                let second = vreinterpretq_f16_u8(vld1q_u8(x.as_ptr().add(16)));
                [
                    vcvt_f32_f16(vget_low_f16(first)),
                    vcvt_high_f32_f16(first),
                    vcvt_f32_f16(vget_low_f16(second)),
                    vcvt_high_f32_f16(second),
                ]
            })
        }

        #[inline(always)]
        fn unsigned_bytes(self, x: &[u8; 16]) -> F {
            neon!({
                let x = vld1q_u8(x.as_ptr());
                let (first, second) = (vmovl_u8(vget_low_u8(x)), vmovl_high_u8(x));
                [
                    vcvtq_f32_u32(vmovl_u16(vget_low_u16(first))),
                    vcvtq_f32_u32(vmovl_high_u16(first)),
                    vcvtq_f32_u32(vmovl_u16(vget_low_u16(second))),
                    vcvtq_f32_u32(vmovl_high_u16(second)),
                ]
            })
        }

        #[inline(always)]
        fn signed_bytes(self, x: &[u8; 16]) -> F {
            neon!({
                let x = vreinterpretq_s8_u8(vld1q_u8(x.as_ptr()));
                let (first, second) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
                [
                    vcvtq_f32_s32(vmovl_s16(vget_low_s16(first))),
                    vcvtq_f32_s32(vmovl_high_s16(first)),
                    vcvtq_f32_s32(vmovl_s16(vget_low_s16(second))),
                    vcvtq_f32_s32(vmovl_high_s16(second)),
                ]
            })
        }

        #[inline(always)]
        fn mul(self, a: F, b: F) -> F {
            neon!([
                vmulq_f32(a[0], b[0]),
                vmulq_f32(a[1], b[1]),
                vmulq_f32(a[2], b[2]),
                vmulq_f32(a[3], b[3]),
            ])
        }

        #[inline(always)]
        fn fma(self, a: F, b: F, c: F) -> F {
            neon!([
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ])
        }
    };
}
pub(super) use shared_lanes;

/// Writes the weights of eight columns as they are, the bias taken off.
#[inline(always)]
pub(super) fn keep(w: [W; 2], bias: i32, to: &mut [[u8; 64]; 2]) {
    neon!({
        let bias = vdupq_n_u8(bias as u8);
        for (w, to) in w.into_iter().zip(to) {
            for (i, w) in w.into_iter().enumerate() {
                vst1q_u8(to.as_mut_ptr().add(16 * i), vsubq_u8(w, bias));
            }
        }
    });
}

/// Calls `$each::<T>` with one of the types that a panel does not tell apart from `$format`: bias and bits are gone
/// from it. So a table has four such functions, not one for each type.
macro_rules! for_panel {
    ($format:ident, $each:ident($($arg:expr),*)) => {{
        use $crate::kernels::tiles::{Format, Q4_0, Q4_1, Q6K, Q8_0};
        match (<$format as Format>::WIDE, <$format as Format>::SEGMENTS, <$format as Format>::MINS) {
            (true, ..) => $each::<Q8_0>($($arg),*),
            (_, 2, _) => $each::<Q6K>($($arg),*),
            (_, _, true) => $each::<Q4_1>($($arg),*),
            _ => $each::<Q4_0>($($arg),*),
        }
    }};
}
pub(super) use for_panel;
