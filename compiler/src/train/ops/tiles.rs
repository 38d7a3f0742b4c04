//! `y = x W^T` through the int8 kernels of the device's runtime, for a `W` that is not trained: a teacher's, or the base
//! beside an adapter.
//!
//! Both factors are integers of eight bits in blocks of 32 with a scale each: `W` (Q8_0, in tiles) from the start, `x`
//! for the time of a product. The backward pass, `dx = dy W`, is the same with the tiles of `W^T`, where these were made.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use edge_runtime::format::{DType, Layout as WeightLayout, tiled_bytes};
use edge_runtime::kernels::{ActivationsMut, Features, Kernels, Matrix, pack_tiles};

use super::{apply1, matrix, rows_cols, threads, values, widest, with_values, zeros};
use crate::quantize::quantize_rows;

/// Rows of `x` that one thread quantizes, and that meet a tile once it is unpacked. Fixed, so the same whatever the number
/// of threads.
const TOGETHER: usize = 128;

/// A matrix `[out, in]` in Q8_0 tiles; clones share them.
#[derive(Clone, Debug)]
pub struct Tiles {
    forward: Packed,
    /// Those of `W^T`.
    backward: Option<Packed>,
}

/// Tiles of `[rows, columns]`.
#[derive(Clone, Debug)]
struct Packed {
    dims: [usize; 2],
    bytes: Arc<[u8]>,
}

impl Tiles {
    /// Whether rows of `cols` values are whole blocks.
    pub fn fit(cols: usize) -> bool {
        cols > 0 && cols.is_multiple_of(DType::Q8_0.block_len())
    }

    /// The values of `weight` `[out, in]`, f32, rounded to Q8_0, to be asked without a gradient.
    ///
    /// # Errors
    /// Rows that do not [`fit`](Self::fit); a value that Q8_0 cannot hold.
    pub fn round(weight: &Tensor) -> Result<Self> {
        Ok(Self { forward: Packed::round(weight)?, backward: None })
    }

    /// The same for products that have a backward pass.
    ///
    /// # Errors
    /// Rows or columns that do not [`fit`](Self::fit); a value that Q8_0 cannot hold.
    pub fn round_both_ways(weight: &Tensor) -> Result<Self> {
        let backward = Some(Packed::round(&weight.t()?.contiguous()?)?);
        Ok(Self { backward, ..Self::round(weight)? })
    }

    /// Bytes that the tiles take.
    pub fn bytes(&self) -> usize {
        self.forward.bytes.len() + self.backward.as_ref().map_or(0, |tiles| tiles.bytes.len())
    }

    /// `x W^T` for `x` `[n, in]`, without a gradient.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        apply1(x, Product(self.clone()))
    }

    /// `y = x W^T` for `x` `[n, in]` and `y` `[n, out]`, row-major, on all threads.
    ///
    /// # Panics
    /// If the shapes do not fit: a fault of the caller.
    pub fn product(&self, y: &mut [f32], x: &[f32]) {
        self.forward.product(y, x, false);
    }

    /// `dx = dy W`, `[n, in]`, for `dy` `[n, out]`, likewise; `None` unless there are tiles of `W^T`. Rows of gradients may
    /// be of any size: scales of blocks have half precision, below which most of them lie, so each row is rounded times a
    /// power of two that brings its largest value near 1.
    ///
    /// # Panics
    /// As [`Self::product`].
    pub fn backward(&self, dy: &[f32]) -> Option<Vec<f32>> {
        let tiles = self.backward.as_ref()?;
        let [cols, rows] = tiles.dims;
        let mut dx = zeros(dy.len() / rows * cols);
        tiles.product(&mut dx, dy, true);
        Some(dx)
    }
}

/// Multiplies by a power of two, so that the largest magnitude is between 1 and 2 as far as it can be, and answers it.
fn bring_near_1(row: &mut [f32]) -> f32 {
    // Without the sign, floats are ordered as their bits are.
    let peak = widest!(row.iter().fold(0, |peak: u32, x| peak.max(x.to_bits() & 0x7fff_ffff)));
    // Twice the bias, less the exponent; zeros, and what is no number, stay what they are times any factor.
    let factor = f32::from_bits(254u32.saturating_sub(peak >> 23).clamp(1, 253) << 23);
    multiply(row, factor);
    factor
}

fn multiply(row: &mut [f32], factor: f32) {
    widest!(row.iter_mut().for_each(|x| *x *= factor));
}

impl Packed {
    fn round(weight: &Tensor) -> Result<Self> {
        let (rows, cols) = weight.dims2()?;
        let blocks = with_values(weight, |values| {
            quantize_rows(DType::Q8_0, values, cols, None).map_err(candle_core::Error::wrap)
        })?;
        let mut bytes = vec![0; tiled_bytes(DType::Q8_0, rows, cols).unwrap_or(0)];
        pack_tiles(DType::Q8_0, rows, cols, &blocks, &mut bytes).map_err(candle_core::Error::wrap)?;
        Ok(Self { dims: [rows, cols], bytes: bytes.into() })
    }

    /// `y = x W^T`, with `level` each row of `x` brought near 1 before it is rounded.
    fn product(&self, y: &mut [f32], x: &[f32], level: bool) {
        let [rows, cols] = self.dims;
        assert_eq!(x.len() / cols * rows, y.len(), "size of the result");
        thread_local! {
            /// Values and integers of `x`, of any product before: fresh memory costs more than rounding into it.
            static BUFFERS: RefCell<Vec<(Vec<f32>, Vec<i8>)>> = const { RefCell::new(Vec::new()) };
        }
        let mut done = |buffers: &mut Vec<(Vec<f32>, Vec<i8>)>| -> edge_runtime::Result<()> {
            let kernels = Kernels::select(Features::detect());
            let weight = Matrix::with(WeightLayout::Tiles, DType::Q8_0, rows, cols, &self.bytes)?;
            let chunks = x.chunks(TOGETHER * cols);
            let mut batches = Vec::new();
            buffers.resize_with(chunks.len().max(buffers.len()), Default::default);
            for ((floats, quants), x) in buffers.iter_mut().zip(chunks.clone()) {
                let (tokens, padded) = (x.len() / cols, ActivationsMut::padded_tokens(x.len() / cols));
                floats.resize(padded * ActivationsMut::floats_per_token(cols), 0.0);
                quants.resize(padded * ActivationsMut::quants_per_token(cols), 0);
                batches.push(ActivationsMut::new(tokens, cols, floats, quants)?);
            }
            let rounded = threads::map(batches.iter_mut().zip(chunks).collect(), |(acts, x)| {
                acts.values_mut().copy_from_slice(x);
                let rows = acts.values_mut().chunks_exact_mut(cols).filter(|_| level);
                let factors: Vec<f32> = rows.map(bring_near_1).collect();
                (kernels.quantize_for(acts, &[&weight]), factors)
            });
            for ((acts, factors), y) in rounded.into_iter().zip(y.chunks_mut(TOGETHER * rows)) {
                kernels.matmul(threads::pool(), &weight, &acts, y)?;
                if level {
                    let scaled = y.chunks_exact_mut(rows).zip(&factors);
                    threads::map(scaled.collect(), |(y, factor)| multiply(y, 1.0 / factor));
                }
            }
            Ok(())
        };
        let mut buffers = BUFFERS.take();
        done(&mut buffers).expect("buffers of the sizes that kernels ask for");
        BUFFERS.set(buffers);
    }
}

struct Product(Tiles);

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "int8 linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((n, cols), [out, weight_cols]) = (rows_cols(layout, self.name())?, self.0.forward.dims);
        if cols != weight_cols {
            bail!("int8 linear: {cols} columns times a weight of {weight_cols}");
        }
        let mut y = zeros(n * out);
        self.0.product(&mut y, values(x, layout, self.name())?);
        Ok(matrix(y, n, out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::Blocks;
    use crate::train::ops::check;
    use candle_core::Var;
    use edge_runtime::format::{f16_to_f32, f32_to_f16};
    use proptest::prelude::*;

    /// Values rounded as kernels round activations: to blocks of 32 integers within ±127 and a scale of half precision.
    fn in_blocks(x: &[f32], cols: usize) -> Vec<f64> {
        let block = |x: &[f32]| {
            let peak = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            let scale = f16_to_f32(f32_to_f16(peak / 127.0));
            let round = move |x: &f32| f64::from((x * (127.0 / peak)).round_ties_even()) * f64::from(scale);
            x.iter().map(round).collect::<Vec<_>>()
        };
        x.chunks_exact(cols).flat_map(|row| row.chunks_exact(32).flat_map(block)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 48, ..ProptestConfig::default() })]

        /// Against double precision of what both factors are rounded to, within the rounding of sums that kernels state.
        #[test]
        fn products_are_those_of_rounded_factors(
            n in 1..300usize, rows in 1..70usize, blocks in 1..30usize, seed: u32,
        ) {
            // Those share a scale among more blocks in large batches.
            prop_assume!(n < 32 || Kernels::select(Features::detect()).name() != "i8mm");
            let (cols, seed) = (32 * blocks, u64::from(seed));
            let (x, weight) = (check::matrix(seed, n, cols), check::matrix(seed + 1, rows, cols));
            let tiles = Tiles::round(&weight).unwrap();
            let found = tiles.apply(&x).unwrap().to_vec2::<f32>().unwrap();
            let weights = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let rounded = Blocks::quantize(DType::Q8_0, [rows, cols], &weights, None).unwrap();
            let rounded = rounded.tensor().unwrap().to_vec2::<f32>().unwrap();
            let x = in_blocks(&x.flatten_all().unwrap().to_vec1::<f32>().unwrap(), cols);
            for (x, found) in x.chunks_exact(cols).zip(&found) {
                for (w, found) in rounded.iter().zip(found) {
                    let products = || x.iter().zip(w).map(|(x, w)| x * f64::from(*w));
                    let magnitude: f64 = x.iter().map(|x| x.abs()).sum::<f64>();
                    let error = (f64::from(*found) - products().sum::<f64>()).abs();
                    prop_assert!(error <= 2e-6 * magnitude, "{found}, off by {error}");
                }
            }
        }
    }

    /// The error beside the product in f32 is that of two roundings to eight bits.
    #[test]
    fn products_are_near_those_in_f32() {
        let (x, weight) = (check::matrix(1, 37, 576), check::matrix(2, 50, 576));
        let exact = super::super::linear(&x, &weight).unwrap();
        let found = Tiles::round(&weight).unwrap().apply(&x).unwrap();
        let square = |t: Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let error = (square((&found - &exact).unwrap()) / square(exact)).sqrt();
        // Each rounding is off by at most half of 1/127 of a block's peak, 1 / (127 sqrt(12)) of it on average.
        assert!((1e-3..7e-3).contains(&error), "{error}");
    }

    /// Backward likewise, whatever the size of a row, and nothing that is no number gets lost.
    #[test]
    fn gradients_of_any_size_pass() {
        let weight = check::matrix(2, 64, 96);
        let tiles = Tiles::round_both_ways(&weight).unwrap();
        for size in [1e-37, 1e-12, 1.0, 1e20] {
            let rows = check::noise(1, 40 * 64).iter().map(|x| x * size).collect();
            let dy = Tensor::from_vec(rows, (40, 64), &candle_core::Device::Cpu).unwrap();
            let exact = dy.matmul(&weight).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let dx = with_values(&dy, |dy| Ok(tiles.backward(dy))).unwrap().unwrap();
            let square = |x: f64| (x / f64::from(size)).powi(2);
            let error: f64 = dx.iter().zip(&exact).map(|(a, b)| square(f64::from(a - b))).sum();
            let whole: f64 = exact.iter().map(|x| square(f64::from(*x))).sum();
            assert!((1e-3..7e-3).contains(&(error / whole).sqrt()), "{size}: {}", (error / whole).sqrt());
        }
        let mut dy = vec![0.0; 3 * 64];
        dy[64 + 5] = f32::NAN;
        let dx = tiles.backward(&dy).unwrap();
        assert!(
            dx[..96].iter().chain(&dx[192..]).all(|x| *x == 0.0) && dx[96..192].iter().all(|x| x.is_nan())
        );
        assert!(Tiles::round(&weight).unwrap().backward(&dy).is_none());
    }

    /// A row's product does not depend on the rows beside it, nor on the threads. (Of the kernels for FEAT_I8MM it does,
    /// where there are fewer than 32 rows.)
    #[test]
    fn rows_stand_alone() {
        let (x, tiles) = (check::matrix(3, 300, 64), Tiles::round(&check::matrix(4, 33, 64)).unwrap());
        let all = tiles.apply(&x).unwrap().to_vec2::<f32>().unwrap();
        let some = tiles.apply(&x.narrow(0, 100, 77).unwrap()).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(some, all[100..177]);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| tiles.apply(&x)).unwrap().to_vec2::<f32>().unwrap(), all);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Tiles::fit(64) && !Tiles::fit(48) && !Tiles::fit(0));
        assert!(Tiles::round(&check::matrix(1, 4, 48)).is_err());
        let huge = Tensor::new(&[[f32::MAX; 32]], &candle_core::Device::Cpu).unwrap();
        let error = Tiles::round(&huge).unwrap_err().to_string();
        assert!(error.contains("row 0, column 0"), "{error}");
        let tiles = Tiles::round(&check::matrix(1, 4, 64)).unwrap();
        let error = tiles.apply(&check::matrix(2, 3, 32)).unwrap_err().to_string();
        assert!(error.contains("32 columns times a weight of 64"), "{error}");
        // No gradient is cut silently.
        let x = Var::from_tensor(&check::matrix(2, 3, 64)).unwrap();
        assert!(tiles.apply(&x).unwrap().sum_all().unwrap().backward().is_err());
    }
}
