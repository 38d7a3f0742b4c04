//! Tiles with nothing but NEON: Cortex-A53, A57, A72.
//!
//! Bytes are multiplied into 16 bits. Each sum of a row's products in four columns has a lane of its own, in
//! which eight products of at most 31 * 127, or four of at most 63 * 127, fit; they are added across at
//! the end of a segment.

use super::neon::Neon;
use super::rows16::{F, W, for_panel, keep, neon, shared_lanes};
use crate::kernels::tiles::{Format, Lanes, Panel, Quad, SIDE, multiply_each};
use core::arch::aarch64::*;

/// Sums on the way: in 16 bits for small weights, in 32 for others. Only one of the two is ever used.
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    narrow: [int16x8_t; 8],
    wide: [int32x4_t; 8],
}

impl Lanes for Neon {
    type W = W;
    type A = int8x16_t;
    type P = Sums;
    type F = F;

    shared_lanes!();

    #[inline(always)]
    fn start(self, _: i32) -> Sums {
        neon!(Sums { narrow: [vdupq_n_s16(0); 8], wide: [vdupq_n_s32(0); 8] })
    }

    #[inline(always)]
    fn dot<const LANE: i32>(self, mut p: Sums, w: W, a: int8x16_t) -> Sums {
        neon!({
            let a = vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(a)));
            for (i, w) in w.into_iter().enumerate() {
                let w = vreinterpretq_s8_u8(w);
                p.narrow[2 * i] = vmlal_s8(p.narrow[2 * i], vget_low_s8(w), vget_low_s8(a));
                p.narrow[2 * i + 1] = vmlal_high_s8(p.narrow[2 * i + 1], w, a);
            }
        });
        p
    }

    #[inline(always)]
    fn dot_wide<const LANE: i32>(self, mut p: Sums, w: W, a: int8x16_t) -> Sums {
        neon!({
            let a = vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(a)));
            for (i, w) in w.into_iter().enumerate() {
                let w = vreinterpretq_s8_u8(w);
                p.wide[2 * i] = vpadalq_s16(p.wide[2 * i], vmull_s8(vget_low_s8(w), vget_low_s8(a)));
                p.wide[2 * i + 1] = vpadalq_s16(p.wide[2 * i + 1], vmull_high_s8(w, a));
            }
        });
        p
    }

    #[inline(always)]
    fn finish(self, p: Sums, bias: i32) -> F {
        neon!({
            let sums = p.narrow.map(|sums| vpaddlq_s16(sums));
            self.finish_wide(Sums { wide: sums, ..p }, bias)
        })
    }

    #[inline(always)]
    fn finish_wide(self, p: Sums, bias: i32) -> F {
        neon!({
            let [a, b, c, d, e, f, g, h] = p.wide;
            let rows = [vpaddq_s32(a, b), vpaddq_s32(c, d), vpaddq_s32(e, f), vpaddq_s32(g, h)];
            let bias = vdupq_n_s32(bias);
            rows.map(|rows| vcvtq_f32_s32(vaddq_s32(rows, bias)))
        })
    }

    #[inline(always)]
    fn keep(self, w: [W; 2], bias: i32, to: &mut [[u8; 64]; 2]) {
        keep(w, bias, to);
    }

    #[inline(always)]
    fn multiply_quad<T: Format>(self, panel: &Panel, acts: Quad, out: [&mut [f32; 16]; SIDE]) {
        for_panel!(T, multiply(self, panel, acts, out));
    }
}

/// [`Lanes::multiply_quad`].
#[inline(never)]
fn multiply<T: Format>(s: Neon, panel: &Panel, acts: Quad, out: [&mut [f32; 16]; SIDE]) {
    multiply_each::<Neon, T>(s, panel, acts, out);
}
