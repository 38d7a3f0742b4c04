//! Rotary angles (Su et al. 2021, arXiv 2104.09864).
//!
//! Computed in `f64`, so that position 100,000 is as exact as position 1, and the same on every machine.

use crate::format::TensorInfo;
use crate::kernels::dequantize_row;
use crate::{Code, Error, Result};
use edge_models::DecoderSpec;

/// Where the inverse frequencies of a model come from.
pub(super) struct Frequencies<'a> {
    spec: &'a DecoderSpec,
    /// One divisor for each frequency, if the file has them.
    table: Option<TensorInfo<'a>>,
}

impl<'a> Frequencies<'a> {
    /// The frequencies of `spec` with the file's divisors, `head_dim / 2` of them, if there are any.
    pub(super) fn new(spec: &'a DecoderSpec, table: Option<TensorInfo<'a>>) -> Self {
        Self { spec, table }
    }

    /// Radians per token of pair `index`: `theta^(-2 index / head_dim)`, divided as the scaling asks.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] if it is not a positive number: then the file's scaling is nonsense;
    /// [`Code::UnsupportedType`] if the table is quantized.
    pub(super) fn get(&self, index: usize) -> Result<f64> {
        let rope = &self.spec.rope;
        let exact = libm::pow(rope.theta, -((2 * index) as f64) / self.spec.head_dim as f64);
        let frequency = exact / rope.scaling.divisor(exact) / f64::from(self.divisor(index)?);
        if frequency > 0.0 && frequency.is_finite() {
            Ok(frequency)
        } else {
            Err(Error::new(Code::OutOfRange, "rope scaling")
                .found(index as u64, 0)
                .hint("the frequency of this pair of elements is not a positive number"))
        }
    }

    fn divisor(&self, index: usize) -> Result<f32> {
        let Some(table) = &self.table else { return Ok(1.0) };
        let element = table.dtype.filter(|dtype| dtype.is_float()).and_then(|dtype| {
            let size = dtype.block_bytes();
            Some((dtype, table.data.get(index * size..)?.get(..size)?))
        });
        let Some((dtype, bytes)) = element else {
            return Err(Error::new(Code::UnsupportedType, table.name).found(u64::from(table.type_id), 0));
        };
        let mut divisor = [0.0];
        dequantize_row(dtype, bytes, &mut divisor)?;
        Ok(divisor[0])
    }
}

/// Fills the cosines and sines of the tokens from `position` on, `[tokens, head_dim / 2]`.
pub(super) fn angles(frequencies: &[f64], position: usize, cos: &mut [f32], sin: &mut [f32]) {
    let half = frequencies.len();
    for (token, (cos, sin)) in cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half)).enumerate() {
        let position = (position + token) as f64;
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(frequencies) {
            let (s, c) = libm::sincos(position * frequency);
            (*cos, *sin) = (c as f32, s as f32);
        }
    }
}
