//! What is written is what is read, in both formats, and what is wrong with a file is said.

use std::path::Path;

use edge_models::{DecoderSpec, family_by_gguf_name};

use super::*;
use crate::export::gguf::{GgufWriter, MetaValue};
use crate::train::fixture::tiny;
use crate::train::random::SplitMix64;
use edge_runtime::format::DType;

fn spec(family: &str) -> DecoderSpec {
    let family = family_by_gguf_name(family).unwrap();
    DecoderSpec { qkv_bias: false, ..DecoderSpec { family, ..tiny(3, 0).spec } }
}

/// An adapter with random values beside `targets`.
fn random(spec: &DecoderSpec, targets: &str, settings: &Settings) -> Adapter {
    let targets: Targets = targets.parse().unwrap();
    let mut random = SplitMix64::new(5, 0);
    let mut values = |count: usize| {
        let mut values = vec![0.0; count];
        random.fill_normal(&mut values, 0.3);
        values
    };
    let pairs = targets.choose(spec).unwrap().into_iter().map(|(row, layer)| {
        let [rows, cols] = row.file_shape(spec);
        let (rank, scale) = settings.rank_and_scale(&module(row, layer));
        let (down, up) = (values(rank * cols), values(rows * rank));
        let magnitude = settings.dora.then(|| values(rows));
        Pair { row, layer, rank, down, up, scale, magnitude }
    });
    Adapter { path: "random".into(), pairs: pairs.collect(), rs: settings.rs }
}

fn settings() -> Settings {
    Settings {
        rank: 4,
        alpha: 7.0,
        ranks: vec![("layers.1.mlp.up_proj".into(), 3), ("v_proj".into(), 7)],
        alphas: vec![("o_proj".into(), 0.3), ("layers.2.mlp.down_proj".into(), 11.0)],
        rs: false,
        dora: false,
    }
}

fn assert_same(found: &Adapter, wanted: &Adapter) {
    assert_eq!((found.pairs.len(), found.rs), (wanted.pairs.len(), wanted.rs));
    for (found, wanted) in found.pairs.iter().zip(&wanted.pairs) {
        let place = |pair: &Pair| (module(pair.row, pair.layer), pair.rank, pair.scale);
        assert_eq!(place(found), place(wanted));
        assert_eq!((&found.down, &found.up), (&wanted.down, &wanted.up), "{:?}", place(found));
        assert_eq!(found.magnitude, wanted.magnitude);
    }
}

#[test]
fn peft_folders_come_back_as_they_were() {
    let plain = settings();
    for family in ["llama", "phi3"] {
        let spec = spec(family);
        for settings in [
            plain.clone(),
            Settings { rs: true, ..plain.clone() },
            Settings { dora: true, ..plain.clone() },
            Settings { rank: 5, alpha: 32.0, rs: true, ranks: vec![], alphas: vec![], dora: false },
        ] {
            for targets in ["all-linear", "layers.1.mlp.down_proj,o_proj"] {
                let folder = tempfile::tempdir().unwrap();
                let adapter = random(&spec, targets, &settings);
                write(&adapter, &spec, "base", folder.path()).unwrap();
                assert_same(&read(folder.path(), &spec).unwrap(), &adapter);
                // Inside a run's folder it is found too.
                let run = tempfile::tempdir().unwrap();
                write(&adapter, &spec, "base", &run.path().join("adapter")).unwrap();
                assert_same(&read(run.path(), &spec).unwrap(), &adapter);
            }
        }
    }
}

/// Names are short where they may be: PEFT would adapt the other layers too where they may not.
#[test]
fn the_configuration_names_no_other_module() {
    let spec = spec("llama");
    let config = |targets| {
        let folder = tempfile::tempdir().unwrap();
        write(&random(&spec, targets, &settings()), &spec, "base", folder.path()).unwrap();
        crate::teacher::json(&folder.path().join(CONFIG)).unwrap()
    };
    let all = config("all-linear");
    assert_eq!(all["target_modules"].as_array().unwrap().len(), 7);
    assert_eq!(all["rank_pattern"]["v_proj"], 7);
    assert_eq!(all["rank_pattern"]["model.layers.1.mlp.up_proj"], 3);
    assert_eq!((&all["r"], &all["lora_alpha"]), (&4.into(), &7.into()));
    assert_eq!(all["alpha_pattern"]["o_proj"], 0.3);
    assert_eq!(all["alpha_pattern"].as_object().unwrap().len(), 2);
    let one = config("layers.1.mlp.down_proj");
    assert_eq!(one["target_modules"], serde_json::json!(["model.layers.1.mlp.down_proj"]));
}

#[test]
fn gguf_files_come_back_as_they_were() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("adapter.gguf");
    for family in ["llama", "phi3", "qwen3"] {
        let spec = spec(family);
        // One alpha for all: nothing has to be folded into `B`.
        let uniform = Settings { ranks: vec![], alphas: vec![], ..settings() };
        let adapter = random(&spec, "all-linear", &uniform);
        export(&adapter, &spec, &path).unwrap();
        assert_same(&read(&path, &spec).unwrap(), &adapter);
        // Several: the products are the same.
        let adapter = random(&spec, "all-linear", &Settings { rs: true, ..settings() });
        export(&adapter, &spec, &path).unwrap();
        let found = read(&path, &spec).unwrap();
        for (found, wanted) in found.pairs.iter().zip(&adapter.pairs) {
            assert_eq!((&found.down, found.rank, found.row.hf), (&wanted.down, wanted.rank, wanted.row.hf));
            for (a, b) in found.up.iter().zip(&wanted.up) {
                assert!((a * found.scale - b * wanted.scale).abs() < 1e-5, "{a} {b}");
            }
        }
    }
}

#[test]
fn order_does_not_matter() {
    let base = tiny(3, 4);
    let dora = random(&base.spec, "all-linear", &Settings { dora: true, ..settings() });
    let lora = random(&base.spec, "q_proj,v_proj", &settings());
    let merged = |adapters: &[(Adapter, f32)]| {
        let mut model = base.clone();
        merge_all(&mut model, adapters).map(|()| crate::train::trainer::fingerprint(&model).unwrap())
    };
    let pairs = [(dora.clone(), 1.0), (lora.clone(), 0.5)];
    let turned = [(lora, 0.5), (dora.clone(), 1.0)];
    assert_eq!(merged(&pairs).unwrap(), merged(&turned).unwrap());
    let error = merged(&[(dora.clone(), 1.0), (dora, 1.0)]).unwrap_err().to_string();
    assert!(error.contains("second DoRA"), "{error}");
}

/// Of full rank, a LoRA does what a DoRA does, also through the file, and of a fused matrix too.
#[test]
fn a_dora_can_be_a_lora() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("adapter.gguf");
    for family in ["llama", "phi3"] {
        let mut base = tiny(3, 4);
        base.spec = spec(family);
        let dora = random(&base.spec, "all-linear", &Settings { dora: true, ..settings() });
        export(&as_lora(dora.clone(), &base).unwrap(), &base.spec, &path).unwrap();
        let lora = read(&path, &base.spec).unwrap();
        assert_eq!(lora.pairs.len(), dora.pairs.len());
        let [wanted, found] = [dora, lora].map(|adapter| {
            let mut model = base.clone();
            merge(&mut model, &adapter, 1.0).unwrap();
            model
        });
        for ((role, layer, wanted), (.., found)) in wanted.weights.iter().zip(found.weights.iter()) {
            let apart = (wanted - found).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            let apart = apart.to_scalar::<f32>().unwrap();
            assert!(apart < 1e-5, "{family}, {role:?} of layer {layer}: {apart}");
        }
    }
}

/// Writes a GGUF LoRA of one pair after `change`.
fn file(path: &Path, alpha: f32, kind: &str, tensors: &[(&str, [u64; 2], f32)]) {
    let mut file = GgufWriter::new();
    for (key, value) in [
        ("general.architecture", "llama".into()),
        ("general.type", MetaValue::from(kind)),
        ("adapter.type", "lora".into()),
        ("adapter.lora.alpha", MetaValue::F32(alpha)),
    ] {
        file.meta(key, &value).unwrap();
    }
    for (name, dims, value) in tensors {
        let values = vec![*value; (dims[0] * dims[1]) as usize];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        file.tensor(name, dims, DType::F32, bytes).unwrap();
    }
    file.write_atomic(path).unwrap();
}

#[test]
fn malformed_files_are_refused_by_name() {
    const A: &str = "blk.1.attn_v.weight.lora_a";
    const B: &str = "blk.1.attn_v.weight.lora_b";
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("adapter.gguf");
    let spec = spec("llama");
    let refused = |parts: &[&str]| {
        let error = read(&path, &spec).unwrap_err().to_string();
        assert!(error.contains("adapter.gguf"), "{error}");
        parts.iter().for_each(|part| assert!(error.contains(part), "no `{part}` in {error}"));
    };
    let good = [(A, [16, 2], 0.5), (B, [2, 8], 0.5)];
    file(&path, 4.0, "adapter", &good);
    assert_eq!(read(&path, &spec).unwrap().pairs[0].scale, 2.0);
    file(&path, f32::NAN, "adapter", &good);
    refused(&["adapter.lora.alpha"]);
    file(&path, 4.0, "model", &good);
    refused(&["general.type", "`model`", "adapter"]);
    file(&path, 4.0, "adapter", &good[..1]);
    refused(&[A, "other half"]);
    file(&path, 4.0, "adapter", &good[1..]);
    refused(&[B, "other half"]);
    file(&path, 4.0, "adapter", &[(A, [16, 2], 0.5), (B, [2, 9], 0.5)]);
    refused(&[B, "[9, 2]", "[8, 2]"]);
    file(&path, 4.0, "adapter", &[(A, [16, 3], 0.5), (B, [2, 8], 0.5)]);
    refused(&[A, "[3, 16]", "[2, 16]"]);
    file(&path, 4.0, "adapter", &[(A, [16, 2], f32::INFINITY), (B, [2, 8], 0.5)]);
    refused(&[A, "inf", "finite"]);
    file(&path, 4.0, "adapter", &[good[0], good[1], ("blk.9.attn_v.weight.lora_a", [16, 2], 0.0)]);
    refused(&["blk.9.attn_v.weight.lora_a", "no linear layer"]);
    file(&path, 4.0, "adapter", &[]);
    refused(&["no tensors"]);
    std::fs::write(&path, b"GGUF").unwrap();
    refused(&[]);
}
