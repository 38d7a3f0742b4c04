//! Products with weights in tiles: against double precision, all tables against each other, prefill against
//! decode.

use super::*;
use crate::Code;
use crate::format::{TILE_ROWS, tiled_bytes};
use crate::kernels::{dequantize_row, pack_tiles};
use crate::workers::Single;

fn is_tiled(dtype: DType) -> bool {
    tiled_bytes(dtype, TILE_ROWS, 256).is_some()
}

fn quantized_dtype() -> impl Strategy<Value = DType> {
    any_dtype().prop_filter("in tiles", |dtype| is_tiled(*dtype))
}

/// The matrix, in tiles.
fn tiled(dtype: DType, rows: usize, cols: usize, weights: &[u8]) -> Vec<u8> {
    let mut tiles = vec![0xee; tiled_bytes(dtype, rows, cols).unwrap()];
    pack_tiles(dtype, rows, cols, weights, &mut tiles).unwrap();
    tiles
}

/// `[tokens, rows]` of one product.
fn product(kernels: &Kernels, weight: &Matrix, tokens: usize, values: &[f32]) -> Vec<f32> {
    let mut batch = Batch::new(tokens, weight.cols(), values);
    let mut rows = batch.rows();
    matmul(kernels, weight, &kernels.quantize(&mut rows, Layout::Tiles))
}

/// The product in double precision, of activations quantized as all kernels do it, and the sum of the
/// magnitudes that rounding errors are measured by.
fn exact(weight: &Matrix, tokens: usize, values: &[f32]) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for x in values.chunks_exact(weight.cols()).take(tokens) {
        let mut batch = Batch::new(1, weight.cols(), x);
        let mut rows = batch.rows();
        let acts = Kernels::generic().quantize(&mut rows, Layout::Tiles).tile_acts();
        let x: Vec<f64> =
            (0..weight.cols()).map(|i| f64::from(acts.quants[i]) * f64::from(acts.scales[i / 32])).collect();
        for row in 0..weight.rows() {
            let mut w = vec![0.0; weight.cols()];
            weight.dequantize(row, &mut w).unwrap();
            let biggest = w.iter().fold(0f32, |most, w| most.max(w.abs()));
            let sum = x.iter().zip(&w).map(|(x, w)| x * f64::from(*w)).sum();
            // A quantized weight near zero is the difference of two larger terms.
            out.push((sum, x.iter().map(|x| x.abs() * f64::from(biggest)).sum()));
        }
    }
    out
}

fn check(dtype: DType, rows: usize, tokens: usize, cols: usize, shift: usize, seed: u64) {
    let mut random = Random(seed);
    let weights = random.weights(dtype, rows, cols);
    let mut moved = vec![0; shift];
    moved.extend(tiled(dtype, rows, cols, &weights));
    let weight = Matrix::with(Layout::Tiles, dtype, rows, cols, &moved[shift..]).unwrap();
    for row in 0..rows {
        let (mut before, mut after) = (vec![0.0; cols], vec![f32::NAN; cols]);
        let bytes = dtype.row_bytes(cols).unwrap();
        dequantize_row(dtype, &weights[row * bytes..][..bytes], &mut before).unwrap();
        weight.dequantize(row, &mut after).unwrap();
        // Not bit for bit: a zero may have another sign.
        assert_eq!(after, before, "{}", dtype.name());
    }
    let values = random.floats(tokens * cols);
    let expected = product(Kernels::generic(), &weight, tokens, &values);
    for (found, (exact, magnitude)) in expected.iter().zip(exact(&weight, tokens, &values)) {
        let error = (f64::from(*found) - exact).abs();
        assert!(error <= 1e-6 * magnitude, "{} is {found}, exactly {exact}", dtype.name());
    }
    for kernels in Kernels::available() {
        let what = format!("{} {} {rows}x{cols}, {tokens} tokens", kernels.name(), dtype.name());
        assert_same(&product(kernels, &weight, tokens, &values), &expected, &what);
        for (token, expected) in expected.chunks_exact(rows).enumerate() {
            let alone = product(kernels, &weight, 1, &values[token * cols..][..cols]);
            assert_same(&alone, expected, &what);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn products_are_right_and_the_same_in_every_table(
        dtype in quantized_dtype(), rows in 1..50usize, tokens in 1..12usize, blocks in 1..40usize,
        shift in 0..65usize, seed: u64,
    ) {
        let blocks = if dtype.block_len() == 256 { blocks.div_ceil(8) } else { blocks };
        check(dtype, rows, tokens, blocks * dtype.block_len(), shift, seed);
    }

    #[test]
    fn any_bytes_give_the_same_result_in_every_table(
        dtype in quantized_dtype(), tokens in 1..6usize, blocks in 1..20usize, seed: u64,
    ) {
        // Random factors include infinities, NaNs, zeros and numbers that overflow.
        let cols = if dtype.block_len() == 256 { 256 } else { blocks * 32 };
        let mut random = Random(seed);
        let tiles = random.bytes(tiled_bytes(dtype, TILE_ROWS, cols).unwrap());
        let weight = Matrix::with(Layout::Tiles, dtype, TILE_ROWS, cols, &tiles).unwrap();
        let mut values: Vec<f32> =
            (0..tokens * cols).map(|_| random.float() * 10f32.powi((random.next() % 60) as i32 - 30)).collect();
        if seed % 3 == 0 {
            let at = random.next() as usize % values.len();
            values[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, 1e-45][seed as usize / 3 % 5];
        }
        let expected = product(Kernels::generic(), &weight, tokens, &values);
        for kernels in Kernels::available() {
            let what = format!("{} {}", kernels.name(), dtype.name());
            assert_same(&product(kernels, &weight, tokens, &values), &expected, &what);
        }
    }
}

/// Blocks that share a scale in wide activations.
const RUN: usize = 3;

/// A product as a large batch has it, whether its activations are wide, and the product of the same ones with kernels
/// that know nothing of runs: NEON's beside those that do, which need no sums of activations.
fn large_batch(
    kernels: &Kernels,
    weight: &Matrix,
    tokens: usize,
    values: &[f32],
) -> (Vec<f32>, bool, Vec<f32>) {
    let mut batch = Batch::new(tokens, weight.cols(), values);
    let mut rows = batch.rows();
    let acts = kernels.quantize_for(&mut rows, &[weight]);
    let twin = if acts.wide() { Kernels::by_name("neon").unwrap() } else { Kernels::generic() };
    let expected = matmul(twin, weight, &acts.narrow());
    (matmul(kernels, weight, &acts), acts.wide(), expected)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn large_batches_are_within_their_contract(
        dtype in quantized_dtype(), rows in 1..36usize, tokens in 30..40usize, blocks in 1..60usize, shift in 0..65usize,
        seed: u64,
    ) {
        let cols = if dtype.block_len() == 256 { blocks.div_ceil(8) * 256 } else { blocks * 32 };
        let mut random = Random(seed);
        let mut moved = vec![0; shift];
        moved.extend(tiled(dtype, rows, cols, &random.weights(dtype, rows, cols)));
        let weight = Matrix::with(Layout::Tiles, dtype, rows, cols, &moved[shift..]).unwrap();
        let values = random.floats(tokens * cols);
        let exact = exact(&weight, tokens, &values);
        for kernels in Kernels::available() {
            let what = format!("{} {} {rows}x{cols}, {tokens} tokens", kernels.name(), dtype.name());
            let (found, wide, expected) = large_batch(kernels, &weight, tokens, &values);
            let one_scale = [DType::Q8_0, DType::Q4_0, DType::Q5_0].contains(&dtype);
            prop_assert_eq!(wide, kernels.name() == "i8mm" && tokens >= 32 && one_scale, "{}", what);
            if !wide {
                assert_same(&found, &expected, &what);
                continue;
            }
            for ((found, expected), (_, magnitude)) in found.iter().zip(&expected).zip(&exact) {
                let error = f64::from((found - expected).abs());
                prop_assert!(error <= 2e-6 * magnitude, "{what}: {found}, {expected}, {magnitude}");
            }
        }
    }
}

#[test]
fn a_run_has_the_largest_scale_of_its_blocks() {
    let (tokens, blocks) = (33, 7);
    let values = Random(3).floats(tokens * blocks * 32);
    let zeros = vec![0; tiled_bytes(DType::Q8_0, 1, blocks * 32).unwrap()];
    let weight = Matrix::with(Layout::Tiles, DType::Q8_0, 1, blocks * 32, &zeros).unwrap();
    for kernels in Kernels::available().filter(|kernels| kernels.name() == "i8mm") {
        let (mut batch, mut other) =
            (Batch::new(tokens, blocks * 32, &values), Batch::new(tokens, blocks * 32, &values));
        let (mut rows, mut other) = (batch.rows(), other.rows());
        let acts = kernels.quantize_for(&mut rows, &[&weight]).tile_acts();
        let exact = kernels.quantize(&mut other, Layout::Tiles).tile_acts();
        for token in 0..tokens {
            let at = |block: usize| (token / 4 * blocks + block) * 4 + token % 4;
            for block in 0..blocks {
                let run = block / RUN * RUN..blocks.min(block / RUN * RUN + RUN);
                let scale = run.map(|block| exact.scales[at(block)]).fold(0.0, f32::max);
                assert_eq!(acts.scales[at(block)], scale);
                for i in 0..32 {
                    let q =
                        acts.quants[(token / 4 * blocks + block) * 128 + i / 8 * 32 + token % 4 * 8 + i % 8];
                    let x = values[(token * blocks + block) * 32 + i];
                    // The scale is rounded to half precision, the integers are not chosen by that.
                    assert!((f32::from(q) * scale - x).abs() <= 0.57 * scale, "{q} * {scale}, {x}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_where_it_is_in_a_large_batch() {
    let (tokens, rows, cols) = (34, 18, 160);
    for (dtype, block_bytes) in [(DType::Q8_0, 34), (DType::Q4_0, 18)] {
        let mut random = Random(5);
        let mut weights = random.weights(dtype, rows, cols);
        for (row, scale) in [(3, [0, 0x7c]), (7, [0, 0x7e])] {
            weights[(row * cols / 32 + 3) * block_bytes..][..2].copy_from_slice(&scale);
        }
        let tiles = tiled(dtype, rows, cols, &weights);
        let weight = Matrix::with(Layout::Tiles, dtype, rows, cols, &tiles).unwrap();
        let mut values = random.floats(tokens * cols);
        values[5 * cols + 9] = f32::NAN;
        values[6 * cols + 100] = f32::NEG_INFINITY;
        values[9 * cols..][..cols].fill(0.0);
        for kernels in Kernels::available() {
            let (found, ..) = large_batch(kernels, &weight, tokens, &values);
            for (index, found) in found.into_iter().enumerate() {
                let (token, row) = (index / rows, index % rows);
                let bad = [5, 6].contains(&token) || [3, 7].contains(&row);
                assert_eq!(found.is_finite(), !bad, "{} token {token}, row {row}: {found}", kernels.name());
                assert!(bad || token != 9 || found == 0.0);
            }
        }
    }
}

#[test]
fn extreme_integers_do_not_overflow() {
    for dtype in DType::ALL.into_iter().filter(|dtype| is_tiled(*dtype)) {
        for (fill, sign, tokens) in [0x00, 0x7f, 0x80, 0xff]
            .into_iter()
            .flat_map(|fill| [(fill, 1.0, 1), (fill, -1.0, 1), (fill, -1.0, 4), (fill, -1.0, 32)])
        {
            let mut weights = vec![fill; dtype.row_bytes(512).unwrap()];
            for block in weights.chunks_exact_mut(dtype.block_bytes()) {
                factors(dtype).iter().for_each(|at| block[*at..at + 2].copy_from_slice(&[0, 0x3c]));
            }
            let tiles = tiled(dtype, 1, 512, &weights);
            let weight = Matrix::with(Layout::Tiles, dtype, 1, 512, &tiles).unwrap();
            let values = vec![sign; 512 * tokens];
            for kernels in Kernels::available() {
                let (found, ..) = large_batch(kernels, &weight, tokens, &values);
                for (found, (exact, magnitude)) in found.iter().zip(exact(&weight, tokens, &values)) {
                    let what = (kernels.name(), dtype.name(), fill);
                    assert!(
                        (f64::from(*found) - exact).abs() <= 1e-6 * magnitude,
                        "{what:?}: {found}, {exact}"
                    );
                }
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let code = |result: crate::Result<()>| result.unwrap_err().code;
    let (from, mut to) = ([0; 18 * 4], vec![0; tiled_bytes(DType::Q4_0, 2, 64).unwrap()]);
    assert!(pack_tiles(DType::Q4_0, 2, 64, &from, &mut to).is_ok());
    assert_eq!(code(pack_tiles(DType::Q4_0, 2, 48, &from, &mut to)), Code::WrongShape);
    assert_eq!(code(pack_tiles(DType::Q4_0, 2, 0, &[], &mut [])), Code::WrongShape);
    assert_eq!(code(pack_tiles(DType::Q4_0, 3, 64, &from, &mut to)), Code::WrongShape);
    assert_eq!(code(pack_tiles(DType::Q4_0, 2, 64, &from, &mut to[1..])), Code::WrongShape);
    assert_eq!(code(pack_tiles(DType::F16, 2, 64, &from, &mut to)), Code::UnsupportedType);
    assert_eq!(tiled_bytes(DType::F32, 1, 64), None);
    assert_eq!(tiled_bytes(DType::Q4K, 1, 32), None);
    assert_eq!(tiled_bytes(DType::Q8_0, usize::MAX, usize::MAX / 32 * 32), None);

    let weight = Matrix::with(Layout::Tiles, DType::Q4_0, 2, 64, &to).unwrap();
    assert!(Matrix::with(Layout::Tiles, DType::Q4_0, 17, 64, &to).is_err());
    assert!(weight.dequantize(2, &mut [0.0; 64]).is_err());
    assert!(weight.dequantize(0, &mut [0.0; 32]).is_err());
    // Activations in the order of rows are not those of tiles.
    let kernels = Kernels::generic();
    let mut batch = Batch::new(1, 64, &[1.0; 64]);
    let mut rows = batch.rows();
    let acts = kernels.quantize(&mut rows, Layout::Rows);
    let error = kernels.matmul(&Single, &weight, &acts, &mut [0.0; 2]).unwrap_err();
    assert_eq!(error.code, Code::BadArgument);
}
