//! candle reads our GGUF files and finds the same numbers in every tensor type.

use std::io::Cursor;

use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use edge_runtime::format::{DType, Gguf};
use edge_runtime::kernels::dequantize_row;
use edge_tests::TinyModel;
use edgec::export::gguf::{Mix, export_to_vec};
use edgec::teacher;

const TOLERANCE: f32 = 1e-6;
const MIXES: [&str; 11] =
    ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "Q6_K", "Q5_K_M", "Q4_K_M"];

/// Compares every tensor of a file and gives the types that were there.
fn compare(what: &str, bytes: &[u8]) -> Vec<DType> {
    let ours = Gguf::parse(bytes).unwrap();
    let mut reader = Cursor::new(bytes);
    let theirs = Content::read(&mut reader).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(theirs.tensor_infos.len(), ours.tensors().count(), "{what}");
    assert_eq!(theirs.metadata.len(), ours.metadata().count(), "{what}");
    let mut types = Vec::new();
    for tensor in ours.tensors() {
        let dtype = tensor.dtype.unwrap();
        let (rows, cols) = (tensor.rows(), tensor.cols());
        let mut found = vec![0.0; rows * cols];
        for (row, out) in tensor.data.chunks_exact(tensor.data.len() / rows).zip(found.chunks_exact_mut(cols))
        {
            dequantize_row(dtype, row, out).unwrap();
        }
        let golden = theirs.tensor(&mut reader, tensor.name, &Device::Cpu).unwrap();
        let golden = golden.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap();
        let golden: Vec<f32> = golden.to_vec1().unwrap();
        assert_eq!(found.len(), golden.len(), "{what}: {}", tensor.name);
        for (index, (found, golden)) in found.iter().zip(&golden).enumerate() {
            let close = (found - golden).abs() <= TOLERANCE;
            assert!(close, "{what}: {} at {index}: {found}, candle {golden}", tensor.name);
        }
        types.push(dtype);
    }
    types
}

#[test]
fn every_tensor_type_means_the_same_to_candle() {
    let types = compare("tiny", &TinyModel::gguf());
    for dtype in DType::CORE {
        assert!(types.contains(&dtype), "{dtype:?} was not compared");
    }
}

#[test]
fn every_mix_that_we_write_is_read() {
    let bytes = TinyModel::gguf();
    let model = teacher::from_gguf(&Gguf::parse(&bytes).unwrap(), "tiny.gguf".as_ref()).unwrap();
    for name in MIXES {
        let mix: Mix = name.parse().unwrap();
        let types = compare(name, &export_to_vec(&model, mix).unwrap());
        let wanted = DType::ALL.into_iter().find(|dtype| name.starts_with(dtype.name())).unwrap();
        assert!(types.contains(&wanted), "{name} has no tensor of {wanted:?}: {types:?}");
    }
}
