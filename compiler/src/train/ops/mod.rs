//! Operations of the differentiable graph, each with its own backward pass.
//!
//! candle's fused operations (`rms_norm`, `softmax_last_dim`, `rope`, ...) have no backward pass and cut
//! the gradient without a word, and its elementwise operations run on one thread. These run on all
//! threads, keep as little as the backward pass needs, and sum in a fixed order: the same inputs give
//! the same bits on the same machine with the same number of threads. f32 on the CPU, contiguous.

mod add;
mod attention;
mod exp;
mod fresh;
mod gemm;
mod glu;
mod linear;
mod low_rank;
mod on_grid;
mod rms_norm;
mod rope;
mod rows;
mod soft_cap;
pub(crate) mod sums;
pub(crate) mod threads;
mod tiles;
mod vectors;

pub use add::{add, add_row};
pub use attention::{Heads, attention};
pub(crate) use exp::exp;
pub(crate) use fresh::{fresh, fresh_with, zeros};
pub use gemm::{Accelerator, AcceleratorError};
pub(crate) use gemm::{Matrix, gemm, product, product_into};
pub use glu::glu;
pub use linear::linear;
pub use low_rank::{Frozen, Scratch, dropout, low_rank, scale_columns};
pub(crate) use on_grid::{Levels, on_grid};
pub use rms_norm::rms_norm;
pub use rope::{RopeTable, rope};
pub use rows::rows;
pub(crate) use soft_cap::{capped, slope};
pub use tiles::Tiles;
pub(crate) use vectors::widest;

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Shape, Storage, Tensor, bail};

use super::tape::{apply1, apply2, apply3};

/// The values behind a storage, which must be contiguous f32.
pub(crate) fn values<'a>(storage: &'a CpuStorage, layout: &Layout, op: &str) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("{op}: a strided tensor of shape {:?}, expected a contiguous one", layout.shape()),
    }
}

/// Calls `body` with the values of a contiguous f32 tensor on the CPU.
pub(crate) fn with_values<T>(tensor: &Tensor, body: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    with_storage(tensor, |storage, layout| body(values(storage, layout, "tensor")?))
}

/// Calls `body` with the storage of a tensor on the CPU.
pub(crate) fn with_storage<T>(
    tensor: &Tensor,
    body: impl FnOnce(&CpuStorage, &Layout) -> Result<T>,
) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => body(storage, layout),
        _ => bail!("tensor is not on the CPU"),
    }
}

/// Calls `body` with the values of a contiguous f32 tensor on the CPU, to be changed in place.
pub(crate) fn with_values_mut(tensor: &Tensor, body: impl FnMut(&mut [f32])) -> Result<()> {
    /// candle's in-place operations take `&self`, hence the cell.
    struct InPlace<F>(RefCell<F>);
    impl<F: FnMut(&mut [f32])> InplaceOp1 for InPlace<F> {
        fn name(&self) -> &'static str {
            "in-place"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            match (storage, layout.contiguous_offsets()) {
                (CpuStorage::F32(values), Some((start, end))) => {
                    (self.0.borrow_mut())(&mut values[start..end])
                }
                _ => bail!("in-place: shape {:?}, expected contiguous f32", layout.shape()),
            }
            Ok(())
        }
    }
    tensor.inplace_op1(&InPlace(RefCell::new(body)))
}

/// `[rows, columns]` of a matrix.
pub(crate) fn rows_cols(layout: &Layout, op: &str) -> Result<(usize, usize)> {
    match layout.dims() {
        [rows, cols] => Ok((*rows, *cols)),
        dims => bail!("{op}: shape {dims:?}, expected two axes"),
    }
}

/// What a forward pass answers: a matrix.
fn matrix(values: Vec<f32>, rows: usize, cols: usize) -> (CpuStorage, Shape) {
    (CpuStorage::F32(values), Shape::from((rows, cols)))
}

/// A matrix as a new tensor.
pub(crate) fn tensor(values: Vec<f32>, rows: usize, cols: usize) -> Result<Tensor> {
    Tensor::from_vec(values, (rows, cols), &candle_core::Device::Cpu)
}

#[cfg(test)]
pub(crate) mod check {
    //! Finite differences: the oracle of every backward pass.

    use super::*;
    use candle_core::{Device, Var};

    /// Reproducible values in -1..1.
    pub fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
        (0..count)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    pub fn matrix(seed: u64, rows: usize, cols: usize) -> Tensor {
        Tensor::from_vec(noise(seed, rows * cols), (rows, cols), &Device::Cpu).unwrap()
    }

    /// Compares `grad`, the gradient of the loss that `evaluate` answers, with a finite difference of fourth order
    /// along a random direction of `var`, which stays as it was; `what` names it.
    pub fn slope(var: &Var, grad: &Tensor, what: &str, evaluate: impl Fn() -> f64) {
        let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let before = var.as_tensor().copy().unwrap();
        let values = before.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let along = noise(5, values.len());
        let at = |step: f32| {
            let moved: Vec<f32> = values.iter().zip(&along).map(|(x, d)| x + step * d).collect();
            var.set(&Tensor::from_vec(moved, before.shape(), &Device::Cpu).unwrap()).unwrap();
            evaluate()
        };
        let step = 4e-3;
        let numeric =
            (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step))) / (12.0 * f64::from(step));
        var.set(&before).unwrap();
        let exact: f64 = grad.iter().zip(&along).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let size = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(size > 0.0, "{what} has a zero gradient");
        assert!(
            (numeric - exact).abs() < 2e-3 * (1.0 + size) + 1e-2 * exact.abs(),
            "{what}: finite difference {numeric}, backward {exact}"
        );
    }

    /// Compares the gradient of `sum(f(inputs) * weights)` with central differences along random
    /// directions, for every input.
    pub fn gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
        let vars: Vec<Var> = inputs.iter().map(|input| Var::from_tensor(input).unwrap()).collect();
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let output = f(&tensors).unwrap();
        let weights = Tensor::from_vec(noise(99, output.elem_count()), output.shape(), &Device::Cpu).unwrap();
        let grads = (&output * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        let value = |inputs: &[Tensor]| -> f64 {
            let output = f(inputs).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let weights = weights.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            output.iter().zip(&weights).map(|(&y, &w)| f64::from(y) * f64::from(w)).sum()
        };
        for (index, var) in vars.iter().enumerate() {
            let grad = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("input {index} has no gradient"));
            let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for direction in 0..3 {
                let along = noise(1000 + direction, grad.len());
                let shifted = |step: f64| {
                    let mut inputs: Vec<Tensor> = inputs.to_vec();
                    let values = inputs[index].flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let moved: Vec<f32> =
                        values.iter().zip(&along).map(|(&x, &d)| x + step as f32 * d).collect();
                    inputs[index] = Tensor::from_vec(moved, inputs[index].shape(), &Device::Cpu).unwrap();
                    value(&inputs)
                };
                let step = 1e-2;
                // Fourth order, so that the step can be large enough for f32.
                let numeric = (8.0 * (shifted(step) - shifted(-step))
                    - (shifted(2.0 * step) - shifted(-2.0 * step)))
                    / (12.0 * step);
                let exact: f64 = grad.iter().zip(&along).map(|(&g, &d)| f64::from(g) * f64::from(d)).sum();
                let size: f64 = grad.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt();
                assert!(size > 0.0, "input {index} has a zero gradient");
                assert!(
                    (numeric - exact).abs() < 2e-3 * size.max(1.0) + 5e-3 * exact.abs(),
                    "input {index}, direction {direction}: finite difference {numeric}, backward {exact}"
                );
            }
        }
    }
}
