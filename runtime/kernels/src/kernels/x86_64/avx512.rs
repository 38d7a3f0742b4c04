//! AVX-512 with VNNI: sixteen rows side by side in one register.
//!
//! `vpdpbusd` takes weights unsigned, so signed ones get 128 added, which the start of the sums takes off.

use crate::kernels::dispatch::Kernels;
use crate::kernels::low_rank::{self, LowRank};
use crate::kernels::tiles::{self, Format, Lanes, Panel, Quad, SIDE, multiply_quad};
use core::arch::x86_64::*;

/// Proof that the CPU has what `TABLE` is compiled for.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The CPU must have AVX-512 F, BW, VL and VNNI, and what [`super::avx2::Avx2`] asks for.
    #[inline(always)]
    unsafe fn assume() -> Self {
        Self(())
    }
}

/// Evaluates AVX-512 intrinsics.
macro_rules! avx512 {
    ($($body:tt)*) => {
        // SAFETY: an `Avx512` exists, so the CPU has the features of every intrinsic used here; pointers come
        // from references to arrays of at least the width of the access, and the unaligned forms are used.
        unsafe { $($body)* }
    };
}

impl Lanes for Avx512 {
    type W = __m512i;
    type A = [i32; 4];
    type P = __m512i;
    type F = __m512;

    const SIGNED_BIAS: i32 = 128;
    const PANEL_WITHOUT_BIAS: bool = false;

    #[inline(always)]
    fn bytes(self, w: &[u8; 64]) -> __m512i {
        avx512!(_mm512_loadu_si512(w.as_ptr().cast()))
    }

    #[inline(always)]
    fn low(self, w: __m512i) -> __m512i {
        avx512!(_mm512_and_si512(w, _mm512_set1_epi8(15)))
    }

    #[inline(always)]
    fn high(self, w: __m512i) -> __m512i {
        avx512!(_mm512_and_si512(_mm512_srli_epi16::<4>(w), _mm512_set1_epi8(15)))
    }

    #[inline(always)]
    fn insert<const LEFT: i32, const RIGHT: i32>(self, w: __m512i, from: __m512i, mask: u8) -> __m512i {
        avx512!({
            let moved = match (LEFT, RIGHT) {
                (0, 0) => from,
                (_, 0) => _mm512_sll_epi16(from, _mm_cvtsi32_si128(LEFT)),
                _ => _mm512_srl_epi16(from, _mm_cvtsi32_si128(RIGHT)),
            };
            // w | (moved & mask)
            _mm512_ternarylogic_epi32::<0xf8>(w, moved, _mm512_set1_epi8(mask as i8))
        })
    }

    #[inline(always)]
    fn signed(self, w: __m512i) -> __m512i {
        avx512!(_mm512_xor_si512(w, _mm512_set1_epi8(-128)))
    }

    #[inline(always)]
    fn activations(self, a: &[i8; 16]) -> [i32; 4] {
        super::lanes_of_four(a)
    }

    #[inline(always)]
    fn start(self, bias: i32) -> __m512i {
        avx512!(_mm512_set1_epi32(bias))
    }

    #[inline(always)]
    fn dot<const LANE: i32>(self, p: __m512i, w: __m512i, a: [i32; 4]) -> __m512i {
        avx512!(_mm512_dpbusd_epi32(p, w, _mm512_set1_epi32(a[LANE as usize])))
    }

    #[inline(always)]
    fn finish(self, p: __m512i, _: i32) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(p))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        avx512!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        avx512!(_mm512_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; 16]) {
        avx512!(_mm512_storeu_ps(to.as_mut_ptr(), x))
    }

    #[inline(always)]
    fn halves(self, x: &[u8; 32]) -> __m512 {
        avx512!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }

    #[inline(always)]
    fn unsigned_bytes(self, x: &[u8; 16]) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn signed_bytes(self, x: &[u8; 16]) -> __m512 {
        avx512!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        avx512!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        avx512!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn keep(self, w: [__m512i; 2], _: i32, to: &mut [[u8; 64]; 2]) {
        for (w, to) in w.into_iter().zip(to) {
            avx512!(_mm512_storeu_si512(to.as_mut_ptr().cast(), w));
        }
    }

    #[inline(always)]
    fn multiply_quad<T: Format>(self, panel: &Panel, acts: Quad, out: [&mut [f32; 16]; SIDE]) {
        multiply_quad::<Self, T>(self, panel, acts, out);
    }
}

crate::kernels::table::tile_tables! {
    [
        // SAFETY: these functions are compiled for the features that `assume` asks for, so whoever calls one has
        // promised them.
        unsafe { Avx512::assume() },
        #[target_feature(enable = "avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512vnni")]
    ]
    ONE_TOKEN FILL MULTIPLY MULTIPLY_PAIR
}

crate::kernels::table::entries! {
    [
        // SAFETY: as above.
        unsafe { Avx512::assume() },
        #[target_feature(enable = "avx2,f16c,fma,avx512f,avx512bw,avx512vl,avx512vnni")]
    ]
    fn add_integers(b: &LowRank, u: &[f32], y: &mut [f32]) = low_rank::add_integers;
}

/// The kernels for quantized weights in tiles.
static TILES: tiles::TileKernels = tiles::TileKernels {
    one_token: &ONE_TOKEN,
    fill: &FILL,
    multiply: &MULTIPLY,
    pair: Some(&MULTIPLY_PAIR),
    wide: None,
};

/// The kernels of this instruction set: those of AVX2, and tiles.
pub(crate) static TABLE: Kernels =
    Kernels { name: "avx512", tiles: &TILES, add_integers, ..super::avx2::TABLE };
