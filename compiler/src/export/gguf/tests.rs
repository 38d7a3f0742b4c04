//! Whole models through a file and back, and files that appear whole or not at all.

use candle_core::{Device, Tensor};
use edge_models::{Activation, DecoderSpec, LayerSet, Role, Rope, family_by_gguf_name};
use edge_runtime::format::{DType, Gguf};
use edge_runtime::kernels::dequantize_row;

use super::*;
use crate::model::{Model, Vocabulary};
use crate::teacher;
use crate::train::fixture::tiny;
use crate::train::pretrain::initialize;

/// A model whose rows are whole blocks of 32, or of 256 in one matrix.
fn model() -> Model {
    let mut model = tiny(2, 1);
    (model.spec.hidden, model.spec.head_dim, model.spec.rope_dims, model.spec.ffn) = (64, 16, 16, 256);
    model.weights = initialize(&model.spec, 1).unwrap();
    model
}

fn values(model: &Model, role: Role, layer: usize) -> Vec<f32> {
    model.weights.get(role, layer).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_mix_comes_back() {
    let model = model();
    for mix in Mix::ALL {
        let bytes = export_to_vec(&model, mix).unwrap();
        let file = Gguf::parse(&bytes).unwrap();
        assert_eq!(file.get("general.file_type").unwrap().as_uint(), Some(u64::from(mix.file_type())));
        assert_eq!(file.tensors().count(), model.weights.iter().count());
        for row in model.spec.family.tensors {
            let name = row.gguf.replace("{}", "1");
            let Some(tensor) = file.tensor(&name) else {
                assert!(!row.role.required(&model.spec), "{name}");
                continue;
            };
            let layer = usize::from(row.role.per_layer());
            assert_eq!(tensor.dtype, Some(mix.dtype(row.role, layer, &model.spec)), "{name} as {mix}");
            // Rows of queries and keys are in another order; `teacher` knows, below.
            if row.role.permuted_heads(&model.spec).is_none() {
                let expected = values(&model, row.role, layer);
                let mut found = vec![f32::NAN; expected.len()];
                dequantize_row(tensor.dtype.unwrap(), tensor.data, &mut found).unwrap();
                let largest = expected.iter().fold(0.0, |max: f32, v| max.max(v.abs()));
                let worst = expected.iter().zip(&found).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                // A step of the coarsest type that has four bits, of two bits.
                let steps = if matches!(tensor.dtype, Some(DType::Q2K | DType::Q3K)) { 2.0 } else { 7.0 };
                assert!(worst <= largest / steps, "{name} as {mix}: {worst} of {largest}");
            }
        }
    }
}

#[test]
fn f32_comes_back_bit_for_bit() {
    let model = model();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    export(&model, Mix::F32, &path).unwrap();
    let back = teacher::load(&path).unwrap();
    assert_eq!(back.spec, model.spec);
    assert_eq!(back.name, model.name);
    assert_eq!(back.weights.iter().count(), model.weights.iter().count());
    for (role, layer, _) in model.weights.iter() {
        assert_eq!(values(&back, role, layer), values(&model, role, layer), "{role:?} {layer}");
    }
}

/// Layers with and without windows in an order that no period gives, and fused tensors of one type.
#[test]
fn windows_and_fused_tensors_come_back() {
    let plain = model();
    let gemma = DecoderSpec {
        family: family_by_gguf_name("gemma3").unwrap(),
        layers: 4,
        activation: Activation::GeluTanh,
        qk_norm: true,
        post_norms: true,
        embedding_scale: 8.0,
        window: 8,
        local: LayerSet::periodic(9, 6).select(&[0, 5, 6, 7]),
        local_rope: Some(Rope { theta: 5_000.0, ..plain.spec.rope }),
        attn_scale: Some(0.125),
        ..plain.spec
    };
    let phi =
        DecoderSpec { family: family_by_gguf_name("phi3").unwrap(), tied_embeddings: false, ..plain.spec };
    for spec in [gemma, phi] {
        let weights = initialize(&spec, 5).unwrap();
        let model = Model { spec, weights, ..plain.clone() };
        let bytes = export_to_vec(&model, Mix::F32).unwrap();
        let back = teacher::from_gguf(&Gguf::parse(&bytes).unwrap(), "memory".as_ref()).unwrap();
        assert_eq!(back.spec, spec);
        for (role, layer, _) in model.weights.iter() {
            assert_eq!(values(&back, role, layer), values(&model, role, layer), "{role:?} {layer}");
        }
        let bytes = export_to_vec(&model, Mix::Q4_0).unwrap();
        let back = teacher::from_gguf(&Gguf::parse(&bytes).unwrap(), "memory".as_ref()).unwrap();
        for (role, layer, _) in model.weights.iter() {
            let (found, expected) = (values(&back, role, layer), values(&model, role, layer));
            let largest = expected.iter().fold(0.0, |max: f32, v| max.max(v.abs()));
            assert!(found.iter().zip(&expected).all(|(x, y)| (x - y).abs() <= largest / 7.0), "{role:?}");
        }
    }
}

#[test]
fn a_vocabulary_is_filled_up_to_the_rows_of_the_table() {
    let mut model = model();
    let tokens = |count: usize| {
        let tokens = (0..count).map(|id| format!("t{id}").into_bytes()).collect();
        let entries = vec![
            ("tokenizer.ggml.model".into(), "gpt2".into()),
            ("tokenizer.ggml.tokens".into(), MetaValue::Strings(tokens)),
            ("tokenizer.ggml.token_type".into(), MetaValue::I32s(vec![1; count])),
        ];
        Some(Vocabulary { entries })
    };
    model.vocabulary = tokens(59);
    let bytes = export_to_vec(&model, Mix::Q4_0).unwrap();
    let file = Gguf::parse(&bytes).unwrap();
    let list = file.get("tokenizer.ggml.tokens").unwrap().as_array().unwrap();
    let list: Vec<&[u8]> = list.strings().unwrap().collect();
    assert_eq!(
        (list.len(), list[58], list[59], list[60]),
        (61, &b"t58"[..], &b"[PAD59]"[..], &b"[PAD60]"[..])
    );
    let kinds = file.get("tokenizer.ggml.token_type").unwrap().as_array().unwrap();
    let kinds: Vec<f64> = kinds.iter().map(|kind| kind.as_float().unwrap()).collect();
    assert_eq!((kinds.len(), kinds[58], kinds[59]), (61, 1.0, 5.0));
    model.vocabulary = tokens(62);
    let error = export_to_vec(&model, Mix::Q4_0).unwrap_err().to_string();
    assert_eq!(error, "key `tokenizer.ggml.tokens` has 62 entries, expected 61");
}

#[test]
fn a_file_appears_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut model = model();
    let summary = export(&model, Mix::Q4_K_M, &path).unwrap();
    let written = std::fs::read(&path).unwrap();
    assert_eq!(written, export_to_vec(&model, Mix::Q4_K_M).unwrap());
    assert_eq!(summary.bytes, written.len() as u64);
    assert_eq!(summary.weights, model.spec.parameters());
    let data = Gguf::parse(&written).unwrap().tensors().map(|tensor| tensor.data.len()).sum::<usize>();
    assert_eq!(summary.bits_per_weight, 8.0 * data as f64 / summary.weights as f64);

    let mut bad = vec![0.5f32; 64 * 256];
    bad[3 * 256 + 7] = f32::NAN;
    model.weights.insert(Role::FfnDown, 1, Tensor::from_vec(bad, (64, 256), &Device::Cpu).unwrap());
    let error = export(&model, Mix::Q4_K_M, &path).unwrap_err().to_string();
    assert!(error.starts_with("tensor `blk.1.ffn_down.weight`: row 3, column 7 is NaN"), "{error}");
    let short = Tensor::zeros((64, 255), candle_core::DType::F32, &Device::Cpu).unwrap();
    model.weights.insert(Role::FfnDown, 1, short);
    let error = export(&model, Mix::Q4_K_M, &path).unwrap_err().to_string();
    assert!(error.contains("[64, 255], expected [64, 256]"), "{error}");
    model.weights.remove(Role::FfnDown, 1);
    let error = export(&model, Mix::Q4_K_M, &path).unwrap_err().to_string();
    assert_eq!(error, "tensor `blk.1.ffn_down.weight` is missing");
    assert_eq!(std::fs::read(&path).unwrap(), written);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn longest_names_and_every_alignment() {
    let name = "x".repeat(63);
    for len in 1..=33 {
        let mut file = GgufWriter::new();
        file.meta(&"k".repeat(len), &MetaValue::U8(1)).unwrap();
        for name in [&name[..], "t"] {
            file.tensor(name, &[len as u64], DType::F16, vec![len as u8; 2 * len]).unwrap();
        }
        let bytes = file.to_vec().unwrap();
        let parsed = Gguf::parse(&bytes).unwrap();
        for tensor in parsed.tensors() {
            let at = tensor.data.as_ptr() as usize - bytes.as_ptr() as usize;
            assert_eq!((at % 32, tensor.data), (0, &vec![len as u8; 2 * len][..]));
        }
        assert_eq!(bytes.len() % 32, 0);
    }
}
