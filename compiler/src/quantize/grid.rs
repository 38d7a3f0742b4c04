//! What the scales of a block allow: the values `scale * q + offset` for integers `q`.
//!
//! A search ([`super::quantize_rows`]) chooses scales and integers together. Who rounds one weight after another, or
//! trains the weights behind fixed scales, needs the two apart: [`Grid::of`] reads the scales of a block,
//! [`store`] replaces its integers. Both know the layouts of ggml's blocks and decide nothing.

use edge_runtime::format::{DType, f16_to_f32};
use edge_runtime::kernels::{IQ4_NL_VALUES, q3_k_scale};

pub(crate) use super::search::{inverse, round};
use super::{blocks, non_linear, super_blocks};

/// Most groups that a block has.
const MOST_GROUPS: usize = 16;

/// The scales of one block. [`Grid::value`] is what a reader of the block computes, bit for bit.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    group: usize,
    low: f32,
    high: f32,
    spacing: Spacing,
    /// Scale, its inverse, and offset of each group.
    steps: [[f32; 3]; MOST_GROUPS],
}

/// Which integers of their range a type has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Spacing {
    /// All of them.
    Even,
    /// Those of IQ4_NL.
    Chosen,
}

impl Spacing {
    /// The integers of `dtype`.
    pub fn of(dtype: DType) -> Self {
        if dtype == DType::IQ4NL { Self::Chosen } else { Self::Even }
    }

    /// The integer nearest to `x`, which is within the range.
    pub fn nearest(self, x: f32) -> f32 {
        match self {
            Self::Even => round(x),
            Self::Chosen => {
                let above = |pair: &[i8; 2]| x > 0.5 * (f32::from(pair[0]) + f32::from(pair[1]));
                let index = IQ4_NL_VALUES.array_windows().filter(|pair| above(pair)).count();
                f32::from(IQ4_NL_VALUES[index])
            }
        }
    }
}

/// Offset of types that have none: `x + -0.0` is `x`, also where that is -0.
const NONE: f32 = -0.0;

/// Weights that share a scale, and the range of their integers; `None` for floating-point types.
pub fn geometry(dtype: DType) -> Option<(usize, f32, f32)> {
    Some(match dtype {
        DType::F32 | DType::F16 | DType::BF16 => return None,
        DType::Q8_0 => (32, -127.0, 127.0),
        DType::Q4_0 => (32, -8.0, 7.0),
        DType::Q5_0 => (32, -16.0, 15.0),
        DType::Q4_1 | DType::Q4K => (32, 0.0, 15.0),
        DType::Q5_1 | DType::Q5K => (32, 0.0, 31.0),
        DType::Q6K => (16, -32.0, 31.0),
        DType::Q2K => (16, 0.0, 3.0),
        DType::Q3K => (16, -4.0, 3.0),
        DType::IQ4NL => (32, -127.0, 113.0),
    })
}

impl Grid {
    /// The grid of one block, whose bytes these are; `None` for floating-point types, which have none.
    ///
    /// # Panics
    /// If `block` is no whole block of `dtype`: a fault of the caller.
    pub fn of(dtype: DType, block: &[u8]) -> Option<Self> {
        let (group, low, high) = geometry(dtype)?;
        assert_eq!(block.len(), dtype.block_bytes(), "bytes of a block");
        let steps = [[0.0; 3]; MOST_GROUPS];
        let mut grid = Self { group, low, high, spacing: Spacing::of(dtype), steps };
        let half = |at: usize| f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]));
        for (index, step) in grid.steps[..dtype.block_len() / group].iter_mut().enumerate() {
            let (scale, offset) = match dtype {
                DType::Q4_1 | DType::Q5_1 => (half(0), half(2)),
                DType::Q4K | DType::Q5K => {
                    let (scale, min) = super_blocks::scale_min(&block[4..16], index);
                    (half(0) * f32::from(scale), -(half(2) * f32::from(min)))
                }
                DType::Q2K => {
                    let (scale, min) = (block[index] & 15, block[index] >> 4);
                    (half(80) * f32::from(scale), -(half(82) * f32::from(min)))
                }
                DType::Q3K => {
                    let scale = q3_k_scale(block.first_chunk().expect("a super-block"), index);
                    (half(108) * f32::from(scale), NONE)
                }
                DType::Q6K => (half(208) * f32::from(block[192 + index] as i8), NONE),
                _ => (half(0), NONE),
            };
            *step = [scale, inverse(scale), offset];
        }
        Some(grid)
    }

    /// The integer whose value is nearest to `x`, the weight at `index` of the block.
    pub fn nearest(&self, index: usize, x: f32) -> f32 {
        let [_, inverse, offset] = self.steps[index / self.group];
        self.spacing.nearest(((x - offset) * inverse).clamp(self.low, self.high))
    }

    /// What integer `q` stands for at `index` of the block.
    pub fn value(&self, index: usize, q: f32) -> f32 {
        let [scale, _, offset] = self.steps[index / self.group];
        scale * q + offset
    }

    /// `(scale, offset)` of the group at `index` of the groups.
    pub fn step(&self, index: usize) -> (f32, f32) {
        let [scale, _, offset] = self.steps[index];
        (scale, offset)
    }
}

/// Replaces the integers of a block, keeping its scales; `q` as [`Grid::nearest`] gives them, one for each weight.
///
/// # Panics
/// If `block` or `q` is no whole block of `dtype`, or `dtype` has no integers: a fault of the caller.
pub fn store(dtype: DType, q: &[f32], block: &mut [u8]) {
    assert_eq!([block.len(), q.len()], [dtype.block_bytes(), dtype.block_len()], "a whole block");
    let (_, low, _) = geometry(dtype).expect("a type with integers");
    match dtype {
        DType::Q8_0 => block[2..].iter_mut().zip(q).for_each(|(byte, q)| *byte = *q as i8 as u8),
        DType::Q4K | DType::Q5K => super_blocks::store_affine(dtype, &unsigned(q, low), block),
        DType::Q6K => super_blocks::store_q6_k(&unsigned(q, low), block),
        DType::Q2K => super_blocks::store_two_bits(&unsigned(q, low), &mut block[16..80]),
        DType::Q3K => super_blocks::store_q3_k(&unsigned(q, low), block),
        DType::IQ4NL => non_linear::store(q, block),
        _ => blocks::store(dtype, &unsigned(q, low), block),
    }
}

/// The integers less the smallest one, as blocks store them.
fn unsigned<const N: usize>(q: &[f32], low: f32) -> [u8; N] {
    std::array::from_fn(|i| (q[i] - low) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::quantize_rows;
    use crate::train::ops::check;
    use edge_runtime::kernels::dequantize_row;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// Grid and blocks mean the same, down to the sign of zero, and other integers can be put in.
    #[test]
    fn values_are_those_of_the_runtime_bit_for_bit() {
        for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
            let (_, low, high) = geometry(dtype).unwrap();
            for (seed, scale) in [(1, 0.1), (2, 30.0), (3, -1.0)] {
                let row: Vec<f32> = check::noise(seed, 1024).iter().map(|x| x * scale).collect();
                let mut blocks = quantize_rows(dtype, &row, 1024, None).unwrap();
                let random = check::noise(seed + 9, 1024);
                // Integers have no -0.
                let spacing = Spacing::of(dtype);
                let integers = random.iter().map(|x| spacing.nearest(low + (high - low) * x.abs()) + 0.0);
                let integers: Vec<f32> = integers.collect();
                let mut expected = Vec::new();
                let (len, bytes) = (dtype.block_len(), dtype.block_bytes());
                for (block, q) in blocks.chunks_mut(bytes).zip(integers.chunks(len)) {
                    let grid = Grid::of(dtype, block).unwrap();
                    expected.extend(q.iter().enumerate().map(|(i, q)| grid.value(i, *q)));
                    store(dtype, q, block);
                }
                let mut found = vec![0.0; 1024];
                dequantize_row(dtype, &blocks, &mut found).unwrap();
                assert_eq!(bits(&found), bits(&expected), "{}", dtype.name());
                // A value of the grid rounds to itself.
                for (block, values) in blocks.chunks(bytes).zip(found.chunks(len)) {
                    let grid = Grid::of(dtype, block).unwrap();
                    for (i, value) in values.iter().enumerate() {
                        assert_eq!(grid.value(i, grid.nearest(i, *value)), *value, "{}", dtype.name());
                    }
                }
            }
        }
        assert!(Grid::of(DType::F16, &[0; 2]).is_none());
    }
}
