//! Real models, as `tests/fetch-models.sh` fetches them, beside llama.cpp: SmolLM2-135M-Instruct in Q4_1, and
//! Gemma 3 270M in Q4_K_M where it was asked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use edge_runtime::kernels::Kernels;
use edge_tests::{Ran, build, edgec, require_smollm2, run, target_folder, workspace};

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

/// Gemma's perplexity in llama-perplexity (October 2026) over the first sixteen windows of the text.
const GEMMA_PERPLEXITY: f64 = 19.359;
/// Tokens of `"\n    if n == 0:\n        return 0\n    elif n == 1:"`, as the same llama.cpp goes on.
const GEMMA_PROMPT: &str = "def fibonacci(n):";
const GEMMA_TOKENS: [u32; 20] = [
    107, 140, 584, 538, 1251, 236743, 236771, 236787, 107, 144, 2060, 236743, 236771, 107, 140, 36208, 538,
    1251, 236743, 236770,
];

/// Gemma is 253 MB: nobody has to have it.
fn gemma() -> Option<PathBuf> {
    let path = target_folder().join("models/gemma-3-270m-q4_k_m.gguf");
    let path = std::env::var_os("EDGE_TEST_GEMMA3").map_or(path, PathBuf::from);
    if !path.is_file() {
        eprintln!("SKIPPED: {} is missing (tests/fetch-models.sh gemma3 fetches it)", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn gemma_is_as_sure_as_in_llama_cpp() {
    let Some(model) = gemma() else { return };
    let mut eval = edgec();
    eval.arg("eval").arg(&model).args(["--windows", "16", "--json", "--data"]);
    let found = Ran::of(eval.arg(workspace().join("tests/golden/text/sotu-eval-part.txt"))).json();
    let ppl = found["ppl"].as_f64().unwrap();
    println!("perplexity {ppl:.4}, llama.cpp {GEMMA_PERPLEXITY}");
    assert_eq!(found["tokens"], 16 * 255);
    assert!((ppl / GEMMA_PERPLEXITY - 1.0).abs() < 0.005, "{ppl}, llama.cpp {GEMMA_PERPLEXITY}");
}

#[test]
fn gemma_says_the_same_through_every_kernel_table() {
    let Some(model) = gemma() else { return };
    for kernels in Kernels::available() {
        let mut command = edgec();
        command.arg("run").arg(&model).args(["--ids", "--prompt", GEMMA_PROMPT, "--kernels", kernels.name()]);
        command.args(["--max-tokens", &GEMMA_TOKENS.len().to_string()]);
        let found: Vec<u32> = serde_json::from_str(&run(&mut command)).unwrap();
        assert_eq!(found, GEMMA_TOKENS, "{}", kernels.name());
    }
}

/// Ids of `text`.
fn tokenize(model: &Path, folder: &Path, text: &str) -> Vec<u32> {
    let file = folder.join("text");
    fs::write(&file, text).unwrap();
    let mut command = edgec();
    command.arg("tokenize").arg(model).stdin(fs::File::open(&file).unwrap());
    serde_json::from_str(&run(&mut command)).unwrap()
}

/// Every token that llama.cpp chose is our choice too, or as good as: both round activations to 8 bits, after which
/// logits of this model are no surer than by a tenth or two, and llama.cpp's own choice between two that
/// are so close depends on how it is run.
#[test]
fn it_continues_as_llama_cpp_does() {
    const CLOSE: f32 = 0.2;
    let Some(model) = require_smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    for (prompt, continuation) in CONTINUATIONS {
        let start = tokenize(&model, folder.path(), prompt).len();
        let ids = tokenize(&model, folder.path(), &format!("{prompt}{continuation}"));
        let (listed, out) = (folder.path().join("ids"), folder.path().join("logits.safetensors"));
        fs::write(&listed, serde_json::to_string(&ids).unwrap()).unwrap();
        run(edgec().arg("logits").arg(&model).arg("--ids").arg(&listed).arg("--out").arg(&out));
        let bytes = fs::read(&out).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let logits = tensors.tensor("logits").unwrap();
        let logits: Vec<f32> = logits.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let (mut same, rows) = (0, logits.chunks_exact(logits.len() / ids.len()));
        for (row, wanted) in rows.zip(&ids[1..]).skip(start - 1) {
            let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let behind = highest - row[*wanted as usize];
            assert!(behind <= CLOSE, "{prompt}: {wanted} is {behind} behind");
            same += usize::from(behind == 0.0);
        }
        println!("{prompt}: {same} of {} tokens are llama.cpp's", ids.len() - start);
        assert!(same + 1 >= ids.len() - start, "{prompt}: {same} of {}", ids.len() - start);
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
    let Some(model) = require_smollm2() else { return };
    let ppl = perplexity(&model, "auto");
    println!("perplexity {ppl:.4}, llama.cpp {LLAMA_CPP_PERPLEXITY}");
    assert!((ppl / LLAMA_CPP_PERPLEXITY - 1.0).abs() < 0.005, "{ppl}, llama.cpp {LLAMA_CPP_PERPLEXITY}");
    let small = perplexity(&model, "q8_0");
    println!("with a q8_0 cache {small:.4}");
    assert!(small != ppl && (small / ppl - 1.0).abs() < 0.005, "{small}, with a cache of f16 {ppl}");
}

#[test]
fn its_q4_0_pack_is_as_sure_as_the_file() {
    let Some(model) = require_smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (gguf, pack) = (folder.path().join("q4_0.gguf"), folder.path().join("q4_0.edgepack"));
    run(edgec().arg("quantize").arg(&model).args(["--type", "Q4_0", "--out"]).arg(&gguf));
    run(edgec().arg("pack").arg(&gguf).args(["--target", "raspberry-pi-5"]));
    let [packed, plain] = [&pack, &gguf].map(|path| perplexity(path, "auto"));
    println!("Q4_0: perplexity {plain:.4}, in tiles {packed:.4}");
    assert!((packed / plain - 1.0).abs() < 0.005, "{packed} in tiles, {plain} in rows");
}

#[test]
fn a_device_asks_it_as_the_chat_template_does() {
    const QUESTION: &str = "What is the capital of France?";
    let Some(model) = require_smollm2() else { return };
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
