//! The exponential function, the same bits on every machine.
//!
//! `exp(x) = 2^n * exp(r)` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`; `exp(r)` is a polynomial of
//! degree 6 (own minimax fit, 3e-9 relative) in fused multiplications and additions. Within 2 ulp of the true
//! value for results that are normal numbers; smaller results are 0.

use super::generic::Scalar;
use super::simd::Simd;

/// Below this the result is not a normal number and becomes 0.
const LOWEST: f32 = -87.33;
/// Above this the result is infinite.
const HIGHEST: f32 = 88.722_8;
/// Adding it leaves an integer in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; products of the first with small integers are exact.
const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// `(exp(r) - 1 - r) / r^2`, lowest power first.
const POLYNOMIAL: [f32; 5] = [0.499_999_94, 0.166_665_2, 0.041_668_385, 0.008_368_748, 0.001_381_492_5];

/// What [`reduced`] adds products to: coefficients, highest power first, and [`ROUND`].
const SUMMANDS: [[f32; 4]; 6] =
    [[POLYNOMIAL[3]; 4], [POLYNOMIAL[2]; 4], [POLYNOMIAL[1]; 4], [POLYNOMIAL[0]; 4], [ROUND; 4], [ROUND; 4]];

/// Eight exponentials.
#[inline(always)]
pub(crate) fn exp_lanes<S: Simd>(s: S, x: S::F) -> S::F {
    // x - x is 0, but NaN stays NaN, whatever the exponent arithmetic made of it.
    let y = s.add(power(s, x), s.sub(x, x));
    let y = s.select_less(x, s.splat(LOWEST), s.splat(0.0), y);
    s.select_less(s.splat(HIGHEST), x, s.splat(f32::INFINITY), y)
}

/// `1 + exp(x)`, eight lanes; 1 where `x` is not a number.
#[inline(always)]
pub(crate) fn one_and_exp<S: Simd>(s: S, x: S::F) -> S::F {
    // What the lowest power adds to 1 is nothing, too.
    let y = s.add(s.splat(1.0), power(s, s.higher(s.splat(LOWEST), x)));
    s.select_less(s.splat(HIGHEST), x, s.splat(f32::INFINITY), y)
}

/// [`exp_lanes`] of what is not above 0.
#[inline(always)]
pub(crate) fn exp_below<S: Simd>(s: S, x: S::F) -> S::F {
    let (p, n) = reduced(s, x);
    // 2^n is a normal number, so 2^n + 2^n p is rounded as 1 + p is; and NaN stays NaN, whatever 2^n has become.
    let power = s.add_exponent(s.splat(1.0), n);
    s.select_less(x, s.splat(LOWEST), s.splat(0.0), s.fma(power, p, power))
}

/// Eight exponentials of numbers from [`LOWEST`] to [`HIGHEST`].
#[inline(always)]
fn power<S: Simd>(s: S, x: S::F) -> S::F {
    let (p, n) = reduced(s, x);
    s.add_exponent(s.add(p, s.splat(1.0)), n)
}

/// `exp(r) - 1`, and `n` with [`ROUND`] added.
#[inline(always)]
fn reduced<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let [c3, c2, c1, c0, round] = s.summands(&SUMMANDS);
    let shifted = s.fma(x, s.splat(core::f32::consts::LOG2_E), round);
    let n = s.sub(shifted, s.splat(ROUND));
    let r = s.fma(n, s.splat(-LN2[1]), s.fma(n, s.splat(-LN2[0]), x));
    let p = s.fma(s.splat(POLYNOMIAL[4]), r, c3);
    let p = s.fma(s.fma(s.fma(p, r, c2), r, c1), r, c0);
    (s.fma(s.mul(r, r), p, r), shifted)
}

/// The exponential of one number, equal to what the vector kernels compute.
pub fn exp(x: f32) -> f32 {
    exp_lanes(Scalar, [x; 8])[0]
}
