//! A matrix in blocks: what a file is to hold, or what stays as a file has it, in a fraction of the memory that its
//! values in f32 take.
//!
//! Rows are in Hugging Face's order, as all weights in memory. Nothing here computes with a matrix; whoever does gets
//! its values for as long as needed.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use edge_models::{DecoderSpec, Role};
use edge_runtime::Error;
use edge_runtime::format::DType;
use edge_runtime::kernels::dequantize_row;
use rayon::prelude::*;

use super::{Mix, QuantizeError, quantize_rows};
use crate::model::Weights;

/// A matrix `[rows, cols]` in blocks; clones share them.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    dtype: DType,
    dims: [usize; 2],
    bytes: Arc<[u8]>,
}

impl Blocks {
    /// A matrix whose rows are `bytes`.
    ///
    /// # Errors
    /// The bytes are not those of `rows` rows of `cols` values.
    pub fn new(dtype: DType, [rows, cols]: [usize; 2], bytes: Vec<u8>) -> Result<Self, QuantizeError> {
        let fits = dtype.row_bytes(cols).and_then(|row| row.checked_mul(rows)) == Some(bytes.len());
        if !fits || rows == 0 || cols == 0 {
            let values = rows.saturating_mul(cols);
            return Err(QuantizeError::Shape { values, cols, dtype: dtype.name() });
        }
        Ok(Self { dtype, dims: [rows, cols], bytes: bytes.into() })
    }

    /// Values `[rows, cols]` in blocks of `dtype`, errors weighed by the `importance` of their columns.
    ///
    /// # Errors
    /// As [`quantize_rows`].
    pub fn quantize(
        dtype: DType,
        dims: [usize; 2],
        values: &[f32],
        importance: Option<&[f32]>,
    ) -> Result<Self, QuantizeError> {
        Self::new(dtype, dims, quantize_rows(dtype, values, dims[1], importance)?)
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> &[usize; 2] {
        &self.dims
    }

    /// The type of its blocks.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its blocks, row after row.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The values of row `row`.
    ///
    /// # Errors
    /// There is no such row, or `out` has not its length.
    pub fn row(&self, row: usize, out: &mut [f32]) -> Result<(), Error> {
        let size = self.bytes.len() / self.dims[0];
        let bytes = self.bytes.get(row * size..(row + 1) * size).unwrap_or_default();
        dequantize_row(self.dtype, bytes, out)
    }

    /// All values, on all threads.
    ///
    /// # Errors
    /// `out` has not `rows * cols` elements.
    pub fn values(&self, out: &mut [f32]) -> Result<(), Error> {
        out.par_chunks_mut(self.dims[1]).enumerate().try_for_each(|(row, out)| self.row(row, out))
    }

    /// All values, as a tensor `[rows, cols]`.
    ///
    /// # Errors
    /// candle refuses.
    pub fn tensor(&self) -> candle_core::Result<Tensor> {
        let mut values = vec![0.0; self.dims[0] * self.dims[1]];
        self.values(&mut values).map_err(candle_core::Error::wrap)?;
        Tensor::from_vec(values, &self.dims[..], &Device::Cpu)
    }
}

/// A model whose matrices are blocks.
#[derive(Clone, Debug)]
pub struct HeldModel {
    /// Hyper-parameters.
    pub spec: DecoderSpec,
    /// Norm weights, biases and tables, f32.
    pub vectors: Weights,
    /// Its matrices by role and layer.
    pub matrices: BTreeMap<(Role, usize), Blocks>,
    /// The blocks are those of the model's file; otherwise they were made here.
    pub as_in_file: bool,
}

impl HeldModel {
    /// The types of the matrices, with how many there are of each.
    pub fn types(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for matrix in self.matrices.values() {
            *counts.entry(matrix.dtype().name()).or_default() += 1;
        }
        counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    }
}

/// The matrix of `role` in `layer` in the type that `mix` has for it.
///
/// # Errors
/// As [`quantize_rows`].
pub(crate) fn hold(
    values: &[f32],
    role: Role,
    layer: usize,
    spec: &DecoderSpec,
    mix: Mix,
) -> Result<Blocks, QuantizeError> {
    Blocks::quantize(mix.dtype(role, layer, spec), role.shape(spec), values, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_give_their_values() {
        let values: Vec<f32> = (0..5 * 64).map(|i| (i as f32 * 0.7).sin()).collect();
        let blocks = Blocks::quantize(DType::Q8_0, [5, 64], &values, None).unwrap();
        assert_eq!(blocks.bytes().len(), 5 * 2 * 34);
        let mut all = vec![0.0; 5 * 64];
        blocks.values(&mut all).unwrap();
        assert!(values.iter().zip(&all).all(|(a, b)| (a - b).abs() < 0.005));
        let mut one = vec![0.0; 64];
        blocks.row(3, &mut one).unwrap();
        assert_eq!(one, all[3 * 64..4 * 64]);
        assert_eq!(blocks.tensor().unwrap().to_vec2::<f32>().unwrap().concat(), all);
        assert!(blocks.row(5, &mut one).is_err() && blocks.values(&mut all[..63]).is_err());
    }

    #[test]
    fn other_sizes_are_refused() {
        assert!(Blocks::new(DType::Q8_0, [2, 64], vec![0; 135]).is_err());
        assert!(Blocks::new(DType::Q8_0, [2, 40], vec![0; 136]).is_err());
        assert!(Blocks::new(DType::F32, [0, 4], vec![]).is_err());
        assert!(Blocks::new(DType::F32, [usize::MAX, usize::MAX], vec![]).is_err());
    }
}
