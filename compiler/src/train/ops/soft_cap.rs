//! Soft caps: `cap * tanh(x / cap)` (Gemma Team 2024, arXiv 2408.00118, section 2), of scores and of logits.

use super::exp;

/// `cap * tanh(x / cap)` as `cap - 2 cap / (1 + exp(2 x / cap))`.
#[inline(always)]
pub(crate) fn capped(x: f32, cap: f32) -> f32 {
    cap - 2.0 * cap / (1.0 + exp(2.0 / cap * x))
}

/// The slope of [`capped`] where it has the value `y`: `1 - (y / cap)^2`.
#[inline(always)]
pub(crate) fn slope(y: f32, cap: f32) -> f32 {
    let share = y / cap;
    1.0 - share * share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_scaled_tanh() {
        for i in -400..=400 {
            let (x, cap) = (i as f32 * 0.25, 30f32);
            let exact = 30.0 * (f64::from(x) / 30.0).tanh();
            assert!((f64::from(capped(x, cap)) - exact).abs() < 1e-5, "{x}");
            assert!((f64::from(slope(capped(x, cap), cap)) - (1.0 - (exact / 30.0).powi(2))).abs() < 1e-6);
        }
        assert_eq!((capped(1e9, 2.0), capped(-1e9, 2.0)), (2.0, -2.0));
    }
}
