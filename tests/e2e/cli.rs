//! Every command once, as its users type it.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use edge_tests::{Ran, edgec, run, teacher, text, workspace};
use safetensors::SafeTensors;
use serde_json::Value;

fn model() -> PathBuf {
    teacher().join("model.gguf")
}

fn on_model(command: &str) -> Command {
    let mut program = edgec();
    program.arg(command).arg(model());
    program
}

fn ids(options: &[&str]) -> Vec<u32> {
    let mut command = on_model("run");
    command.args(["--prompt", "My fellow citizens", "--max-tokens", "16", "--ids"]).args(options);
    serde_json::from_str(&run(&mut command)).unwrap()
}

fn tokenize(text: &[u8], options: &[&str]) -> Vec<u32> {
    let mut command = on_model("tokenize");
    command.args(options).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn run_is_greedy_by_default_and_seeded_otherwise() {
    let greedy = ids(&[]);
    assert_eq!(greedy.len(), 16);
    assert_eq!(ids(&["--kernels", "generic", "-t", "1"]), greedy);
    assert_eq!(ids(&["--temp", "5", "--top-k", "1"]), greedy);
    let hot = ["--temp", "5", "--top-p", "1", "--min-p", "0", "--seed"];
    let with = |seed| ids(&[&hot[..], &[seed]].concat());
    assert_eq!(with("1"), with("1"));
    assert_ne!(with("1"), with("2"));
    let mut text = on_model("run");
    text.args(["--prompt", "My fellow citizens", "--max-tokens", "16"]);
    let ran = Ran::of(&mut text);
    assert!(ran.success && ran.out.trim().len() > 8, "{}", ran.out);
    assert!(ran.err.contains("generated 16"), "{}", ran.err);
}

#[test]
fn a_full_context_ends_a_text() {
    let mut command = on_model("run");
    let ran = Ran::of(command.args(["--prompt", "My", "--max-tokens", "500", "--ids"]));
    let ids: Vec<u32> = serde_json::from_str(&ran.out).unwrap();
    assert!(ran.success && ids.len() <= 64, "{}", ids.len());
    assert!(ids.len() < 60 || ran.err.contains("context of 64 tokens is full"), "{}", ran.err);
}

#[test]
fn tokenize_takes_any_bytes() {
    let ids = tokenize("My fellow citizens".as_bytes(), &[]);
    assert!(!ids.is_empty() && ids.len() < 18, "{ids:?}");
    assert_eq!(tokenize(b"", &["--no-bos"]), [0; 0]);
    // Every byte has a token of its own, so nothing is lost.
    assert_eq!(tokenize(b"\xff\xfe", &["--no-bos"]).len(), 2);
    assert_eq!(tokenize(b"<|endoftext|>", &["--no-bos", "--special"]), [0]);
    assert!(tokenize(b"<|endoftext|>", &["--no-bos"]).len() > 1);
    // The folder has the same vocabulary as the file.
    let mut folder = edgec();
    folder.arg("tokenize").arg(teacher().join("student")).stdin(fs::File::open(text()).unwrap());
    let mut file = on_model("tokenize");
    file.stdin(fs::File::open(text()).unwrap());
    assert_eq!(run(&mut folder), run(&mut file));
}

#[test]
fn logits_of_both_backends_agree() {
    let folder = tempfile::tempdir().unwrap();
    let of = |model: PathBuf, backend: &str, ids: &str| {
        let out = folder.path().join("logits.safetensors");
        let mut command = edgec();
        command.arg("logits").arg(model).args(["--ids", ids, "--backend", backend, "--out"]).arg(&out);
        run(&mut command);
        let bytes = fs::read(&out).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let logits = file.tensor("logits").unwrap();
        assert_eq!(logits.shape(), [5, 512]);
        let values = logits.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        values.collect::<Vec<f32>>()
    };
    let student = teacher().join("student");
    let native = of(student.clone(), "native", "5,40,300,2,511");
    let list = folder.path().join("ids.json");
    fs::write(&list, "[5, 40, 300, 2, 511]").unwrap();
    let candle = of(student, "candle", list.to_str().unwrap());
    let worst = native.iter().zip(&candle).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-3, "{worst}");
    assert!(native.iter().any(|logit| logit.abs() > 1.0));
    let quantized = of(model(), "native", "5,40,300,2,511");
    assert_ne!(quantized, native, "the Q8_0 file was not what was run");
    Ran::of(on_model("logits").args(["--ids", "1,512", "--out", "x"])).assert_refused("id", &["512"]);
}

#[test]
fn inspect_says_what_is_in_a_file() {
    let found = Ran::of(on_model("inspect").arg("--json")).json();
    assert_eq!(found["bytes"], model().metadata().unwrap().len());
    assert_eq!(found["metadata"]["general.architecture"], "llama");
    assert_eq!(found["metadata"]["llama.block_count"], "2");
    assert_eq!(found["cannot_run"], Value::Array(vec![]));
    let tensors = found["tensors"].as_array().unwrap();
    let embedding = tensors.iter().find(|tensor| tensor["name"] == "token_embd.weight").unwrap();
    assert_eq!(embedding["dims"], serde_json::json!([64, 512]));
    let spec = &found["spec"];
    assert_eq!((&spec["family"], &spec["layers"], &spec["hidden"]), (&"llama".into(), &2.into(), &64.into()));
    let tokenizer = &found["tokenizer"];
    assert_eq!((&tokenizer["model"], &tokenizer["tokens"]), (&"gpt2".into(), &512.into()));
    assert_eq!(tokenizer["chat_template"], false);
    let text = run(on_model("inspect").arg("--all"));
    for part in [
        "family llama",
        "2 layers of 64 wide",
        "blk.1.ffn_down.weight",
        "llama.context_length = 64",
        "tokenizer: gpt2 (byte-level BPE, pre-tokenizer",
        "chat template: none",
    ] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    assert!(!text.contains("window"), "{text}");
}

#[test]
fn inspect_tells_what_makes_a_family() {
    let inspect = |name: &str| {
        let folder = workspace().join("tests/golden/models").join(name);
        let json = Ran::of(edgec().arg("inspect").arg(&folder).arg("--json")).json();
        (json["spec"].clone(), run(edgec().arg("inspect").arg(&folder)))
    };
    let (spec, text) = inspect("gemma3");
    assert_eq!((&spec["window"], &spec["qk_norm"]), (&8.into(), &true.into()));
    assert_eq!(spec["window_layers"], serde_json::json!([0, 1, 2, 3, 4, 6]));
    assert_eq!((&spec["rope"]["theta"], &spec["local_rope"]["theta"]), (&1e6.into(), &1e4.into()));
    for part in [
        "(GeluTanh)",
        "tied head, normalized query and key heads, norms behind",
        "embeddings times 8",
        "scores times 0.223607, window of 8 tokens in 6 of 7 layers (all but every 6th)",
        "rope: base 1000000, stretched by 8; in layers with a window base 10000",
        "cannot run: ",
    ] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    let (spec, text) = inspect("gemma2");
    assert_eq!((&spec["attn_soft_cap"], &spec["final_soft_cap"]), (&2.0.into(), &3.0.into()));
    assert!(text.contains("logits' soft cap 3") && text.contains("soft cap 2, window of 8"), "{text}");
    let (spec, text) = inspect("phi3-longrope");
    assert_eq!((&spec["rope_dims"], &spec["head_dim"]), (&12.into(), &16.into()));
    assert!(text.contains("(LongRoPE)") && text.contains("12 of a head's 16 elements rotate"), "{text}");
    let (spec, _) = inspect("qwen2");
    assert_eq!((&spec["qkv_bias"], &spec["window"]), (&true.into(), &0.into()));
}

#[test]
fn inspect_names_what_cannot_be_run() {
    let good = fs::read(model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.gguf");
    let with = |place: &[u8], behind: usize, change: &[u8]| {
        let at = good.windows(place.len()).position(|window| window == place).unwrap() + place.len() + behind;
        let mut bytes = good.clone();
        bytes[at..at + change.len()].copy_from_slice(change);
        fs::write(&path, bytes).unwrap();
        let found = Ran::of(edgec().arg("inspect").arg(&path).arg("--json")).json();
        let text = run(edgec().arg("inspect").arg(&path));
        let obstacles: Vec<String> = serde_json::from_value(found["cannot_run"].clone()).unwrap();
        for line in &obstacles {
            assert!(text.contains(&format!("cannot run: {line}")), "{text}");
        }
        obstacles.join("\n")
    };
    // Behind a text's key are its type (4 bytes) and its length (8), behind a tensor's name its dimensions.
    let family = with(b"general.architecture", 12, b"lambo");
    assert!(family.contains("`lambo`") && family.contains("there are llama, mistral, qwen2"), "{family}");
    let tokenizer = with(b"tokenizer.ggml.model", 12, b"bert");
    assert!(
        tokenizer.contains("`bert`") && tokenizer.contains("tokenizer models: gpt2, llama"),
        "{tokenizer}"
    );
    let splitter = with(b"tokenizer.ggml.pre", 12, b"v");
    assert!(splitter.contains("pre-tokenizers: default, gpt-2"), "{splitter}");
    let tensor = with(b"blk.1.ffn_down.weight", 4 + 2 * 8, &[23]);
    assert!(tensor.contains("`blk.1.ffn_down.weight` of type IQ4_XS; there are F32, F16"), "{tensor}");
}

#[test]
fn targets_are_listed() {
    let all = Ran::of(edgec().args(["targets", "--json"])).json();
    let names: Vec<_> = all.as_array().unwrap().iter().map(|target| &target["name"]).collect();
    assert!(names.iter().any(|name| **name == "aarch64-android"), "{names:?}");
    let one = Ran::of(edgec().args(["targets", "aarch64-android", "--json"])).json();
    assert_eq!(one["triple"], "aarch64-linux-android");
    assert!(run(edgec().arg("targets")).lines().count() > names.len());
    Ran::of(edgec().args(["targets", "toaster"]))
        .assert_refused("unknown", &["`toaster`", "aarch64-android"]);
}

#[test]
fn bench_has_the_fields_of_llama_bench() {
    let mut command = on_model("bench");
    let tests = Ran::of(command.args(["-p", "32", "-n", "16", "-r", "2", "-t", "1", "-o", "json"])).json();
    let tests = tests.as_array().unwrap();
    assert_eq!(tests.len(), 2);
    for (test, (prompt, generated)) in tests.iter().zip([(32, 0), (0, 16)]) {
        assert_eq!((&test["n_prompt"], &test["n_gen"]), (&Value::from(prompt), &Value::from(generated)));
        assert_eq!(test["n_threads"], 1);
        for key in
            ["build_commit", "backends", "cpu_info", "model_filename", "model_type", "type_k", "type_v"]
        {
            assert!(test[key].as_str().is_some_and(|text| !text.is_empty()), "{key}");
        }
        for key in ["build_number", "model_size", "model_n_params", "n_batch", "n_ubatch", "avg_ns", "avg_ts"]
        {
            assert!(test[key].as_f64().is_some_and(|number| number > 0.0), "{key}");
        }
        for key in ["stddev_ns", "stddev_ts"] {
            assert!(test[key].is_number(), "{key}");
        }
        for key in ["samples_ns", "samples_ts"] {
            assert_eq!(test[key].as_array().unwrap().len(), 2, "{key}");
        }
        // What llama-bench has not: each test has its latencies, and the memory where the system tells.
        let latencies = [("ttft", prompt), ("inter_token", generated)];
        for (key, tokens) in latencies {
            let percentiles = ["p50_ns", "p95_ns", "p99_ns"].map(|percent| test[key][percent].as_u64());
            match tokens {
                0 => assert!(test[key].is_null(), "{key}"),
                _ => assert!(percentiles[0] > Some(0) && percentiles.is_sorted(), "{key}: {percentiles:?}"),
            }
        }
        let [peak, anonymous, file] =
            ["peak_rss_bytes", "rss_anon_bytes", "rss_file_bytes"].map(|key| test[key].as_u64());
        if cfg!(target_os = "linux") {
            assert!(anonymous.max(file) <= peak && anonymous >= test["arena_bytes"].as_u64(), "{test}");
        } else {
            assert_eq!([peak, anonymous, file], [None; 3]);
        }
    }
    let table = run(on_model("bench").args(["-p", "8", "-n", "0", "-r", "1"]));
    assert!(table.starts_with('|') && table.contains("pp8"), "{table}");
}

#[test]
fn quantize_and_export_write_what_they_say() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q4.gguf");
    run(on_model("quantize").args(["--type", "Q4_0", "--out"]).arg(&path));
    let found = Ran::of(edgec().arg("inspect").arg(&path).arg("--json")).json();
    let matrix = |name: &str| {
        let tensors = found["tensors"].as_array().unwrap();
        tensors.iter().find(|tensor| tensor["name"] == name).unwrap()["type"].clone()
    };
    assert_eq!(matrix("blk.0.attn_q.weight"), "Q4_0");
    assert!(path.metadata().unwrap().len() < model().metadata().unwrap().len());

    // The folder and the file that it came from say the same.
    let exported = folder.path().join("hf");
    run(on_model("export").args(["--format", "hf", "--out"]).arg(&exported));
    let file = folder.path().join("f16.gguf");
    run(edgec().arg("export").arg(&exported).args(["--format", "gguf", "--out"]).arg(&file));
    let say = |model: &PathBuf| {
        let mut command = edgec();
        command.arg("run").arg(model).args(["--prompt", "My fellow", "--max-tokens", "24", "--ids"]);
        run(&mut command)
    };
    assert_eq!(say(&exported), say(&model()));
    assert_eq!(say(&file), say(&model()));
}

#[test]
fn chat_needs_a_template() {
    let mut chat = on_model("chat");
    Ran::of(chat.stdin(Stdio::null()))
        .assert_refused("chat", &["model.gguf", "no chat template", "edgec run"]);
}

#[test]
fn help_and_version_are_no_errors() {
    let help = run(edgec().arg("--help"));
    for command in ["distill", "quantize", "run", "eval", "bench", "targets"] {
        assert!(help.contains(command), "{command}");
    }
    assert!(run(edgec().arg("--version")).starts_with("edgec "));
    assert!(run(edgec().args(["distill", "--help"])).contains("--teacher"));
}
