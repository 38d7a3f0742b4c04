//! A real model: SmolLM2-135M-Instruct in Q4_1, as `tests/fetch-models.sh` fetches it, beside llama.cpp.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use edge_tests::{Ran, build, edgec, run, skip, target_folder, workspace};

/// Perplexity of llama.cpp (xllamacpp 2026.10.11549, each prediction asked of its server) on the same eight windows of 512
/// tokens, the second half of each scored.
const LLAMA_CPP_PERPLEXITY: f64 = 27.7755;
const WINDOWS: &str = "8";

/// Greedy continuations by the same llama.cpp.
const CONTINUATIONS: [(&str, &str); 2] = [
    ("The capital of France is", " Paris."),
    (
        "Once upon a time",
        ", the city of New Haven was a thriving metropolis, with towering skyscrapers and bustling",
    ),
];

fn model() -> Option<PathBuf> {
    let default = || target_folder().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("EDGE_TEST_SMOLLM2").map_or_else(default, PathBuf::from);
    if !path.is_file() {
        skip(&format!("{} (tests/fetch-models.sh fetches it)", path.display()));
        return None;
    }
    Some(path)
}

#[test]
fn it_continues_as_llama_cpp_does() {
    let Some(model) = model() else { return };
    for (prompt, wanted) in CONTINUATIONS {
        let mut command = edgec();
        command.arg("run").arg(&model).args(["--max-tokens", "16", "--prompt", prompt]);
        let found = run(&mut command);
        let found = found.trim_end_matches('\n');
        assert!(found.starts_with(wanted), "{prompt}: {found}");
    }
}

#[test]
fn its_perplexity_is_that_of_llama_cpp() {
    let Some(model) = model() else { return };
    let mut eval = edgec();
    eval.arg("eval").arg(&model).args(["--windows", WINDOWS, "--json", "--data"]);
    let found = Ran::of(eval.arg(workspace().join("tests/golden/text/sotu-eval-part.txt"))).json();
    let ppl = found["ppl"].as_f64().unwrap();
    println!("perplexity {ppl:.4}, llama.cpp {LLAMA_CPP_PERPLEXITY}");
    assert_eq!(found["tokens"], 8 * 255);
    assert!((ppl / LLAMA_CPP_PERPLEXITY - 1.0).abs() < 0.005, "{ppl}, llama.cpp {LLAMA_CPP_PERPLEXITY}");
}

#[test]
fn a_device_asks_it_as_the_chat_template_does() {
    const QUESTION: &str = "What is the capital of France?";
    let Some(model) = model() else { return };
    let folder = tempfile::tempdir().unwrap();
    edgec::bundle::write_chat(&edgec::profile::open(&model).unwrap(), folder.path()).unwrap();
    let mut device = Command::new(build("edge-run", None).join("edge-run"));
    device.arg("generate").arg(&model).args(["--max-tokens", "24", "--prompt", QUESTION, "--chat"]);
    let answer = run(device.arg(folder.path().join("chat.json")));
    let question = folder.path().join("question");
    fs::write(&question, QUESTION).unwrap();
    let mut host = edgec();
    host.arg("chat").arg(&model).args(["--max-tokens", "24"]);
    assert_eq!(answer, run(host.stdin(fs::File::open(question).unwrap())));
    assert!(answer.len() > 20, "{answer}");
}
