//! Second moments of what a matrix reads: all that rounding it needs to know of the text.
//!
//! [`Moments`] sums `X^T X` (and `T^T X` with what is to come out) over chunks of tokens; [`Factor`] takes
//! the result apart, so that rounding can go from column to column. Nothing here knows a block or a model.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::train::ops::{Matrix, gemm, with_values};

/// Columns that are factored at a time.
const PANEL: usize = 48;

/// Columns whose products with those before them are worked out at a time.
const SQUARE: usize = 384;

/// Rows that are solved for at a time, so that the factor is not fetched anew for each.
const SOLVED: usize = 8;

/// Sums over tokens of the inputs `x` of a matrix, and perhaps of targets `t` beside them.
pub struct Moments {
    cols: usize,
    /// Width of a target; 0 without.
    target_cols: usize,
    /// `sum(x x^T)`, `[cols, cols]`.
    pub gram: Vec<f64>,
    /// `sum(t x^T)`, `[target_cols, cols]`.
    pub cross: Vec<f64>,
}

impl Moments {
    /// Of inputs of `cols` values and targets of `target_cols` (0 if there are none), over no tokens yet.
    pub fn new(cols: usize, target_cols: usize) -> Self {
        let (gram, cross) = (vec![0.0; cols * cols], vec![0.0; target_cols * cols]);
        Self { cols, target_cols, gram, cross }
    }

    /// Values of an input.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Adds tokens: `x` is `[n, cols]`, `target` `[n, target_cols]`. Products are summed in f32 over `n`, a few
    /// thousand at most, and in f64 from there on.
    ///
    /// # Errors
    /// Shapes that do not fit, or values that are not f32 on the CPU.
    pub fn add(&mut self, x: &Tensor, target: Option<&Tensor>) -> candle_core::Result<()> {
        let (tokens, cols) = x.dims2()?;
        let target_cols = target.map_or(Ok(0), |target| target.dim(1))?;
        if (cols, target_cols) != (self.cols, self.target_cols) {
            let expected = (self.cols, self.target_cols);
            candle_core::bail!("moments of {:?} columns, expected {expected:?}", (cols, target_cols));
        }
        let x = x.contiguous()?;
        with_values(&x, |x| {
            add_square(&mut self.gram, x, tokens, cols);
            let x = Matrix::new(x, tokens, cols);
            match target {
                None => Ok(()),
                Some(target) => with_values(&target.contiguous()?, |target| {
                    add_product(&mut self.cross, Matrix::new(target, tokens, target_cols), x);
                    Ok(())
                }),
            }
        })?;
        Ok(())
    }
}

/// `sums += x^T x`. The lower triangle is worked out, some columns at a time, and mirrored.
fn add_square(sums: &mut [f64], x: &[f32], tokens: usize, cols: usize) {
    let mut product = Vec::new();
    for first in (0..cols).step_by(SQUARE) {
        let last = (first + SQUARE).min(cols);
        product.resize((last - first) * last, 0.0);
        let rows = Matrix::strided(&x[first..], tokens, last - first, cols);
        gemm(&mut product, rows.t(), Matrix::strided(x, tokens, last, cols), 1.0, false, true);
        sums[first * cols..].par_chunks_mut(cols).zip(product.par_chunks(last)).for_each(|(sums, terms)| {
            sums.iter_mut().zip(terms).for_each(|(sum, &term)| *sum += f64::from(term));
        });
    }
    for row in 1..cols {
        let (above, below) = sums.split_at_mut(row * cols);
        above.chunks_mut(cols).zip(below).for_each(|(above, &mut sum)| above[row] = sum);
    }
}

/// `sums += a^T b`.
fn add_product(sums: &mut [f64], a: Matrix<'_>, b: Matrix<'_>) {
    let mut product = vec![0.0; sums.len()];
    gemm(&mut product, a.t(), b, 1.0, false, true);
    sums.par_iter_mut().zip(product).for_each(|(sum, term)| *sum += f64::from(term));
}

/// `G + damping * mean(diag G) * I = V V^T` with `V` upper triangular.
pub struct Factor {
    cols: usize,
    /// Row-major; the lower triangle is zero.
    v: Vec<f64>,
}

impl Factor {
    /// Takes a Gram matrix `[cols, cols]` apart; columns that no token ever moved are taken for independent. `None`
    /// if the matrix is not positive definite: it holds no sums of squares, or NaN.
    pub fn new(gram: &[f64], cols: usize, damping: f64) -> Option<Self> {
        let mean = (0..cols).map(|i| gram[i * cols + i]).sum::<f64>() / cols as f64;
        let ridge = if mean > 0.0 { damping * mean } else { 1.0 };
        // The lower factor of the matrix turned by half a turn, turned back, is the upper one.
        let mut turned: Vec<f64> = gram.iter().rev().copied().collect();
        (0..cols).for_each(|i| turned[i * cols + i] += ridge);
        cholesky(&mut turned, cols)?;
        turned.reverse();
        Some(Self { cols, v: turned })
    }

    /// Replaces each row `b` of `[n, cols]` by `b (V V^T)^-1`.
    pub fn solve(&self, rows: &mut [f64]) {
        let (v, cols) = (&self.v, self.cols);
        rows.par_chunks_mut(SOLVED * cols).for_each(|rows| {
            // u V^T = b, from the last column on.
            for j in (0..cols).rev() {
                let row = &v[j * cols..][j..cols];
                for b in rows.chunks_exact_mut(cols) {
                    b[j] = (b[j] - dot(&b[j + 1..], &row[1..])) / row[0];
                }
            }
            // z V = u, from the first.
            for j in 0..cols {
                let row = &v[j * cols..][j..cols];
                for u in rows.chunks_exact_mut(cols) {
                    let z = u[j] / row[0];
                    u[j] = z;
                    u[j + 1..].iter_mut().zip(&row[1..]).for_each(|(u, v)| *u -= z * v);
                }
            }
        });
    }

    /// `A[j][i] = V[j][i] / V[i][i]` for `j < i`, else 0, row-major: how much of the error in column `j` column `i`
    /// makes up for.
    pub fn feedback(&self) -> Vec<f32> {
        let (v, cols) = (&self.v, self.cols);
        let diagonal: Vec<f64> = (0..cols).map(|i| v[i * cols + i]).collect();
        let mut out = vec![0.0; cols * cols];
        out.par_chunks_mut(cols).enumerate().for_each(|(j, row)| {
            for i in j + 1..cols {
                row[i] = (v[j * cols + i] / diagonal[i]) as f32;
            }
        });
        out
    }

    /// `V[i][i]^2`: what a squared error of 1 in column `i` costs that no later column can make up for.
    pub fn importance(&self) -> Vec<f32> {
        (0..self.cols).map(|i| (self.v[i * self.cols + i]).powi(2) as f32).collect()
    }
}

/// The sum of products, in eight interleaved partial sums.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut lanes = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}

/// The lower Cholesky factor of a symmetric matrix, in its place, with zeros above; `None` if it is not positive
/// definite. Left-looking, a panel of columns at a time, rows in parallel; sums have a fixed order.
fn cholesky(a: &mut [f64], n: usize) -> Option<()> {
    for first in (0..n).step_by(PANEL) {
        let last = (first + PANEL).min(n);
        let panel = a[first * n..last * n].to_vec();
        let done = |j: usize| &panel[(j - first) * n..][..first];
        a[first * n..].par_chunks_mut(n).for_each(|row| {
            let (known, rest) = row.split_at_mut(first);
            for j in first..last {
                rest[j - first] -= dot(known, done(j));
            }
        });
        let (square, below) = a[first * n..].split_at_mut((last - first) * n);
        for i in first..last {
            let (above, row) = square.split_at_mut((i - first) * n);
            for j in first..i {
                let other = &above[(j - first) * n..][first..=j];
                row[j] = (row[j] - dot(&row[first..j], &other[..j - first])) / other[j - first];
            }
            let pivot = row[i] - dot(&row[first..i], &row[first..i]);
            // Not `pivot <= 0.0`, which NaN would pass.
            if !(pivot > 0.0 && pivot.is_finite()) {
                return None;
            }
            row[i] = pivot.sqrt();
            row[i + 1..n].fill(0.0);
        }
        let square = &*square;
        below.par_chunks_mut(n).for_each(|row| {
            for j in first..last {
                let other = &square[(j - first) * n..][first..=j];
                row[j] = (row[j] - dot(&row[first..j], &other[..j - first])) / other[j - first];
            }
        });
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    /// Moments of random inputs whose columns depend on each other.
    fn moments(cols: usize, tokens: usize) -> Moments {
        let mix = check::matrix(3, cols, cols);
        let mut moments = Moments::new(cols, 3);
        for chunk in 0..2 {
            let x = check::matrix(10 + chunk, tokens, cols).matmul(&mix).unwrap();
            moments.add(&x, Some(&check::matrix(20 + chunk, tokens, 3))).unwrap();
        }
        moments
    }

    #[test]
    fn sums_are_those_of_the_definition() {
        for cols in [5, SQUARE + 9] {
            let moments = moments(cols, 9);
            let mix = check::matrix(3, cols, cols);
            let x: Vec<Tensor> =
                (0..2).map(|chunk| check::matrix(10 + chunk, 9, cols).matmul(&mix).unwrap()).collect();
            let x = Tensor::cat(&x, 0).unwrap();
            let t = Tensor::cat(&[check::matrix(20, 9, 3), check::matrix(21, 9, 3)], 0).unwrap();
            let product = |a: &Tensor| a.t().unwrap().matmul(&x).unwrap().flatten_all().unwrap();
            for (found, expected) in [(&moments.gram, product(&x)), (&moments.cross, product(&t))] {
                for (found, expected) in found.iter().zip(expected.to_vec1::<f32>().unwrap()) {
                    let bound = 1e-4 * f64::from(expected).abs().max(1.0);
                    assert!((found - f64::from(expected)).abs() < bound, "{found} {expected}");
                }
            }
        }
    }

    #[test]
    fn the_factor_is_the_upper_one_and_solves() {
        // More than one panel.
        let cols = 2 * PANEL + 7;
        let moments = moments(cols, 2 * cols);
        let damping = 0.01;
        let factor = Factor::new(&moments.gram, cols, damping).unwrap();
        let mean = (0..cols).map(|i| moments.gram[i * cols + i]).sum::<f64>() / cols as f64;
        let gram =
            |i: usize, j: usize| moments.gram[i * cols + j] + if i == j { damping * mean } else { 0.0 };
        for i in 0..cols {
            assert!(factor.v[i * cols..][..i].iter().all(|v| *v == 0.0));
            for j in 0..cols {
                let product = dot(&factor.v[i * cols..][..cols], &factor.v[j * cols..][..cols]);
                assert!((product - gram(i, j)).abs() < 1e-6 * mean, "{i} {j}");
            }
        }
        let b: Vec<f64> = check::noise(5, 2 * cols).into_iter().map(f64::from).collect();
        let mut z = b.clone();
        factor.solve(&mut z);
        for (z, b) in z.chunks(cols).zip(b.chunks(cols)) {
            for (j, b) in b.iter().enumerate() {
                let back: f64 = (0..cols).map(|i| z[i] * gram(i, j)).sum();
                assert!((back - b).abs() < 1e-6, "{back} {b}");
            }
        }
    }

    #[test]
    fn what_is_no_gram_matrix_is_refused() {
        assert!(Factor::new(&[1.0, 2.0, 2.0, 1.0], 2, 0.01).is_none());
        assert!(Factor::new(&[f64::NAN; 4], 2, 0.01).is_none());
        // Nothing ever came through.
        assert_eq!(Factor::new(&[0.0; 4], 2, 0.01).unwrap().importance(), [1.0, 1.0]);
    }
}
