//! One suite, run for every table that this build and CPU have.

extern crate std;

mod float;
mod golden;
mod matmul;
mod tables;
mod tiles;

use super::{Activations, ActivationsMut, Kernels, KeyValues, Matrix, Query, Ring, Scores};
use crate::format::{DType, Layout, f16_to_f32, f32_to_f16};
use proptest::prelude::*;
use std::format;
use std::vec;
use std::vec::Vec;

/// Owned buffers of a batch of activations.
pub struct Batch {
    pub tokens: usize,
    pub cols: usize,
    floats: Vec<f32>,
    quants: Vec<i8>,
}

impl Batch {
    pub fn new(tokens: usize, cols: usize, values: &[f32]) -> Self {
        // What the buffers hold before must not matter.
        let mut floats =
            vec![f32::NAN; ActivationsMut::padded_tokens(tokens) * ActivationsMut::floats_per_token(cols)];
        floats[..tokens * cols].copy_from_slice(values);
        let quants = vec![77; ActivationsMut::padded_tokens(tokens) * ActivationsMut::quants_per_token(cols)];
        Self { tokens, cols, floats, quants }
    }

    pub fn rows(&mut self) -> ActivationsMut<'_> {
        ActivationsMut::new(self.tokens, self.cols, &mut self.floats, &mut self.quants).unwrap()
    }
}

/// Small deterministic random numbers (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Within ±1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// Random weights of a type, whose half-precision factors are within ±1.
    pub fn weights(&mut self, dtype: DType, rows: usize, cols: usize) -> Vec<u8> {
        let mut bytes = self.bytes(dtype.row_bytes(cols).unwrap() * rows);
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            for at in factors(dtype) {
                let half = f32_to_f16(self.float());
                block[*at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
            match dtype {
                DType::F32 => block.copy_from_slice(&self.float().to_le_bytes()),
                DType::BF16 => block.copy_from_slice(&self.float().to_le_bytes()[2..]),
                _ => {}
            }
        }
        bytes
    }
}

/// Where a block has half-precision numbers.
pub fn factors(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::F32 | DType::BF16 => &[],
        DType::F16 | DType::Q8_0 | DType::Q4_0 | DType::Q5_0 => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
        DType::Q6K => &[208],
        #[cfg(feature = "low-bit")]
        DType::Q2K => &[80, 82],
        #[cfg(feature = "low-bit")]
        DType::Q3K => &[108],
        #[cfg(feature = "low-bit")]
        DType::IQ4NL => &[0],
    }
}

pub fn any_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(&DType::ALL)
}

/// Equal bits, or both NaN.
#[track_caller]
pub fn assert_same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: element {i} is {found:e}, expected {expected:e}");
    }
}

/// Runs one product on one thread.
pub fn matmul(kernels: &Kernels, weight: &Matrix, acts: &Activations) -> Vec<f32> {
    let mut out = vec![f32::NAN; acts.tokens() * weight.rows()];
    kernels.matmul(&crate::workers::Single, weight, acts, &mut out).unwrap();
    out
}

/// The cached rows that one query sees: position `first + i` of `len` is row `(first + i) % rows`.
#[derive(Clone, Copy)]
pub struct Span {
    pub stride: usize,
    pub rows: usize,
    pub first: usize,
    pub len: usize,
}

impl Span {
    /// `len` rows from the first of the cache on.
    pub fn new(stride: usize, len: usize) -> Self {
        Self { stride, rows: len, first: 0, len }
    }
}

/// Attention of one query.
pub fn attend(kernels: &Kernels, q: &[f32], cache: KeyValues, span: Span, rule: Scores, out: &mut [f32]) {
    let query = Query { at: 0, first: span.first, end: span.first + span.len };
    let ring = Ring { stride: span.stride, rows: span.rows };
    kernels.attention(q, q.len(), &[query], cache, ring, rule, out);
}
