//! A run that is killed at any stage goes on with `--resume` and ends with the very files of a run that
//! was left alone.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use edge_tests::{Ran, edgec, kill, kill_when, teacher, text};

const STEPS: usize = 320;
/// How long a run may take to where it is killed.
const LIMIT: Duration = Duration::from_secs(120);
/// What has to be the same, byte for byte.
const RESULTS: [&str; 4] =
    ["student.gguf", "student/model.safetensors", "student/config.json", "student/tokenizer.json"];

/// The same run in any folder. Choosing the layer takes long enough to be interrupted, and so does
/// training.
fn distill(out: &Path) -> Command {
    let mut command = edgec();
    command.args(["distill", "--layers", "1", "--calibration", "65536", "--target", "x86_64-linux"]);
    command.args(["--checkpoint-every", "7"]);
    command.args(["--length", "64", "--batch", "4", "--tokens", "81920", "--seed", "3", "--quant", "Q4_0"]);
    command.arg("--teacher").arg(teacher().join("model.gguf")).arg("--data").arg(text());
    command.arg("--out").arg(out);
    command
}

fn resume(out: &Path) -> Ran {
    let ran = Ran::of(distill(out).arg("--resume"));
    assert!(ran.success, "{}", ran.err);
    ran
}

fn results(out: &Path) -> Vec<Vec<u8>> {
    RESULTS.iter().map(|name| fs::read(out.join(name)).unwrap()).collect()
}

/// Steps of both metrics files, which must be those of one whole run.
fn assert_whole_metrics(out: &Path) {
    let rows = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let step = |row: &str| serde_json::from_str::<serde_json::Value>(row).unwrap()["step"].as_u64().unwrap();
    let steps: Vec<_> = rows.lines().map(step).collect();
    let wanted: Vec<_> = (1..=STEPS as u64).collect();
    assert_eq!(steps, wanted);
    let table = fs::read_to_string(out.join("metrics.csv")).unwrap();
    let steps: Vec<u64> =
        table.lines().skip(1).map(|row| row.split(',').next().unwrap().parse().unwrap()).collect();
    assert_eq!(steps, wanted);
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn a_killed_run_ends_as_if_it_had_not_been() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { folder.path().join(name) };
    let whole = at("whole");
    let ran = Ran::of(&mut distill(&whole));
    assert!(ran.success, "{}", ran.err);
    assert_whole_metrics(&whole);
    let wanted = results(&whole);

    let choosing = at("killed while layers were chosen");
    let mut child = distill(&choosing).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(said.any(|line| line.unwrap().trim_start().starts_with("layers 1/")));
    kill(child);
    assert!(choosing.join("recipe.json").exists() && !choosing.join("layers.json").exists());

    let training = at("killed in training");
    kill_when(&mut distill(&training), LIMIT, || lines(&training.join("metrics.jsonl")) >= 20);
    assert!(training.join("layers.json").exists() && !training.join("student").exists());
    assert!(lines(&training.join("metrics.jsonl")) < STEPS);
    assert!(training.join("checkpoint.safetensors").exists());

    let exporting = at("killed after training");
    kill_when(&mut distill(&exporting), LIMIT, || {
        lines(&exporting.join("metrics.jsonl")) == STEPS && exporting.join("student").exists()
    });
    assert!(!exporting.join("manifest.json").exists());

    for (out, said) in
        [(&choosing, ""), (&training, "resumed after step "), (&exporting, "resumed after step 320 of 320")]
    {
        let ran = resume(out);
        assert!(ran.err.contains(said), "{}: {}", out.display(), ran.err);
        assert!(results(out) == wanted, "{}: other bytes than the run left alone", out.display());
        assert_whole_metrics(out);
        assert!(out.join("manifest.json").exists() && out.join("report.html").exists());
    }

    // A run that is over does nothing twice, and changes nothing.
    resume(&whole);
    assert!(results(&whole) == wanted);
    assert_whole_metrics(&whole);
}
