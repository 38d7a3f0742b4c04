//! Rotary angles (Su et al. 2021, arXiv 2104.09864).
//!
//! Computed in `f64`, so that position 100,000 is as exact as position 1, and the same on every machine.

use crate::format::TensorInfo;
use crate::kernels::dequantize_row;
use crate::{Code, Error, Result};
use edge_models::Rope;

/// Where the inverse frequencies of a kind of layers come from.
pub(super) struct Frequencies<'a> {
    rope: &'a Rope,
    /// Elements of a head that are rotated.
    dims: usize,
    /// One divisor for each frequency, if the file has them.
    table: Option<TensorInfo<'a>>,
}

impl<'a> Frequencies<'a> {
    /// The frequencies of `rope` with the file's divisors, `dims / 2` of them, if there are any.
    pub(super) fn new(rope: &'a Rope, dims: usize, table: Option<TensorInfo<'a>>) -> Self {
        Self { rope, dims, table }
    }

    /// Radians per token of pair `index`: `theta^(-2 index / dims)`, divided as the scaling asks.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] if it is not a positive number: then the file's scaling is nonsense;
    /// [`Code::UnsupportedType`] if the table is quantized.
    pub(super) fn get(&self, index: usize) -> Result<f64> {
        let rope = self.rope;
        let exact = libm::pow(rope.theta, -((2 * index) as f64) / self.dims as f64);
        let frequency = exact / rope.scaling.divisor(exact) / f64::from(self.divisor(index)?);
        if frequency > 0.0 && frequency.is_finite() {
            Ok(frequency)
        } else {
            Err(Error::new(Code::OutOfRange, "rope scaling")
                .found(index as u64, 0)
                .hint("this frequency is not a positive number"))
        }
    }

    /// What cosines and sines are multiplied by.
    pub(super) fn magnitude(&self) -> f32 {
        self.rope.scaling.magnitude()
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

/// The angles of one batch for one kind of layers.
pub(super) struct Angles<'a> {
    /// Radians per token of each pair.
    pub(super) frequencies: &'a [f64],
    /// What cosines and sines are multiplied by.
    pub(super) magnitude: f32,
    /// `[batch, frequencies.len()]`.
    pub(super) cos: &'a mut [f32],
    /// `[batch, frequencies.len()]`.
    pub(super) sin: &'a mut [f32],
}

impl Angles<'_> {
    /// Computes them for `tokens` tokens from `position` on.
    pub(super) fn fill(&mut self, position: usize, tokens: usize) {
        let half = self.frequencies.len();
        let rows = self.cos.chunks_exact_mut(half).zip(self.sin.chunks_exact_mut(half));
        for (token, (cos, sin)) in rows.take(tokens).enumerate() {
            let position = (position + token) as f64;
            for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(self.frequencies) {
                let (s, c) = libm::sincos(position * frequency);
                (*cos, *sin) = (c as f32 * self.magnitude, s as f32 * self.magnitude);
            }
        }
    }

    /// Computes, in place of those of the batch's first token, the angles that take a key back by `positions`. Its
    /// magnitude stays.
    pub(super) fn fill_back(&mut self, positions: usize) {
        let angles = self.cos.iter_mut().zip(self.sin.iter_mut()).zip(self.frequencies);
        for ((cos, sin), frequency) in angles {
            let (s, c) = libm::sincos(positions as f64 * frequency);
            (*cos, *sin) = (c as f32, -s as f32);
        }
    }

    /// Cosines and sines of one token of the batch.
    pub(super) fn of(&self, token: usize) -> (&[f32], &[f32]) {
        let half = self.frequencies.len();
        (&self.cos[token * half..][..half], &self.sin[token * half..][..half])
    }
}
