//! Rounds a matrix column after column, each making up for the errors of those before it.
//!
//! GPTQ (Frantar et al. 2023) in the form of LDLQ (Chee et al. 2023, "QuIP", theorem 6: the two are the same):
//! with `X^T X = V V^T`, `V` upper triangular, the output error `|X (W - Q)^T|^2` of a row is the sum over columns `i`
//! of `V[i][i]^2 (w_i + sum_{j < i} (w_j - q_j) V[j][i] / V[i][i] - q_i)^2`, so each column rounds the
//! expression in the parentheses. Scales are searched where a block begins, on the values that are to be rounded
//! there, each weighed by its `V[i][i]^2`. Columns keep their order: blocks of the file format lie along rows.

use edge_runtime::format::DType;
use rayon::prelude::*;

use super::grid::{Grid, store};
use super::moments::Factor;
use super::{QuantizeError, quantize_row};
use crate::train::ops::{Matrix, gemm};

/// Rows that one thread takes at a time.
const ROWS: usize = 16;

/// A matrix that was rounded.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// Type of the blocks.
    pub dtype: DType,
    /// Blocks, row after row.
    pub blocks: Vec<u8>,
    /// What was rounded to them: the weights with everything that they make up for, `[rows, cols]`.
    pub latent: Vec<f32>,
}

/// Rounds `weights` `[rows, cols]` to blocks of `dtype`, which must be no floating-point type, for inputs whose Gram
/// matrix `factor` was made of.
///
/// # Errors
/// A row is not a whole number of blocks, or a value is beyond what the type's scales reach.
pub fn round(dtype: DType, weights: &[f32], cols: usize, factor: &Factor) -> Result<Rounded, QuantizeError> {
    let shape_error = || QuantizeError::Shape { values: weights.len(), cols, dtype: dtype.name() };
    let row_bytes = dtype.row_bytes(cols).filter(|bytes| *bytes > 0).ok_or_else(shape_error)?;
    if dtype.is_float() || !weights.len().is_multiple_of(cols) {
        return Err(shape_error());
    }
    let feedback = factor.feedback();
    let mut importance = factor.importance();
    let largest = importance.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    importance.iter_mut().for_each(|v| *v /= largest);
    let mut blocks = vec![0; weights.len() / cols * row_bytes];
    let mut latent = vec![0.0; weights.len()];
    let rows = Rows { dtype, cols, feedback: &feedback, importance: &importance };
    blocks
        .par_chunks_mut(ROWS * row_bytes)
        .zip(latent.par_chunks_mut(ROWS * cols))
        .zip(weights.par_chunks(ROWS * cols))
        .enumerate()
        .map(|(chunk, ((blocks, latent), weights))| {
            rows.round(weights, latent, blocks).map_err(|error| error.below(chunk * ROWS))
        })
        .collect::<Vec<_>>()
        .into_iter()
        .collect::<Result<(), _>>()?;
    Ok(Rounded { dtype, blocks, latent })
}

/// What all rows have in common.
struct Rows<'a> {
    dtype: DType,
    cols: usize,
    /// [`Factor::feedback`].
    feedback: &'a [f32],
    /// [`Factor::importance`], the largest being 1.
    importance: &'a [f32],
}

impl Rows<'_> {
    /// Rounds some rows, one block of columns after the other.
    fn round(&self, weights: &[f32], latent: &mut [f32], blocks: &mut [u8]) -> Result<(), QuantizeError> {
        let (cols, len, bytes) = (self.cols, self.dtype.block_len(), self.dtype.block_bytes());
        let rows = weights.len() / cols;
        let row_bytes = cols / len * bytes;
        // w - q of every column that is done.
        let mut errors = vec![0.0; weights.len()];
        let mut correction = vec![0.0; rows * len];
        for first in (0..cols).step_by(len) {
            let done = Matrix::strided(&errors, rows, first, cols);
            let feedback = Matrix::strided(&self.feedback[first..], first, len, cols);
            correction.fill(0.0);
            if first > 0 {
                gemm(&mut correction, done, feedback, 1.0, false, false);
            }
            for row in 0..rows {
                let at = row * cols + first;
                let block = &mut blocks[row * row_bytes + first / len * bytes..][..bytes];
                let wanted = &mut latent[at..at + len];
                for ((wanted, weight), correction) in
                    wanted.iter_mut().zip(&weights[at..]).zip(&correction[row * len..])
                {
                    *wanted = weight + correction;
                }
                self.round_block(first, &weights[at..][..len], wanted, &mut errors[at..][..len], block)
                    .map_err(|error| error.beside(first).below(row))?;
            }
        }
        Ok(())
    }

    /// Rounds the `wanted` values of one block that begins at column `first`; they move on while its columns are
    /// rounded.
    fn round_block(
        &self,
        first: usize,
        weights: &[f32],
        wanted: &mut [f32],
        errors: &mut [f32],
        block: &mut [u8],
    ) -> Result<(), QuantizeError> {
        let len = weights.len();
        quantize_row(self.dtype, wanted, Some(&self.importance[first..first + len]), block)?;
        let Some(grid) = Grid::of(self.dtype, block) else { return Ok(()) };
        let mut integers = [0.0; 256];
        for column in 0..len {
            let q = grid.nearest(column, wanted[column]);
            integers[column] = q;
            let error = weights[column] - grid.value(column, q);
            errors[column] = error;
            let feedback = &self.feedback[(first + column) * self.cols + first..][column + 1..len];
            wanted[column + 1..].iter_mut().zip(feedback).for_each(|(w, a)| *w += error * a);
        }
        store(self.dtype, &integers[..len], block);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::moments::Moments;
    use crate::quantize::quantize_rows;
    use crate::train::ops::check;
    use edge_runtime::kernels::dequantize_row;

    const COLS: usize = 256;

    /// Inputs that depend on each other, some much larger than others, as activations do.
    fn inputs() -> Vec<f32> {
        let tokens = 2 * COLS;
        let mut x = check::noise(1, tokens * COLS);
        for row in x.chunks_mut(COLS) {
            for i in 1..COLS {
                row[i] = 0.7 * row[i - 1] + 0.5 * row[i];
            }
            for i in (0..COLS).step_by(19) {
                row[i] *= 6.0;
            }
        }
        x
    }

    fn moments(x: &[f32]) -> Moments {
        let mut moments = Moments::new(COLS, 0);
        let x = candle_core::Tensor::from_slice(x, (x.len() / COLS, COLS), &candle_core::Device::Cpu);
        moments.add(&x.unwrap(), None).unwrap();
        moments
    }

    /// `|X (W - Q)^T|^2`.
    fn output_error(gram: &[f64], weights: &[f32], dtype: DType, blocks: &[u8]) -> f64 {
        let mut values = vec![0.0; weights.len()];
        dequantize_row(dtype, blocks, &mut values).unwrap();
        let rows = weights.chunks(COLS).zip(values.chunks(COLS));
        rows.map(|(w, q)| {
            let e: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect();
            (0..COLS).map(|i| e[i] * (0..COLS).map(|j| gram[i * COLS + j] * e[j]).sum::<f64>()).sum::<f64>()
        })
        .sum()
    }

    /// The point of it all, and that blocks hold what was rounded: latents rounded to their grids are the blocks.
    #[test]
    fn the_output_error_falls_well_below_that_of_plain_rounding() {
        let moments = moments(&inputs());
        let factor = Factor::new(&moments.gram, COLS, 0.01).unwrap();
        let weights = check::noise(2, 20 * COLS);
        let importance: Vec<f32> = (0..COLS).map(|i| moments.gram[i * COLS + i] as f32).collect();
        for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
            let rounded = round(dtype, &weights, COLS, &factor).unwrap();
            let plain = quantize_rows(dtype, &weights, COLS, None).unwrap();
            let weighted = quantize_rows(dtype, &weights, COLS, Some(&importance)).unwrap();
            let [found, plain, weighted] = [&rounded.blocks, &plain, &weighted]
                .map(|blocks| output_error(&moments.gram, &weights, dtype, blocks));
            assert!(found < 0.6 * plain.min(weighted), "{}: {found} {plain} {weighted}", dtype.name());
            for (block, latent) in
                rounded.blocks.chunks(dtype.block_bytes()).zip(rounded.latent.chunks(dtype.block_len()))
            {
                let grid = Grid::of(dtype, block).unwrap();
                let q: Vec<f32> = latent.iter().enumerate().map(|(i, x)| grid.nearest(i, *x)).collect();
                let mut again = block.to_vec();
                store(dtype, &q, &mut again);
                assert_eq!(again, block, "{}", dtype.name());
            }
        }
    }

    /// Without dependence between columns there is nothing to make up for.
    #[test]
    fn independent_inputs_leave_the_weights_as_they_are() {
        let mut gram = vec![0.0; COLS * COLS];
        (0..COLS).for_each(|i| gram[i * COLS + i] = 1.0 + i as f64);
        let factor = Factor::new(&gram, COLS, 0.0).unwrap();
        let weights = check::noise(3, 3 * COLS);
        let rounded = round(DType::Q4_0, &weights, COLS, &factor).unwrap();
        assert_eq!(rounded.latent, weights);
        let importance: Vec<f32> = (0..COLS).map(|i| 1.0 + i as f32).collect();
        let searched = quantize_rows(DType::Q4_0, &weights, COLS, Some(&importance)).unwrap();
        assert_eq!(rounded.blocks, searched);
    }

    #[test]
    fn refuses_by_row_and_column() {
        let factor = Factor::new(&moments(&inputs()).gram, COLS, 0.01).unwrap();
        let mut weights = check::noise(3, 40 * COLS);
        weights[33 * COLS + 70] = f32::INFINITY;
        let error = round(DType::Q4_0, &weights, COLS, &factor).unwrap_err();
        assert!(matches!(error, QuantizeError::Value { row: 33, col: 70, .. }), "{error}");
        assert!(round(DType::F16, &weights, COLS, &factor).is_err());
        assert!(round(DType::Q4_0, &weights[1..], COLS, &factor).is_err());
    }
}
