//! The main job from end to end: what it leaves in the folder, and that its own numbers are right.

use std::fs;
use std::path::Path;

use edge_tests::{Ran, edgec, run, teacher, text};
use serde_json::Value;

const TARGET: &str = "aarch64-android";
const STEPS: usize = 8;

fn distill(out: &Path) -> Ran {
    let mut command = edgec();
    command.args(["distill", "--layers", "1", "--length", "64", "--batch", "4", "--tokens", "2048"]);
    // Nothing is mended, so that there is something to learn in a few steps.
    command.args(["--mend-tokens", "0", "--lr", "6e-4"]);
    command.args(["--quant", "Q4_0", "--target", TARGET, "--out"]).arg(out);
    command.arg("--teacher").arg(teacher().join("model.gguf"));
    command.arg("--data").arg(text()).arg("--eval-data").arg(text());
    Ran::of(&mut command)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_run_leaves_everything_that_a_device_needs() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let ran = distill(&out);
    assert!(ran.success, "{}", ran.err);
    // The table ends the run: teacher and student side by side, and where everything is.
    for part in ["teacher", "student, Q4_0", "perplexity", "libedge.so", out.to_str().unwrap()] {
        assert!(ran.out.contains(part), "no `{part}` in {}", ran.out);
    }

    let manifest = json(&out.join("manifest.json"));
    the_files_are_those_of_the_manifest(&out, &manifest);
    the_metrics_have_a_row_for_each_step(&out);
    the_report_needs_no_network(&out);
    eval_finds_what_the_manifest_says(&out, &manifest);
    the_student_speaks(&out);
}

fn the_files_are_those_of_the_manifest(out: &Path, manifest: &Value) {
    assert_eq!(manifest["kept_layers"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["inputs"].as_array().unwrap().len(), 3);
    let mut paths = Vec::new();
    for artifact in manifest["artifacts"].as_array().unwrap() {
        let path = artifact["path"].as_str().unwrap();
        let file = if path == "student" { out.join("student/model.safetensors") } else { out.join(path) };
        assert_eq!(artifact["bytes"], file.metadata().unwrap().len(), "{path}");
        assert_eq!(artifact["sha256"].as_str().unwrap().len(), 64, "{path}");
        paths.push(path);
    }
    for path in ["student", "student.gguf", "student.edgepack", "report.html"] {
        assert!(paths.contains(&path), "{path}: {paths:?}");
    }
    let library = out.join("lib").join(TARGET);
    for name in ["libedge.so", "libedge.a", "edge.h"] {
        assert!(library.join(name).metadata().unwrap().len() > 1000, "{name}");
    }
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        json(&out.join("student").join(name));
    }
    let unfinished: Vec<_> = fs::read_dir(out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().starts_with('.'))
        .collect();
    assert!(unfinished.is_empty(), "{unfinished:?}");
}

fn the_metrics_have_a_row_for_each_step(out: &Path) {
    let rows = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    let table = fs::read_to_string(out.join("metrics.csv")).unwrap();
    let mut table = table.lines();
    let columns: Vec<_> = table.next().unwrap().split(',').collect();
    let kl = columns.iter().position(|column| *column == "kl").unwrap();
    assert_eq!((rows.len(), table.clone().count()), (STEPS, STEPS));
    for (index, (row, line)) in rows.iter().zip(table).enumerate() {
        assert_eq!(row["step"], index + 1);
        let cells: Vec<_> = line.split(',').collect();
        assert_eq!(cells.len(), columns.len());
        assert_eq!(cells[kl].parse::<f64>().unwrap(), row["kl"].as_f64().unwrap());
    }
    assert!(rows[STEPS - 1]["kl"].as_f64() < rows[0]["kl"].as_f64(), "the student learned nothing: {rows:?}");
}

fn the_report_needs_no_network(out: &Path) {
    let report = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(report.contains("perplexity") || report.contains("Perplexity"), "{report}");
    for loads in ["src=\"http", "href=\"http", "@import", "url(http"] {
        assert!(!report.contains(loads), "the report loads something: {loads}");
    }
}

fn eval_finds_what_the_manifest_says(out: &Path, manifest: &Value) {
    let found = |model: &Path| {
        let mut eval = edgec();
        eval.arg("eval").arg(model).arg("--teacher").arg(teacher().join("model.gguf"));
        eval.args(["--context", "64", "--windows", "16", "--score", "all", "--json", "--data"]).arg(text());
        Ran::of(&mut eval).json()
    };
    let close = |found: &Value, wanted: &Value| {
        for key in ["ppl", "teacher_ppl", "kl", "top1_agreement", "tokens"] {
            let (found, wanted) = (found[key].as_f64().unwrap(), wanted[key].as_f64().unwrap());
            assert!(
                (found - wanted).abs() <= 1e-9 * wanted.abs(),
                "{key}: {found}, {wanted} in the manifest"
            );
        }
    };
    let summary = &manifest["summary"];
    close(&found(out), &summary["student"]["quality"]);
    close(&found(&out.join("student.gguf")), &summary["student"]["quality"]);
    close(&found(&out.join("student")), &summary["trained"]["quality"]);
    // The pack holds the weights of the file: it is as far from the trained weights.
    let parity = |path: &str| {
        let artifacts = manifest["artifacts"].as_array().unwrap();
        artifacts.iter().find(|artifact| artifact["path"] == path).unwrap()["parity"]["kl"].as_f64().unwrap()
    };
    let (file, pack) = (parity("student.gguf"), parity("student.edgepack"));
    assert!(pack > 0.0 && (pack - file).abs() < 0.1 * file, "KL {pack} of the pack, {file} of the GGUF");
    let [teacher, student] = ["teacher", "student"].map(|model| &summary[model]["quality"]);
    assert_eq!(student["teacher_ppl"], teacher["ppl"]);
    assert!(student["kl"].as_f64().unwrap() > 0.0 && teacher["kl"] == 0.0);
}

fn the_student_speaks(out: &Path) {
    let mut speak = edgec();
    speak.arg("run").arg(out).args(["--prompt", "My fellow", "--max-tokens", "8", "--ids"]);
    let ids: Vec<u32> = serde_json::from_str(&run(&mut speak)).unwrap();
    assert_eq!(ids.len(), 8);
    let manifest = json(&out.join("manifest.json"));
    let mut inspect = edgec();
    let inspected = Ran::of(inspect.arg("inspect").arg(out).arg("--json")).json();
    assert_eq!(inspected["cannot_run"], Value::Array(vec![]));
    assert_eq!(inspected["bytes"], manifest["summary"]["student"]["file_bytes"]);
}

/// A student whose vocabulary is not its teacher's, by tokens that spell the same and by rank.
#[test]
fn a_student_of_another_vocabulary_is_distilled() {
    let folder = tempfile::tempdir().unwrap();
    let student = folder.path().join("student");
    let mut pretrain = edgec();
    pretrain.args(["pretrain", "--name", "other", "--layers", "1", "--hidden", "64", "--heads", "2"]);
    pretrain.args(["--kv-heads", "1", "--ffn", "64", "--vocab", "384", "--length", "64", "--batch", "4"]);
    run(pretrain.args(["--tokens", "4096", "--data"]).arg(text()).arg("--out").arg(&student));
    for (name, flags) in [("aligned", &["--align"][..]), ("ranked", &["--loss", "uld", "--alpha", "0.5"])] {
        let out = folder.path().join(name);
        let mut command = edgec();
        command.args(["distill", "--length", "64", "--batch", "4", "--tokens", "12288", "--lr", "2e-3"]);
        command.args(flags).args(["--target", "x86_64-linux", "--teacher"]).arg(teacher().join("model.gguf"));
        command.arg("--student").arg(student.join("student")).arg("--data").arg(text());
        let ran = Ran::of(command.arg("--eval-data").arg(text()).arg("--out").arg(&out));
        assert!(ran.success, "{name}: {}", ran.err);
        assert!(ran.err.contains("tokens in common"), "{name}: {}", ran.err);
        let summary = &json(&out.join("manifest.json"))["summary"];
        assert_eq!(summary["teacher"]["name"], "student before");
        let [before, after] =
            ["teacher", "trained"].map(|model| summary[model]["quality"]["ppl"].as_f64().unwrap());
        assert!(after < 0.9 * before, "{name}: perplexity {before}, then {after}");
        the_student_speaks(&out);
    }
}

/// Without `--teacher` and `--data` the program uses what is inside it, and says so.
#[test]
fn a_first_run_needs_no_input() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut command = edgec();
    command.args(["distill", "--target", TARGET, "--tokens", "2048", "--out"]).arg(&out);
    let ran = Ran::of(&mut command);
    assert!(ran.success, "{}", ran.err);
    assert!(ran.err.contains("embedded"), "{}", ran.err);
    assert!(out.join("student.gguf").is_file() && out.join("report.html").is_file());
}
