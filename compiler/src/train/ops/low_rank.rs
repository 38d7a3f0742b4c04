//! `y = x W^T + scale (x A^T) B^T` for a matrix `W` that is not trained (Hu et al. 2021, arXiv 2106.09685), and
//! what DoRA and dropout add to it.
//!
//! The products with `W` are the only large ones: forward `x W^T`, backward `dy W`. There is no gradient of
//! `W`, and what the factors add is accumulated in place. A matrix in blocks is dequantized for each product into
//! a buffer that all matrices share; one in tiles goes through the device's int8 kernels, backward too where it can.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{
    Matrix, Tiles, apply1, apply2, apply3, matrix, product, product_into, rows_cols, tensor, values,
    with_values, zeros,
};
use crate::quantize::Blocks;
use crate::train::random::SplitMix64;

/// Memory for one matrix at a time, shared by clones.
#[derive(Clone, Debug, Default)]
pub struct Scratch(Arc<Mutex<Vec<f32>>>);

/// A matrix that is not trained, `[out, in]`.
#[derive(Clone, Debug)]
pub enum Frozen {
    /// In f32.
    Dense(Tensor),
    /// The same, multiplied with in integers of eight bits, [backward](Tiles::backward) too if there are tiles for it; for
    /// what it is otherwise asked it is as it is.
    Tiled(Tensor, Tiles),
    /// In blocks, and where they are dequantized.
    Blocks(Blocks, Scratch),
}

impl Frozen {
    /// `[out, in]`.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Dense(weight) | Self::Tiled(weight, _) => weight.dims(),
            Self::Blocks(blocks, _) => blocks.dims(),
        }
    }

    /// Bytes that it takes for as long as it is there.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.elem_count() * size_of::<f32>(),
            Self::Tiled(weight, tiles) => weight.elem_count() * size_of::<f32>() + tiles.bytes(),
            Self::Blocks(blocks, _) => blocks.bytes().len(),
        }
    }

    /// Calls `body` with the values, row-major.
    ///
    /// # Errors
    /// A dense matrix that is not contiguous f32 on the CPU; what `body` answers.
    pub fn with_values<T>(&self, body: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
        match self {
            Self::Dense(weight) | Self::Tiled(weight, _) => with_values(weight, body),
            Self::Blocks(blocks, Scratch(scratch)) => {
                // Taken out, not kept locked: whoever comes meanwhile works in a buffer of its own.
                let mut buffer = std::mem::take(&mut *scratch.lock().unwrap_or_else(PoisonError::into_inner));
                let [rows, cols] = *blocks.dims();
                buffer.resize(buffer.len().max(rows * cols), 0.0);
                let values = &mut buffer[..rows * cols];
                blocks.values(values).map_err(|error| candle_core::Error::Msg(error.to_string()))?;
                let answer = body(values);
                *scratch.lock().unwrap_or_else(PoisonError::into_inner) = buffer;
                answer
            }
        }
    }

    /// `x W^T` for `x` `[n, in]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => super::linear(x, weight),
            Self::Tiled(..) | Self::Blocks(..) => apply1(x, Product { weight: self.clone() }),
        }
    }

    /// `x W^T + scale (x A^T) B^T` for `down` (`A`) `[rank, in]` and `up` (`B`) `[out, rank]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn apply_with(&self, x: &Tensor, down: &Tensor, up: &Tensor, scale: f32) -> Result<Tensor> {
        apply3([x, down, up], LowRankProduct { weight: Some(self.clone()), scale, low: Mutex::default() })
    }

    /// `x W^T` for `n` rows `x`.
    fn forward(&self, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let (rows, cols) = (self.dims()[0], self.dims()[1]);
        if let Self::Tiled(_, tiles) = self {
            let mut y = zeros(n * rows);
            tiles.product(&mut y, x);
            return Ok(y);
        }
        self.with_values(|weight| product(Matrix::new(x, n, cols), Matrix::new(weight, rows, cols).t(), 1.0))
    }

    /// `grad W` for `n` rows `grad`.
    fn backward(&self, grad: &[f32], n: usize) -> Result<Vec<f32>> {
        let (rows, cols) = (self.dims()[0], self.dims()[1]);
        if let Self::Tiled(_, tiles) = self
            && let Some(dx) = tiles.backward(grad)
        {
            return Ok(dx);
        }
        self.with_values(|weight| product(Matrix::new(grad, n, rows), Matrix::new(weight, rows, cols), 1.0))
    }
}

/// `scale (x A^T) B^T` alone; shapes as for [`Frozen::apply_with`].
///
/// # Errors
/// The shapes do not fit.
pub fn low_rank(x: &Tensor, down: &Tensor, up: &Tensor, scale: f32) -> Result<Tensor> {
    apply3([x, down, up], LowRankProduct { weight: None, scale, low: Mutex::default() })
}

struct Product {
    weight: Frozen,
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "frozen linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, cols) = rows_cols(layout, "frozen linear")?;
        let [out, weight_cols] = *self.weight.dims() else { bail!("frozen linear: not a matrix") };
        if cols != weight_cols {
            bail!("frozen linear: {cols} columns times a weight of {weight_cols}");
        }
        Ok(matrix(self.weight.forward(values(x, layout, "frozen linear")?, n)?, n, out))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (n, cols) = x.dims2()?;
        let dx = with_values(&grad.contiguous()?, |grad| self.weight.backward(grad, n))?;
        Ok(Some(tensor(dx, n, cols)?))
    }
}

/// Inputs `x`, `A`, `B`; without `weight` the product with it is left out.
struct LowRankProduct {
    weight: Option<Frozen>,
    scale: f32,
    /// `x A^T`, from the forward to the backward pass.
    low: Mutex<Option<Vec<f32>>>,
}

impl CustomOp3 for LowRankProduct {
    fn name(&self) -> &'static str {
        "low-rank linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        down: &CpuStorage,
        down_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let op = self.name();
        let ((n, cols), (rank, down_cols)) = (rows_cols(x_layout, op)?, rows_cols(down_layout, op)?);
        let (out, up_cols) = rows_cols(up_layout, op)?;
        let fits = self.weight.as_ref().is_none_or(|weight| weight.dims() == [out, cols]);
        if !fits || down_cols != cols || up_cols != rank {
            let weight = self.weight.as_ref().map(Frozen::dims);
            bail!("{op}: x {n} x {cols}, W {weight:?}, A {rank} x {down_cols}, B {out} x {up_cols}");
        }
        let x = values(x, x_layout, op)?;
        let down = Matrix::new(values(down, down_layout, op)?, rank, cols);
        let up = Matrix::new(values(up, up_layout, op)?, out, rank);
        let kept = product(Matrix::new(x, n, cols), down.t(), 1.0)?;
        let low = Matrix::new(&kept, n, rank);
        let y = match &self.weight {
            None => product(low, up.t(), self.scale)?,
            Some(weight) => {
                let mut y = weight.forward(x, n)?;
                product_into(&mut y, low, up.t(), self.scale, true)?;
                y
            }
        };
        *self.low.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        Ok(matrix(y, n, out))
    }

    fn bwd(
        &self,
        x: &Tensor,
        down: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((n, cols), (out, rank)) = (x.dims2()?, up.dims2()?);
        let wants_x = x.track_op();
        let grad = grad.contiguous()?;
        with_values(&grad, |grad| {
            with_values(x, |x| {
                with_values(down, |down| {
                    with_values(up, |up| {
                        let (dy, x) = (Matrix::new(grad, n, out), Matrix::new(x, n, cols));
                        let down = Matrix::new(down, rank, cols);
                        let kept = self.low.lock().unwrap_or_else(PoisonError::into_inner).take();
                        let mut low = kept.map_or_else(|| product(x, down.t(), 1.0), Ok)?;
                        let dup = product(dy.t(), Matrix::new(&low, n, rank), self.scale)?;
                        // The gradient of `x A^T`, in the same memory.
                        product_into(&mut low, dy, Matrix::new(up, out, rank), self.scale, false)?;
                        let dlow = Matrix::new(&low, n, rank);
                        let ddown = product(dlow.t(), x, 1.0)?;
                        let dx = wants_x.then(|| {
                            let dx = match &self.weight {
                                None => product(dlow, down, 1.0)?,
                                Some(weight) => {
                                    let mut dx = weight.backward(grad, n)?;
                                    product_into(&mut dx, dlow, down, 1.0, true)?;
                                    dx
                                }
                            };
                            tensor(dx, n, cols)
                        });
                        Ok((dx.transpose()?, Some(tensor(ddown, rank, cols)?), Some(tensor(dup, out, rank)?)))
                    })
                })
            })
        })
    }
}

/// Multiplies column `j` of `x` `[n, out]` by `factors[j] / lengths[j]`; the lengths are constants.
///
/// # Errors
/// The shapes do not fit.
pub fn scale_columns(x: &Tensor, factors: &Tensor, lengths: Vec<f32>) -> Result<Tensor> {
    apply2(x, factors, ScaleColumns { lengths })
}

struct ScaleColumns {
    lengths: Vec<f32>,
}

impl ScaleColumns {
    fn scales(&self, factors: &[f32]) -> Vec<f32> {
        factors.iter().zip(&self.lengths).map(|(factor, length)| factor / length).collect()
    }

    fn scaled(&self, x: &[f32], factors: &[f32]) -> Vec<f32> {
        let (scales, mut y) = (self.scales(factors), x.to_vec());
        y.par_chunks_mut(scales.len()).for_each(|row| {
            row.iter_mut().zip(&scales).for_each(|(y, scale)| *y *= scale);
        });
        y
    }
}

impl CustomOp2 for ScaleColumns {
    fn name(&self) -> &'static str {
        "scale columns"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        factors: &CpuStorage,
        factors_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, out) = rows_cols(x_layout, self.name())?;
        if factors_layout.dims() != [out] || self.lengths.len() != out || out == 0 {
            let (factors, lengths) = (factors_layout.dims(), self.lengths.len());
            bail!("scale columns: x {n} x {out}, {factors:?} factors, {lengths} lengths");
        }
        let x = values(x, x_layout, self.name())?;
        Ok(matrix(self.scaled(x, values(factors, factors_layout, self.name())?), n, out))
    }

    fn bwd(
        &self,
        x: &Tensor,
        factors: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, out) = x.dims2()?;
        let grad = grad.contiguous()?;
        with_values(&grad, |grad| {
            let dx = x
                .track_op()
                .then(|| with_values(factors, |factors| tensor(self.scaled(grad, factors), n, out)));
            let dfactors = with_values(x, |x| {
                let mut sums = vec![0f64; out];
                for (x, grad) in x.chunks_exact(out).zip(grad.chunks_exact(out)) {
                    for ((sum, x), grad) in sums.iter_mut().zip(x).zip(grad) {
                        *sum += f64::from(x * grad);
                    }
                }
                let sums =
                    sums.iter().zip(&self.lengths).map(|(sum, length)| (sum / f64::from(*length)) as f32);
                Tensor::from_vec(sums.collect(), out, &candle_core::Device::Cpu)
            })?;
            Ok((dx.transpose()?, Some(dfactors)))
        })
    }
}

/// Sets each element of `x` `[n, in]` to 0 with probability `rate` and divides the others by `1 - rate`
/// (Srivastava et al., 2014).
///
/// Which ones of a row follows from `seed`, the row's number and its values: a resumed run, and a forward pass that is made again
/// for its gradient, drop the same without any state.
///
/// # Errors
/// `x` is not a contiguous matrix.
pub fn dropout(x: &Tensor, rate: f32, seed: u64) -> Result<Tensor> {
    apply1(x, Dropout { rate, seed })
}

struct Dropout {
    rate: f32,
    seed: u64,
}

impl Dropout {
    /// `out` with the mask that belongs to `x`.
    fn mask(&self, x: &[f32], cols: usize, mut out: Vec<f32>) -> Vec<f32> {
        // FNV-1a over the values as words.
        let mix = |hash: u64, value: &f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0000_01b3);
        let keep = 1.0 / (1.0 - self.rate);
        out.par_chunks_mut(cols).zip(x.par_chunks(cols)).enumerate().for_each(|(row, (out, x))| {
            let seed = x.iter().fold(self.seed ^ 0xcbf2_9ce4_8422_2325, mix);
            let mut random = SplitMix64::new(seed, row as u64);
            for value in out {
                *value *= if random.unit() <= f64::from(self.rate) { 0.0 } else { keep };
            }
        });
        out
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, cols) = rows_cols(layout, "dropout")?;
        let x = values(x, layout, "dropout")?;
        Ok(matrix(self.mask(x, cols, x.to_vec()), n, cols))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (n, cols) = x.dims2()?;
        let grad = grad.flatten_all()?.to_vec1::<f32>()?;
        Ok(Some(with_values(x, |x| tensor(self.mask(x, cols, grad), n, cols))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;
    use candle_core::{Device, Var};
    use edge_runtime::format::DType;

    fn blocks(dtype: DType, rows: usize, cols: usize) -> Frozen {
        let values = check::noise(31, rows * cols);
        Frozen::Blocks(Blocks::quantize(dtype, [rows, cols], &values, None).unwrap(), Scratch::default())
    }

    fn bases() -> [Frozen; 3] {
        [Frozen::Dense(check::matrix(4, 6, 32)), blocks(DType::Q4_0, 6, 32), blocks(DType::Q8_0, 6, 32)]
    }

    #[test]
    fn gradients_of_factors_and_input() {
        let inputs = [check::matrix(1, 5, 32), check::matrix(2, 3, 32), check::matrix(3, 6, 3)];
        for base in bases() {
            check::gradients(&inputs, |x| base.apply_with(&x[0], &x[1], &x[2], 0.7));
            check::gradients(&inputs[..1], |x| base.apply(&x[0]));
        }
        check::gradients(&inputs, |x| low_rank(&x[0], &x[1], &x[2], 0.7));
        let blocks = blocks(DType::Q4K, 4, 256);
        let inputs = [check::matrix(5, 3, 256), check::matrix(6, 2, 256), check::matrix(7, 4, 2)];
        check::gradients(&inputs, |x| blocks.apply_with(&x[0], &x[1], &x[2], 0.1));
    }

    /// Blocks compute what their values compute.
    #[test]
    fn blocks_are_their_values() {
        let (x, down, up) = (check::matrix(1, 5, 32), check::matrix(2, 3, 32), check::matrix(3, 6, 3));
        for base in &bases()[1..] {
            let dense = base.with_values(|values| tensor(values.to_vec(), 6, 32)).unwrap();
            let product =
                |base: &Frozen| base.apply_with(&x, &down, &up, 0.5).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(product(base), product(&Frozen::Dense(dense.clone())));
            let plain = super::super::linear(&x, &dense).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(base.apply(&x).unwrap().to_vec2::<f32>().unwrap(), plain);
        }
    }

    /// An input that depends on nothing trained gets no gradient: that product would be for nothing.
    #[test]
    fn an_input_that_is_not_trained_gets_no_gradient() {
        let op = LowRankProduct { weight: Some(bases()[0].clone()), scale: 1.0, low: Mutex::default() };
        let (x, down, up) = (check::matrix(1, 5, 32), check::matrix(2, 3, 32), check::matrix(3, 6, 3));
        let grad = check::matrix(8, 5, 6);
        assert!(op.bwd(&x, &down, &up, &grad, &grad).unwrap().0.is_none());
        let x = Var::from_tensor(&x).unwrap();
        assert!(op.bwd(&x, &down, &up, &grad, &grad).unwrap().0.is_some());
    }

    #[test]
    fn gradients_of_scaled_columns() {
        let factors = Tensor::from_vec(check::noise(9, 6), 6, &Device::Cpu).unwrap();
        let lengths = vec![0.5, 1.0, 2.0, 3.0, 0.7, 1.5];
        check::gradients(&[check::matrix(1, 5, 6), factors], |x| {
            scale_columns(&x[0], &x[1], lengths.clone())
        });
    }

    #[test]
    fn dropout_is_a_function_of_its_input() {
        let x = check::matrix(1, 40, 50);
        let dropped = |x: &Tensor, seed| {
            dropout(x, 0.3, seed).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let first = dropped(&x, 1);
        assert_eq!(first, dropped(&x.copy().unwrap(), 1));
        assert_ne!(first, dropped(&x, 2));
        let zeros = first.iter().filter(|x| **x == 0.0).count();
        assert!((500..700).contains(&zeros), "{zeros}");
        let kept = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(kept.iter().zip(&first).all(|(x, y)| *y == 0.0 || (x / 0.7 - y).abs() < 1e-6));
        // The gradient has the mask of the forward pass.
        let var = Var::from_tensor(&x).unwrap();
        let grads = dropout(&var, 0.3, 1).unwrap().sum_all().unwrap().backward().unwrap();
        let grad = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(grad.iter().zip(&first).all(|(grad, y)| (*grad == 0.0) == (*y == 0.0)));
    }

    #[test]
    fn shapes_must_fit() {
        let (x, down, up) = (check::matrix(1, 5, 32), check::matrix(2, 3, 32), check::matrix(3, 6, 2));
        assert!(bases()[0].apply_with(&x, &down, &up, 1.0).is_err());
        assert!(bases()[1].apply(&check::matrix(1, 5, 31)).is_err());
        let factors = Tensor::zeros(5, candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(scale_columns(&check::matrix(1, 5, 6), &factors, vec![1.0; 6]).is_err());
    }
}
