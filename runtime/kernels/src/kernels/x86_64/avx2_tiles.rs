//! Sixteen rows side by side in two AVX2 registers.
//!
//! Unsigned weights below 64 go to `vpmaddubsw` as they are; signed ones as magnitudes, their sign moved to
//! the activations.

use super::avx2::Avx2;
use crate::kernels::tiles::{Format, Lanes, Panel, Quad, SIDE, multiply_quad};
use core::arch::x86_64::*;

/// Evaluates AVX2 intrinsics.
macro_rules! avx2 {
    ($($body:tt)*) => {
        // SAFETY: an `Avx2` exists, so the CPU has the features of every intrinsic used here; pointers come from
        // references to arrays of at least the width of the access, and the unaligned forms are used.
        unsafe { $($body)* }
    };
}

type W = [__m256i; 2];
type F = [__m256; 2];

/// Evaluates an expression for rows 0 to 7, then for rows 8 to 15.
macro_rules! halves {
    (|$($x:ident = $y:ident),+| $body:expr) => {
        [{ $(let $x = $y[0];)+ avx2!($body) }, { $(let $x = $y[1];)+ avx2!($body) }]
    };
}

impl Lanes for Avx2 {
    type W = W;
    type A = [i32; 4];
    type P = W;
    type F = F;

    const SIGNED_BIAS: i32 = 0;
    const PANEL_WITHOUT_BIAS: bool = false;

    #[inline(always)]
    fn bytes(self, w: &[u8; 64]) -> W {
        avx2!([_mm256_loadu_si256(w.as_ptr().cast()), _mm256_loadu_si256(w.as_ptr().add(32).cast())])
    }

    #[inline(always)]
    fn low(self, w: W) -> W {
        halves!(|w = w| _mm256_and_si256(w, _mm256_set1_epi8(15)))
    }

    #[inline(always)]
    fn high(self, w: W) -> W {
        halves!(|w = w| _mm256_and_si256(_mm256_srli_epi16::<4>(w), _mm256_set1_epi8(15)))
    }

    #[inline(always)]
    fn insert<const LEFT: i32, const RIGHT: i32>(self, w: W, from: W, mask: u8) -> W {
        halves!(|w = w, from = from| {
            let moved = _mm256_srli_epi16::<RIGHT>(_mm256_slli_epi16::<LEFT>(from));
            _mm256_or_si256(w, _mm256_and_si256(moved, _mm256_set1_epi8(mask as i8)))
        })
    }

    #[inline(always)]
    fn signed(self, w: W) -> W {
        w
    }

    #[inline(always)]
    fn activations(self, a: &[i8; 16]) -> [i32; 4] {
        super::lanes_of_four(a)
    }

    #[inline(always)]
    fn start(self, bias: i32) -> W {
        avx2!([_mm256_set1_epi32(bias); 2])
    }

    #[inline(always)]
    fn dot<const LANE: i32>(self, p: W, w: W, a: [i32; 4]) -> W {
        halves!(|p = p, w = w| {
            let words = _mm256_maddubs_epi16(w, _mm256_set1_epi32(a[LANE as usize]));
            _mm256_add_epi32(p, _mm256_madd_epi16(words, _mm256_set1_epi16(1)))
        })
    }

    #[inline(always)]
    fn dot_wide<const LANE: i32>(self, p: W, w: W, a: [i32; 4]) -> W {
        halves!(|p = p, w = w| {
            let a = _mm256_sign_epi8(_mm256_set1_epi32(a[LANE as usize]), w);
            let words = _mm256_maddubs_epi16(_mm256_abs_epi8(w), a);
            _mm256_add_epi32(p, _mm256_madd_epi16(words, _mm256_set1_epi16(1)))
        })
    }

    #[inline(always)]
    fn finish(self, p: W, _: i32) -> F {
        halves!(|p = p| _mm256_cvtepi32_ps(p))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        avx2!([_mm256_set1_ps(x); 2])
    }

    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        avx2!([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))])
    }

    #[inline(always)]
    fn store(self, x: F, to: &mut [f32; 16]) {
        avx2!({
            _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), x[1]);
        })
    }

    #[inline(always)]
    fn halves(self, x: &[u8; 32]) -> F {
        avx2!([
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(16).cast())),
        ])
    }

    #[inline(always)]
    fn unsigned_bytes(self, x: &[u8; 16]) -> F {
        avx2!({
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm_unpackhi_epi64(x, x);
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high))]
        })
    }

    #[inline(always)]
    fn signed_bytes(self, x: &[u8; 16]) -> F {
        avx2!({
            let x = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm_unpackhi_epi64(x, x);
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
        })
    }

    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        halves!(|a = a, b = b| _mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        halves!(|a = a, b = b, c = c| _mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn keep(self, w: [W; 2], _: i32, to: &mut [[u8; 64]; 2]) {
        for (w, to) in w.into_iter().zip(to) {
            avx2!({
                _mm256_storeu_si256(to.as_mut_ptr().cast(), w[0]);
                _mm256_storeu_si256(to.as_mut_ptr().add(32).cast(), w[1]);
            });
        }
    }

    #[inline(always)]
    fn multiply_quad<T: Format>(self, panel: &Panel, acts: Quad, out: [&mut [f32; 16]; SIDE]) {
        multiply_quad::<Self, T>(self, panel, acts, out);
    }
}
