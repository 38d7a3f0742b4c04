//! Training in several processes: the same run as in one, and what happens when one of them dies.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use edge_tests::{Ran, edgec, require_mpi, teacher, text};

/// Held by the test that runs: processes that wait for each other keep processors busy.
static TURN: Mutex<()> = Mutex::new(());

const STEPS: usize = 50;
/// The flags of as many steps of four windows.
const SHAPE: [&str; 8] = ["--length", "64", "--batch", "2", "--accumulate", "2", "--tokens", "12800"];
/// What has to be the same, byte for byte, after a kill.
const RESULTS: [&str; 2] = ["student.gguf", "student/model.safetensors"];

/// The arguments of the same run in any folder.
fn distill(command: &mut Command, out: &Path) {
    command.args(["distill", "--layers", "1", "--target", "x86_64-linux", "--checkpoint-every", "5"]);
    command.args(SHAPE);
    command.arg("--teacher").arg(teacher().join("model.gguf")).arg("--data").arg(text());
    command.arg("--out").arg(out);
}

/// The same for an adapter.
fn tune(command: &mut Command, out: &Path) {
    command.arg("tune").arg(teacher().join("model.gguf")).arg("--data").arg(text());
    command.args(SHAPE).args(["--lr", "1e-2", "--base-quant", "Q4_0", "--json"]).arg("--out").arg(out);
}

/// A run in two processes.
fn mpirun(run: fn(&mut Command, &Path), out: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "-n", "2"]).arg(edgec().get_program());
    run(&mut command, out);
    // Containers run as root and often forbid to read another process's memory.
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        command.env(name, "1");
    }
    command.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
    command
}

fn losses(out: &Path) -> Vec<f64> {
    let rows = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let rows = rows.lines().map(|row| serde_json::from_str::<serde_json::Value>(row).unwrap());
    let rows: Vec<_> = rows.collect();
    assert!(rows.iter().enumerate().all(|(index, row)| row["step"] == index + 1));
    rows.iter().map(|row| row["loss"].as_f64().unwrap()).collect()
}

fn results(out: &Path) -> Vec<Vec<u8>> {
    RESULTS.iter().map(|name| fs::read(out.join(name)).unwrap()).collect()
}

/// Kills the process of rank 1 among the children of `mpirun`.
fn kill_second(mpirun: &Child) {
    let of_rank_one = |process: &Path| {
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        let mut variables = environment.split(|byte| *byte == 0);
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        variables.any(|variable| variable == b"OMPI_COMM_WORLD_RANK=1")
            && status.lines().any(|line| line == format!("PPid:\t{}", mpirun.id()))
    };
    let mut processes = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let process: PathBuf = processes.find(|process| of_rank_one(process)).expect("the second process");
    let mut kill = Command::new("kill");
    assert!(kill.arg("-KILL").arg(process.file_name().unwrap()).status().unwrap().success());
}

/// Both are the losses of a whole run, within what another order of sums makes of them.
fn agree(one: &[f64], two: &[f64]) {
    assert_eq!((one.len(), two.len()), (STEPS, STEPS));
    for (step, (one, two)) in one.iter().zip(two).enumerate() {
        assert!((one - two).abs() <= 1e-4, "step {}: loss {one} in one process, {two} in two", step + 1);
    }
}

#[test]
fn two_processes_tune_as_one() {
    if !require_mpi() {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let mut alone = edgec();
    tune(&mut alone, &one);
    let ppl = |report: &serde_json::Value, when: &str| report[when]["ppl"].as_f64().unwrap();
    let report = Ran::of(&mut alone).json();
    let (before, expected) = (ppl(&report, "before"), ppl(&report, "after"));
    assert!(expected < before, "{before} {expected}");
    // One process alone has something to say, so this is one document.
    let found = ppl(&Ran::of(&mut mpirun(tune, &two)).json(), "after");
    agree(&losses(&one), &losses(&two));
    assert!((found / expected - 1.0).abs() < 1e-3, "perplexity {expected} by one process, {found} by two");
}

#[test]
fn two_processes_train_as_one_and_survive_a_kill() {
    if !require_mpi() {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { folder.path().join(name) };

    let (one, two) = (at("one"), at("two"));
    let mut alone = edgec();
    distill(&mut alone, &one);
    let ran = Ran::of(&mut alone);
    assert!(ran.success, "{}", ran.err);
    let ran = Ran::of(&mut mpirun(distill, &two));
    assert!(ran.success, "{}", ran.err);
    assert!(ran.err.contains("2 processes"), "{}", ran.err);
    let (one, shared) = (losses(&one), losses(&two));
    agree(&one, &shared);
    assert!(one[STEPS - 1] < one[0]);

    // A process dies: the run ends, and its checkpoint is there.
    let killed = at("killed");
    let mut run = mpirun(distill, &killed).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    let steps = || fs::read_to_string(killed.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    while steps() < 12 {
        assert!(run.try_wait().unwrap().is_none(), "the run was over before it could be killed");
        assert!(started.elapsed() < Duration::from_secs(120), "the run hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_second(&run);
    let Output { status, stderr, .. } = run.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&stderr);
    assert!(!status.success() && said.contains("rank 1") && said.contains("signal 9"), "{status}: {said}");
    assert!(killed.join("checkpoint.safetensors").exists() && !killed.join("student").exists());

    let ran = Ran::of(mpirun(distill, &killed).arg("--resume"));
    assert!(ran.success && ran.err.contains("resumed after step "), "{}", ran.err);
    assert!(
        losses(&killed) == shared && results(&killed) == results(&two),
        "another run than the one left alone"
    );

    // An error of one process ends them all: this folder is in use.
    let ran = Ran::of(&mut mpirun(distill, &two));
    assert!(!ran.success && ran.err.contains("edgec: process 0: "), "{}", ran.err);
    assert!(ran.err.contains("the folder is not empty"), "{}", ran.err);
}
