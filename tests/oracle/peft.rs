//! PEFT loads the folders that `edgec tune` writes, and computes with them what we compute.
//!
//! PyTorch is gigabytes, so this is asked for: `cargo test -p edge-tests --test peft -- --ignored`, with
//! `EDGE_TEST_PYTHON` naming an interpreter that has peft, torch and transformers.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use edge_tests::{Ran, edgec, require_python, run, teacher, text, workspace};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const IDS: [u32; 12] = [0, 40, 41, 90, 200, 3, 77, 401, 12, 13, 14, 300];
/// Largest difference of a logit.
const TOLERANCE: f32 = 2e-3;
/// What is tuned, and how many modules of the two layers then have an adapter.
const RUNS: [(&str, &[&str], u64); 4] = [
    ("lora", &["--rank-pattern", "layers.1.mlp.up_proj=3", "--alpha-pattern", "q_proj=5"], 14),
    ("part", &["--targets", "layers.1.self_attn.q_proj,layers.0.mlp.down_proj"], 2),
    ("rslora", &["--rslora", "--targets", "q_proj,v_proj", "--rank-pattern", "v_proj=6"], 4),
    ("dora", &["--dora"], 14),
];

fn logits(base: &Path, adapter: &Path, backend: &str) -> Vec<f32> {
    let out = adapter.join("logits.safetensors");
    let mut command = edgec();
    command.arg("logits").arg(base).arg("--adapter").arg(adapter).args(["--backend", backend]);
    run(command.args(["--ids", &IDS.map(|id| id.to_string()).join(","), "--out"]).arg(&out));
    let bytes = fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = file.tensor("logits").unwrap().data().as_chunks::<4>().0.to_vec();
    words.into_iter().map(f32::from_le_bytes).collect()
}

#[test]
#[ignore = "needs PEFT and PyTorch: see above"]
fn peft_says_the_same_with_our_adapters() {
    let Some(mut python) = require_python("peft, torch, transformers") else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = teacher().join("student");
    let adapters = RUNS.map(|(name, options, _)| {
        let out = folder.path().join(name);
        let mut tune = edgec();
        tune.arg("tune").arg(&base).arg("--data").arg(text()).arg("--out").arg(&out);
        tune.args(["--length", "64", "--batch", "4", "--tokens", "5120", "--rank", "4", "--lr", "1e-2"]);
        let ran = Ran::of(tune.args(options));
        assert!(ran.success, "{name}: {}", ran.err);
        out.join("adapter")
    });
    python.arg(workspace().join("tests/oracle/adapters.py"));
    let mut child =
        python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let task = json!({"base": base, "adapters": adapters, "ids": IDS}).to_string();
    child.stdin.take().unwrap().write_all(task.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    // PEFT warns of what it misses or does not know, and goes on.
    assert!(!said.contains("issing") && !said.contains("nexpected"), "{said}");
    let answers: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    for ((adapter, answer), (name, _, modules)) in adapters.iter().zip(&answers).zip(RUNS) {
        assert_eq!(answer["modules"], modules, "{name}");
        let golden: Vec<f32> =
            answer["logits"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        for backend in ["native", "candle"] {
            let found = logits(&base, adapter, backend);
            assert_eq!(found.len(), golden.len());
            let worst = found.iter().zip(&golden).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{name}, {backend}: max abs logit error {worst:.2e}");
            assert!(worst < TOLERANCE, "{name}, {backend}: {worst}");
        }
    }
}
