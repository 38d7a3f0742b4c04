//! Adapters give the logits that PEFT gives: beside the weights, through GGUF, and merged.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use edge_models::DecoderSpec;
use edge_run::{Adapter, Engine, ModelFile, Settings};
use edge_runtime::kernels::Kernels;
use edge_tests::workspace;
use edgec::adapter::AdapterError;
use edgec::export::gguf::Mix;
use edgec::profile::{lay_out, open, open_with, spec_of};
use edgec::train::Precision;
use edgec::train::adapter::Base;
use edgec::{adapter, pack, quantize, teacher};
use safetensors::SafeTensors;

/// Largest difference of a logit; they reach to about 4.
const TOLERANCE: f32 = 2e-3;

fn base() -> PathBuf {
    workspace().join("tests/golden/models/llama-tied")
}

fn folder(name: &str) -> PathBuf {
    workspace().join("tests/golden/adapters").join(name)
}

struct Golden {
    ids: Vec<u32>,
    base: Vec<f32>,
    adapted: Vec<f32>,
    merged: Vec<f32>,
}

impl Golden {
    fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
        let floats = |name| words(name).into_iter().map(f32::from_le_bytes).collect();
        Self {
            ids: words("input_ids").into_iter().map(u32::from_le_bytes).collect(),
            base: floats("logits_base"),
            adapted: floats("logits_with_adapter"),
            merged: floats("logits_merged"),
        }
    }
}

fn distance(found: &[f32], golden: &[f32]) -> f32 {
    assert_eq!(found.len(), golden.len());
    let worse = |worst: f32, difference: f32| if difference <= worst { worst } else { difference };
    found.iter().zip(golden).map(|(a, b)| (a - b).abs()).fold(0.0, worse)
}

fn logits(file: &ModelFile, ids: &[u32], settings: Settings) -> Vec<f32> {
    let mut engine = Engine::new(file, settings).unwrap();
    let mut session = engine.session(file).unwrap();
    let mut logits = Vec::new();
    session.feed_all(ids, &mut |_, row| logits.extend_from_slice(row)).unwrap();
    logits
}

/// Every kernel table, batches that split the input.
fn check(what: &str, file: &ModelFile, adapters: &[Adapter], ids: &[u32], golden: &[f32]) {
    for kernels in Kernels::available() {
        let kernels = Some(kernels.name().to_owned());
        let adapters = adapters.to_vec();
        let settings = Settings { kernels, adapters, batch: 5, ..Settings::new(ids.len()) };
        let worst = distance(&logits(file, ids, settings), golden);
        println!("{what}: max abs logit error {worst:.2e}");
        assert!(worst < TOLERANCE, "{what}: {worst}");
    }
}

fn spec() -> DecoderSpec {
    spec_of(&open(&base()).unwrap()).unwrap()
}

#[test]
fn adapters_say_what_peft_says() {
    for name in ["lora", "rslora", "dora"] {
        let golden = Golden::read(&folder(name));
        // Otherwise an adapter that does nothing would pass.
        assert!(distance(&golden.base, &golden.adapted) > 0.1, "{name}");
        check("base", &open(&base()).unwrap(), &[], &golden.ids, &golden.base);

        let (file, adapters) = open_with(&base(), &[(folder(name), 1.0)]).unwrap();
        assert_eq!(adapters.len(), usize::from(name != "dora"));
        check(name, &file, &adapters, &golden.ids, &golden.adapted);

        let mut model = teacher::load(&base()).unwrap();
        let read = adapter::read(&folder(name), &model.spec).unwrap();
        adapter::merge(&mut model, &read, 1.0).unwrap();
        let merged = lay_out(&model, &base()).unwrap();
        check(&format!("{name} merged"), &merged, &[], &golden.ids, &golden.merged);
    }
}

/// What trains adapters computes with them what PEFT computes.
#[test]
fn the_graph_says_what_peft_says() {
    let model = teacher::load(&base()).unwrap();
    let frozen = Base::dense(&model, Precision::F32).unwrap();
    for name in ["lora", "rslora", "dora"] {
        let golden = Golden::read(&folder(name));
        let adapter = adapter::read(&folder(name), &model.spec).unwrap();
        let decoder = frozen.with(&adapter).unwrap();
        let logits = decoder.logits(&golden.ids, 1, golden.ids.len()).unwrap();
        let logits = logits.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let worst = distance(&logits, &golden.adapted);
        println!("{name} in the graph: max abs logit error {worst:.2e}");
        assert!(worst < TOLERANCE, "{name}: {worst}");
    }
}

/// What is written is what was read, to the bit, and says of itself what PEFT's own configuration says.
#[test]
fn a_written_folder_is_the_one_that_was_read() {
    let spec = spec();
    for name in ["lora", "rslora", "dora"] {
        let out = tempfile::tempdir().unwrap();
        let read = adapter::read(&folder(name), &spec).unwrap();
        adapter::write(&read, &spec, "../models/llama-tied", out.path()).unwrap();
        let again = adapter::read(out.path(), &spec).unwrap();
        assert_eq!(again.pairs.len(), read.pairs.len());
        for (a, b) in again.pairs.iter().zip(&read.pairs) {
            assert_eq!((a.rank, a.scale, &a.down, &a.up), (b.rank, b.scale, &b.down, &b.up));
            assert_eq!(a.magnitude, b.magnitude);
        }
        let tensors = |folder: &Path| std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let (ours, theirs) = (tensors(out.path()), tensors(&folder(name)));
        let [ours, theirs] = [&ours, &theirs].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        assert_eq!(ours.len(), theirs.len());
        for (tensor, view) in theirs.iter() {
            assert!(ours.tensor(tensor).unwrap() == view, "{name}: {tensor}");
        }
        let config = |folder: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (ours, theirs) = (config(out.path()), config(&folder(name)));
        for key in ["peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern"] {
            assert_eq!(ours[key], theirs[key], "{name}: {key}");
        }
        let targets = |config: &serde_json::Value| {
            let list = config["target_modules"].as_array().unwrap();
            list.iter().map(|name| name.as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
        };
        assert_eq!(targets(&ours), targets(&theirs));
    }
}

/// A GGUF LoRA merges as the folder that it came from.
#[test]
fn a_gguf_lora_can_be_merged() {
    let (out, spec) = (tempfile::tempdir().unwrap(), spec());
    for name in ["lora", "rslora"] {
        let golden = Golden::read(&folder(name));
        let path = out.path().join("adapter.gguf");
        adapter::export(&adapter::read(&folder(name), &spec).unwrap(), &spec, &path).unwrap();
        let mut model = teacher::load(&base()).unwrap();
        adapter::merge(&mut model, &adapter::read(&path, &spec).unwrap(), 1.0).unwrap();
        let merged = lay_out(&model, &base()).unwrap();
        check(&format!("{name} merged from GGUF"), &merged, &[], &golden.ids, &golden.merged);
    }
}

#[test]
fn two_at_once_add_up_and_scale() {
    let golden = Golden::read(&folder("lora"));
    let half = [(folder("lora"), 0.25), (folder("lora"), 0.75)];
    let (file, adapters) = open_with(&base(), &half).unwrap();
    check("two parts of one", &file, &adapters, &golden.ids, &golden.adapted);
    // One that is taken back leaves the base.
    let (file, adapters) = open_with(&base(), &[(folder("rslora"), 1.0), (folder("rslora"), -1.0)]).unwrap();
    check("there and back", &file, &adapters, &golden.ids, &golden.base);
}

/// Beside quantized weights the update is made of integers too. It must lose about what merging the adapter
/// and quantizing the result would.
#[test]
fn integers_lose_little_more_than_quantizing_the_sum() {
    let out = tempfile::tempdir().unwrap();
    let model = teacher::load(&base()).unwrap();
    for name in ["lora", "rslora"] {
        let golden = Golden::read(&folder(name));
        let path = out.path().join("model.gguf");
        let error = |logits: &[f32]| {
            let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
            (logits.iter().zip(&golden.adapted).map(square).sum::<f64>() / logits.len() as f64).sqrt()
        };
        quantize::quantize_file(&model, Mix::Q8_0, &path).unwrap();
        let (file, adapters) = open_with(&path, &[(folder(name), 1.0)]).unwrap();
        let settings = Settings { adapters, ..Settings::new(golden.ids.len()) };
        let found = error(&logits(&file, &golden.ids, settings));

        let mut merged = model.clone();
        adapter::merge(&mut merged, &adapter::read(&folder(name), &model.spec).unwrap(), 1.0).unwrap();
        quantize::quantize_file(&merged, Mix::Q8_0, &path).unwrap();
        let settings = Settings::new(golden.ids.len());
        let reference = error(&logits(&open(&path).unwrap(), &golden.ids, settings));
        println!("{name} beside Q8_0: rms logit error {found:.4}, merged and quantized {reference:.4}");
        assert!(found < 1.5 * reference, "{name}: {found}, merged and quantized {reference}");
    }
}

#[test]
fn a_gguf_lora_says_the_same() {
    let (out, spec) = (tempfile::tempdir().unwrap(), spec());
    for name in ["lora", "rslora", "dora"] {
        let golden = Golden::read(&folder(name));
        let path = out.path().join("adapter.gguf");
        let mut read = adapter::read(&folder(name), &spec).unwrap();
        if name == "dora" {
            read = adapter::as_lora(read, &teacher::load(&base()).unwrap()).unwrap();
        }
        adapter::export(&read, &spec, &path).unwrap();
        let (file, adapters) = open_with(&base(), &[(path, 1.0)]).unwrap();
        check(&format!("{name} through GGUF"), &file, &adapters, &golden.ids, &golden.adapted);
    }
    let dora = adapter::read(&folder("dora"), &spec).unwrap();
    let error = adapter::export(&dora, &spec, &out.path().join("dora.gguf")).unwrap_err();
    assert!(matches!(error, AdapterError::Dora { .. }), "{error}");
    assert!(!out.path().join("dora.gguf").exists());
}

/// A pattern of ranks and alphas: the same adapter, one matrix at a time rescaled.
#[test]
fn patterns_change_the_scale_of_their_modules() {
    let (out, spec) = (tempfile::tempdir().unwrap(), spec());
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder("lora").join("adapter_config.json")).unwrap()).unwrap();
    std::fs::copy(
        folder("lora").join("adapter_model.safetensors"),
        out.path().join("adapter_model.safetensors"),
    )
    .unwrap();
    config["alpha_pattern"] = serde_json::json!({"layers.1.mlp.up_proj": 5.0, "q_proj": 4});
    std::fs::write(out.path().join("adapter_config.json"), config.to_string()).unwrap();
    let plain = adapter::read(&folder("lora"), &spec).unwrap();
    let read = adapter::read(out.path(), &spec).unwrap();
    for (pair, before) in read.pairs.iter().zip(&plain.pairs) {
        let alpha = match (pair.row.hf.contains("q_proj"), pair.row.hf.contains("up_proj"), pair.layer) {
            (true, ..) => 4.0,
            (_, true, 1) => 5.0,
            _ => 16.0,
        };
        assert_eq!(pair.scale, alpha / pair.rank as f32, "{} {}", pair.row.hf, pair.layer);
        assert_eq!(before.scale, 16.0 / pair.rank as f32);
    }
    // GGUF has one alpha; merged and through GGUF they agree.
    let mut model = teacher::load(&base()).unwrap();
    adapter::merge(&mut model, &read, 1.0).unwrap();
    let ids = Golden::read(&folder("lora")).ids;
    let golden = logits(&lay_out(&model, &base()).unwrap(), &ids, Settings::new(ids.len()));
    let (file, adapters) = open_with(&base(), &[(out.path().to_owned(), 1.0)]).unwrap();
    check("patterns", &file, &adapters, &ids, &golden);
}

#[test]
fn an_adapter_keeps_to_the_file_that_it_was_made_for() {
    let (out, spec) = (tempfile::tempdir().unwrap(), spec());
    let path = |name: &str| out.path().join(name);
    let model = teacher::load(&base()).unwrap();
    for (name, mix) in [("base", Mix::Q8_0), ("other", Mix::F16)] {
        let gguf = path(&format!("{name}.gguf"));
        quantize::quantize_file(&model, mix, &gguf).unwrap();
        pack::pack(&open(&gguf).unwrap(), &gguf.with_extension("edgepack")).unwrap();
    }
    let hash = |name: &str| adapter::base_of(&open(&path(name)).unwrap()).unwrap();
    let (ours, others) = (hash("base.gguf"), hash("other.gguf"));
    assert_eq!((hash("base.edgepack"), hash("other.edgepack")), (ours, others));
    assert_eq!(adapter::base_of(&open(&base()).unwrap()), None, "laid out in memory");
    let lora = path("adapter.gguf");
    adapter::export_for(&adapter::read(&folder("lora"), &spec).unwrap(), &spec, &ours, &lora).unwrap();

    // By itself the runtime knows the hash of packs alone.
    let attach = |name: &str, lora: &Path| {
        let file = open(&path(name)).unwrap();
        let adapter = Adapter { file: ModelFile::open(lora).unwrap().into(), scale: 1.0 };
        let settings = Settings { adapters: vec![adapter], ..Settings::new(8) };
        let error = Engine::new(&file, settings).unwrap().session(&file).err();
        error.map(|error| error.to_string())
    };
    let named = |text: &str, hashes: [&[u8]; 2]| hashes.iter().all(|hash| text.contains(&pack::hex(hash)));
    for name in ["base.gguf", "base.edgepack", "other.gguf", "other.edgepack"] {
        let host = open_with(&path(name), &[(lora.clone(), 1.0)]).err().map(|error| error.to_string());
        let runtime = attach(name, &lora);
        if name.starts_with("base") {
            assert_eq!((host, runtime), (None, None), "{name}");
            continue;
        }
        let host = host.unwrap();
        assert!(named(&host, [&ours, &others]) && host.contains("adapter.gguf"), "{name}: {host}");
        match runtime {
            None => assert_eq!(name, "other.gguf"),
            Some(error) => {
                assert!(error.contains("[E28]") && named(&error, [&ours[..8], &others[..8]]), "{error}");
            }
        }
    }
    assert!(attach("other.edgepack", &lora).is_some());
    // What is no hash is refused, whatever the model.
    let bytes = std::fs::read(&lora).unwrap();
    let digits = pack::hex(&ours);
    let at = bytes.windows(64).position(|window| window == digits.as_bytes()).unwrap();
    let bad = path("bad.gguf");
    for place in [at, at + 63] {
        let mut bytes = bytes.clone();
        bytes[place] = b'g';
        std::fs::write(&bad, &bytes).unwrap();
        let error = attach("base.gguf", &bad).unwrap();
        assert!(error.contains("edge.base.sha256"), "{place}: {error}");
    }
}
