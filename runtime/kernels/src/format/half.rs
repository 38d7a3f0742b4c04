//! IEEE half precision and bfloat16, in integer arithmetic, the same on every machine.

/// A half-precision number's bits as `f32`, exactly.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    if magnitude >= 0x7c00 {
        // Infinity or NaN: the exponent becomes all ones.
        return f32::from_bits(sign | 0x7f80_0000 | (magnitude & 0x3ff) << 13);
    }
    if magnitude >= 0x0400 {
        return f32::from_bits(sign | ((magnitude << 13) + (112 << 23)));
    }
    // Subnormal: a multiple of 2^-24, exact in f32.
    let value = magnitude as f32 * f32::from_bits(0x3380_0000);
    f32::from_bits(sign | value.to_bits())
}

/// `value` as half precision, rounded to nearest even; beyond the range it becomes infinite.
#[inline]
pub fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    if magnitude >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if magnitude >= 0x3880_0000 {
        // Normal: round the 13 dropped bits to nearest even, then re-bias; a carry into the exponent
        // is the right result, up to and including infinity.
        let rounded = magnitude + 0x0fff + (magnitude >> 13 & 1);
        return sign | ((rounded - (112 << 23)) >> 13) as u16;
    }
    // Subnormal: adding 0.5 puts the multiple of 2^-24 into the low bits, rounded by the adder.
    let shifted = f32::from_bits(magnitude) + 0.5;
    sign | (shifted.to_bits() & 0xffff) as u16
}

/// A bfloat16 number's bits as `f32`, exactly.
#[inline]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// `value` as bfloat16, rounded to nearest even.
#[inline]
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let value = f16_to_f32(bits);
            if value.is_nan() {
                assert!(f16_to_f32(f32_to_f16(value)).is_nan());
            } else {
                assert_eq!(f32_to_f16(value), bits, "{value}");
                assert_eq!(f32_to_bf16(bf16_to_f32(bits)), bits);
            }
        }
    }

    #[test]
    fn rounds_to_nearest_even() {
        assert_eq!(f32_to_f16(1.0 + 1.0 / 2048.0), 0x3c00);
        assert_eq!(f32_to_f16(1.0 + 3.0 / 2048.0), 0x3c02);
        assert_eq!(f32_to_f16(65519.0), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(2.0f32.powi(-25)), 0);
        assert_eq!(f32_to_f16(2.0f32.powi(-25) * 1.5), 1);
        assert_eq!(f32_to_f16(-2.0f32.powi(-24)), 0x8001);
    }
}
