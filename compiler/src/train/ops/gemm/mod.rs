//! One safe door to the matrix product: our own where there is AVX-512, made for what training multiplies, and
//! that of the crate `gemm` elsewhere; for large ones a GPU, if one was chosen.

mod accelerator;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::mem::MaybeUninit;

use ::gemm::Parallelism;
use candle_core::Result;

pub use accelerator::{Accelerator, AcceleratorError};

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

/// `c = alpha * a * b`, or `c += alpha * a * b` with `accumulate`, on the CPU; `c` is row-major and dense.
///
/// `threads` says whether the product may use all threads or must stay on the caller's.
///
/// # Panics
/// If the shapes do not fit each other or their slices: a fault of the caller.
pub fn gemm(c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, alpha: f32, accumulate: bool, threads: bool) {
    on_cpu(uninit(c), a, b, alpha, accumulate, threads);
}

/// [`gemm`] on all threads or on the GPU: for whatever grows with the model and the tokens.
///
/// # Errors
/// What the GPU answers; there are none on the CPU.
///
/// # Panics
/// As [`gemm`].
pub fn product_into(c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, alpha: f32, accumulate: bool) -> Result<()> {
    into(uninit(c), a, b, alpha, accumulate)
}

/// `alpha * a * b`, row-major and dense, likewise. Its memory is not filled with zeros before.
///
/// # Errors
/// As [`product_into`].
///
/// # Panics
/// As [`gemm`].
pub fn product(a: Matrix<'_>, b: Matrix<'_>, alpha: f32) -> Result<Vec<f32>> {
    let size = a.rows * b.cols;
    let mut c = Vec::with_capacity(size);
    into(&mut c.spare_capacity_mut()[..size], a, b, alpha, false)?;
    // SAFETY: `into` has written all `size` elements, since it adds to none and has not failed.
    unsafe { c.set_len(size) };
    Ok(c)
}

/// Values as memory that may hold none.
fn uninit(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: both are slices of the same length and layout, and whatever gets this writes nothing but floats.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len()) }
}

/// [`product_into`] memory that may hold no values yet: it reads some only to `accumulate`, and writes them all.
fn into(
    c: &mut [MaybeUninit<f32>],
    a: Matrix<'_>,
    b: Matrix<'_>,
    alpha: f32,
    accumulate: bool,
) -> Result<()> {
    match accelerator::for_product(a.rows * a.cols * b.cols) {
        Some(_) if is_empty(c, &a, &b, accumulate) => Ok(()),
        Some(device) => accelerator::product(device, c, a, b, alpha, accumulate),
        None => {
            on_cpu(c, a, b, alpha, accumulate, true);
            Ok(())
        }
    }
}

/// [`gemm`], likewise.
fn on_cpu(
    c: &mut [MaybeUninit<f32>],
    a: Matrix<'_>,
    b: Matrix<'_>,
    alpha: f32,
    accumulate: bool,
    threads: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if avx512::detected() {
        return avx512::gemm(c, a, b, alpha, accumulate, threads);
    }
    portable(c, a, b, alpha, accumulate, threads);
}

/// Panics unless `c = a * b` stays within the three slices, which every `unsafe` below relies on. Answers whether nothing
/// is to be multiplied: then `c` is as it must be.
fn is_empty(c: &mut [MaybeUninit<f32>], a: &Matrix<'_>, b: &Matrix<'_>, accumulate: bool) -> bool {
    assert_eq!(a.cols, b.rows, "inner sizes of the product");
    assert_eq!(c.len(), a.rows * b.cols, "size of the result");
    assert!(a.end() <= a.values.len() && b.end() <= b.values.len(), "matrix beyond its slice");
    if a.cols == 0 && !accumulate {
        c.fill(MaybeUninit::new(0.0));
    }
    a.cols == 0 || c.is_empty()
}

/// [`on_cpu`] by the crate `gemm`.
fn portable(
    c: &mut [MaybeUninit<f32>],
    a: Matrix<'_>,
    b: Matrix<'_>,
    alpha: f32,
    accumulate: bool,
    threads: bool,
) {
    if is_empty(c, &a, &b, accumulate) {
        return;
    }
    let parallelism = if threads { Parallelism::Rayon(0) } else { Parallelism::None };
    // SAFETY: every element (i, j) that the product reads lies before `end()` of its matrix, which was
    // just checked against its slice; every element of the result lies in `c`, whose length is exactly
    // rows * cols and which nothing else can see during the call because it is borrowed mutably. It is read only
    // with `accumulate`, where the caller's elements are all there.
    unsafe {
        ::gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.as_mut_ptr().cast(),
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
    use proptest::prelude::*;

    type Gemm = fn(&mut [MaybeUninit<f32>], Matrix<'_>, Matrix<'_>, f32, bool, bool);

    /// The product of this CPU, the one of CPUs that it does not know, and the way to a GPU, which ends at candle's own
    /// CPU backend here.
    const ALL: [(&str, Gemm); 3] = [("gemm", on_cpu), ("portable", portable), ("candle", by_candle)];

    fn by_candle(
        c: &mut [MaybeUninit<f32>],
        a: Matrix<'_>,
        b: Matrix<'_>,
        alpha: f32,
        accumulate: bool,
        _: bool,
    ) {
        if !is_empty(c, &a, &b, accumulate) {
            accelerator::product(&candle_core::Device::Cpu, c, a, b, alpha, accumulate).unwrap();
        }
    }

    /// Calls `product` with values; those that it leaves are the ones from before.
    fn call(product: Gemm, c: &mut [f32], a: Matrix<'_>, b: Matrix<'_>, how: (f32, bool, bool)) {
        let mut made: Vec<_> = c.iter().copied().map(MaybeUninit::new).collect();
        product(&mut made, a, b, how.0, how.1, how.2);
        // SAFETY: they were values before, and only values are written.
        c.iter_mut().zip(made).for_each(|(c, made)| *c = unsafe { made.assume_init() });
    }

    /// An operand as it may lie in memory: rows or columns contiguous, with `gap` values between them.
    #[derive(Clone, Copy, Debug)]
    struct Lie {
        turned: bool,
        gap: usize,
    }

    impl Lie {
        fn values(self, seed: u64, rows: usize, cols: usize) -> Vec<f32> {
            let (rows, cols) = if self.turned { (cols, rows) } else { (rows, cols) };
            // Not one value more than a matrix has: a read beyond its end would be one beyond the slice.
            noise(seed, if rows == 0 { 0 } else { (rows - 1) * (cols + self.gap) + cols })
        }

        fn matrix(self, values: &[f32], rows: usize, cols: usize) -> Matrix<'_> {
            if self.turned {
                Matrix::strided(values, cols, rows, rows + self.gap).t()
            } else {
                Matrix::strided(values, rows, cols, cols + self.gap)
            }
        }
    }

    fn at(matrix: &Matrix<'_>, i: usize, j: usize) -> f64 {
        f64::from(matrix.values[i * matrix.row_stride + j * matrix.col_stride])
    }

    /// Compares with the sum in f64; the error may be what f32 leaves open for sums of this length.
    fn agrees(a: Matrix<'_>, b: Matrix<'_>, alpha: f32, accumulate: bool, threads: bool) {
        let (m, n, k) = (a.rows, b.cols, a.cols);
        let before = noise(3, m * n);
        for (name, product) in ALL {
            let mut c = before.clone();
            call(product, &mut c, a, b, (alpha, accumulate, threads));
            for (at_c, (&found, &before)) in c.iter().zip(&before).enumerate() {
                let (i, j) = (at_c / n, at_c % n);
                let sum: f64 = (0..k).map(|x| at(&a, i, x) * at(&b, x, j)).sum();
                let expected = f64::from(alpha) * sum + if accumulate { f64::from(before) } else { 0.0 };
                let open = 1e-6 * (1.0 + k as f64).sqrt() * 4.0;
                assert!(
                    (f64::from(found) - expected).abs() < open,
                    "{name} {m} x {k} x {n} at {i}, {j}: {found}, expected {expected}"
                );
            }
        }
    }

    fn lie() -> impl Strategy<Value = Lie> {
        (any::<bool>(), prop_oneof![Just(0), 1..9usize]).prop_map(|(turned, gap)| Lie { turned, gap })
    }

    fn size() -> impl Strategy<Value = usize> {
        prop_oneof![0..20usize, 30..70usize, Just(16), Just(96), Just(144)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
        #[test]
        fn agrees_with_the_definition(
            (m, n, k) in (size(), size(), size()),
            (a, b) in (lie(), lie()),
            alpha in prop_oneof![Just(1.0f32), -2.0..2.0f32],
            (accumulate, threads) in (any::<bool>(), any::<bool>()),
        ) {
            let (left, right) = (a.values(1, m, k), b.values(2, k, n));
            agrees(a.matrix(&left, m, k), b.matrix(&right, k, n), alpha, accumulate, threads);
        }
    }

    /// Sizes that are cut along every axis, with threads: the shapes of training, smaller.
    #[test]
    fn agrees_where_it_is_cut() {
        for turned in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b) = (Lie { turned: turned.0, gap: 0 }, Lie { turned: turned.1, gap: 0 });
            for (m, n, k) in
                [(150, 210, 1300), (420, 33, 700), (33, 420, 100), (1, 1, 50_000), (700, 160, 90)]
            {
                let (left, right) = (a.values(1, m, k), b.values(2, k, n));
                agrees(a.matrix(&left, m, k), b.matrix(&right, k, n), 0.5, true, true);
            }
        }
    }

    /// A stopped run goes on bit for bit, whoever computes which part and however many there are.
    #[test]
    fn threads_do_not_change_a_bit() {
        let (m, n, k) = (300, 200, 1000);
        for turned in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b) = (Lie { turned: turned.0, gap: 0 }, Lie { turned: turned.1, gap: 0 });
            let (left, right) = (a.values(1, m, k), b.values(2, k, n));
            let product = |threads| {
                let mut c = vec![0.0; m * n];
                gemm(&mut c, a.matrix(&left, m, k), b.matrix(&right, k, n), 1.0, false, threads);
                c
            };
            let alone = product(false);
            for count in [1, 2, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap();
                assert!(pool.install(|| product(true)) == alone, "{count} threads");
            }
        }
    }

    /// What is not a number reaches the rows and columns that it belongs to, and no other.
    #[test]
    fn what_is_no_number_stays_visible() {
        let (m, n, k) = (11, 37, 21);
        for (name, product) in ALL {
            for turned in [false, true] {
                let lie = Lie { turned, gap: 2 };
                let (mut left, right) = (lie.values(1, m, k), lie.values(2, k, n));
                let place = |i: usize, j: usize| if turned { j * (m + 2) + i } else { i * (k + 2) + j };
                (left[place(3, 5)], left[place(10, 20)]) = (f32::NAN, f32::INFINITY);
                let mut c = vec![f32::NAN; m * n];
                call(product, &mut c, lie.matrix(&left, m, k), lie.matrix(&right, k, n), (1.0, false, false));
                for (row, c) in c.chunks_exact(n).enumerate() {
                    let expected = |x: &f32| match row {
                        3 => x.is_nan(),
                        10 => x.is_infinite(),
                        _ => x.is_finite(),
                    };
                    assert!(c.iter().all(expected), "{name}: row {row}");
                }
            }
        }
    }
}
