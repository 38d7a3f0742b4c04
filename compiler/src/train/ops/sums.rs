//! Loops over rows, written so that a compiler keeps them in vectors.
//!
//! Sums run in [`LANES`] independent chains in f32, those over rows of logits in short runs that f64 adds up, always in
//! the same order: the same row gives the same bits.

use super::{exp, widest};

/// Lanes of a sum: independent chains that a compiler keeps in vectors.
const LANES: usize = 16;

/// Values that are summed in f32 before f64 takes over.
const RUN: usize = 4096;

/// `ln x` within 3 units in the last place for normal positive `x`, without a branch or a call.
///
/// `x = 2^n m` with `m` in `[sqrt(1/2), sqrt(2))`; `ln m = 2 artanh(s)` with `s = (m - 1) / (m + 1)`, of
/// which `|s| < 0.172`, by its series up to the ninth power.
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    /// The bits of `sqrt(1/2)`: subtracting them leaves `n` in the exponent.
    const HALF_ROOT: u32 = 0x3f35_04f3;
    const FRACTION: u32 = 0x007f_ffff;
    let bits = x.to_bits().wrapping_sub(HALF_ROOT);
    let n = ((bits as i32) >> 23) as f32;
    let m = f32::from_bits((bits & FRACTION).wrapping_add(HALF_ROOT));
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut series = 2.0 / 9.0;
    for coefficient in [2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0, 2.0] {
        series = series * z + coefficient;
    }
    // ln 2 in two parts, the first exact in few bits.
    n * 0.693_359_4 + (s * series - n * 2.121_944_4e-4)
}

pub(crate) fn max(values: &[f32]) -> f32 {
    widest!({
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = values.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane = if *value > *lane { *value } else { *lane };
            }
        }
        lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
    })
}

/// Sum of the products of two rows, for rows of a few thousand.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum_of(a, b, b, |a, b, _| a * b)
}

/// Sum of `f` over three rows, for rows of a few thousand.
#[inline(always)]
pub(crate) fn sum_of(a: &[f32], b: &[f32], c: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    widest!({
        let mut lanes = [0f32; LANES];
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
        let (c, c_rest) = c.as_chunks::<LANES>();
        for ((a, b), c) in a.iter().zip(b).zip(c) {
            for lane in 0..LANES {
                lanes[lane] += f(a[lane], b[lane], c[lane]);
            }
        }
        let rest = a_rest.iter().zip(b_rest).zip(c_rest).map(|((a, b), c)| f(*a, *b, *c));
        lanes.iter().sum::<f32>() + rest.sum::<f32>()
    })
}

/// Sum of `f(x)`.
#[inline(always)]
pub(crate) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    widest!({
        let mut total = 0.0;
        for run in values.chunks(RUN) {
            let mut lanes = [0.0; LANES];
            let (chunks, rest) = run.as_chunks::<LANES>();
            for chunk in chunks {
                for (lane, value) in lanes.iter_mut().zip(chunk) {
                    *lane += f(*value);
                }
            }
            total += f64::from(lanes.iter().sum::<f32>() + rest.iter().map(|x| f(*x)).sum::<f32>());
        }
        total
    })
}

/// `x = exp((x - max) / T)` in place; answers the sum.
pub(crate) fn exponentiate(values: &mut [f32], max: f32, cool: f32) -> f64 {
    widest!(values.iter_mut().for_each(|x| *x = exp((*x - max) * cool)));
    sum(values, |x| x)
}

/// Calls `f` with the elements of two rows side by side and adds up the `N` numbers that it answers.
#[inline(always)]
pub(crate) fn sums_of_pairs<const N: usize>(
    a: &mut [f32],
    b: &mut [f32],
    f: impl Fn(&mut f32, &mut f32) -> [f32; N],
) -> [f64; N] {
    // A third row that takes no memory.
    sums_of_triples(a, b, &mut vec![(); a.len()], |a, b, ()| f(a, b))
}

/// The same for three rows.
#[inline(always)]
pub(crate) fn sums_of_triples<T, const N: usize>(
    a: &mut [f32],
    b: &mut [f32],
    c: &mut [T],
    f: impl Fn(&mut f32, &mut f32, &mut T) -> [f32; N],
) -> [f64; N] {
    widest!({
        let mut totals = [0.0; N];
        for ((a, b), c) in a.chunks_mut(RUN).zip(b.chunks_mut(RUN)).zip(c.chunks_mut(RUN)) {
            let mut lanes = [[0f32; LANES]; N];
            let mut one = |lane: usize, a: &mut f32, b: &mut f32, c: &mut T| {
                for (sums, value) in lanes.iter_mut().zip(f(a, b, c)) {
                    sums[lane] += value;
                }
            };
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks_mut::<LANES>(), b.as_chunks_mut::<LANES>());
            let (c, c_rest) = c.as_chunks_mut::<LANES>();
            for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
                for lane in 0..LANES {
                    one(lane, &mut a[lane], &mut b[lane], &mut c[lane]);
                }
            }
            for ((a, b), c) in a_rest.iter_mut().zip(b_rest).zip(c_rest) {
                one(0, a, b, c);
            }
            for (total, lanes) in totals.iter_mut().zip(lanes) {
                *total += f64::from(lanes.iter().sum::<f32>());
            }
        }
        totals
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logarithm_is_close_to_the_library() {
        for step in 0..200_000u32 {
            // Every binade from the smallest normal number to the largest.
            let x = f32::from_bits(0x0080_0000 + step * 10_611);
            let (found, expected) = (f64::from(ln(x)), f64::from(x).ln());
            assert!(
                (found - expected).abs() <= 4e-7 * expected.abs().max(0.3),
                "ln({x}) = {found}, {expected}"
            );
        }
        assert_eq!(ln(1.0), 0.0);
        assert!(ln(0.0).is_finite() && ln(1e-42).is_finite());
    }
}
