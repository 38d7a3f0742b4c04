//! One safe door to the matrix product.

use gemm::Parallelism;

/// A matrix inside a slice: element `(i, j)` is at `offset + i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix.
    pub fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { values, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows that lie `stride` apart.
    pub fn strided(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self { values, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Index one past the last element.
    fn end(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride + 1
    }
}

/// `c = alpha * a * b`, or `c += alpha * a * b` with `accumulate`; `c` is row-major and dense.
///
/// `threads` says whether the product may use all threads or must stay on the caller's.
///
/// # Panics
/// If the shapes do not fit each other or their slices: a fault of the caller.
pub fn gemm(c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, alpha: f32, accumulate: bool, threads: bool) {
    assert_eq!(a.cols, b.rows, "inner sizes of the product");
    assert_eq!(c.len(), a.rows * b.cols, "size of the result");
    assert!(a.end() <= a.values.len() && b.end() <= b.values.len(), "matrix beyond its slice");
    let parallelism = if threads { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: every element (i, j) that the product reads lies before `end()` of its matrix, which was
    // just checked against its slice; every element of the result lies in `c`, whose length is exactly
    // rows * cols and which nothing else can see during the call because it is borrowed mutably.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.as_mut_ptr(),
            1,
            b.cols as isize,
            accumulate,
            a.values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check::noise;

    #[test]
    fn agrees_with_the_definition() {
        let (m, k, n) = (5, 7, 3);
        let (a, b) = (noise(1, m * 9), noise(2, n * k));
        let left = Matrix::strided(&a, m, k, 9);
        let right = Matrix::new(&b, n, k).t();
        let mut c = vec![1.0; m * n];
        gemm(&mut c, left, right, 0.5, true, true);
        for i in 0..m {
            for j in 0..n {
                let sum: f32 = (0..k).map(|x| a[i * 9 + x] * b[j * k + x]).sum();
                assert!((c[i * n + j] - 1.0 - 0.5 * sum).abs() < 1e-5);
            }
        }
        let kept = c.clone();
        gemm(&mut c, left, right, 1.0, false, false);
        assert!(c.iter().zip(&kept).all(|(new, old)| ((old - 1.0) * 2.0 - new).abs() < 1e-5));
    }
}
