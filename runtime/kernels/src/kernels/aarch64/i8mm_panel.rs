//! Prefill's innermost loops for types with one scale a block and no minimum: eight rows times four tokens, the rows'
//! first half, then the other.
//!
//! Written in assembly because they need all 32 registers. Each two by two sums (rows 2i and 2i + 1, two tokens) take
//! eight instructions a block that nothing can save: four products, and clearing, converting, scaling and adding what
//! they sum up to. For all eight of them there are eight loads, most of 64 bytes, besides, and two instructions of the
//! loop. Wide activations ([`TileKernels::wide`](crate::kernels::tiles::TileKernels::wide)) take six and two
//! thirds, and of the loop two a run.

use super::rows16::neon;
use crate::format::TILE_ROWS as ROWS;
use crate::kernels::output::Strip;
use crate::kernels::tiles::{Panel, Quad, Quads, RUN, SIDE};
use core::arch::aarch64::*;
use core::arch::asm;

/// Eight columns of the four pairs of rows in v28 to v31 times those of the two pairs of tokens in `$a` and `$b`.
macro_rules! octet {
    ($a:literal, $b:literal) => {
        concat!(
            "ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{weights}], {octet}\n",
            "smmla v16.4s, v28.16b, ",
            $a,
            ".16b\n",
            "smmla v17.4s, v28.16b, ",
            $b,
            ".16b\n",
            "smmla v18.4s, v29.16b, ",
            $a,
            ".16b\n",
            "smmla v19.4s, v29.16b, ",
            $b,
            ".16b\n",
            "smmla v20.4s, v30.16b, ",
            $a,
            ".16b\n",
            "smmla v21.4s, v30.16b, ",
            $b,
            ".16b\n",
            "smmla v22.4s, v31.16b, ",
            $a,
            ".16b\n",
            "smmla v23.4s, v31.16b, ",
            $b,
            ".16b\n",
        )
    };
}

/// Two pairs of rows with the scales `$r` and `$s`, the integers from `$p` on: adds them to the sums `$sum`. The
/// tokens' scales are in v24 and v25.
macro_rules! add {
    ($r:literal, $s:literal, [$($p:literal)*], [$a:literal $b:literal $c:literal $d:literal]) => {
        concat!(
            $("scvtf v", $p, ".4s, v", $p, ".4s\n",)*
            "fmul v26.4s, ", $r, ".4s, v24.4s\n",
            "fmul ", $r, ".4s, ", $r, ".4s, v25.4s\n",
            "fmul v27.4s, ", $s, ".4s, v24.4s\n",
            "fmul ", $s, ".4s, ", $s, ".4s, v25.4s\n",
            add!(@ $a, "v26", [$($p)*] 0), add!(@ $b, $r, [$($p)*] 1),
            add!(@ $c, "v27", [$($p)*] 2), add!(@ $d, $s, [$($p)*] 3),
        )
    };
    (@ $sum:literal, $scale:literal, [$p:literal $q:literal $r:literal $s:literal] 0) => {
        concat!("fmla ", $sum, ".4s, v", $p, ".4s, ", $scale, ".4s\n")
    };
    (@ $sum:literal, $scale:literal, [$p:literal $q:literal $r:literal $s:literal] 1) => {
        concat!("fmla ", $sum, ".4s, v", $q, ".4s, ", $scale, ".4s\n")
    };
    (@ $sum:literal, $scale:literal, [$p:literal $q:literal $r:literal $s:literal] 2) => {
        concat!("fmla ", $sum, ".4s, v", $r, ".4s, ", $scale, ".4s\n")
    };
    (@ $sum:literal, $scale:literal, [$p:literal $q:literal $r:literal $s:literal] 3) => {
        concat!("fmla ", $sum, ".4s, v", $s, ".4s, ", $scale, ".4s\n")
    };
}

/// Clears the integers.
macro_rules! clear {
    () => {
        concat!(
            "movi v16.4s, #0\n",
            "movi v17.4s, #0\n",
            "movi v18.4s, #0\n",
            "movi v19.4s, #0\n",
            "movi v20.4s, #0\n",
            "movi v21.4s, #0\n",
            "movi v22.4s, #0\n",
            "movi v23.4s, #0\n",
        )
    };
}

/// Adds the products of a block to the integers.
macro_rules! products {
    () => {
        concat!(
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{acts}], #64\n",
            octet!("v24", "v25"),
            octet!("v26", "v27"),
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{acts}], #64\n",
            octet!("v24", "v25"),
            octet!("v26", "v27"),
        )
    };
}

/// A block of eight rows of wide activations: the integers of the run in v16 to v23 go on, and `$add` adds them, times
/// what the rows' scales have more than the next block's, to the run's sums in v8 to v15.
macro_rules! wide_block {
    ($add:literal) => {
        concat!(
            products!(),
            "ld1 {{v28.4s, v29.4s, v30.4s, v31.4s}}, [{rows}], {next}\n",
            "scvtf v24.4s, v16.4s\n",
            "scvtf v25.4s, v17.4s\n",
            "scvtf v26.4s, v18.4s\n",
            "scvtf v27.4s, v19.4s\n",
            $add,
            " v8.4s, v24.4s, v28.4s\n",
            $add,
            " v9.4s, v25.4s, v28.4s\n",
            $add,
            " v10.4s, v26.4s, v29.4s\n",
            $add,
            " v11.4s, v27.4s, v29.4s\n",
            "scvtf v24.4s, v20.4s\n",
            "scvtf v25.4s, v21.4s\n",
            "scvtf v26.4s, v22.4s\n",
            "scvtf v27.4s, v23.4s\n",
            $add,
            " v12.4s, v24.4s, v30.4s\n",
            $add,
            " v13.4s, v25.4s, v30.4s\n",
            $add,
            " v14.4s, v26.4s, v31.4s\n",
            $add,
            " v15.4s, v27.4s, v31.4s\n",
        )
    };
}

/// Sums of eight rows and four tokens: rows `2i` and `2i + 1` of tokens `2j` and `2j + 1` are at `2i + j`.
type Sums = [float32x4_t; 8];

/// Adds the products of eight rows of a panel, the first or the second ones, with four tokens of wide activations.
///
/// # Safety
/// The CPU must have FEAT_I8MM, and the activations as many blocks as the panel.
#[inline(always)]
unsafe fn add_wide_products(panel: &Panel, half: usize, Quad { quants, scales, .. }: Quad, sums: &mut Sums) {
    const { assert!(RUN == 3) }
    debug_assert!(half < 2 && quants.len() == panel.blocks && scales.len() == panel.blocks);
    let [a, b, c, d, e, f, g, h] = sums;
    // SAFETY: a block reads 64 bytes of each of its four octets of weights, which are 128 bytes apart, 128 bytes
    // of activations, and 64 of the 256 bytes that scales of rows have; a run, besides, 16 bytes of its first block's
    // scales of tokens. Whole runs come first, then the one or two blocks that are left. Panel and activations have
    // `blocks` of each. Nothing is written but the registers named.
    unsafe {
        asm!(
            "subs {left}, {left}, #3",
            "b.lo 5f",
            "2:",
            clear!(),
            wide_block!("fmul"),
            "3:",
            wide_block!("fmla"),
            "4:",
            wide_block!("fmla"),
            "ld2r {{v24.2d, v25.2d}}, [{tokens}], {run}",
            "fmla v0.4s, v8.4s, v24.4s", "fmla v1.4s, v9.4s, v25.4s",
            "fmla v2.4s, v10.4s, v24.4s", "fmla v3.4s, v11.4s, v25.4s",
            "fmla v4.4s, v12.4s, v24.4s", "fmla v5.4s, v13.4s, v25.4s",
            "fmla v6.4s, v14.4s, v24.4s", "fmla v7.4s, v15.4s, v25.4s",
            "subs {left}, {left}, #3",
            "b.hs 2b",
            "5:",
            "adds {left}, {left}, #3",
            "b.eq 6f",
            clear!(),
            "movi v8.4s, #0", "movi v9.4s, #0", "movi v10.4s, #0", "movi v11.4s, #0",
            "movi v12.4s, #0", "movi v13.4s, #0", "movi v14.4s, #0", "movi v15.4s, #0",
            "cmp {left}, #1",
            "mov {left}, #0",
            "b.eq 4b",
            "b 3b",
            "6:",
            left = inout(reg) panel.blocks => _,
            weights = inout(reg) panel.weights.as_ptr().cast::<u8>().add(64 * half) => _,
            octet = in(reg) 128usize,
            acts = inout(reg) quants.as_ptr() => _,
            rows = inout(reg) panel.scales.as_ptr().cast::<f32>().add(ROWS * half) => _,
            next = in(reg) 256usize,
            tokens = inout(reg) scales.as_ptr() => _,
            run = in(reg) 16 * RUN,
            inout("v0") *a, inout("v1") *b, inout("v2") *c, inout("v3") *d,
            inout("v4") *e, inout("v5") *f, inout("v6") *g, inout("v7") *h,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _,
            out("v12") _, out("v13") _, out("v14") _, out("v15") _,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _,
            out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            options(nostack, readonly),
        );
    }
}

/// Adds the products of eight rows of a panel, the first or the second ones, with four tokens.
///
/// # Safety
/// As [`add_wide_products`]; the panel must have at least one block.
#[inline(always)]
unsafe fn add_products(panel: &Panel, half: usize, Quad { quants, scales, .. }: Quad, sums: &mut Sums) {
    debug_assert!(panel.blocks > 0 && half < 2);
    debug_assert!(quants.len() == panel.blocks && scales.len() == panel.blocks);
    let [a, b, c, d, e, f, g, h] = sums;
    // SAFETY: each round reads the next block: 64 bytes of each of its four octets of weights, which are 128 bytes
    // apart, 128 bytes of activations, 64 of the 256 bytes that scales of rows have, 16 bytes of scales of tokens.
    // Panel and activations have `blocks` of each. Nothing is written but the registers named.
    unsafe {
        asm!(
            "2:",
            clear!(),
            products!(),
            "ld2r {{v24.2d, v25.2d}}, [{tokens}], #16",
            "ld1 {{v28.4s, v29.4s, v30.4s, v31.4s}}, [{rows}], {next}",
            add!("v28", "v29", [16 17 18 19], ["v0" "v1" "v2" "v3"]),
            add!("v30", "v31", [20 21 22 23], ["v4" "v5" "v6" "v7"]),
            "subs {blocks}, {blocks}, #1",
            "b.gt 2b",
            blocks = inout(reg) panel.blocks => _,
            weights = inout(reg) panel.weights.as_ptr().cast::<u8>().add(64 * half) => _,
            octet = in(reg) 128usize,
            acts = inout(reg) quants.as_ptr() => _,
            rows = inout(reg) panel.scales.as_ptr().cast::<f32>().add(ROWS * half) => _,
            next = in(reg) 256usize,
            tokens = inout(reg) scales.as_ptr() => _,
            inout("v0") *a, inout("v1") *b, inout("v2") *c, inout("v3") *d,
            inout("v4") *e, inout("v5") *f, inout("v6") *g, inout("v7") *h,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _,
            out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            options(nostack, readonly),
        );
    }
}

/// [`Multiply`](crate::kernels::tiles::Multiply).
#[target_feature(enable = "i8mm")]
pub(super) fn multiply(panel: &Panel, acts: Quad, mut out: [&mut [f32; ROWS]; SIDE]) {
    if panel.blocks > 0 {
        eight_rows(panel, acts, &mut out, 0);
        eight_rows(panel, acts, &mut out, 1);
    }
}

/// The first or the second eight rows of a panel that has a block.
#[inline(never)]
#[target_feature(enable = "i8mm")]
fn eight_rows(panel: &Panel, acts: Quad, out: &mut [&mut [f32; ROWS]; SIDE], half: usize) {
    let mut sums = neon!([vdupq_n_f32(0.0); 8]);
    load(out, half, &mut sums);
    // SAFETY: this function is compiled for the instructions; the panel has a block, and whoever multiplies gives as many
    // of the activations.
    unsafe { add_products(panel, half, acts, &mut sums) }
    store(&sums, out, half);
}

/// [`MultiplyWide`](crate::kernels::tiles::MultiplyWide).
#[target_feature(enable = "i8mm")]
pub(super) fn multiply_wide(panel: &Panel, acts: Quads, mut out: Strip<ROWS>) {
    eight_rows_wide(panel, &acts, &mut out, 0);
    eight_rows_wide(panel, &acts, &mut out, 1);
}

/// The first or the second eight rows of a wide panel.
#[inline(never)]
#[target_feature(enable = "i8mm")]
fn eight_rows_wide(panel: &Panel, acts: &Quads, out: &mut Strip<ROWS>, half: usize) {
    for (index, acts) in acts.iter().enumerate() {
        let Some(mut out) = out.tokens_mut(index * SIDE) else { return };
        let mut sums = neon!([vdupq_n_f32(0.0); 8]);
        if !panel.first {
            load(&out, half, &mut sums);
        }
        // SAFETY: this function is compiled for the instructions, and whoever multiplies gives as many blocks of the
        // activations as the panel has.
        unsafe { add_wide_products(panel, half, acts, &mut sums) }
        store(&sums, &mut out, half);
    }
}

#[inline(always)]
fn load(from: &[&mut [f32; ROWS]; SIDE], half: usize, sums: &mut Sums) {
    for j in 0..2 {
        let [even, odd] = [2 * j, 2 * j + 1].map(|token| &from[token].as_chunks::<4>().0[2 * half..][..2]);
        for i in 0..2 {
            neon!({
                let (even, odd) = (vld1q_f32(even[i].as_ptr()), vld1q_f32(odd[i].as_ptr()));
                sums[4 * i + j] = vzip1q_f32(even, odd);
                sums[4 * i + 2 + j] = vzip2q_f32(even, odd);
            });
        }
    }
}

#[inline(always)]
fn store(sums: &Sums, to: &mut [&mut [f32; ROWS]; SIDE], half: usize) {
    for token in 0..SIDE {
        let to = &mut to[token].as_chunks_mut::<4>().0[2 * half..][..2];
        for (i, to) in to.iter_mut().enumerate() {
            let (first, second) = (sums[4 * i + token / 2], sums[4 * i + 2 + token / 2]);
            neon!({
                let pair = if token % 2 == 0 { vuzp1q_f32(first, second) } else { vuzp2q_f32(first, second) };
                vst1q_f32(to.as_mut_ptr(), pair);
            });
        }
    }
}
