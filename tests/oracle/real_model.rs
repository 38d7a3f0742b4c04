//! A real model: SmolLM2-135M-Instruct in Q4_1, as `tests/fetch-models.sh` fetches it, beside llama.cpp.

use std::path::{Path, PathBuf};

use edge_tests::{Ran, edgec, run, skip, target_folder, workspace};

/// Perplexity of llama.cpp (xllamacpp 2026.10.11549, through `llama.py`) on the same eight windows of 512
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

/// Perplexity with a cache of type `kv`, over [`WINDOWS`] windows.
fn perplexity(model: &Path, kv: &str) -> f64 {
    let mut eval = edgec();
    eval.arg("eval").arg(model).args(["--windows", WINDOWS, "--kv", kv, "--json", "--data"]);
    let found = Ran::of(eval.arg(workspace().join("tests/golden/text/sotu-eval-part.txt"))).json();
    assert_eq!(found["tokens"], 8 * 255);
    found["ppl"].as_f64().unwrap()
}

#[test]
fn its_perplexity_is_that_of_llama_cpp_and_a_smaller_cache_hardly_moves_it() {
    let Some(model) = model() else { return };
    let ppl = perplexity(&model, "auto");
    println!("perplexity {ppl:.4}, llama.cpp {LLAMA_CPP_PERPLEXITY}");
    assert!((ppl / LLAMA_CPP_PERPLEXITY - 1.0).abs() < 0.005, "{ppl}, llama.cpp {LLAMA_CPP_PERPLEXITY}");
    let small = perplexity(&model, "q8_0");
    println!("with a q8_0 cache {small:.4}");
    assert!(small != ppl && (small / ppl - 1.0).abs() < 0.005, "{small}, with a cache of f16 {ppl}");
}
