//! Adapters from end to end: tuned, run beside their base, merged into it, and as part of a teacher.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use edge_tests::{Ran, edgec, kill_when, run, teacher, text, workspace};
use serde_json::Value;

fn model() -> PathBuf {
    teacher().join("model.gguf")
}

/// Text that the teacher has not learned by heart, as it has the beginning of [`text`].
fn unknown() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let known = fs::read_to_string(text()).unwrap();
        let from = (known.len() / 2..).find(|from| known.is_char_boundary(*from)).unwrap();
        let file = text().with_file_name("unknown.txt");
        fs::write(&file, &known[from..]).unwrap();
        file
    })
}

/// A run of 40 steps, or of as many as `options` say.
fn tune(model: &Path, out: &Path, options: &[&str]) -> Command {
    let mut tune = edgec();
    tune.arg("tune").arg(model).arg("--data").arg(text()).arg("--eval-data").arg(unknown());
    tune.args(["--length", "64", "--batch", "4", "--rank", "4", "--alpha", "8", "--lr", "1e-2"]);
    if !options.contains(&"--tokens") {
        tune.args(["--tokens", "10240"]);
    }
    tune.arg("--out").arg(out).args(options);
    tune
}

fn tuned(model: &Path, out: &Path, options: &[&str]) -> Ran {
    let ran = Ran::of(&mut tune(model, out, options));
    assert!(ran.success, "{}", ran.err);
    ran
}

fn ppl(model: &Path, adapter: Option<&Path>) -> f64 {
    let mut eval = edgec();
    eval.arg("eval").arg(model).arg("--data").arg(unknown());
    eval.args(["--context", "64", "--windows", "16", "--score", "all", "--json"]);
    if let Some(adapter) = adapter {
        eval.arg("--adapter").arg(adapter);
    }
    Ran::of(&mut eval).json()["ppl"].as_f64().unwrap()
}

fn merge(adapter: &Path, out: &Path, options: &[&str]) -> Ran {
    let mut merge = edgec();
    Ran::of(merge.arg("merge").arg(model()).arg(adapter).arg("--out").arg(out).args(options))
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_tuned_model_is_better_wherever_its_adapter_goes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("lora");
    let report = tuned(&model(), &out, &["--json"]).json();
    let number = |report: &Value, key: &str| report[key]["ppl"].as_f64().unwrap();
    let (before, after) = (number(&report, "before"), number(&report, "after"));
    assert!(after < 0.95 * before, "{before} {after}");
    assert_eq!(report["artifacts"], serde_json::json!(["adapter", "adapter.gguf"]));
    for file in
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "metrics.csv", "tune.json"]
    {
        assert!(out.join(file).is_file(), "{file}");
    }
    // Both formats, and the run's folder, say what the report says.
    for adapter in ["adapter", "adapter.gguf", ""] {
        let found = ppl(&model(), Some(&out.join(adapter)));
        assert!((found / after - 1.0).abs() < 1e-9, "{adapter}: {found}, {after} in the report");
    }
    assert!((ppl(&model(), None) / before - 1.0).abs() < 1e-9);
    let mut speak = edgec();
    speak.arg("run").arg(model()).arg("--adapter").arg(out.join("adapter.gguf"));
    let spoken = Ran::of(speak.args(["--prompt", "My fellow citizens", "--max-tokens", "8"]));
    assert!(spoken.success && !spoken.out.trim().is_empty(), "{}", spoken.err);

    // Merged, in both forms.
    let file = folder.path().join("merged.gguf");
    let found = merge(&out, &file, &["--type", "F32", "--json"]).json();
    let kl = |key: &str| found[key].as_f64().unwrap();
    assert!(kl("merged_kl").abs() < 1e-5 && kl("exported_kl").abs() < 1e-5, "{found}");
    assert!((ppl(&file, None) / after - 1.0).abs() < 0.02);
    let ran = merge(&out.join("adapter.gguf"), &folder.path().join("merged"), &[]);
    assert!(ran.success && ran.out.contains("base + adapters"), "{}", ran.err);
    assert!((ppl(&folder.path().join("merged"), None) / ppl(&file, None) - 1.0).abs() < 1e-6);
    // What a coarse type loses is printed, and refused where there is a limit.
    let coarse = folder.path().join("coarse.gguf");
    merge(&out, &coarse, &["--type", "Q4_0", "--tolerance", "1e-4"])
        .assert_refused("tolerance", &["coarse.gguf", "KL"]);
    assert!(!coarse.exists() && fs::read_dir(folder.path()).unwrap().count() == 3);
    assert!(merge(&out, &coarse, &["--type", "Q4_0"]).success && coarse.exists());
}

#[test]
fn dora_and_blocks() {
    let folder = tempfile::tempdir().unwrap();
    let dora = folder.path().join("dora");
    let ran = tuned(
        &model(),
        &dora,
        &["--dora", "--targets", "q_proj,v_proj,down_proj", "--rank-pattern", "v_proj=2"],
    );
    assert!(ran.err.contains("no adapter.gguf") && !dora.join("adapter.gguf").exists(), "{}", ran.err);
    assert!(dora.join("adapter/adapter_config.json").exists());
    let report = json(dora.join("tune.json"));
    let after = report["after"]["ppl"].as_f64().unwrap();
    assert!(after < report["before"]["ppl"].as_f64().unwrap());
    let file = folder.path().join("merged.gguf");
    let found = merge(&dora, &file, &["--type", "F32", "--json"]).json();
    assert!(found["merged_kl"].as_f64().unwrap() < 1e-5, "{found}");
    assert!((ppl(&file, None) / after - 1.0).abs() < 1e-6);
    let lora = folder.path().join("lora.gguf");
    let mut export = edgec();
    export.arg("export").arg(&dora).args(["--format", "lora-gguf", "--base"]).arg(model());
    let ran = Ran::of(export.arg("--out").arg(&lora));
    assert!(ran.success && ran.err.contains("as large as they are"), "{}", ran.err);
    // Integers beside the base's blocks.
    let found = ppl(&model(), Some(&lora));
    assert!((found / after - 1.0).abs() < 5e-3, "{found}, merged {after}");

    // The file's own blocks, and blocks made from a model in floats.
    let held = folder.path().join("held");
    let ran = tuned(&model(), &held, &["--base-quant", "Q4_0", "--rslora"]);
    assert!(ran.err.contains("as its file has them") && !held.join("base.gguf").exists(), "{}", ran.err);
    let made = folder.path().join("made");
    let ran = tuned(&teacher().join("student"), &made, &["--base-quant", "Q4_0"]);
    assert!(ran.err.contains("made from its weights"), "{}", ran.err);
    let report = json(made.join("tune.json"));
    let [bytes, f32] = ["base_bytes", "base_f32_bytes"].map(|key| report[key].as_f64().unwrap());
    assert!(bytes < 0.4 * f32, "{bytes} of {f32}");
    let found = ppl(&made.join("base.gguf"), Some(&made));
    assert!((found / report["after"]["ppl"].as_f64().unwrap() - 1.0).abs() < 1e-9);
}

#[test]
fn a_killed_run_ends_as_if_it_had_not_been() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let options = ["--dropout", "0.1", "--checkpoint-every", "3", "--tokens", "40960"];
    let run = |out: &Path, resume: bool| {
        let mut command = tune(&model(), out, &options);
        command.args(resume.then_some("--resume"));
        command
    };
    assert!(Ran::of(&mut run(&whole, false)).success);
    let lines = || fs::read_to_string(killed.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    kill_when(&mut run(&killed, false), Duration::from_secs(120), || lines() >= 8);
    assert!(!killed.join("adapter").exists());
    let ran = Ran::of(&mut run(&killed, true));
    assert!(ran.success && ran.err.contains("resumed after step"), "{}", ran.err);
    for file in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter.gguf"] {
        assert!(fs::read(whole.join(file)).unwrap() == fs::read(killed.join(file)).unwrap(), "{file}");
    }
    let other = Ran::of(run(&killed, true).arg("--rslora"));
    other.assert_refused("another run", &["asked for something else", "rs was false, now true"]);
}

#[test]
fn what_makes_no_sense_leaves_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let cases: [(&[&str], &[&str]); 7] = [
        (&["--targets", "w_proj"], &["w_proj", "q_proj"]),
        (&["--targets", "lm_head"], &["lm_head", "take no adapter"]),
        (&["--targets", "q_(proj"], &["q_(proj"]),
        (&["--rank-pattern", "q_proj=0"], &["rank is 0", "256"]),
        (&["--alpha-pattern", "q_proj=x"], &["q_proj=x"]),
        (&["--base-quant", "Q9_9"], &["--base-quant", "Q9_9"]),
        (&["--dropout", "1.5"], &["dropout is 1.5"]),
    ];
    for (options, parts) in cases {
        Ran::of(&mut tune(&model(), &out, options)).assert_refused(options[1], parts);
        assert!(!out.exists(), "{options:?}");
    }
    // A hostile adapter: each case names the file and what is wrong, and nothing is written.
    let adapter = folder.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    let golden = workspace().join("tests/golden/adapters/lora");
    let weights = "adapter_model.safetensors";
    fs::copy(golden.join(weights), adapter.join(weights)).unwrap();
    let config = fs::read_to_string(golden.join("adapter_config.json")).unwrap();
    let merged = folder.path().join("merged.gguf");
    for (found, put, parts) in [
        ("\"r\": 8", "\"r\": 8.5", &["`r`", "8.5"][..]),
        ("\"r\": 8", "\"r\": 1e300", &["`r`", "whole numbers"]),
        ("\"lora_alpha\": 16", "\"lora_alpha\": null", &["`lora_alpha`", "null"]),
        ("\"LORA\"", "\"IA3\"", &["`peft_type`", "IA3"]),
        ("\"rank_pattern\": {}", "\"rank_pattern\": {\".*q_proj\": 4}", &["`rank_pattern`"]),
        // Right by itself, and for another model.
        ("\"r\": 8", "\"r\": 8", &[weights, "no linear layer"]),
    ] {
        assert!(config.contains(found), "{found}");
        fs::write(adapter.join("adapter_config.json"), config.replace(found, put)).unwrap();
        merge(&adapter, &merged, &[]).assert_refused(put, parts);
        assert!(!merged.exists(), "{put}");
    }
}

/// LoRA-QAD: beside blocks of few bits, an adapter learns what the model said before it was rounded.
#[test]
fn an_adapter_makes_up_for_rounding() {
    let folder = tempfile::tempdir().unwrap();
    let (rounded, out) = (folder.path().join("rounded.gguf"), folder.path().join("adapter"));
    // Weights in f32, so that there is something to lose.
    let source = teacher().join("student");
    run(edgec().arg("quantize").arg(&source).args(["--type", "Q4_0", "--out"]).arg(&rounded));
    let options = ["--base-quant", "Q4_0", "--teacher", source.to_str().unwrap(), "--json"];
    let report = tuned(&rounded, &out, &options).json();
    let kl = |when: &str| report[when]["kl"].as_f64().unwrap();
    assert!(kl("after") < kl("before"), "{report}");
}

/// The embedded model and text do for a first try, and the tuned model teaches.
#[test]
fn a_tuned_teacher_teaches() {
    let folder = tempfile::tempdir().unwrap();
    let (tuned, run) = (folder.path().join("tuned"), folder.path().join("run"));
    let mut first = edgec();
    first.args(["tune", "--tokens", "2048", "--rank", "8", "--targets", "all-linear", "--out"]).arg(&tuned);
    let ran = Ran::of(&mut first);
    assert!(ran.success && ran.err.matches("embedded").count() >= 2, "{}", ran.err);
    let mut distill = edgec();
    distill.args(["distill", "--tokens", "1024", "--target", "x86_64-linux", "--calibration", "256"]);
    let ran = Ran::of(distill.arg("--teacher-adapter").arg(&tuned).arg("--out").arg(&run));
    assert!(ran.success && ran.err.contains("is merged into it"), "{}", ran.err);
    let (manifest, report) = (json(run.join("manifest.json")), json(tuned.join("tune.json")));
    let taught = manifest["summary"]["teacher"]["quality"]["ppl"].as_f64().unwrap();
    let after = report["after"]["ppl"].as_f64().unwrap();
    // The same text; beside the blocks of the file, activations are 8-bit integers.
    assert!((taught / after - 1.0).abs() < 0.01, "{taught}, {after}");
    let inputs = manifest["inputs"].as_array().unwrap();
    assert!(inputs.iter().any(|input| input[0].as_str().unwrap().ends_with("adapter_model.safetensors")));
}
