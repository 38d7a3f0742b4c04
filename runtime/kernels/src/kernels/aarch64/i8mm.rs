//! Integer matrix multiplication (Armv8.6 FEAT_I8MM) beside the dot product extension: Cortex-A510, A710,
//! X2, Neoverse V1, N2 and later.
//!
//! Decode is the dot product's; prefill multiplies eight columns of two rows with those of two tokens in one
//! instruction.

use super::neon::Neon;
use super::rows16::neon;
use super::{dotprod, i8mm, i8mm_panel, neon};
use crate::format::DType;
use crate::kernels::dispatch::Kernels;
use crate::kernels::tiles::{self, AnyShare, Format, Lanes, Panel, Q4_0, Q4_1, Q6K, Quad, RUN, SIDE, shares};
use core::arch::aarch64::*;
use core::arch::asm;

/// Proof that the CPU has both extensions.
#[derive(Clone, Copy)]
struct I8mm(());

impl I8mm {
    /// # Safety
    /// The CPU must have the dot product and the integer matrix multiplication extension.
    #[inline(always)]
    unsafe fn assume() -> Self {
        Self(())
    }

    /// Adds `w a^T` to `sums`, all two by two: the weights of two rows and the activations of two tokens.
    #[inline(always)]
    fn smmla(self, mut sums: int32x4_t, w: uint8x16_t, a: int8x16_t) -> int32x4_t {
        // SAFETY: an `I8mm` exists, so the CPU has the instruction; it touches no memory and no flags.
        unsafe {
            asm!(
                "smmla {sums:v}.4s, {w:v}.16b, {a:v}.16b",
                sums = inout(vreg) sums,
                w = in(vreg) w,
                a = in(vreg) a,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        sums
    }

    /// Adds the products of eight rows, from row `8 * half` on, with four tokens.
    #[inline(always)]
    fn eight_rows<T: Format>(self, panel: &Panel, acts: Quad, half: usize, out: &mut [&mut [f32; 16]; SIDE]) {
        neon!({
            // sums[i][j] has rows 2i and 2i + 1 of tokens 2j and 2j + 1: [row, token] = 00, 01, 10, 11.
            let mut sums = [[vdupq_n_f32(0.0); 2]; 4];
            for i in 0..2 {
                for j in 0..2 {
                    let even = vld1q_f32(out[2 * j].as_ptr().add(8 * half + 4 * i));
                    let odd = vld1q_f32(out[2 * j + 1].as_ptr().add(8 * half + 4 * i));
                    sums[2 * i][j] = vzip1q_f32(even, odd);
                    sums[2 * i + 1][j] = vzip2q_f32(even, odd);
                }
            }
            let weights = panel.weights[..panel.blocks].iter().zip(&panel.scales).zip(&panel.mins);
            let numbers = acts.scales.iter().zip(acts.sums);
            for ((((weights, scales), mins), quants), (scale_a, sum_a)) in
                weights.zip(acts.quants).zip(numbers)
            {
                let scale_a = vld1q_f32(scale_a.as_ptr());
                let tokens = pairs(scale_a);
                for segment in 0..T::SEGMENTS {
                    let octets = 4 / T::SEGMENTS;
                    let mut p = [[vdupq_n_s32(0); 2]; 4];
                    for octet in (segment * octets..(segment + 1) * octets).step_by(2) {
                        let a = vld1q_s8_x4(quants[octet].as_ptr());
                        // `arrange` put the eight pairs of rows one after another.
                        let w = [octet, octet + 1].map(|octet| vld1q_u8_x4(weights[octet][half].as_ptr()));
                        for (w, a) in [(w[0], [a.0, a.1]), (w[1], [a.2, a.3])] {
                            for (i, w) in [w.0, w.1, w.2, w.3].into_iter().enumerate() {
                                p[i][0] = self.smmla(p[i][0], w, a[0]);
                                p[i][1] = self.smmla(p[i][1], w, a[1]);
                            }
                        }
                    }
                    let rows = vld1q_f32_x4(scales[segment].as_ptr().add(16 * half));
                    for (i, rows) in [rows.0, rows.1, rows.2, rows.3].into_iter().enumerate() {
                        for j in 0..2 {
                            let integers = vcvtq_f32_s32(p[i][j]);
                            sums[i][j] = vfmaq_f32(sums[i][j], integers, vmulq_f32(rows, tokens[j]));
                        }
                    }
                }
                if T::MINS {
                    let tokens = pairs(vmulq_f32(vcvtq_f32_s32(vld1q_s32(sum_a.as_ptr().cast())), scale_a));
                    for i in 0..2 {
                        let rows = vld1q_f32(mins.as_ptr().add(8 * half + 4 * i));
                        for (k, rows) in
                            [vzip1q_f32(rows, rows), vzip2q_f32(rows, rows)].into_iter().enumerate()
                        {
                            for j in 0..2 {
                                sums[2 * i + k][j] = vfmaq_f32(sums[2 * i + k][j], rows, tokens[j]);
                            }
                        }
                    }
                }
            }
            for i in 0..2 {
                for j in 0..2 {
                    let (first, second) = (sums[2 * i][j], sums[2 * i + 1][j]);
                    vst1q_f32(out[2 * j].as_mut_ptr().add(8 * half + 4 * i), vuzp1q_f32(first, second));
                    vst1q_f32(out[2 * j + 1].as_mut_ptr().add(8 * half + 4 * i), vuzp2q_f32(first, second));
                }
            }
        });
    }
}

/// Numbers of four tokens as those of the first two, twice, and of the last two, twice.
#[inline(always)]
fn pairs(x: float32x4_t) -> [float32x4_t; 2] {
    neon!([vcombine_f32(vget_low_f32(x), vget_low_f32(x)), vcombine_f32(vget_high_f32(x), vget_high_f32(x))])
}

/// [`tiles::Fill`] of NEON, arranged for [`I8mm::eight_rows`].
#[inline(always)]
fn fill<T: Format>(_: I8mm, panel: &mut Panel, tile: &[u8], first: usize, count: usize) {
    if matches!(T::DTYPE, DType::Q4_0) {
        return fill_q4_0(panel, tile, first, count);
    }
    if let Some(fill) = neon::FILL.of(T::DTYPE) {
        // SAFETY: NEON belongs to the baseline.
        unsafe { fill(panel, tile, first, count) }
        arrange(panel);
        arrange_scales(panel, T::SEGMENTS == 2);
    }
}

/// [`fill`] for the most common type, whose weights lie in pairs of rows before they are unpacked: half the work.
fn fill_q4_0(panel: &mut Panel, tile: &[u8], first: usize, count: usize) {
    panel.blocks = count;
    let shares = &shares::<Q4_0>(tile)[first / 2..];
    let (weights, scales) = (panel.weights.as_chunks_mut::<2>().0, panel.scales.as_chunks_mut::<2>().0);
    for ((share, weights), to) in shares.iter().zip(weights).zip(scales).take(count.div_ceil(2)) {
        for (i, [a, b, c, d]) in weights.iter_mut().enumerate() {
            let [even, odd, third, fourth] = share.quants(i) else { return };
            unpack(even, odd, a, c);
            unpack(third, fourth, b, d);
        }
        for (halves, [to, _]) in share.factors().as_chunks().0.iter().zip(to) {
            if let Some(to) = to.first_chunk_mut() {
                Neon.store(Neon.halves(halves), to);
            }
        }
    }
    arrange_scales(panel, false);
}

/// Two vectors of nibbles: the low ones are the weights of eight columns, the high ones those of eight others.
#[inline(always)]
fn unpack(even: &[u8; 64], odd: &[u8; 64], low: &mut [[u8; 64]; 2], high: &mut [[u8; 64]; 2]) {
    neon!({
        let (even, odd) = (vld1q_u8_x4(even.as_ptr()), vld1q_u8_x4(odd.as_ptr()));
        let (a, b) = (pairs_of_rows(even.0, odd.0), pairs_of_rows(even.1, odd.1));
        let (c, d) = (pairs_of_rows(even.2, odd.2), pairs_of_rows(even.3, odd.3));
        let bias = vdupq_n_u8(Q4_0::BIAS as u8);
        for (i, w) in [[a, b], [c, d]].into_iter().enumerate() {
            let low_bits = |w| vsubq_u8(vandq_u8(w, vdupq_n_u8(15)), bias);
            let high_bits = |w| vsubq_u8(vshrq_n_u8::<4>(w), bias);
            let [(a, b), (c, d)] = w;
            let four = uint8x16x4_t(low_bits(a), low_bits(b), low_bits(c), low_bits(d));
            vst1q_u8_x4(low[i].as_mut_ptr(), four);
            let four = uint8x16x4_t(high_bits(a), high_bits(b), high_bits(c), high_bits(d));
            vst1q_u8_x4(high[i].as_mut_ptr(), four);
        }
    });
}

/// Four columns of four rows each, and four more of them, as eight columns of two rows and of two more.
#[inline(always)]
fn pairs_of_rows(even: uint8x16_t, odd: uint8x16_t) -> (uint8x16_t, uint8x16_t) {
    neon!({
        let (even, odd) = (vreinterpretq_u32_u8(even), vreinterpretq_u32_u8(odd));
        (vreinterpretq_u8_u32(vzip1q_u32(even, odd)), vreinterpretq_u8_u32(vzip2q_u32(even, odd)))
    })
}

/// Weights: eight columns of rows 0 and 1, of rows 2 and 3, and so on.
#[inline(never)]
fn arrange(panel: &mut Panel) {
    let blocks = panel.blocks;
    for weights in panel.weights[..blocks].as_flattened_mut() {
        neon!({
            let to = weights.as_flattened_mut().as_mut_ptr();
            let (even, odd) = (vld1q_u8_x4(to), vld1q_u8_x4(to.add(64)));
            let (a, b) = (pairs_of_rows(even.0, odd.0), pairs_of_rows(even.1, odd.1));
            let (c, d) = (pairs_of_rows(even.2, odd.2), pairs_of_rows(even.3, odd.3));
            vst1q_u8_x4(to, uint8x16x4_t(a.0, a.1, b.0, b.1));
            vst1q_u8_x4(to.add(64), uint8x16x4_t(c.0, c.1, d.0, d.1));
        });
    }
}

/// Scales: those of rows 0, 0, 1, 1, then of 2, 2, 3, 3, and so on; in a wide panel what they have more than those of
/// the run's next block (see [`tiles::TileKernels::wide`]).
#[inline(never)]
fn arrange_scales(panel: &mut Panel, segments: bool) {
    let (blocks, wide, mut block) = (panel.blocks, panel.wide, 0usize);
    let mut rest = &mut panel.scales[..blocks];
    while let Some(([first, second], behind)) = rest.split_first_mut() {
        block += 1;
        if let (true, false, Some([next, _])) = (wide, block.is_multiple_of(RUN), behind.first()) {
            neon!({
                let (a, b) = (vld1q_f32_x4(first.as_ptr()), vld1q_f32_x4(next.as_ptr()));
                let (c, d) = (vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1));
                let more = float32x4x4_t(c, d, vsubq_f32(a.2, b.2), vsubq_f32(a.3, b.3));
                vst1q_f32_x4(first.as_mut_ptr(), more);
            });
        }
        twice(first);
        if segments {
            twice(second);
        }
        rest = behind;
    }
}

/// The first sixteen numbers, each twice.
#[inline(always)]
fn twice(to: &mut [f32; 32]) {
    neon!({
        let rows = vld1q_f32_x4(to.as_ptr());
        let pairs = |x| (vzip1q_f32(x, x), vzip2q_f32(x, x));
        let (a, b, c, d) = (pairs(rows.0), pairs(rows.1), pairs(rows.2), pairs(rows.3));
        vst1q_f32_x4(to.as_mut_ptr(), float32x4x4_t(a.0, a.1, b.0, b.1));
        vst1q_f32_x4(to.as_mut_ptr().add(16), float32x4x4_t(c.0, c.1, d.0, d.1));
    });
}

/// [`tiles::Multiply`].
#[inline(always)]
fn multiply<T: Format>(s: I8mm, panel: &Panel, acts: Quad, out: [&mut [f32; 16]; SIDE]) {
    // SAFETY: a token exists, so the CPU has both extensions.
    unsafe {
        match (T::SEGMENTS, T::MINS) {
            (1, false) => i8mm_panel::multiply(panel, acts, out),
            (1, true) => multiply_panel::<Q4_1>(s, panel, acts, out),
            _ => multiply_panel::<Q6K>(s, panel, acts, out),
        }
    }
}

/// [`multiply`] for types with a minimum or two scales a block, once for all of each kind.
#[inline(never)]
#[target_feature(enable = "dotprod,i8mm")]
fn multiply_panel<T: Format>(s: I8mm, panel: &Panel, acts: Quad, mut out: [&mut [f32; 16]; SIDE]) {
    for half in 0..2 {
        s.eight_rows::<T>(panel, acts, half, &mut out);
    }
}

crate::kernels::table::block_entries! {
    [
        // SAFETY: these functions are compiled for both extensions, so whoever calls one has promised them.
        unsafe { I8mm::assume() },
        #[target_feature(enable = "dotprod,i8mm")]
    ]
    /// Unpacks weights for many tokens.
    static FILL: fn(panel: &mut Panel, tile: &[u8], first: usize, count: usize) = i8mm::fill, tiles;
}

crate::kernels::table::block_entries! {
    [
        // SAFETY: as above.
        unsafe { I8mm::assume() },
        #[target_feature(enable = "dotprod,i8mm")]
    ]
    /// Products of unpacked weights with four tokens.
    static MULTIPLY: fn(panel: &Panel, x: Quad, out: [&mut [f32; 16]; 4]) = i8mm::multiply, tiles;
}

/// The kernels for quantized weights in tiles.
static TILES: tiles::TileKernels = tiles::TileKernels {
    one_token: &dotprod::ONE_TOKEN,
    fill: &FILL,
    multiply: &MULTIPLY,
    wide: Some(i8mm_panel::multiply_wide),
};

/// The kernels of this instruction set: those of NEON, and tiles.
pub(crate) static TABLE: Kernels =
    Kernels { name: "i8mm", tiles: &TILES, add_integers: dotprod::TABLE.add_integers, ..neon::TABLE };
