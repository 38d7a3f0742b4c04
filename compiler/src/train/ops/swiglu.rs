//! The gate of the feed-forward network: `silu(gate) * up`, `silu(x) = x / (1 + exp(-x))`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{exp, matrix, rows_cols, tensor, values, with_values};

/// Elements that one task takes.
const CHUNK: usize = 1 << 13;

struct SwiGlu;

/// `silu(gate) * up`, both `[n, width]`.
///
/// # Errors
/// The shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.apply_op2(up, SwiGlu)
}

#[inline]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, width) = rows_cols(gate_layout, "swiglu")?;
        let (gate, up) = (values(gate, gate_layout, "swiglu")?, values(up, up_layout, "swiglu")?);
        if gate.len() != up.len() {
            bail!("swiglu: gate {:?}, up {:?}", gate_layout.shape(), up_layout.shape());
        }
        let mut y = vec![0.0; n * width];
        y.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(
            |((y, gate), up)| {
                for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gate * sigmoid(*gate) * up;
                }
            },
        );
        Ok(matrix(y, n, width))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, width) = gate.dims2()?;
        let grad = grad.contiguous()?;
        let mut dgate = vec![0.0; n * width];
        let mut dup = vec![0.0; n * width];
        with_values(gate, |gate| {
            with_values(up, |up| {
                with_values(&grad, |grad| {
                    dgate
                        .par_chunks_mut(CHUNK)
                        .zip(dup.par_chunks_mut(CHUNK))
                        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(grad.par_chunks(CHUNK)))
                        .for_each(|((dgate, dup), ((gate, up), grad))| {
                            for i in 0..gate.len() {
                                let s = sigmoid(gate[i]);
                                dup[i] = grad[i] * gate[i] * s;
                                dgate[i] = grad[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                            }
                        });
                    Ok(())
                })
            })
        })?;
        Ok((Some(tensor(dgate, n, width)?), Some(tensor(dup, n, width)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    #[test]
    fn gradient() {
        check::gradients(&[check::matrix(1, 6, 10), check::matrix(2, 6, 10)], |x| swiglu(&x[0], &x[1]));
    }
}
