//! Blocks of 32 values as 8-bit integers with one scale, one value at a time.

use super::activations::BLOCK;
use super::float::TINY;
use crate::format::f32_to_f16;

/// Up to 32 values as `scale * q`, `q` within ±127 and rounded to nearest even. A value that is not finite
/// makes the scale NaN.
#[inline(never)]
pub(crate) fn quantize(values: &[f32]) -> (f32, [i8; BLOCK]) {
    /// Adding 1.5 * 2^23 leaves no bits for a fraction, so the adder rounds to nearest even.
    const SHIFT: f32 = 12_582_912.0;
    let mut quants = [0; BLOCK];
    // Without the sign, floats are ordered as their bits are, and what is not finite comes last.
    let peak = f32::from_bits(values.iter().fold(0, |peak, x| peak.max(x.to_bits() & 0x7fff_ffff)));
    if !peak.is_finite() {
        return (f32::NAN, quants);
    }
    if peak <= TINY {
        return (0.0, quants);
    }
    let inverse = 127.0 / peak;
    for (quant, value) in quants.iter_mut().zip(values) {
        *quant = (value * inverse + SHIFT).to_bits() as i8;
    }
    (peak / 127.0, quants)
}

/// A block of ggml's type Q8_0: the scale in half precision, then the integers.
pub fn q8_0_block(values: &[f32; BLOCK]) -> [u8; 34] {
    let (scale, quants) = quantize(values);
    let mut block = [0; 34];
    block[..2].copy_from_slice(&f32_to_f16(scale).to_le_bytes());
    for (byte, quant) in block[2..].iter_mut().zip(quants) {
        *byte = quant as u8;
    }
    block
}
