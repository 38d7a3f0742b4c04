//! Root mean square norm (Zhang and Sennrich, 2019): `y = x * w / sqrt(mean(x^2) + eps)`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{matrix, rows_cols, tensor, values, with_values};

/// Rows that one task takes; fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 32;

struct RmsNorm {
    eps: f32,
}

/// Normalizes the rows of `x` `[n, width]` and multiplies them by `weight` `[width]`.
///
/// # Errors
/// The shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.apply_op2(weight, RmsNorm { eps })
}

impl RmsNorm {
    /// `1 / sqrt(mean(x^2) + eps)` of one row.
    fn inverse(&self, row: &[f32]) -> f32 {
        let sum: f32 = row.iter().map(|x| x * x).sum();
        1.0 / (sum / row.len() as f32 + self.eps).sqrt()
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, width) = rows_cols(x_layout, "rms-norm")?;
        let x = values(x, x_layout, "rms-norm")?;
        let weight = values(weight, weight_layout, "rms-norm")?;
        if weight.len() != width {
            bail!("rms-norm: rows of {width} times a weight of {}", weight.len());
        }
        let mut y = vec![0.0; n * width];
        y.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(ROWS).for_each(|(y, x)| {
            let inverse = self.inverse(x);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * inverse * w;
            }
        });
        Ok(matrix(y, n, width))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, width) = x.dims2()?;
        let grad = grad.contiguous()?;
        let (dx, dweight) = with_values(x, |x| {
            with_values(weight, |weight| with_values(&grad, |grad| Ok(self.backward(x, weight, grad, width))))
        })?;
        let dweight = Tensor::from_vec(dweight, width, &candle_core::Device::Cpu)?;
        Ok((Some(tensor(dx, n, width)?), weight.track_op().then_some(dweight)))
    }
}

impl RmsNorm {
    /// With r = 1 / rms: dx = r * (g * w - x * r^2 * mean(g * w * x)), dw = sum over rows of g * x * r.
    fn backward(&self, x: &[f32], weight: &[f32], grad: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
        let mut dx = vec![0.0; x.len()];
        let partial: Vec<Vec<f32>> = dx
            .par_chunks_mut(ROWS * width)
            .zip(x.par_chunks(ROWS * width))
            .zip(grad.par_chunks(ROWS * width))
            .map(|((dx, x), grad)| {
                let mut dweight = vec![0.0; width];
                let rows =
                    dx.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(grad.chunks_exact(width));
                for ((dx, x), grad) in rows {
                    let inverse = self.inverse(x);
                    let dot: f32 = grad.iter().zip(weight).zip(x).map(|((g, w), x)| g * w * x).sum();
                    let shrink = dot * inverse * inverse / width as f32;
                    for i in 0..width {
                        dx[i] = inverse * (grad[i] * weight[i] - x[i] * shrink);
                        dweight[i] += grad[i] * x[i] * inverse;
                    }
                }
                dweight
            })
            .collect();
        let mut dweight = vec![0.0; width];
        for part in partial {
            for (sum, value) in dweight.iter_mut().zip(part) {
                *sum += value;
            }
        }
        (dx, dweight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    #[test]
    fn gradient() {
        let weight = Tensor::from_vec(check::noise(5, 12), 12, &candle_core::Device::Cpu).unwrap();
        check::gradients(&[check::matrix(1, 70, 12), weight], |x| rms_norm(&x[0], &x[1], 1e-5));
    }

    #[test]
    fn rows_have_unit_root_mean_square() {
        let ones = Tensor::ones(16, candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let y = rms_norm(&check::matrix(3, 4, 16), &ones, 1e-8).unwrap();
        for row in y.to_vec2::<f32>().unwrap() {
            let mean = row.iter().map(|x| x * x).sum::<f32>() / 16.0;
            assert!((mean - 1.0).abs() < 1e-5);
        }
    }
}
