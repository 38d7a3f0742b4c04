//! llama.cpp loads every type that we write, says the same and is as sure of it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use edge_tests::{Ran, edgec, require_python, run, text, wide_teacher, workspace};
use serde_json::{Value, json};

const TYPES: [&str; 6] = ["F16", "Q8_0", "Q4_0", "Q4_1", "Q4_K_M", "Q6_K"];
/// Beginnings of sentences that the model has learned, so that no token is a close call.
const PROMPTS: [&str; 3] =
    ["Since the close of the last Congress", "The world knew his kindness", "He has made justice"];
const TOKENS: usize = 16;
const CONTEXT: usize = 64;
const WINDOWS: usize = 6;
/// Largest difference of a perplexity, as a share of it.
const PERPLEXITY: f64 = 0.005;

/// What llama.cpp answers to a task of `llama.py`.
fn llama_cpp(mut python: Command, task: &Value) -> Value {
    python.arg(workspace().join("tests/oracle/llama.py"));
    python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = python.spawn().unwrap();
    child.stdin.take().unwrap().write_all(task.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "llama.py failed on {}", task["model"]);
    serde_json::from_slice(&output.stdout).unwrap()
}

fn quantize(kind: &str, folder: &Path) -> PathBuf {
    let path = folder.join(format!("{kind}.gguf"));
    let mut quantize = edgec();
    quantize.arg("quantize").arg(wide_teacher().join("student")).args(["--type", kind, "--out"]).arg(&path);
    run(&mut quantize);
    path
}

fn greedy(model: &Path, prompt: &str) -> Value {
    let mut command = edgec();
    command.arg("run").arg(model).args(["--ids", "--max-tokens", &TOKENS.to_string(), "--prompt", prompt]);
    serde_json::from_str(&run(&mut command)).unwrap()
}

/// The windows that `edgec eval` reads, each of which begins with BOS where the vocabulary asks for it.
fn windows(model: &Path) -> Vec<Vec<u32>> {
    let tokenize = |options: &[&str]| -> Vec<u32> {
        let mut command = edgec();
        command.arg("tokenize").arg(model).args(options).stdin(File::open(text()).unwrap());
        serde_json::from_str(&run(&mut command)).unwrap()
    };
    let (ids, plain) = (tokenize(&[]), tokenize(&["--no-bos"]));
    let mut windows: Vec<_> = ids.chunks(CONTEXT).take(WINDOWS).map(<[u32]>::to_vec).collect();
    if ids.len() > plain.len() {
        windows.iter_mut().for_each(|window| window[0] = ids[0]);
    }
    windows
}

#[test]
fn every_type_says_the_same_in_llama_cpp() {
    let folder = tempfile::tempdir().unwrap();
    for kind in TYPES {
        let Some(python) = require_python("xllamacpp") else { return };
        let model = quantize(kind, folder.path());
        let answer = llama_cpp(
            python,
            &json!({
                "model": model, "context": CONTEXT, "prompts": PROMPTS, "tokens": TOKENS,
                "windows": windows(&model),
            }),
        );
        for (prompt, golden) in PROMPTS.iter().zip(answer["greedy"].as_array().unwrap()) {
            assert_eq!(golden.as_array().unwrap().len(), TOKENS, "{kind}: {prompt}");
            assert_eq!(greedy(&model, prompt), *golden, "{kind}: {prompt}");
        }
        let mut eval = edgec();
        eval.arg("eval")
            .arg(&model)
            .args(["--context", &CONTEXT.to_string(), "--json", "--data"])
            .arg(text());
        let found = Ran::of(eval.args(["--windows", &WINDOWS.to_string()])).json();
        assert_eq!(found["tokens"], answer["tokens"]);
        let [found, golden] = [&found, &answer].map(|outcome| outcome["ppl"].as_f64().unwrap());
        println!(
            "{kind}: perplexity {found:.4}, llama.cpp {golden:.4} ({:+.3} %)",
            (found / golden - 1.0) * 100.0
        );
        assert!((found / golden - 1.0).abs() < PERPLEXITY, "{kind}: {found}, llama.cpp {golden}");
    }
}
