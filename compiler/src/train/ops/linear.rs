//! `y = x W^T`, with gradients that come out in the layout of the weights.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{Matrix, apply2, matrix, product, product_into, rows_cols, tensor, values, with_values};
use crate::train::gradients::into_buffer;

struct Linear;

/// `x W^T`: `x` is `[n, in]`, `weight` `[out, in]`, the result `[n, out]`.
///
/// # Errors
/// The shapes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    apply2(x, weight, Linear)
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, cols) = rows_cols(x_layout, "linear")?;
        let (out, weight_cols) = rows_cols(weight_layout, "linear")?;
        if cols != weight_cols {
            bail!("linear: {cols} columns times a weight of {weight_cols}");
        }
        let x = Matrix::new(values(x, x_layout, "linear")?, n, cols);
        let weight = Matrix::new(values(weight, weight_layout, "linear")?, out, cols);
        Ok(matrix(product(x, weight.t(), 1.0)?, n, out))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((n, cols), (out, _)) = (x.dims2()?, weight.dims2()?);
        let grad = grad.contiguous()?;
        with_values(&grad, |grad| {
            let grad = Matrix::new(grad, n, out);
            let dx = || {
                with_values(weight, |weight| {
                    tensor(product(grad, Matrix::new(weight, out, cols), 1.0)?, n, cols)
                })
            };
            let dweight = || {
                with_values(x, |x| {
                    let x = Matrix::new(x, n, cols);
                    let buffered = into_buffer(weight, |sum, add| product_into(sum, grad.t(), x, 1.0, add))?;
                    if buffered {
                        return Ok(None);
                    }
                    tensor(product(grad.t(), x, 1.0)?, out, cols).map(Some)
                })
            };
            // What is frozen, and states that depend on nothing trained, need no gradient.
            let dweight = if weight.track_op() { dweight()? } else { None };
            Ok((x.track_op().then(dx).transpose()?, dweight))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;
    use candle_core::Var;

    #[test]
    fn gradient() {
        check::gradients(&[check::matrix(1, 5, 8), check::matrix(2, 6, 8)], |x| linear(&x[0], &x[1]));
    }

    /// A gradient that nobody asks for is a product for nothing.
    #[test]
    fn what_is_frozen_gets_no_gradient() {
        let (x, weight) = (check::matrix(1, 5, 8), check::matrix(2, 6, 8));
        let (x_var, weight_var) = (Var::from_tensor(&x).unwrap(), Var::from_tensor(&weight).unwrap());
        let grad = check::matrix(3, 5, 6);
        let gradients = |x: &Tensor, weight: &Tensor| {
            let (dx, dweight) = Linear.bwd(x, weight, &grad, &grad).unwrap();
            (dx.is_some(), dweight.is_some())
        };
        assert_eq!(gradients(&x_var, &weight), (true, false));
        assert_eq!(gradients(&x, &weight_var), (false, true));
        // A variable behind an operation counts.
        assert_eq!(gradients(&(x_var.as_tensor() * 2.0).unwrap(), &weight_var), (true, true));
    }

    #[test]
    fn shapes_must_fit() {
        assert!(linear(&check::matrix(1, 5, 8), &check::matrix(2, 6, 7)).is_err());
    }
}
