//! Types that have no tiles, as wider ones that have: the same values, bit for bit.

use edge_runtime::format::DType;
use edge_runtime::kernels::{IQ4_NL_VALUES, q3_k_scale};

use super::super_blocks::store_q6_k;

/// The type that holds every value of `dtype` and lies in tiles, if that is another one.
pub(crate) fn wider(dtype: DType) -> Option<DType> {
    match dtype {
        DType::IQ4NL => Some(DType::Q8_0),
        DType::Q3K => Some(DType::Q6K),
        _ => None,
    }
}

/// Blocks of `dtype` as those of [`wider`].
pub(crate) fn widen(dtype: DType, blocks: &[u8]) -> Vec<u8> {
    match dtype {
        DType::IQ4NL => blocks.as_chunks().0.iter().flat_map(iq4_nl_to_q8_0).collect(),
        DType::Q3K => blocks.as_chunks().0.iter().flat_map(q3_k_to_q6_k).collect(),
        _ => blocks.to_vec(),
    }
}

fn iq4_nl_to_q8_0(block: &[u8; 18]) -> [u8; 34] {
    std::array::from_fn(|at| match at {
        0 | 1 => block[at],
        2..18 => IQ4_NL_VALUES[usize::from(block[at] & 15)] as u8,
        _ => IQ4_NL_VALUES[usize::from(block[at - 16] >> 4)] as u8,
    })
}

/// Both have a half-precision factor and an integer one for every 16 weights.
fn q3_k_to_q6_k(block: &[u8; 110]) -> [u8; 210] {
    let q = std::array::from_fn(|i| {
        let low = block[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
        let high = block[i % 32] >> (i / 32) & 1;
        // Less 4 there, less 32 here.
        (low | high << 2) + 28
    });
    let mut out = [0; 210];
    store_q6_k(&q, &mut out);
    for (j, scale) in out[192..208].iter_mut().enumerate() {
        *scale = q3_k_scale(block, j) as u8;
    }
    out[208..].copy_from_slice(&block[108..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::quantize_rows;
    use crate::train::ops::check;
    use edge_runtime::format::tiled_bytes;
    use edge_runtime::kernels::dequantize_row;

    #[test]
    fn wider_types_mean_the_same_bit_for_bit() {
        let row = check::noise(5, 2048);
        for (dtype, expected) in [(DType::IQ4NL, DType::Q8_0), (DType::Q3K, DType::Q6K)] {
            assert_eq!(wider(dtype), Some(expected));
            assert!(tiled_bytes(dtype, 16, 256).is_none() && tiled_bytes(expected, 16, 256).is_some());
            let blocks = quantize_rows(dtype, &row, 1024, None).unwrap();
            let wide = widen(dtype, &blocks);
            let values = |dtype, blocks: &[u8]| {
                let mut values = vec![f32::NAN; 2048];
                dequantize_row(dtype, blocks, &mut values).unwrap();
                values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert_eq!(values(dtype, &blocks), values(expected, &wide), "{}", dtype.name());
        }
    }
}
