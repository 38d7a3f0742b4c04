//! Least-squares searches for the scale (and minimum) of a group of weights.
//!
//! For fixed integers `q` the best scale is a weighted linear regression in closed form; the searches try
//! a few roundings of the group to integers and keep the one whose regression leaves the smallest error.
//! Nothing here knows a block's layout. Every sum has a fixed order, so results are the same everywhere.

/// Adds 1.5 * 2^23: the sum's last bit is worth one, so the adder rounds to the nearest integer (ties to
/// even) for magnitudes below 2^22. Unlike `f32::round` this becomes vector code on every target.
const ROUNDER: f32 = 12_582_912.0;

/// A regression whose determinant is smaller than this part of its terms is mostly their rounding: all
/// weight on one element, or all elements on one integer.
const FLAT: f32 = 1e-4;

pub(crate) fn round(value: f32) -> f32 {
    (value + ROUNDER) - ROUNDER
}

/// The sum of `term(i)` for `i < N`, in eight interleaved partial sums.
pub(super) fn sum<const N: usize>(term: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 8];
    for base in (0..N).step_by(8) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += term(base + lane);
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

/// The inverse of a scale; 0 for 0, so that a group of zeros stays one.
pub(crate) fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The first value of the largest magnitude, with its sign; 0 for none.
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |extreme: f32, v| if v.abs() > extreme.abs() { *v } else { extreme })
}

/// What elements weigh where nothing is known of their importance, as in ggml: what is large moves the output more.
pub(super) fn by_magnitude<const N: usize>(x: &[f32; N]) -> [f32; N] {
    let rms = (x.iter().map(|v| v * v).sum::<f32>() / N as f32).sqrt();
    x.map(|v| rms + v.abs())
}

/// Integers `low..=high` nearest to `inverse * (x - offset)`.
pub(super) fn to_grid<const N: usize>(
    x: &[f32; N],
    inverse: f32,
    offset: f32,
    low: f32,
    high: f32,
) -> [f32; N] {
    std::array::from_fn(|i| round(((x[i] - offset) * inverse).clamp(low, high)))
}

/// `sum(w * (x - scale * q - offset)^2)`.
pub(super) fn squared_error<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    q: &[f32; N],
    scale: f32,
    offset: f32,
) -> f32 {
    sum::<N>(|i| {
        let difference = x[i] - (scale * q[i] + offset);
        w[i] * difference * difference
    })
}

/// `0, -1, 1, -2, 2, ...` up to `last` on both sides.
pub(super) fn outwards(last: i32) -> impl Iterator<Item = i32> {
    (0..=2 * last).map(|i| if i % 2 == 0 { i / 2 } else { -(i + 1) / 2 })
}

/// The scale of `x ~ scale * q` with integers `-levels <= q < levels`, minimal in the error weighted by
/// `w`; 0 for a group of zeros.
///
/// The element of the largest magnitude decides the sign, so that it may use the longer negative side.
pub(super) fn symmetric<const N: usize>(x: &[f32; N], w: &[f32; N], levels: f32) -> f32 {
    let extreme = extreme(x);
    let unit = -1.0 / extreme;
    if extreme == 0.0 || !(unit * levels * 2.0).is_finite() {
        return 0.0;
    }
    let (mut best, mut scale) = (0.0, 1.0 / (unit * levels));
    // The plain scale first: where others are as good, its half-precision number is the likelier exact one.
    for step in outwards(9) {
        let q = to_grid(x, (levels + 0.1 * step as f32) * unit, 0.0, -levels, levels - 1.0);
        let xq = sum::<N>(|i| w[i] * x[i] * q[i]);
        let qq = sum::<N>(|i| w[i] * q[i] * q[i]);
        // The regression leaves sum(w x^2) - xq^2 / qq.
        if qq > 0.0 && xq * xq > best * qq {
            best = xq * xq / qq;
            scale = xq / qq;
        }
    }
    scale
}

/// `(scale, offset)` of `x ~ scale * q + offset` with integers `0 <= q <= top`, minimal in the error
/// weighted by `w`. With `may_rise` false the offset is at most 0, as K-quants store it.
pub(super) fn affine<const N: usize>(x: &[f32; N], w: &[f32; N], top: f32, may_rise: bool) -> (f32, f32) {
    let high = x.iter().copied().fold(f32::MIN, f32::max);
    let low = x.iter().copied().fold(if may_rise { f32::MAX } else { 0.0 }, f32::min);
    if high <= low || !(2.0 * top / (high - low)).is_finite() {
        return (0.0, low);
    }
    // Sums over y = x - low, whose magnitude is that of the range: no cancellation for far offsets.
    let y: [f32; N] = std::array::from_fn(|i| x[i] - low);
    let one = sum::<N>(|i| w[i]);
    let y1 = sum::<N>(|i| w[i] * y[i]);
    let plain = (high - low) / top;
    let reach = 2.0 * high.abs().max(low.abs());
    let mut best = (f32::INFINITY, plain, low);
    for step in outwards(10) {
        // From the best offset so far on: a good one may be far from the smallest value.
        let origin = best.2 - low;
        let unit = 1.0 / (high - low - origin);
        let q = to_grid(&y, (top + 0.1 * step as f32) * unit, origin, 0.0, top);
        let q1 = sum::<N>(|i| w[i] * q[i]);
        let qq = sum::<N>(|i| w[i] * q[i] * q[i]);
        let yq = sum::<N>(|i| w[i] * y[i] * q[i]);
        let determinant = one * qq - q1 * q1;
        if determinant <= FLAT * one * qq {
            continue;
        }
        let mut scale = (one * yq - y1 * q1) / determinant;
        let mut rest = (qq * y1 - q1 * yq) / determinant;
        if !may_rise && low + rest > 0.0 {
            rest = -low;
            scale = (yq + low * q1) / qq;
        }
        // The error less sum(w y^2), which is the same for every step.
        let error =
            scale * (scale * qq - 2.0 * yq) + rest * (rest * one - 2.0 * y1) + 2.0 * scale * rest * q1;
        let offset = low + rest;
        if error < best.0 && (0.0..=2.0 * plain).contains(&scale) && offset.abs() <= reach {
            best = (error, scale, offset);
        }
    }
    (best.1, best.2)
}
