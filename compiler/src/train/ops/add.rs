//! Sums: of two matrices, and of a matrix and one row.

use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail};

use super::{apply2, fresh, matrix, rows_cols, values, widest, with_values};

/// Elements that one task takes.
const CHUNK: usize = 1 << 14;
/// Rows that one task takes.
const ROWS: usize = 32;

/// `a + b` of the same shape.
///
/// # Errors
/// The shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    apply2(a, b, Add)
}

/// `a + row` for each row of `a` `[n, width]`.
///
/// # Errors
/// The shapes do not fit.
pub fn add_row(a: &Tensor, row: &Tensor) -> Result<Tensor> {
    apply2(a, row, AddRow)
}

fn sums(a: &[f32], b: &[f32]) -> Vec<f32> {
    fresh(a.len(), CHUNK, |start, y| {
        widest!(y.iter_mut().zip(&a[start..]).zip(&b[start..]).for_each(|((y, a), b)| *y = a + b));
    })
}

struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if a_layout.shape() != b_layout.shape() {
            bail!("add: {:?} and {:?}", a_layout.shape(), b_layout.shape());
        }
        let (a, b) = (values(a, a_layout, "add")?, values(b, b_layout, "add")?);
        Ok((CpuStorage::F32(sums(a, b)), a_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.clone()), Some(grad.clone())))
    }
}

struct AddRow;

impl CustomOp2 for AddRow {
    fn name(&self) -> &'static str {
        "add-row"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        row: &CpuStorage,
        row_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, width) = rows_cols(a_layout, "add-row")?;
        if row_layout.dims() != [width] {
            bail!("add-row: rows of {width} and a row {:?}", row_layout.shape());
        }
        let (a, row) = (values(a, a_layout, "add-row")?, values(row, row_layout, "add-row")?);
        let y = fresh(a.len(), ROWS * width, |start, y| {
            for (y, a) in y.chunks_exact_mut(width).zip(a[start..].chunks_exact(width)) {
                widest!(y.iter_mut().zip(a).zip(row).for_each(|((y, a), b)| *y = a + b));
            }
        });
        Ok(matrix(y, n, width))
    }

    fn bwd(
        &self,
        a: &Tensor,
        row: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, width) = a.dims2()?;
        let drow = || {
            with_values(&grad.contiguous()?, |grad| {
                let mut sums = vec![0.0; width];
                for grad in grad.chunks_exact(width) {
                    sums.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
                }
                Tensor::from_vec(sums, width, &Device::Cpu)
            })
        };
        Ok((Some(grad.clone()), row.track_op().then(drow).transpose()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    #[test]
    fn gradients() {
        check::gradients(&[check::matrix(1, 5, 7), check::matrix(2, 5, 7)], |x| add(&x[0], &x[1]));
        let row = Tensor::from_vec(check::noise(3, 7), 7, &Device::Cpu).unwrap();
        check::gradients(&[check::matrix(1, 5, 7), row], |x| add_row(&x[0], &x[1]));
    }

    #[test]
    fn shapes_must_fit() {
        let (a, b) = (check::matrix(1, 5, 7), check::matrix(2, 7, 5));
        assert!(add(&a, &b).is_err());
        assert!(add_row(&a, &Tensor::from_vec(check::noise(3, 5), 5, &Device::Cpu).unwrap()).is_err());
    }
}
