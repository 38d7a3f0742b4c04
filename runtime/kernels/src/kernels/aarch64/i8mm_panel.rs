//! Prefill's innermost loop for types with one scale a block and no minimum: sixteen rows times four tokens.
//!
//! Written in assembly because it needs all 32 registers: 16 of sums, 8 of integers on the way, 4 of weights and
//! 4 of activations. Each two by two sums (rows 2i and 2i + 1, two tokens) take eight instructions a block that
//! nothing can save: four products, and clearing, converting, scaling and adding what they sum up to. For all
//! sixteen of them there are sixteen loads, most of 64 bytes, besides, and one instruction of the loop: 145 a block,
//! where the compiler makes 174, mostly to compute addresses.

use super::rows16::neon;
use crate::format::TILE_ROWS as ROWS;
use crate::kernels::tiles::{Panel, Quad, SIDE};
use core::arch::aarch64::*;
use core::arch::asm;

/// Eight columns of the four pairs of rows in v28 to v31 times those of the two pairs of tokens in `$a` and `$b`.
macro_rules! octet {
    ($weights:literal, $a:literal, $b:literal) => {
        concat!(
            "ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{",
            $weights,
            "}], {octet}\n",
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

/// A block of eight rows, whose sums are `$first` and `$second`: activations and tokens' scales move on by
/// `$acts` and `$tokens`, rows' scales by `$rows`.
macro_rules! eight_rows {
    ($weights:literal, $acts:literal, $tokens:literal, $rows:literal, $first:tt, $second:tt) => {
        concat!(
            "movi v16.4s, #0\n", "movi v17.4s, #0\n", "movi v18.4s, #0\n", "movi v19.4s, #0\n",
            "movi v20.4s, #0\n", "movi v21.4s, #0\n", "movi v22.4s, #0\n", "movi v23.4s, #0\n",
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{acts}], #64\n",
            octet!($weights, "v24", "v25"),
            octet!($weights, "v26", "v27"),
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{acts}], ", $acts, "\n",
            octet!($weights, "v24", "v25"),
            octet!($weights, "v26", "v27"),
            "ld2r {{v24.2d, v25.2d}}, [{tokens}]", $tokens, "\n",
            "ld1 {{v28.4s, v29.4s, v30.4s, v31.4s}}, [{rows}], ", $rows, "\n",
            add!("v28", "v29", [16 17 18 19], $first),
            add!("v30", "v31", [20 21 22 23], $second),
        )
    };
}

/// A block of sixteen rows.
macro_rules! block {
    () => {
        concat!(
            eight_rows!("first", "{back}", "", "#64", ["v0" "v1" "v2" "v3"], ["v4" "v5" "v6" "v7"]),
            eight_rows!(
                "second", "#64", ", #16", "{next}", ["v8" "v9" "v10" "v11"], ["v12" "v13" "v14" "v15"]
            ),
        )
    };
}

/// Sums of sixteen rows and four tokens: rows `2i` and `2i + 1` of tokens `2j` and `2j + 1` are at `2i + j`.
type Sums = [float32x4_t; 16];

/// Adds the products of a panel with four tokens.
///
/// # Safety
/// The CPU must have FEAT_I8MM, the panel must have at least one block and the activations as many.
#[inline(always)]
unsafe fn add_products(panel: &Panel, Quad { quants, scales, .. }: Quad, sums: &mut Sums) {
    debug_assert!(panel.blocks > 0 && quants.len() == panel.blocks && scales.len() == panel.blocks);
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = sums;
    let weights = panel.weights.as_ptr().cast::<u8>();
    // SAFETY: each round reads the next block: 512 bytes of weights in octets of 128, of which `first` takes the
    // front half and `second` the other; 128 bytes of activations, twice; 128 bytes of the 256 that scales of
    // rows have; 16 bytes of scales of tokens. Panel and activations have `blocks` of each. Nothing is written but the
    // registers named.
    unsafe {
        asm!(
            "tbnz {blocks}, #0, 3f",
            "2:",
            block!(),
            "3:",
            block!(),
            "subs {blocks}, {blocks}, #2",
            "b.gt 2b",
            blocks = inout(reg) panel.blocks => _,
            first = inout(reg) weights => _,
            second = inout(reg) weights.add(64) => _,
            octet = in(reg) 128usize,
            acts = inout(reg) quants.as_ptr() => _,
            back = in(reg) -64isize,
            rows = inout(reg) panel.scales.as_ptr() => _,
            next = in(reg) 192usize,
            tokens = inout(reg) scales.as_ptr() => _,
            inout("v0") *a, inout("v1") *b, inout("v2") *c, inout("v3") *d,
            inout("v4") *e, inout("v5") *f, inout("v6") *g, inout("v7") *h,
            inout("v8") *i, inout("v9") *j, inout("v10") *k, inout("v11") *l,
            inout("v12") *m, inout("v13") *n, inout("v14") *o, inout("v15") *p,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _,
            out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            options(nostack, readonly),
        );
    }
}

/// [`Multiply`](crate::kernels::tiles::Multiply).
#[inline(never)]
#[target_feature(enable = "i8mm")]
pub(super) fn multiply(panel: &Panel, acts: Quad, out: [&mut [f32; ROWS]; SIDE]) {
    if panel.blocks == 0 {
        return;
    }
    let mut sums = load(&out);
    // SAFETY: this function is compiled for the instructions; the panel has a block, and whoever multiplies gives as
    // many of the activations.
    unsafe { add_products(panel, acts, &mut sums) }
    store(&sums, out);
}

#[inline(always)]
fn load(from: &[&mut [f32; ROWS]; SIDE]) -> Sums {
    neon!({
        let mut sums = [vdupq_n_f32(0.0); 16];
        for j in 0..2 {
            let (even, odd) = (from[2 * j].as_ptr(), from[2 * j + 1].as_ptr());
            for i in 0..4 {
                let (even, odd) = (vld1q_f32(even.add(4 * i)), vld1q_f32(odd.add(4 * i)));
                sums[4 * i + j] = vzip1q_f32(even, odd);
                sums[4 * i + 2 + j] = vzip2q_f32(even, odd);
            }
        }
        sums
    })
}

#[inline(always)]
fn store(sums: &Sums, to: [&mut [f32; ROWS]; SIDE]) {
    neon!({
        for j in 0..2 {
            for i in 0..4 {
                let (first, second) = (sums[4 * i + j], sums[4 * i + 2 + j]);
                vst1q_f32(to[2 * j].as_mut_ptr().add(4 * i), vuzp1q_f32(first, second));
                vst1q_f32(to[2 * j + 1].as_mut_ptr().add(4 * i), vuzp2q_f32(first, second));
            }
        }
    });
}
