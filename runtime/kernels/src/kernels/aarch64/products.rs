//! Attention's innermost loop: four rows of factors times rows of sixteen numbers.
//!
//! Written in assembly because it needs all 32 registers: sixteen of sums, eight of factors, and twice four of numbers,
//! loaded 64 bytes at a time. Eight rows take 128 multiplications and additions, which nothing can save, and fourteen
//! instructions besides.

use core::arch::aarch64::*;
use core::arch::asm;

/// A row of numbers in the registers `$a` to `$d` times the numbers `$lane` of the registers of factors.
macro_rules! row {
    ($lane:literal of [$p:literal $q:literal $r:literal $s:literal], [$a:literal $b:literal $c:literal $d:literal]) => {
        concat!(
            row!(@ $p $lane, 0 $a, 1 $b, 2 $c, 3 $d),
            row!(@ $q $lane, 4 $a, 5 $b, 6 $c, 7 $d),
            row!(@ $r $lane, 8 $a, 9 $b, 10 $c, 11 $d),
            row!(@ $s $lane, 12 $a, 13 $b, 14 $c, 15 $d),
        )
    };
    (@ $w:literal $lane:literal, $($sum:literal $x:literal),*) => {
        concat!($("fmla v", $sum, ".4s, v", $x, ".4s, v", $w, ".s[", $lane, "]\n"),*)
    };
}

/// Four rows, whose factors are in four registers, the first four or the second ones.
macro_rules! four_rows {
    ($w:tt) => {
        concat!(
            "ld1 {{v24.4s, v25.4s, v26.4s, v27.4s}}, [{x}], #64\n",
            "ld1 {{v28.4s, v29.4s, v30.4s, v31.4s}}, [{x}], #64\n",
            row!(0 of $w, [24 25 26 27]),
            "ld1 {{v24.4s, v25.4s, v26.4s, v27.4s}}, [{x}], #64\n",
            row!(1 of $w, [28 29 30 31]),
            "ld1 {{v28.4s, v29.4s, v30.4s, v31.4s}}, [{x}], #64\n",
            row!(2 of $w, [24 25 26 27]),
            row!(3 of $w, [28 29 30 31]),
        )
    };
}

/// [`Simd::add_products`](crate::kernels::simd::Simd::add_products): eight rows at a time, then one.
#[inline(always)]
pub(super) fn add_products(w: [&[f32]; 4], x: &[[f32; 16]], sums: &mut [[[float32x4_t; 2]; 2]; 4]) {
    let w = w.map(|w| &w[..x.len()]);
    let [[[a, b], [c, d]], [[e, f], [g, h]], [[i, j], [k, l]], [[m, n], [o, p]]] = sums;
    // SAFETY: NEON belongs to the baseline. A round reads 32 bytes of each row of factors and 512 of the numbers, or 4
    // and 64: eight of the one and eight rows of the other, or one of each, and there are as many of the one as of
    // the other. Nothing is written but the registers named.
    unsafe {
        asm!(
            "cbz {eights}, 3f",
            "2:",
            "ldp q16, q17, [{p}], #32",
            "ldp q18, q19, [{q}], #32",
            "ldp q20, q21, [{r}], #32",
            "ldp q22, q23, [{s}], #32",
            four_rows!([16 18 20 22]),
            four_rows!([17 19 21 23]),
            "sub {eights}, {eights}, #1",
            "cbnz {eights}, 2b",
            "3:",
            "cbz {left}, 5f",
            "4:",
            "ldr s16, [{p}], #4",
            "ldr s18, [{q}], #4",
            "ldr s20, [{r}], #4",
            "ldr s22, [{s}], #4",
            "ld1 {{v24.4s, v25.4s, v26.4s, v27.4s}}, [{x}], #64",
            row!(0 of [16 18 20 22], [24 25 26 27]),
            "sub {left}, {left}, #1",
            "cbnz {left}, 4b",
            "5:",
            eights = inout(reg) x.len() / 8 => _,
            left = inout(reg) x.len() % 8 => _,
            p = inout(reg) w[0].as_ptr() => _,
            q = inout(reg) w[1].as_ptr() => _,
            r = inout(reg) w[2].as_ptr() => _,
            s = inout(reg) w[3].as_ptr() => _,
            x = inout(reg) x.as_ptr() => _,
            inout("v0") *a, inout("v1") *b, inout("v2") *c, inout("v3") *d,
            inout("v4") *e, inout("v5") *f, inout("v6") *g, inout("v7") *h,
            inout("v8") *i, inout("v9") *j, inout("v10") *k, inout("v11") *l,
            inout("v12") *m, inout("v13") *n, inout("v14") *o, inout("v15") *p,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _,
            out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            options(nostack, readonly, preserves_flags),
        );
    }
}
