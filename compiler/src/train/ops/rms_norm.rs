//! Root mean square norm (Zhang and Sennrich, 2019): `y = x * w / sqrt(mean(x^2) + eps)`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::sums::{dot, sum_of};
use super::{apply2, fresh, fresh_with, matrix, rows_cols, tensor, values, widest, with_values};

/// Rows that one task takes; fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 32;

struct RmsNorm {
    eps: f32,
}

/// Normalizes the rows of `x` `[n, width]` and multiplies them by `weight` `[width]`; with a shorter `weight`, each part
/// of a row that is as long.
///
/// # Errors
/// The shapes do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    apply2(x, weight, RmsNorm { eps })
}

impl RmsNorm {
    /// `1 / sqrt(mean(x^2) + eps)` of one row.
    fn inverse(&self, row: &[f32]) -> f32 {
        1.0 / (dot(row, row) / row.len() as f32 + self.eps).sqrt()
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
        if weight.is_empty() || !width.is_multiple_of(weight.len()) {
            bail!("rms-norm: rows of {width} times a weight of {}", weight.len());
        }
        let part = weight.len();
        let y = fresh(n * width, ROWS * part, |start, y| {
            for (y, x) in y.chunks_exact_mut(part).zip(x[start..].chunks_exact(part)) {
                let inverse = self.inverse(x);
                widest!({
                    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                        *y = x * inverse * w;
                    }
                });
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
            with_values(weight, |weight| with_values(&grad, |grad| Ok(self.backward(x, weight, grad))))
        })?;
        let dweight = Tensor::from_vec(dweight, weight.dims1()?, &candle_core::Device::Cpu)?;
        Ok((Some(tensor(dx, n, width)?), weight.track_op().then_some(dweight)))
    }
}

impl RmsNorm {
    /// With r = 1 / rms: dx = r * (g * w - x * r^2 * mean(g * w * x)), dw = sum over rows of g * x * r.
    fn backward(&self, x: &[f32], weight: &[f32], grad: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let width = weight.len();
        let ([dx], partial) = fresh_with(x.len(), ROWS * width, |start, [dx]| {
            let mut dweight = vec![0.0; width];
            let (x, grad) = (x[start..].chunks_exact(width), grad[start..].chunks_exact(width));
            let rows = dx.chunks_exact_mut(width).zip(x).zip(grad);
            for ((dx, x), grad) in rows {
                let inverse = self.inverse(x);
                let shrink = sum_of(grad, weight, x, |g, w, x| g * w * x) * inverse * inverse / width as f32;
                widest!({
                    let rows = dx.iter_mut().zip(&mut dweight).zip(x).zip(grad).zip(weight);
                    for ((((dx, dweight), x), grad), w) in rows {
                        *dx = inverse * (grad * w - x * shrink);
                        *dweight += grad * x * inverse;
                    }
                });
            }
            dweight
        });
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
        for parts in [1, 3] {
            check::gradients(&[check::matrix(1, 70, 12 * parts), weight.clone()], |x| {
                rms_norm(&x[0], &x[1], 1e-5)
            });
        }
        assert!(rms_norm(&check::matrix(1, 2, 13), &weight, 1e-5).is_err());
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
