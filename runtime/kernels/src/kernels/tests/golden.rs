//! Dequantization against gguf-py (tests/golden/blocks), and results that must be the same on every machine.

use super::*;
use crate::Code;
use crate::format::tiled_bytes;
use crate::kernels::{dequantize_row, pack_tiles};

/// Blocks of a type, followed by their values.
fn golden(dtype: DType) -> &'static [u8] {
    macro_rules! file {
        ($name:literal) => {
            include_bytes!(concat!("../../../../../tests/golden/blocks/", $name, ".bin"))
        };
    }
    match dtype {
        DType::F32 => file!("f32"),
        DType::F16 => file!("f16"),
        DType::BF16 => file!("bf16"),
        DType::Q8_0 => file!("q8_0"),
        DType::Q4_0 => file!("q4_0"),
        DType::Q4_1 => file!("q4_1"),
        DType::Q5_0 => file!("q5_0"),
        DType::Q5_1 => file!("q5_1"),
        DType::Q4K => file!("q4_k"),
        DType::Q5K => file!("q5_k"),
        DType::Q6K => file!("q6_k"),
        #[cfg(feature = "low-bit")]
        DType::Q2K => file!("q2_k"),
        #[cfg(feature = "low-bit")]
        DType::Q3K => file!("q3_k"),
        #[cfg(feature = "low-bit")]
        DType::IQ4NL => file!("iq4_nl"),
    }
}

#[test]
fn dequantization_agrees_with_gguf_py() {
    for dtype in DType::ALL {
        let (blocks, values) = golden(dtype).split_at(dtype.row_bytes(512).unwrap());
        let expected: Vec<f32> =
            values.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert_eq!(expected.len(), 512);
        let mut found = [f32::NAN; 512];
        dequantize_row(dtype, blocks, &mut found).unwrap();
        assert_same(&found, &expected, dtype.name());
    }
}

#[test]
fn dequantization_refuses_other_lengths() {
    for dtype in DType::ALL {
        let blocks = vec![0; dtype.row_bytes(512).unwrap()];
        let code =
            |row: &[u8], len: usize| dequantize_row(dtype, row, &mut vec![0.0; len]).map_err(|e| e.code);
        assert_eq!(code(&blocks, 512), Ok(()));
        assert_eq!(code(&blocks[1..], 512), Err(Code::WrongShape));
        assert_eq!(code(&blocks, 256), Err(Code::WrongShape));
        assert_eq!(code(&blocks, 511), Err(Code::WrongShape));
        assert_eq!(code(&[], 0), Ok(()));
    }
}

#[test]
fn results_are_the_same_on_every_machine() {
    // FNV-1a over the bits of products, norm, activation and attention.
    const EXPECTED: u64 = 0x3f78_fdc2_95ad_30fb;
    for kernels in Kernels::available() {
        let mut random = Random(7);
        let mut results = Vec::new();
        for dtype in DType::CORE {
            let cols = if dtype.block_len() == 256 { 768 } else { 576 };
            let weights = random.weights(dtype, 9, cols);
            let weight = Matrix::new(dtype, 9, cols, &weights).unwrap();
            let mut batch = Batch::new(5, cols, &random.floats(5 * cols));
            let mut rows = batch.rows();
            results.extend(matmul(kernels, &weight, &kernels.quantize(&mut rows, Layout::Rows)));
            if let Some(bytes) = tiled_bytes(dtype, 9, cols) {
                let mut tiles = vec![0; bytes];
                pack_tiles(dtype, 9, cols, &weights, &mut tiles).unwrap();
                let weight = Matrix::with(Layout::Tiles, dtype, 9, cols, &tiles).unwrap();
                results.extend(matmul(kernels, &weight, &kernels.quantize(&mut rows, Layout::Tiles)));
            }
        }
        let (x, y) = (random.floats(300), random.floats(300));
        let mut out = vec![0.0; 300];
        kernels.rms_norm(&x, &y, 1e-5, &mut out);
        results.extend_from_slice(&out);
        kernels.swiglu(&mut out, &x);
        results.extend_from_slice(&out);
        let scores = |soft_cap| Scores { scale: 0.7, soft_cap };
        let mut halves = || random.floats(100 * 80).into_iter().map(f32_to_f16).collect::<Vec<_>>();
        let (keys, values) = (halves(), halves());
        let cache = KeyValues::Half { keys: &keys, values: &values };
        attend(kernels, &x[..80], cache, Span::new(80, 100), scores(0.0), &mut out[..80]);
        results.extend_from_slice(&out);
        attend(kernels, &x[..80], cache, Span::new(80, 100), scores(1.5), &mut out[..80]);
        kernels.geglu(&mut out, &y);
        results.extend_from_slice(&out);
        kernels.rms_norm_in_place(&mut out, &x, 1e-6);
        kernels.soft_cap(&mut out, 1.25);
        results.extend_from_slice(&out);
        let hash = results
            .iter()
            .flat_map(|x| x.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        assert_eq!(hash, EXPECTED, "{}: {hash:#x}", kernels.name());
    }
}
