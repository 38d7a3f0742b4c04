//! AVX2, FMA and F16C.
//!
//! Bytes are multiplied with `vpmaddubsw`, whose first operand is unsigned: small weights go there as they
//! are, signed ones as magnitudes with their sign moved to the activation, which is never -128. Two products
//! of at most 128 * 127 fit 16 bits.

use crate::kernels::simd::{Op, Simd};
use core::arch::x86_64::*;

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The CPU must have AVX2, FMA and F16C.
    #[inline(always)]
    unsafe fn assume() -> Self {
        Self(())
    }
}

/// Evaluates AVX2 intrinsics.
macro_rules! avx2 {
    ($($body:tt)*) => {
        // SAFETY: an `Avx2` exists, so the CPU has the features of every intrinsic used here; pointers come from
        // references to arrays of the width of the access, and the unaligned forms are used.
        unsafe { $($body)* }
    };
}

impl Avx2 {
    /// Two halves of a pair's activations.
    #[inline(always)]
    fn activations(self, a: &[i8; 64]) -> [__m256i; 2] {
        avx2!([_mm256_loadu_si256(a.as_ptr().cast()), _mm256_loadu_si256(a.as_ptr().add(32).cast())])
    }

    /// 16-bit sums of two products each, of signed weights.
    #[inline(always)]
    fn signed_products(self, w: __m256i, a: __m256i) -> __m256i {
        avx2!(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)))
    }
}

impl Simd for Avx2 {
    type F = __m256;
    type B = __m256i;
    /// 32-bit sums, four of the even block, then four of the odd one.
    type P = __m256i;
    /// For each half, eight 16-bit copies of the even block's factor, then of the odd one's.
    type K = [__m256i; 2];

    #[inline(always)]
    fn outline<O: Op<Self>>(self, op: O) {
        #[inline(never)]
        #[target_feature(enable = "avx2,f16c,fma")]
        fn run<O: Op<Avx2>>(s: Avx2, op: O) {
            op.run(s);
        }
        // SAFETY: an `Avx2` exists, so the CPU has these features.
        unsafe { run(self, op) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        avx2!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32; 8]) -> __m256 {
        avx2!(_mm256_loadu_ps(x.as_ptr()))
    }

    #[inline(always)]
    fn store(self, x: __m256, to: &mut [f32; 8]) {
        avx2!(_mm256_storeu_ps(to.as_mut_ptr(), x))
    }

    #[inline(always)]
    fn f32_bytes(self, bytes: &[u8; 32]) -> __m256 {
        avx2!(_mm256_loadu_ps(bytes.as_ptr().cast()))
    }

    #[inline(always)]
    fn f16_bytes(self, bytes: &[u8; 16]) -> __m256 {
        avx2!(_mm256_cvtph_ps(_mm_loadu_si128(bytes.as_ptr().cast())))
    }

    #[inline(always)]
    fn bf16_bytes(self, bytes: &[u8; 16]) -> __m256 {
        avx2!({
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn f16_bits(self, bits: [u16; 8]) -> __m256 {
        let [a, b, c, d, e, f, g, h] = bits;
        avx2!(_mm256_cvtph_ps(_mm_setr_epi16(
            a as i16, b as i16, c as i16, d as i16, e as i16, f as i16, g as i16, h as i16
        )))
    }

    #[inline(always)]
    fn to_f16(self, x: __m256) -> [u16; 8] {
        avx2!({
            let mut out = [0; 8];
            let halves = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x);
            _mm_storeu_si128(out.as_mut_ptr().cast(), halves);
            out
        })
    }

    #[inline(always)]
    fn f32_from_u8(self, x: [u8; 8]) -> __m256 {
        avx2!({
            let bytes = _mm_cvtsi64_si128(i64::from_le_bytes(x));
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
        })
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_mul_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        avx2!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        avx2!(_mm256_div_ps(a, b))
    }

    #[inline(always)]
    fn select_less(self, a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
        avx2!(_mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b)))
    }

    #[inline(always)]
    fn higher(self, a: __m256, x: __m256) -> __m256 {
        // The second operand where one is not a number.
        avx2!(_mm256_max_ps(x, a))
    }

    #[inline(always)]
    fn add_exponent(self, x: __m256, n: __m256) -> __m256 {
        avx2!({
            let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), n))
        })
    }

    #[inline(always)]
    fn sum(self, x: __m256) -> f32 {
        avx2!({
            let pairs = _mm256_hadd_ps(x, x);
            let fours = _mm256_hadd_ps(pairs, pairs);
            let (low, high) = (_mm256_castps256_ps128(fours), _mm256_extractf128_ps::<1>(fours));
            _mm_cvtss_f32(_mm_add_ss(low, high))
        })
    }

    #[inline(always)]
    fn sums(self, x: [__m256; 8]) -> __m256 {
        avx2!({
            let [a, b, c, d, e, f, g, h] = x;
            let low = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let high = _mm256_hadd_ps(_mm256_hadd_ps(e, f), _mm256_hadd_ps(g, h));
            let first = _mm256_permute2f128_ps::<0x20>(low, high);
            let second = _mm256_permute2f128_ps::<0x31>(low, high);
            _mm256_add_ps(first, second)
        })
    }

    #[inline(always)]
    fn transpose(self, x: [__m256; 8]) -> [__m256; 8] {
        avx2!({
            let [a, b, c, d, e, f, g, h] = x;
            // Columns 0, 1, 4 and 5, then the others, of two rows; then those of four, two columns in a register.
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ef, gh) = (_mm256_unpacklo_ps(e, f), _mm256_unpacklo_ps(g, h));
            let (ab2, cd2) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            let (ef2, gh2) = (_mm256_unpackhi_ps(e, f), _mm256_unpackhi_ps(g, h));
            let low = [
                _mm256_shuffle_ps::<0x44>(ab, cd),
                _mm256_shuffle_ps::<0xee>(ab, cd),
                _mm256_shuffle_ps::<0x44>(ab2, cd2),
                _mm256_shuffle_ps::<0xee>(ab2, cd2),
            ];
            let high = [
                _mm256_shuffle_ps::<0x44>(ef, gh),
                _mm256_shuffle_ps::<0xee>(ef, gh),
                _mm256_shuffle_ps::<0x44>(ef2, gh2),
                _mm256_shuffle_ps::<0xee>(ef2, gh2),
            ];
            [
                _mm256_permute2f128_ps::<0x20>(low[0], high[0]),
                _mm256_permute2f128_ps::<0x20>(low[1], high[1]),
                _mm256_permute2f128_ps::<0x20>(low[2], high[2]),
                _mm256_permute2f128_ps::<0x20>(low[3], high[3]),
                _mm256_permute2f128_ps::<0x31>(low[0], high[0]),
                _mm256_permute2f128_ps::<0x31>(low[1], high[1]),
                _mm256_permute2f128_ps::<0x31>(low[2], high[2]),
                _mm256_permute2f128_ps::<0x31>(low[3], high[3]),
            ]
        })
    }

    #[inline(always)]
    fn peak(self, x: &[[f32; 32]]) -> u32 {
        avx2!({
            // Without the sign, floats are ordered as their bits are.
            let magnitude = _mm256_set1_epi32(0x7fff_ffff);
            let mut eight = _mm256_setzero_si256();
            for x in x {
                for x in x.as_chunks::<8>().0 {
                    let x = _mm256_castps_si256(_mm256_loadu_ps(x.as_ptr()));
                    eight = _mm256_max_epi32(eight, _mm256_and_si256(x, magnitude));
                }
            }
            let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
            _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two))) as u32
        })
    }

    #[inline(always)]
    fn round_i8(self, x: [__m256; 2]) -> [i8; 16] {
        avx2!({
            // The adder rounds to nearest even, in whatever mode MXCSR leaves the conversions.
            let shift = _mm256_set1_ps(12_582_912.0);
            let low_byte = _mm256_set1_epi32(0xff);
            let a = _mm256_and_si256(_mm256_castps_si256(_mm256_add_ps(x[0], shift)), low_byte);
            let b = _mm256_and_si256(_mm256_castps_si256(_mm256_add_ps(x[1], shift)), low_byte);
            // Words 0-3 of `a`, 0-3 of `b`, 4-7 of `a`, 4-7 of `b`; then put in order and narrowed.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            let mut out = [0; 16];
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
            out
        })
    }

    #[inline(always)]
    fn sum_i8(self, x: &[i8; 16]) -> i32 {
        avx2!({
            // Unsigned bytes are summed in two halves; the offset is taken off again.
            let bytes = _mm_xor_si128(_mm_loadu_si128(x.as_ptr().cast()), _mm_set1_epi8(-128));
            let sums = _mm_sad_epu8(bytes, _mm_setzero_si128());
            _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 16 * 128
        })
    }

    #[inline(always)]
    fn pair(self, even: &[u8; 16], odd: &[u8; 16]) -> __m256i {
        avx2!({
            let even = _mm256_castsi128_si256(_mm_loadu_si128(even.as_ptr().cast()));
            _mm256_inserti128_si256::<1>(even, _mm_loadu_si128(odd.as_ptr().cast()))
        })
    }

    #[inline(always)]
    fn both(self, x: &[u8; 16]) -> __m256i {
        avx2!(_mm256_broadcastsi128_si256(_mm_loadu_si128(x.as_ptr().cast())))
    }

    #[inline(always)]
    fn bits<const EVEN: i32, const ODD: i32>(self, x: __m256i, mask: u8) -> __m256i {
        avx2!({
            let shifts = _mm256_setr_epi32(EVEN, EVEN, EVEN, EVEN, ODD, ODD, ODD, ODD);
            _mm256_and_si256(_mm256_srlv_epi32(x, shifts), _mm256_set1_epi8(mask as i8))
        })
    }

    #[inline(always)]
    fn shl4(self, x: __m256i) -> __m256i {
        avx2!(_mm256_slli_epi16::<4>(x))
    }

    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        avx2!(_mm256_or_si256(a, b))
    }

    #[inline(always)]
    fn sub_i8(self, x: __m256i, y: i8) -> __m256i {
        avx2!(_mm256_sub_epi8(x, _mm256_set1_epi8(y)))
    }

    #[cfg(feature = "low-bit")]
    #[inline(always)]
    fn choose(self, x: __m256i, from: &[i8; 16]) -> __m256i {
        let from = self.both(&from.map(|number| number as u8));
        avx2!(_mm256_shuffle_epi8(from, x))
    }

    #[inline(always)]
    fn spread(self, even: u16, odd: u16) -> __m256i {
        avx2!({
            let words =
                _mm256_set_m128i(_mm_cvtsi32_si128(i32::from(odd)), _mm_cvtsi32_si128(i32::from(even)));
            // Byte 0 eight times, then byte 1 eight times, each compared with its own bit.
            let order = _mm256_broadcastsi128_si256(_mm_set_epi64x(0x0101_0101_0101_0101, 0));
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let set = _mm256_and_si256(_mm256_shuffle_epi8(words, order), bit);
            _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), _mm256_set1_epi8(16))
        })
    }

    #[inline(always)]
    fn factors(self, even: [i8; 2], odd: [i8; 2]) -> [__m256i; 2] {
        avx2!([
            _mm256_set_m128i(_mm_set1_epi16(i16::from(odd[0])), _mm_set1_epi16(i16::from(even[0]))),
            _mm256_set_m128i(_mm_set1_epi16(i16::from(odd[1])), _mm_set1_epi16(i16::from(even[1]))),
        ])
    }

    #[inline(always)]
    fn dot_small(self, w: [__m256i; 2], a: &[i8; 64]) -> __m256i {
        let a = self.activations(a);
        avx2!({
            // Four products of at most 31 * 127 fit 16 bits.
            let words = _mm256_add_epi16(_mm256_maddubs_epi16(w[0], a[0]), _mm256_maddubs_epi16(w[1], a[1]));
            _mm256_madd_epi16(words, _mm256_set1_epi16(1))
        })
    }

    #[inline(always)]
    fn dot_signed(self, w: [__m256i; 2], a: &[i8; 64]) -> __m256i {
        let a = self.activations(a);
        let words = [self.signed_products(w[0], a[0]), self.signed_products(w[1], a[1])];
        avx2!({
            let one = _mm256_set1_epi16(1);
            _mm256_add_epi32(_mm256_madd_epi16(words[0], one), _mm256_madd_epi16(words[1], one))
        })
    }

    #[inline(always)]
    fn dot_factors(self, w: [__m256i; 2], k: [__m256i; 2], a: &[i8; 64]) -> __m256i {
        let a = self.activations(a);
        let words = [self.signed_products(w[0], a[0]), self.signed_products(w[1], a[1])];
        avx2!(_mm256_add_epi32(_mm256_madd_epi16(words[0], k[0]), _mm256_madd_epi16(words[1], k[1])))
    }

    #[inline(always)]
    fn no_products(self) -> __m256i {
        avx2!(_mm256_setzero_si256())
    }

    #[inline(always)]
    fn totals(self, p: [__m256i; 4]) -> __m256 {
        avx2!({
            let fours = _mm256_hadd_epi32(_mm256_hadd_epi32(p[0], p[1]), _mm256_hadd_epi32(p[2], p[3]));
            // Even blocks' totals are in the low half, odd blocks' in the high half.
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            _mm256_cvtepi32_ps(_mm256_permutevar8x32_epi32(fours, order))
        })
    }
}

crate::kernels::table::kernel_table!(
    "avx2",
    // SAFETY: these functions are compiled for AVX2, FMA and F16C, so whoever calls one has promised them.
    unsafe { Avx2::assume() },
    #[target_feature(enable = "avx2,f16c,fma")]
);
