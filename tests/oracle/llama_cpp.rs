//! llama.cpp loads every type and every family that we write, says the same and is as sure of it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use edge_run::Settings;
use edge_tests::{Ran, edgec, require_python, run, text, wide_teacher, workspace};
use edgec::export::gguf::{MetaValue, Mix};
use edgec::model::Vocabulary;
use edgec::profile::eval::{Config, Score, evaluate};
use edgec::{adapter, profile, quantize, teacher};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const TYPES: [&str; 9] = ["F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M", "Q6_K", "IQ4_NL", "Q3_K_M", "Q2_K"];
/// Types that are rounded on a text as well, by GPTQ.
const CALIBRATED: [&str; 2] = ["Q4_0", "Q4_K_M"];
/// Beginnings of sentences that the model has learned, so that few tokens are close calls.
const PROMPTS: [&str; 3] =
    ["Since the close of the last Congress", "The world knew his kindness", "He has made justice"];
const TOKENS: usize = 16;
const CONTEXT: usize = 64;
const WINDOWS: usize = 6;
/// Logits that are closer than this may be ordered otherwise: activations are rounded to eight bits.
const CLOSE: f32 = 0.05;
/// Largest difference of a perplexity, as a share of it.
const PERPLEXITY: f64 = 0.005;

/// What llama.cpp answers to tasks of `llama.py`.
fn llama_cpp(mut python: Command, tasks: &[Value]) -> Vec<Value> {
    python.arg(workspace().join("tests/oracle/llama.py"));
    python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = python.spawn().unwrap();
    child.stdin.take().unwrap().write_all(json!(tasks).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let answers: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answers.len(), tasks.len());
    answers
}

fn assert_as_sure(what: &str, found: f64, golden: &Value) {
    let golden = golden["ppl"].as_f64().unwrap();
    let difference = found / golden - 1.0;
    println!("{what}: perplexity {found:.4}, llama.cpp {golden:.4} ({:+.3} %)", difference * 100.0);
    assert!(difference.abs() < PERPLEXITY, "{what}: {found}, llama.cpp {golden}");
}

fn quantized(kind: &str, calibrated: bool, folder: &Path) -> PathBuf {
    let path = folder.join(format!("{kind}{}.gguf", if calibrated { " by GPTQ" } else { "" }));
    let mut quantize = edgec();
    quantize.arg("quantize").arg(wide_teacher().join("student")).args(["--type", kind, "--out"]).arg(&path);
    if calibrated {
        quantize
            .args(["--calibration-tokens", "4096", "--calibration-length", "64", "--calibration"])
            .arg(text());
    }
    run(&mut quantize);
    path
}

fn greedy(model: &Path, prompt: &str) -> Value {
    let mut command = edgec();
    command.arg("run").arg(model).args(["--ids", "--max-tokens", &TOKENS.to_string(), "--prompt", prompt]);
    serde_json::from_str(&run(&mut command)).unwrap()
}

/// The token ids of a file of text.
fn tokenize(model: &Path, text: &Path, options: &[&str]) -> Vec<u32> {
    let mut command = edgec();
    command.arg("tokenize").arg(model).args(options).stdin(File::open(text).unwrap());
    serde_json::from_str(&run(&mut command)).unwrap()
}

/// The tokens are llama.cpp's, up to a choice that 8-bit activations leave open.
fn assert_same_choices(kind: &str, model: &Path, prompt: &str, golden: &Value) {
    let tokens = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let (found, golden) = (tokens(&greedy(model, prompt)), tokens(golden));
    assert_eq!(golden.len(), TOKENS, "{kind}: {prompt}");
    let Some(at) = found.iter().zip(&golden).position(|(found, golden)| found != golden) else {
        return assert_eq!(found, golden, "{kind}: {prompt}");
    };
    let file = model.with_extension("txt");
    std::fs::write(&file, prompt).unwrap();
    let mut read = tokenize(model, &file, &[]);
    read.extend(&found[..at]);
    let out = model.with_extension("logits");
    let mut command = edgec();
    run(command
        .arg("logits")
        .arg(model)
        .arg("--ids")
        .arg(json!(read).to_string().trim_matches(['[', ']']))
        .arg("--out")
        .arg(&out));
    let bytes = std::fs::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    let row = &logits.data()[(read.len() - 1) * logits.shape()[1] * 4..];
    let logit = |token: u32| f32::from_le_bytes(row[token as usize * 4..][..4].try_into().unwrap());
    let ahead = logit(found[at]) - logit(golden[at]);
    println!("{kind}: {prompt}: token {at} is {}, llama.cpp's {}, {ahead} behind", found[at], golden[at]);
    assert!((0.0..CLOSE).contains(&ahead), "{kind}: {prompt}: {found:?}, llama.cpp {golden:?}");
}

/// The windows that `edgec eval` reads, each of which begins with BOS where the vocabulary asks for it.
fn windows(model: &Path) -> Vec<Vec<u32>> {
    let (ids, plain) = (tokenize(model, text(), &[]), tokenize(model, text(), &["--no-bos"]));
    let mut windows: Vec<_> = ids.chunks(CONTEXT).take(WINDOWS).map(<[u32]>::to_vec).collect();
    if ids.len() > plain.len() {
        windows.iter_mut().for_each(|window| window[0] = ids[0]);
    }
    windows
}

#[test]
fn every_type_says_the_same_in_llama_cpp() {
    let Some(python) = require_python("xllamacpp") else { return };
    let folder = tempfile::tempdir().unwrap();
    let plain = TYPES.map(|kind| quantized(kind, false, folder.path()));
    let models: Vec<PathBuf> =
        plain.into_iter().chain(CALIBRATED.map(|kind| quantized(kind, true, folder.path()))).collect();
    let task = |model: &PathBuf| {
        json!({
            "model": model, "context": CONTEXT, "prompts": PROMPTS, "tokens": TOKENS,
            "windows": windows(model), "vocab": 512,
        })
    };
    let answers = llama_cpp(python, &models.iter().map(task).collect::<Vec<_>>());
    for (model, answer) in models.iter().zip(&answers) {
        let kind = model.file_stem().unwrap().to_str().unwrap();
        for (prompt, golden) in PROMPTS.iter().zip(answer["greedy"].as_array().unwrap()) {
            assert_same_choices(kind, model, prompt, golden);
        }
        let mut eval = edgec();
        eval.arg("eval").arg(model).args(["--context", &CONTEXT.to_string(), "--json", "--data"]).arg(text());
        let found = Ran::of(eval.args(["--windows", &WINDOWS.to_string()])).json();
        assert_eq!(found["tokens"], answer["tokens"]);
        assert_as_sure(kind, found["ppl"].as_f64().unwrap(), answer);
    }
}

/// A golden model of each family, and how many tokens it reads at a time: no more than the window that
/// llama.cpp does not follow in Mistral's and Phi-3's models.
const FAMILIES: [(&str, usize); 9] = [
    ("llama-tied", 32),
    ("llama3-rope", 32),
    ("mistral-swa", 8),
    ("qwen2", 32),
    ("qwen3", 32),
    ("phi3", 32),
    ("phi3-longrope", 24),
    ("gemma2", 32),
    ("gemma3", 32),
];
/// Tokens that the golden models have.
const VOCABULARY: u32 = 256;
/// Tokens that each reads. Rounding to Q8_0 shifts the probabilities of models as random as these by some
/// percent, differently in each implementation: it takes a few hundred to average that out.
const READ: usize = 768;

/// A vocabulary for models that have none; llama.cpp wants one. The text of each token is whole
/// characters, for which its server need not wait.
fn numbers() -> Vocabulary {
    let tokens: Vec<_> = (0..VOCABULARY).map(|id| format!("<{id}>").into_bytes()).collect();
    let entries = [
        ("model", "gpt2".into()),
        ("pre", "gpt-2".into()),
        ("token_type", MetaValue::I32s(vec![1; tokens.len()])),
        ("tokens", MetaValue::Strings(tokens)),
        ("merges", MetaValue::Strings(Vec::new())),
        ("bos_token_id", MetaValue::U32(1)),
        ("eos_token_id", MetaValue::U32(2)),
        ("add_bos_token", MetaValue::Bool(false)),
    ];
    Vocabulary { entries: entries.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).into() }
}

/// Arbitrary tokens, the same each time (Steele and Vigna's multiplier).
fn arbitrary_ids() -> Vec<u32> {
    let mut state = 1u64;
    let next = || {
        state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        (state >> 33) as u32 % VOCABULARY
    };
    std::iter::repeat_with(next).take(READ).collect()
}

#[test]
fn every_family_is_as_sure_in_llama_cpp() {
    let Some(python) = require_python("xllamacpp") else { return };
    let folder = tempfile::tempdir().unwrap();
    let ids = arbitrary_ids();
    let (mut found, mut tasks) = (Vec::new(), Vec::new());
    for (name, context) in FAMILIES {
        let source = workspace().join("tests/golden/models").join(name);
        let mut model = teacher::load(&source).unwrap();
        model.vocabulary = Some(numbers());
        // By the name of Phi-3 llama.cpp expects tokens that this vocabulary has not.
        model.name = "golden".into();
        // llama.cpp takes the inverse root of the head's width for the scores' scale of Gemma 3, and does not
        // ask the file.
        if name == "gemma3" {
            model.spec.attn_scale = None;
        }
        for mix in [Mix::F32, Mix::Q8_0] {
            let path = folder.path().join(format!("{name}-{mix}.gguf"));
            quantize::quantize_file(&model, mix, &path).unwrap();
            let config = Config { context, windows: None, score: Score::Half, bos: None };
            let file = profile::open(&path).unwrap();
            let outcome = evaluate(&file, None, &ids, &config, &Settings::new(0), &mut |_, _, _| ()).unwrap();
            let windows: Vec<_> = ids.chunks_exact(context).collect();
            tasks.push(json!({
                "model": path, "context": 64, "windows": windows, "vocab": VOCABULARY,
            }));
            found.push((format!("{name} {mix}"), outcome));
        }
    }
    for ((what, outcome), answer) in found.iter().zip(llama_cpp(python, &tasks)) {
        assert_eq!(answer["tokens"], outcome.tokens, "{what}");
        assert_as_sure(what, outcome.ppl, &answer);
    }
}

/// Adapters whose scales are more than one alpha and its rank can say (rsLoRA, patterns), and a DoRA of full rank.
#[test]
fn adapters_are_as_sure_in_llama_cpp() {
    let Some(python) = require_python("xllamacpp") else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut model = teacher::load(&workspace().join("tests/golden/models/llama-tied")).unwrap();
    model.vocabulary = Some(numbers());
    let base = folder.path().join("base.gguf");
    quantize::quantize_file(&model, Mix::F32, &base).unwrap();
    let adapters = workspace().join("tests/golden/adapters");
    let read = |name: &str| adapter::read(&adapters.join(name), &model.spec).unwrap();
    let mut patterns = read("rslora");
    patterns.pairs.retain(|pair| pair.layer != 1);
    patterns.pairs.iter_mut().step_by(2).for_each(|pair| pair.scale *= 0.4);
    // With lengths that say more than a little.
    let mut dora = read("dora");
    let lengths = dora.pairs.iter_mut().filter_map(|pair| pair.magnitude.as_mut());
    lengths.flatten().for_each(|length| *length *= 1.3);
    let dora = adapter::as_lora(dora, &model).unwrap();
    let (ids, context) = (arbitrary_ids(), 32);
    let windows: Vec<_> = ids.chunks_exact(context).collect();
    let config = Config { context, windows: None, score: Score::Half, bos: None };
    let (mut found, mut tasks) = (Vec::new(), vec![]);
    for (name, adapter) in
        [("lora", read("lora")), ("rslora", read("rslora")), ("patterns", patterns), ("dora", dora)]
    {
        let path = folder.path().join(format!("{name}.gguf"));
        adapter::export(&adapter, &model.spec, &path).unwrap();
        let (file, beside) = profile::open_with(&base, &[(path.clone(), 1.0)]).unwrap();
        let settings = Settings { adapters: beside, ..Settings::new(0) };
        found.push((name, evaluate(&file, None, &ids, &config, &settings, &mut |_, _, _| ()).unwrap()));
        let (vocab, context) = (VOCABULARY, 64);
        tasks.push(json!({
            "model": base, "lora": path, "context": context, "windows": windows, "vocab": vocab,
        }));
    }
    let plain =
        evaluate(&profile::open(&base).unwrap(), None, &ids, &config, &Settings::new(0), &mut |_, _, _| ());
    let plain = plain.unwrap().ppl;
    for ((what, outcome), answer) in found.iter().zip(llama_cpp(python, &tasks)) {
        // Otherwise an adapter that does nothing would pass.
        assert!((outcome.ppl / plain - 1.0).abs() > 4.0 * PERPLEXITY, "{what}: {}, {plain}", outcome.ppl);
        assert_as_sure(what, outcome.ppl, &answer);
    }
}
