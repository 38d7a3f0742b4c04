//! A frozen matrix with a trained update of low rank: LoRA, rsLoRA (which is another scale) and DoRA.
//!
//! Knows no adapter's format and picks no matrix: [`adapter`](super::adapter) does.

use candle_core::{Result, Tensor, bail};

use super::ops::{Frozen, Matrix, add, dropout, low_rank, product_into, scale_columns, with_values};

/// `W' = W + scale B A`, for DoRA with the length of every row of `W'` trained by itself.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `W`, `[out, in]`.
    pub base: Frozen,
    /// `A`, `[rank, in]`.
    pub down: Tensor,
    /// `B`, `[out, rank]`.
    pub up: Tensor,
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub scale: f32,
    /// DoRA's part.
    pub lengths: Option<Lengths>,
    /// Share of the inputs of `A` that is dropped while training, and the seed.
    pub dropout: Option<(f32, u64)>,
}

/// What DoRA adds (Liu et al. 2024, arXiv 2402.09353).
#[derive(Clone, Debug)]
pub struct Lengths {
    /// The trained length of each row of `W'`, `[out]`.
    pub magnitude: Tensor,
    /// Squared lengths of the rows of `W`.
    squares: Vec<f64>,
}

impl Lengths {
    /// Of a matrix whose rows shall have the lengths `magnitude`.
    ///
    /// # Errors
    /// `base` cannot be read.
    pub fn new(base: &Frozen, magnitude: Tensor) -> Result<Self> {
        Ok(Self { magnitude, squares: row_squares(base)? })
    }
}

/// The squared length of each row.
///
/// # Errors
/// `base` cannot be read.
pub fn row_squares(base: &Frozen) -> Result<Vec<f64>> {
    let cols = base.dims()[1];
    let square = |row: &[f32]| row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    base.with_values(|values| Ok(values.chunks_exact(cols).map(square).collect()))
}

impl LowRank {
    /// `x W'^T` for `x` `[n, in]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let Self { base, down, up, scale, .. } = self;
        let y = match self.dropout {
            None => base.apply_with(x, down, up, *scale)?,
            Some((rate, seed)) => {
                add(&base.apply(x)?, &low_rank(&dropout(x, rate, seed)?, down, up, *scale)?)?
            }
        };
        match &self.lengths {
            None => Ok(y),
            Some(lengths) => scale_columns(&y, &lengths.magnitude, self.row_lengths(lengths)?),
        }
    }

    /// `W'` with its graph.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn matrix(&self) -> Result<Tensor> {
        let (rows, cols) = (self.base.dims()[0], self.base.dims()[1]);
        let base =
            self.base.with_values(|values| Tensor::from_slice(values, (rows, cols), self.up.device()))?;
        let sum = (base + (self.up.matmul(&self.down)? * f64::from(self.scale))?)?;
        let Some(lengths) = &self.lengths else { return Ok(sum) };
        let norms = Tensor::from_vec(self.row_lengths(lengths)?, (rows, 1), self.up.device())?;
        sum.broadcast_mul(&(lengths.magnitude.reshape((rows, 1))? / norms)?)
    }

    /// `||W + scale B A||` of each row, as a constant: no gradient flows through it (section 4.3 of the paper).
    ///
    /// From `||w||^2 + 2 scale b (A w) + scale^2 b (A A^T) b` for a row `w` and its row `b`, without making `W'`.
    fn row_lengths(&self, lengths: &Lengths) -> Result<Vec<f32>> {
        let ((rank, cols), (rows, _)) = (self.down.dims2()?, self.up.dims2()?);
        if lengths.squares.len() != rows {
            bail!("low rank: {} lengths for {rows} rows", lengths.squares.len());
        }
        let (mut crossed, mut gram) = (vec![0.0; rows * rank], vec![0.0; rank * rank]);
        with_values(&self.down, |down| {
            let down = Matrix::new(down, rank, cols);
            product_into(&mut gram, down, down.t(), 1.0, false)?;
            self.base.with_values(|base| {
                product_into(&mut crossed, Matrix::new(base, rows, cols), down.t(), 1.0, false)
            })
        })?;
        let scale = f64::from(self.scale);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        with_values(&self.up, |up| {
            let rows = up.chunks_exact(rank).zip(crossed.chunks_exact(rank)).zip(&lengths.squares);
            Ok(rows
                .map(|((up, crossed), square)| {
                    let quadratic: f64 =
                        gram.chunks_exact(rank).zip(up).map(|(gram, b)| f64::from(*b) * dot(gram, up)).sum();
                    let squared = square + 2.0 * scale * dot(up, crossed) + scale * scale * quadratic;
                    // A row of nothing but zeros has no direction, and none to be scaled.
                    squared.max(f64::from(f32::MIN_POSITIVE)).sqrt() as f32
                })
                .collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::Blocks;
    use crate::train::ops::{Scratch, check};
    use candle_core::{Device, Var};
    use edge_runtime::format::DType;

    fn bases() -> [Frozen; 2] {
        let values = check::noise(31, 6 * 32);
        let blocks = Blocks::quantize(DType::Q4_0, [6, 32], &values, None).unwrap();
        [Frozen::Dense(check::matrix(4, 6, 32)), Frozen::Blocks(blocks, Scratch::default())]
    }

    fn dora(base: &Frozen, down: &Tensor, up: &Tensor, magnitude: &Tensor) -> LowRank {
        let lengths = Lengths::new(base, magnitude.clone()).unwrap();
        let (base, down, up) = (base.clone(), down.clone(), up.clone());
        LowRank { base, down, up, scale: 0.6, lengths: Some(lengths), dropout: None }
    }

    fn inputs() -> [Tensor; 4] {
        let magnitude = Tensor::from_vec(check::noise(9, 6), 6, &Device::Cpu).unwrap();
        [check::matrix(1, 5, 32), check::matrix(2, 3, 32), check::matrix(3, 6, 3), magnitude]
    }

    /// Lengths are constants to the gradient, so finite differences must hold them too.
    #[test]
    fn gradients_of_dora() {
        for base in bases() {
            let [x, down, up, magnitude] = inputs();
            let held = dora(&base, &down, &up, &magnitude);
            let norms = held.row_lengths(held.lengths.as_ref().unwrap()).unwrap();
            check::gradients(&[x, down, up, magnitude], |x| {
                scale_columns(&base.apply_with(&x[0], &x[1], &x[2], 0.6)?, &x[3], norms.clone())
            });
        }
    }

    /// `apply` has the very gradients of the function that [`gradients_of_dora`] checks.
    #[test]
    fn dora_keeps_its_lengths_out_of_the_gradient() {
        for base in bases() {
            let vars = inputs().map(|input| Var::from_tensor(&input).unwrap());
            let [x, down, up, magnitude] = &vars;
            let matrix = dora(&base, down, up, magnitude);
            let norms = matrix.row_lengths(matrix.lengths.as_ref().unwrap()).unwrap();
            let detached = base.apply_with(x, down, up, 0.6).unwrap();
            let detached = scale_columns(&detached, magnitude, norms).unwrap();
            let weights = check::matrix(12, 5, 6);
            let gradients = |y: &Tensor| {
                let grads = (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
                vars.each_ref()
                    .map(|var| grads.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap())
            };
            assert_eq!(gradients(&matrix.apply(x).unwrap()), gradients(&detached));
        }
    }

    #[test]
    fn apply_is_a_product_with_the_matrix() {
        for base in bases() {
            let [x, down, up, magnitude] = inputs();
            let mut matrix = dora(&base, &down, &up, &magnitude);
            for lengths in [matrix.lengths.clone(), None] {
                matrix.lengths = lengths;
                let found = matrix.apply(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let whole = x.matmul(&matrix.matrix().unwrap().t().unwrap()).unwrap();
                let whole = whole.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                assert!(found.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-4), "{found:?} {whole:?}");
            }
            // With B = 0 and the base's own lengths, DoRA changes nothing.
            let up = up.zeros_like().unwrap();
            let own: Vec<f32> = row_squares(&base).unwrap().iter().map(|x| x.sqrt() as f32).collect();
            let own = Tensor::from_vec(own, 6, &Device::Cpu).unwrap();
            let same = dora(&base, &down, &up, &own).apply(&x).unwrap().flatten_all().unwrap();
            let plain = base.apply(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
            assert!(same.to_vec1::<f32>().unwrap().iter().zip(&plain).all(close));
        }
    }

    #[test]
    fn dropout_leaves_the_base_alone() {
        let [x, down, up, _] = inputs();
        let base = bases()[0].clone();
        let plain = base.apply(&x).unwrap().to_vec2::<f32>().unwrap();
        let zero = up.zeros_like().unwrap();
        let mut matrix = LowRank { base, down, up: zero, scale: 1.0, lengths: None, dropout: Some((0.5, 3)) };
        assert_eq!(matrix.apply(&x).unwrap().to_vec2::<f32>().unwrap(), plain);
        matrix.up = up;
        assert_ne!(matrix.apply(&x).unwrap().to_vec2::<f32>().unwrap(), plain);
    }
}
