//! The two functions that `core` lacks and specifications need once, on loading.

/// The square root of a normal positive number, within 1 unit in the last place; 0 for anything else.
pub(crate) fn sqrt(x: f64) -> f64 {
    if !(x.is_normal() && x > 0.0) {
        return 0.0;
    }
    // Halving the exponent is a first guess within 6 %; Newton's step squares the error.
    let mut root = f64::from_bits((x.to_bits() >> 1) + (1023 << 51));
    for _ in 0..5 {
        root = 0.5 * (root + x / root);
    }
    root
}

/// The natural logarithm of a normal positive number; 0 for anything else.
pub(crate) fn ln(x: f64) -> f64 {
    if !(x.is_normal() && x > 0.0) {
        return 0.0;
    }
    // x = 2^n m with 1 <= m < 2 and ln m = 2 atanh((m - 1) / (m + 1)), whose argument is below 1/3.
    let exponent = (x.to_bits() >> 52) as i32 - 1023;
    let mantissa = f64::from_bits(x.to_bits() & ((1 << 52) - 1) | 1023 << 52);
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let (mut power, mut sum) = (t, 0.0);
    for odd in 0..20 {
        sum += power / f64::from(2 * odd + 1);
        power *= t * t;
    }
    f64::from(exponent) * core::f64::consts::LN_2 + 2.0 * sum
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn close_to_the_standard_library() {
        for i in 1..20_000 {
            let x = f64::from(i) * 0.37 * f64::powi(1.01, i % 4000);
            assert!((sqrt(x) - x.sqrt()).abs() <= 3e-16 * x.sqrt(), "{x}");
            assert!((ln(x) - x.ln()).abs() <= 1e-14 * (1.0 + x.ln().abs()), "{x}");
        }
        for x in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-320] {
            assert_eq!((sqrt(x), ln(x)), (0.0, 0.0));
        }
        assert_eq!((sqrt(640.0) as f32, sqrt(256.0), ln(1.0)), (640f32.sqrt(), 16.0, 0.0));
    }
}
