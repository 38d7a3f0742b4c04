//! Matrix products against dequantized weights in double precision, and all tables against each other.

use super::*;
use crate::Code;
use crate::kernels::dequantize_row;
use crate::workers::Workers;

use std::thread;

/// What a product must be near: the exact sum over the quantized activations, and the sum of magnitudes that
/// rounding errors are measured by.
fn reference(weight: &Matrix, acts: &Activations) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for token in 0..acts.tokens() {
        let x = if weight.dtype().is_float() { acts.row(token).to_vec() } else { dequantized(acts, token) };
        for row in 0..weight.rows() {
            let mut w = vec![0.0; weight.cols()];
            dequantize_row(weight.dtype(), weight.row(row).unwrap(), &mut w).unwrap();
            let biggest = w.iter().fold(0f32, |m, w| m.max(w.abs()));
            let products = x.iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            // A quantized weight near zero is the difference of two larger terms.
            let magnitude = x.iter().map(|x| f64::from(x.abs()) * f64::from(biggest)).sum::<f64>();
            out.push((products.sum(), magnitude));
        }
    }
    out
}

/// The activations that a quantized product really sees.
fn dequantized(acts: &Activations, token: usize) -> Vec<f32> {
    let row = acts.quantized_row(token);
    (0..acts.cols())
        .map(|i| {
            let (pair, half, at) = (i / 64, i % 32 / 16, i % 16);
            let q = row.quants.as_flattened()[pair * 64 + half * 32 + i % 64 / 32 * 16 + at];
            f32::from(q) * row.scales.as_flattened()[i / 32]
        })
        .collect()
}

fn check(dtype: DType, rows: usize, tokens: usize, cols: usize, shift: usize, seed: u64) {
    let mut random = Random(seed);
    let weights = random.weights(dtype, rows, cols);
    let mut moved = vec![0; shift];
    moved.extend_from_slice(&weights);
    let weight = Matrix::new(dtype, rows, cols, &moved[shift..]).unwrap();
    let values = random.floats(tokens * cols);
    let mut batch = Batch::new(tokens, cols, &values);
    let mut acts = batch.rows();
    let acts = Kernels::generic().quantize(&mut acts, Layout::Rows);
    let expected = matmul(Kernels::generic(), &weight, &acts);
    for (found, (exact, magnitude)) in expected.iter().zip(reference(&weight, &acts)) {
        let error = (f64::from(*found) - exact).abs();
        assert!(error <= 1e-6 * magnitude, "{} is {found}, exactly {exact}", dtype.name());
    }
    for kernels in Kernels::available() {
        let what = format!("{} {} {rows}x{cols}, {tokens} tokens", kernels.name(), dtype.name());
        let mut batch = Batch::new(tokens, cols, &values);
        let mut acts = batch.rows();
        assert_same(&matmul(kernels, &weight, &kernels.quantize(&mut acts, Layout::Rows)), &expected, &what);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_are_right_and_the_same_in_every_table(
        dtype in any_dtype(), rows in 1..9usize, tokens in 1..20usize, blocks in 1..20usize,
        shift in 0..33usize, seed: u64,
    ) {
        let unit = if dtype.is_float() { 7 } else { dtype.block_len() };
        let blocks = if unit == 256 { blocks.div_ceil(6) } else { blocks };
        check(dtype, rows, tokens, blocks * unit, shift, seed);
    }

    #[test]
    fn any_bytes_give_the_same_result_in_every_table(
        dtype in any_dtype(), tokens in 1..10usize, blocks in 1..20usize, seed: u64,
    ) {
        // Random factors include infinities, NaNs, zeros and numbers that overflow.
        let cols = if dtype.block_len() == 256 { 256 } else { blocks * 32 };
        let mut random = Random(seed);
        let weights = random.bytes(dtype.row_bytes(cols).unwrap() * 3);
        let weight = Matrix::new(dtype, 3, cols, &weights).unwrap();
        let mut values: Vec<f32> =
            (0..tokens * cols).map(|_| random.float() * 10f32.powi((random.next() % 60) as i32 - 30)).collect();
        if seed % 3 == 0 {
            let at = random.next() as usize % values.len();
            values[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-45][seed as usize / 3 % 5];
        }
        let mut batch = Batch::new(tokens, cols, &values);
        let mut acts = batch.rows();
        let expected = matmul(Kernels::generic(), &weight, &Kernels::generic().quantize(&mut acts, Layout::Rows));
        for kernels in Kernels::available() {
            let mut batch = Batch::new(tokens, cols, &values);
            let mut acts = batch.rows();
            assert_same(&matmul(kernels, &weight, &kernels.quantize(&mut acts, Layout::Rows)), &expected, dtype.name());
        }
    }
}

#[test]
fn extreme_integers_do_not_overflow() {
    for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        for fill in [0x00, 0x7f, 0x80, 0xff] {
            for sign in [1.0, -1.0] {
                let mut weights = vec![fill; dtype.row_bytes(512).unwrap()];
                for block in weights.chunks_exact_mut(dtype.block_bytes()) {
                    factors(dtype).iter().for_each(|at| block[*at..at + 2].copy_from_slice(&[0, 0x3c]));
                }
                let weight = Matrix::new(dtype, 1, 512, &weights).unwrap();
                let mut batch = Batch::new(1, 512, &[sign; 512]);
                let mut rows = batch.rows();
                let acts = Kernels::generic().quantize(&mut rows, Layout::Rows);
                let (exact, magnitude) = reference(&weight, &acts)[0];
                for kernels in Kernels::available() {
                    let found = f64::from(matmul(kernels, &weight, &acts)[0]);
                    let what = (kernels.name(), dtype.name(), fill);
                    assert!((found - exact).abs() <= 1e-6 * magnitude, "{what:?}: {found}, exactly {exact}");
                }
            }
        }
    }
}

/// Threads that are really there, and one that calls the job far too often.
struct Threads(usize, usize);

impl Workers for Threads {
    fn count(&self) -> usize {
        self.0
    }

    fn run(&self, job: &(dyn Fn() + Sync)) {
        thread::scope(|scope| {
            for _ in 0..self.1 {
                scope.spawn(job);
            }
        });
    }
}

#[test]
fn results_do_not_depend_on_batch_or_threads() {
    let mut random = Random(1);
    let (rows, cols, tokens) = (203, 576, 21);
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.block_len() < 256) {
        let weights = random.weights(dtype, rows, cols);
        let weight = Matrix::new(dtype, rows, cols, &weights).unwrap();
        let values = random.floats(tokens * cols);
        for kernels in Kernels::available() {
            let mut batch = Batch::new(tokens, cols, &values);
            let mut acts = batch.rows();
            let acts = kernels.quantize(&mut acts, Layout::Rows);
            let expected = matmul(kernels, &weight, &acts);
            for workers in [Threads(2, 2), Threads(7, 7), Threads(2, 9), Threads(4, 1), Threads(3, 0)] {
                let mut out = vec![f32::NAN; tokens * rows];
                kernels.matmul(&workers, &weight, &acts, &mut out).unwrap();
                assert_same(&out, &expected, dtype.name());
            }
            for token in 0..tokens {
                let mut batch = Batch::new(1, cols, &values[token * cols..][..cols]);
                let mut acts = batch.rows();
                let alone = matmul(kernels, &weight, &kernels.quantize(&mut acts, Layout::Rows));
                assert_same(&alone, &expected[token * rows..][..rows], dtype.name());
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let kernels = Kernels::generic();
    let bytes = [0; 18 * 4];
    let code = |result: crate::Result<Matrix>| result.unwrap_err().code;
    assert_eq!(code(Matrix::new(DType::Q4_0, 2, 48, &bytes)), Code::WrongShape);
    assert_eq!(code(Matrix::new(DType::Q4_0, 2, 0, &[])), Code::WrongShape);
    assert_eq!(code(Matrix::new(DType::Q4_0, 3, 64, &bytes)), Code::WrongShape);
    assert_eq!(code(Matrix::new(DType::F32, usize::MAX, usize::MAX / 4, &bytes)), Code::WrongShape);
    let weight = Matrix::new(DType::Q4_0, 2, 64, &bytes).unwrap();
    assert!(weight.row(2).is_none());

    let run = |acts: &Activations, len: usize| {
        kernels.matmul(&crate::workers::Single, &weight, acts, &mut vec![0.0; len]).map_err(|e| e.code)
    };
    let (mut narrow, mut right) = (Batch::new(3, 32, &[0.0; 96]), Batch::new(3, 64, &[0.0; 192]));
    assert_eq!(run(&kernels.quantize(&mut narrow.rows(), Layout::Rows), 6), Err(Code::WrongShape));
    assert_eq!(run(&right.rows().unquantized(), 6), Err(Code::BadArgument));
    assert_eq!(run(&kernels.quantize(&mut right.rows(), Layout::Rows), 5), Err(Code::WrongShape));
    assert_eq!(run(&kernels.quantize(&mut right.rows(), Layout::Rows), 6), Ok(()));

    let (mut floats, mut quants) = ([0.0; 40], [0; 256]);
    assert!(ActivationsMut::new(1, 24, &mut floats, &mut quants).is_ok());
    assert!(ActivationsMut::new(1, 32, &mut floats, &mut quants).is_err());
    assert!(ActivationsMut::new(2, 24, &mut floats, &mut quants).is_err());
    assert!(ActivationsMut::new(usize::MAX, 24, &mut floats, &mut quants).is_err());
    assert!(ActivationsMut::new(1, usize::MAX, &mut floats, &mut quants).is_err());
    assert!(ActivationsMut::new(0, 64, &mut [], &mut []).is_ok());
}
