//! Weights to blocks: from `f32` to every type that GGUF files of this toolchain hold.
//!
//! [`quantize_rows`] encodes, [`Mix`] says which tensor becomes which type. Reading blocks is the
//! runtime's business (`edge_runtime::kernels::dequantize_row`); files are [`crate::export`]'s.

pub mod awq;
mod blocks;
pub mod budget;
pub mod calibrate;
mod encoding;
mod gptq;
pub(crate) mod grid;
mod held;
mod imatrix;
mod mix;
pub(crate) mod moments;
mod non_linear;
mod search;
mod super_blocks;
pub(crate) mod widen;

use edge_runtime::format::{DType, f32_to_bf16, f32_to_f16};
use rayon::prelude::*;

pub use crate::export::gguf::export as quantize_file;
pub use encoding::Encoding;
pub(crate) use held::hold;
pub use held::{Blocks, HeldModel};
pub use imatrix::{Imatrix, ImatrixError};
pub use mix::{Mix, UnknownMix};

/// Why values could not be quantized.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[allow(missing_docs)]
pub enum QuantizeError {
    /// Not a number, infinite, or beyond what the type's scales reach.
    #[error("row {row}, column {col} is {found}, expected a magnitude of at most {limit} for {dtype}")]
    Value { row: usize, col: usize, found: f32, limit: f32, dtype: &'static str },
    /// The values are not whole rows of whole blocks.
    #[error("{values} values in rows of {cols}, expected whole rows of whole blocks for {dtype}")]
    Shape { values: usize, cols: usize, dtype: &'static str },
    /// Importance must be one finite, non-negative number for each column.
    #[error("importance has {found} usable entries, expected {expected}")]
    Importance { found: usize, expected: usize },
}

impl QuantizeError {
    /// The same error for values that begin at row `first` of their tensor.
    pub(crate) fn below(self, first: usize) -> Self {
        match self {
            Self::Value { row, col, found, limit, dtype } => {
                Self::Value { row: row + first, col, found, limit, dtype }
            }
            other => other,
        }
    }

    /// The same error for values that begin at column `first` of their row.
    fn beside(self, first: usize) -> Self {
        match self {
            Self::Value { row, col, found, limit, dtype } => {
                Self::Value { row, col: col + first, found, limit, dtype }
            }
            other => other,
        }
    }
}

/// Quantizes rows of `cols` values each, in parallel; the same bytes on every machine.
///
/// `importance` weighs the squared error of each column (usually the mean square of the activation that
/// meets it); only ratios within it matter. Without it the 32-wide types follow ggml's reference formulas
/// bit for bit; K-types and IQ4_NL always search their scales. F32, F16, BF16 and Q8_0 do not look at it.
///
/// # Errors
/// The first value that the type cannot hold, by row and column; a shape or importance that does not fit.
pub fn quantize_rows(
    dtype: DType,
    values: &[f32],
    cols: usize,
    importance: Option<&[f32]>,
) -> Result<Vec<u8>, QuantizeError> {
    let shape_error = || QuantizeError::Shape { values: values.len(), cols, dtype: dtype.name() };
    let row_bytes = dtype.row_bytes(cols).filter(|bytes| *bytes > 0).ok_or_else(shape_error)?;
    if !values.len().is_multiple_of(cols) {
        return Err(shape_error());
    }
    if let Some(importance) = importance {
        let found = importance.iter().filter(|v| v.is_finite() && **v >= 0.0).count();
        if found != cols || importance.len() != cols {
            return Err(QuantizeError::Importance { found, expected: cols });
        }
    }
    // Between 0 and 1, so that no sum over a block overflows or vanishes.
    let largest = importance.unwrap_or_default().iter().copied().fold(0.0, f32::max);
    let importance: Option<Vec<f32>> =
        importance.map(|list| list.iter().map(|v| if *v > 0.0 { v / largest } else { 0.0 }).collect());
    let importance = importance.as_deref();
    let mut out = vec![0; values.len() / cols * row_bytes];
    out.par_chunks_mut(row_bytes)
        .zip(values.par_chunks(cols))
        .enumerate()
        .map(|(row, (out, values))| {
            quantize_row(dtype, values, importance, out).map_err(|error| error.below(row))
        })
        // The first bad row in order, whichever thread finds one first.
        .collect::<Vec<_>>()
        .into_iter()
        .collect::<Result<(), _>>()?;
    Ok(out)
}

/// Quantizes one row of whole blocks into exactly its bytes.
fn quantize_row(
    dtype: DType,
    row: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<(), QuantizeError> {
    let limit = largest_magnitude(dtype);
    if let Some(col) = row.iter().position(|v| v.is_nan() || v.abs() > limit) {
        return Err(QuantizeError::Value { row: 0, col, found: row[col], limit, dtype: dtype.name() });
    }
    match dtype {
        DType::F32 => encode(row, None, out, |v: &[f32; 1], _| v[0].to_le_bytes()),
        DType::F16 => encode(row, None, out, |v: &[f32; 1], _| f32_to_f16(v[0]).to_le_bytes()),
        DType::BF16 => encode(row, None, out, |v: &[f32; 1], _| f32_to_bf16(v[0]).to_le_bytes()),
        DType::Q8_0 => encode(row, importance, out, blocks::q8_0),
        DType::Q4_0 => encode(row, importance, out, blocks::q4_0),
        DType::Q4_1 => encode(row, importance, out, blocks::q4_1),
        DType::Q5_0 => encode(row, importance, out, blocks::q5_0),
        DType::Q5_1 => encode(row, importance, out, blocks::q5_1),
        DType::Q4K => encode(row, importance, out, super_blocks::q4_k),
        DType::Q5K => encode(row, importance, out, super_blocks::q5_k),
        DType::Q6K => encode(row, importance, out, super_blocks::q6_k),
        DType::Q2K => encode(row, importance, out, super_blocks::q2_k),
        DType::Q3K => encode(row, importance, out, super_blocks::q3_k),
        DType::IQ4NL => encode(row, importance, out, non_linear::iq4_nl),
    }
    Ok(())
}

/// The largest magnitude for which no half-precision number of a block can overflow, a least-squares
/// scale being up to twice the plain one and an offset twice as far from 0 as the values.
fn largest_magnitude(dtype: DType) -> f32 {
    const HALF: f32 = 65_504.0;
    match dtype {
        DType::F32 => f32::MAX,
        // The largest finite bfloat16.
        DType::BF16 => f32::from_bits(0x7f7f_0000),
        DType::F16 => HALF,
        DType::Q4_1 | DType::Q5_1 => HALF / 2.0,
        DType::Q8_0 => HALF * 127.0,
        DType::Q4_0 => HALF * 4.0,
        DType::Q5_0 => HALF * 8.0,
        DType::Q4K | DType::Q5K => HALF * 31.0,
        DType::Q6K => HALF * 2048.0,
        DType::Q2K => HALF,
        DType::Q3K => HALF * 64.0,
        DType::IQ4NL => HALF * 56.0,
    }
}

/// Calls `block` for every `LEN` values of a row and stores its bytes.
fn encode<const LEN: usize, const BYTES: usize>(
    row: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
    block: impl Fn(&[f32; LEN], Option<&[f32; LEN]>) -> [u8; BYTES],
) {
    let importance = importance.map(|importance| importance.as_chunks::<LEN>().0);
    for (i, (x, out)) in row.as_chunks().0.iter().zip(out.as_chunks_mut().0).enumerate() {
        *out = block(x, importance.map(|importance| &importance[i]));
    }
}

#[cfg(test)]
mod tests;
