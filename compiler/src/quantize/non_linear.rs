//! Blocks of 32 weights whose integers are 16 chosen ones: IQ4_NL.

use edge_runtime::format::{f16_to_f32, f32_to_f16};
use edge_runtime::kernels::IQ4_NL_VALUES;

use super::grid::Spacing;
use super::search::{by_magnitude, extreme, inverse, outwards, squared_error, sum};

/// The ends of the range.
const LOW: f32 = IQ4_NL_VALUES[0] as f32;
const HIGH: f32 = IQ4_NL_VALUES[15] as f32;

/// The chosen integers nearest to `inverse * x`.
fn to_grid(x: &[f32; 32], inverse: f32) -> [f32; 32] {
    x.map(|x| Spacing::Chosen.nearest((x * inverse).clamp(LOW, HIGH)))
}

/// `x ~ scale * q`. Without importance elements weigh by magnitude.
pub(super) fn iq4_nl(x: &[f32; 32], importance: Option<&[f32; 32]>) -> [u8; 18] {
    let w = importance.copied().unwrap_or_else(|| by_magnitude(x));
    let extreme = extreme(x);
    let plain = extreme / LOW;
    let mut best = (f32::INFINITY, 0, [0.0; 32]);
    let mut consider = |scale: f32| {
        let half = f32_to_f16(scale);
        let scale = f16_to_f32(half);
        let q = to_grid(x, inverse(scale));
        let error = squared_error(x, &w, &q, scale, 0.0);
        if error < best.0 {
            best = (error, half, q);
        }
    };
    consider(plain);
    // The largest element at either end of the range, or somewhat within or beyond it.
    for end in [LOW, HIGH] {
        for step in outwards(9) {
            let scale = extreme / (end * (1.0 + 0.02 * step as f32));
            let q = to_grid(x, inverse(scale));
            let (xq, qq) = (sum::<32>(|i| w[i] * x[i] * q[i]), sum::<32>(|i| w[i] * q[i] * q[i]));
            let refined = xq / qq;
            if refined.is_finite() && refined.abs() <= 2.0 * plain.abs() {
                consider(refined);
            }
        }
    }
    let (_, half, q) = best;
    let mut out = [0; 18];
    out[..2].copy_from_slice(&half.to_le_bytes());
    store(&q, &mut out);
    out
}

/// Replaces the integers of a block; `q` are chosen ones.
pub(super) fn store(q: &[f32], block: &mut [u8]) {
    let index = |q: f32| IQ4_NL_VALUES.iter().filter(|value| f32::from(**value) < q).count() as u8;
    for (i, byte) in block[2..].iter_mut().enumerate() {
        *byte = index(q[i]) | index(q[i + 16]) << 4;
    }
}
