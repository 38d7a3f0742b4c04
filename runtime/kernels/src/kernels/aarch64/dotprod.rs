//! The dot product extension (Armv8.2 FEAT_DotProd): Cortex-A55, A76, A78AE and later.
//!
//! `sdot` is not stable as an intrinsic, so it is written in assembly, one instruction at a time, for the
//! compiler to schedule.

use super::neon;
use super::rows16::{F, W, for_panel, keep, neon, shared_lanes};
use crate::kernels::dispatch::Kernels;
use crate::kernels::low_rank::{self, LowRank};
use crate::kernels::tiles::{self, Format, Lanes, Panel, Quad, SIDE};
use core::arch::aarch64::*;
use core::arch::asm;

/// Proof that the CPU has the dot product extension.
#[derive(Clone, Copy)]
pub(crate) struct Dotprod(());

impl Dotprod {
    /// # Safety
    /// The CPU must have the dot product extension.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        Self(())
    }

    /// Adds the products of four weights of each of four rows with lane `LANE` of the activations.
    #[inline(always)]
    pub(super) fn sdot<const LANE: i32>(self, mut sums: int32x4_t, w: uint8x16_t, a: int8x16_t) -> int32x4_t {
        // SAFETY: a `Dotprod` exists, so the CPU has the instruction; it touches no memory and no flags.
        unsafe {
            asm!(
                "sdot {sums:v}.4s, {w:v}.16b, {a:v}.4b[{lane}]",
                sums = inout(vreg) sums,
                w = in(vreg) w,
                a = in(vreg) a,
                lane = const LANE,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sums
    }

    /// Adds the products of eight rows, from row `8 * half` on, with four tokens.
    #[inline(always)]
    fn eight_rows<T: Format>(self, panel: &Panel, acts: Quad, half: usize, out: &mut [&mut [f32; 16]; SIDE]) {
        neon!({
            let at = |out: &[f32; 16], i: usize| out.as_ptr().add(8 * half + 4 * i);
            let mut sums = [[vdupq_n_f32(0.0); 2]; SIDE];
            for (sums, out) in sums.iter_mut().zip(out.iter()) {
                *sums = [vld1q_f32(at(out, 0)), vld1q_f32(at(out, 1))];
            }
            let weights = panel.weights[..panel.blocks].iter().zip(&panel.scales).zip(&panel.mins);
            let numbers = acts.scales.iter().zip(acts.sums);
            for ((((weights, scales), mins), quants), (scale_a, sum_a)) in
                weights.zip(acts.quants).zip(numbers)
            {
                let scale_a = vld1q_f32(scale_a.as_ptr());
                for segment in 0..T::SEGMENTS {
                    let pairs = 4 / T::SEGMENTS;
                    let mut p = [[vdupq_n_s32(0); 2]; SIDE];
                    for pair in segment * pairs..(segment + 1) * pairs {
                        let a = quants[pair].as_ptr();
                        let (a01, a23) = (vld1q_s8(a), vld1q_s8(a.add(16)));
                        let [even, odd] = &weights[pair];
                        for i in 0..2 {
                            let even = vld1q_u8(even.as_ptr().add(32 * half + 16 * i));
                            let odd = vld1q_u8(odd.as_ptr().add(32 * half + 16 * i));
                            p[0][i] = self.sdot::<1>(self.sdot::<0>(p[0][i], even, a01), odd, a01);
                            p[1][i] = self.sdot::<3>(self.sdot::<2>(p[1][i], even, a01), odd, a01);
                            p[2][i] = self.sdot::<1>(self.sdot::<0>(p[2][i], even, a23), odd, a23);
                            p[3][i] = self.sdot::<3>(self.sdot::<2>(p[3][i], even, a23), odd, a23);
                        }
                    }
                    let scale = scales[segment].as_ptr().add(8 * half);
                    for i in 0..2 {
                        let scale = vld1q_f32(scale.add(4 * i));
                        let scales = [
                            vmulq_laneq_f32::<0>(scale, scale_a),
                            vmulq_laneq_f32::<1>(scale, scale_a),
                            vmulq_laneq_f32::<2>(scale, scale_a),
                            vmulq_laneq_f32::<3>(scale, scale_a),
                        ];
                        for token in 0..SIDE {
                            let integers = vcvtq_f32_s32(p[token][i]);
                            sums[token][i] = vfmaq_f32(sums[token][i], integers, scales[token]);
                        }
                    }
                }
                if T::MINS {
                    let sum_a = vmulq_f32(vcvtq_f32_s32(vld1q_s32(sum_a.as_ptr().cast())), scale_a);
                    for i in 0..2 {
                        let min = vld1q_f32(mins.as_ptr().add(8 * half + 4 * i));
                        sums[0][i] = vfmaq_laneq_f32::<0>(sums[0][i], min, sum_a);
                        sums[1][i] = vfmaq_laneq_f32::<1>(sums[1][i], min, sum_a);
                        sums[2][i] = vfmaq_laneq_f32::<2>(sums[2][i], min, sum_a);
                        sums[3][i] = vfmaq_laneq_f32::<3>(sums[3][i], min, sum_a);
                    }
                }
            }
            for (sums, out) in sums.into_iter().zip(out) {
                vst1q_f32(out.as_mut_ptr().add(8 * half), sums[0]);
                vst1q_f32(out.as_mut_ptr().add(8 * half + 4), sums[1]);
            }
        });
    }
}

impl Lanes for Dotprod {
    type W = W;
    type A = int8x16_t;
    type P = [int32x4_t; 4];
    type F = F;

    shared_lanes!();

    #[inline(always)]
    fn start(self, bias: i32) -> [int32x4_t; 4] {
        neon!([vdupq_n_s32(bias); 4])
    }

    #[inline(always)]
    fn dot<const LANE: i32>(self, p: [int32x4_t; 4], w: W, a: int8x16_t) -> [int32x4_t; 4] {
        [
            self.sdot::<LANE>(p[0], w[0], a),
            self.sdot::<LANE>(p[1], w[1], a),
            self.sdot::<LANE>(p[2], w[2], a),
            self.sdot::<LANE>(p[3], w[3], a),
        ]
    }

    #[inline(always)]
    fn finish(self, p: [int32x4_t; 4], _: i32) -> F {
        p.map(|p| neon!(vcvtq_f32_s32(p)))
    }

    #[inline(always)]
    fn keep(self, w: [W; 2], bias: i32, to: &mut [[u8; 64]; 2]) {
        keep(w, bias, to);
    }

    #[inline(always)]
    fn multiply_quad<T: Format>(self, panel: &Panel, acts: Quad, out: [&mut [f32; 16]; SIDE]) {
        // SAFETY: a token exists, so the CPU has the extension.
        unsafe { for_panel!(T, multiply(self, panel, acts, out)) }
    }
}

/// [`Lanes::multiply_quad`].
#[inline(never)]
#[target_feature(enable = "dotprod")]
fn multiply<T: Format>(s: Dotprod, panel: &Panel, acts: Quad, mut out: [&mut [f32; 16]; SIDE]) {
    for half in 0..2 {
        s.eight_rows::<T>(panel, acts, half, &mut out);
    }
}

crate::kernels::table::tile_tables! {
    [
        // SAFETY: these functions are compiled for the dot product extension, so whoever calls one has promised it.
        unsafe { Dotprod::assume() },
        #[target_feature(enable = "dotprod")]
    ]
    ONE_TOKEN MULTIPLY
}

crate::kernels::table::entries! {
    [
        // SAFETY: as above.
        unsafe { Dotprod::assume() },
        #[target_feature(enable = "dotprod")]
    ]
    fn add_integers(b: &LowRank, u: &[f32], y: &mut [f32]) = low_rank::add_integers;
}

/// The kernels for quantized weights in tiles.
static TILES: tiles::TileKernels =
    tiles::TileKernels { one_token: &ONE_TOKEN, fill: &neon::FILL, multiply: &MULTIPLY, wide: None };

/// The kernels of this instruction set: those of NEON, and tiles.
pub(crate) static TABLE: Kernels = Kernels { name: "dotprod", tiles: &TILES, add_integers, ..neon::TABLE };
