//! Tiny checkpoints give the logits and the greedy tokens that transformers gives: in the differentiable
//! graph and in the runtime, from the folder and from the GGUF file that is made of it.

use std::path::Path;

use edge_models::RopeScaling;
use edge_run::{Engine, ModelFile, Settings};
use edge_runtime::kernels::Kernels;
use edge_runtime::session::argmax;
use edge_tests::workspace;
use edgec::export::gguf::Mix;
use edgec::model::Model;
use edgec::train::graph::Decoder;
use edgec::{export, profile, quantize, teacher};
use safetensors::SafeTensors;

/// Largest difference of a logit; they reach to about 4.
const TOLERANCE: f32 = 2e-3;
/// Tokens of `greedy_ids` that were given.
const PROMPT: usize = 8;

/// What transformers computed.
struct Golden {
    input: Vec<u32>,
    /// `[input.len(), vocab]`.
    logits: Vec<f32>,
    greedy: Vec<u32>,
}

impl Golden {
    fn read(folder: &Path) -> Self {
        let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| file.tensor(name).unwrap().data().as_chunks::<4>().0.to_vec();
        let ids = |name| words(name).into_iter().map(u32::from_le_bytes).collect();
        Self {
            input: ids("input_ids"),
            logits: words("logits").into_iter().map(f32::from_le_bytes).collect(),
            greedy: ids("greedy_ids"),
        }
    }

    fn compare(&self, what: &str, logits: &[f32], greedy: &[u32]) {
        assert_eq!(logits.len(), self.logits.len(), "{what}");
        let differences = logits.iter().zip(&self.logits).map(|(found, golden)| (found - golden).abs());
        let worst =
            differences.fold(
                0.0,
                |worst: f32, difference| {
                    if difference.is_nan() { f32::INFINITY } else { worst.max(difference) }
                },
            );
        println!("{what}: max abs logit error {worst:.2e}");
        assert!(worst < TOLERANCE, "{what}: {worst}");
        assert_eq!(greedy, self.greedy, "{what}: greedy tokens");
    }

    fn compare_graph(&self, what: &str, model: &Model) {
        let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
        let logits = |ids: &[u32]| -> Vec<f32> {
            decoder.logits(ids, 1, ids.len()).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let mut greedy = self.greedy[..PROMPT].to_vec();
        while greedy.len() < self.greedy.len() {
            let all = logits(&greedy);
            greedy.push(argmax(&all[all.len() - model.spec.vocab..]));
        }
        self.compare(&format!("{what}, graph"), &logits(&self.input), &greedy);
    }

    fn compare_runtime(&self, what: &str, file: &ModelFile) {
        for kernels in Kernels::available() {
            let name = Some(kernels.name().to_owned());
            let settings = Settings { kernels: name, batch: 5, ..Settings::new(self.input.len()) };
            let mut engine = Engine::new(file, settings).unwrap();
            let mut session = engine.session(file).unwrap();
            let mut logits = Vec::new();
            session.feed_all(&self.input, &mut |_, row| logits.extend_from_slice(row)).unwrap();
            session.truncate(0).unwrap();
            let mut greedy = self.greedy[..PROMPT].to_vec();
            session.feed(&greedy).unwrap();
            while greedy.len() < self.greedy.len() {
                let next = argmax(session.logits());
                greedy.push(next);
                session.feed(&[next]).unwrap();
            }
            self.compare(&format!("{what}, runtime {}", kernels.name()), &logits, &greedy);
        }
    }
}

fn check(name: &str) {
    let folder = workspace().join("tests/golden/models").join(name);
    let golden = Golden::read(&folder);
    let model = teacher::load(&folder).unwrap();
    golden.compare_graph(name, &model);
    golden.compare_runtime(name, &profile::open(&folder).unwrap());

    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("model.gguf");
    quantize::quantize_file(&model, Mix::F32, &path).unwrap();
    let through = format!("{name} through GGUF");
    golden.compare_graph(&through, &teacher::load(&path).unwrap());
    golden.compare_runtime(&through, &profile::open(&path).unwrap());

    // Our own folder says the same model again.
    let again = out.path().join("again");
    export::hf::write(&model, &again).unwrap();
    let back = teacher::load(&again).unwrap();
    assert_eq!(back.spec, model.spec, "{name}");
    golden.compare_graph(&format!("{name} through a folder"), &back);
}

#[test]
fn llama_with_a_tied_head() {
    check("llama-tied");
}

#[test]
fn llama_3_with_scaled_rope() {
    check("llama3-rope");
}

#[test]
fn qwen2_with_biases() {
    check("qwen2");
}

#[test]
fn mistral_with_a_sliding_window() {
    check("mistral-swa");
}

#[test]
fn qwen3_with_normalized_heads() {
    check("qwen3");
}

#[test]
fn phi3_with_fused_projections() {
    check("phi3");
}

#[test]
fn phi3_with_longrope_on_a_part_of_each_head() {
    check("phi3-longrope");
}

#[test]
fn gemma2_with_soft_caps() {
    check("gemma2");
}

#[test]
fn gemma3_with_two_rotary_bases() {
    check("gemma3");
}

/// The golden model is always beyond its original context; this one never is, and takes the other list.
#[test]
fn longrope_takes_the_short_list_for_short_contexts() {
    let folder = workspace().join("tests/golden/models/phi3-longrope");
    let golden = Golden::read(&folder);
    let mut model = teacher::load(&folder).unwrap();
    let RopeScaling::Long { attention_factor, .. } = model.spec.rope.scaling else { panic!() };
    model.spec.rope.scaling = RopeScaling::Long { original_context: 64, attention_factor };
    let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
    let logits = decoder.logits(&golden.input, 1, golden.input.len()).unwrap();
    let short = Golden { logits: logits.flatten_all().unwrap().to_vec1().unwrap(), ..golden };
    assert!(short.logits.iter().zip(&Golden::read(&folder).logits).any(|(a, b)| (a - b).abs() > 0.1));
    let file = profile::lay_out(&model, &folder).unwrap();
    let settings = Settings { batch: 7, ..Settings::new(short.input.len()) };
    let mut engine = Engine::new(&file, settings).unwrap();
    let mut found = Vec::new();
    let mut session = engine.session(&file).unwrap();
    session.feed_all(&short.input, &mut |_, row| found.extend_from_slice(row)).unwrap();
    short.compare("short list", &found, &short.greedy);
}
