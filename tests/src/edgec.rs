//! `edgec` as its users run it, and a teacher that it trains in seconds.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::tools::{build, run, target_folder, workspace};

/// The program, built for release once per process.
pub fn edgec() -> Command {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    Command::new(PROGRAM.get_or_init(|| build("edgec", None).join("edgec")))
}

/// The folder of a run of `edgec pretrain`: a llama of two layers, 64 wide, 512 tokens, context 64, as
/// `model.gguf` (Q8_0) and as the Hugging Face folder `student`. It knows the first sentences of [`text`]
/// nearly by heart, so that what it says is neither constant nor a matter of rounding. Made anew by each
/// process.
pub fn teacher() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        pretrain("teacher", "--layers 2 --hidden 64 --heads 2 --kv-heads 1 --ffn 128 --tokens 61440")
    })
}

/// As [`teacher`], of one layer that is wide enough for super-blocks of 256.
pub fn wide_teacher() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        pretrain("wide", "--layers 1 --hidden 256 --heads 4 --kv-heads 2 --ffn 256 --tokens 32768")
    })
}

fn pretrain(name: &str, shape: &str) -> PathBuf {
    let folder = scratch().join(name);
    let lesson = excerpt("lesson.txt", 6_000);
    let mut pretrain = edgec();
    pretrain.args(["pretrain", "--name", name]).args(shape.split(' '));
    pretrain.args(["--vocab", "512", "--length", "64", "--batch", "4"]);
    run(pretrain.arg("--data").arg(lesson).arg("--out").arg(&folder));
    folder
}

/// A text of about 200 KB: the first of the demo's speeches.
pub fn text() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| excerpt("text.txt", 200_000))
}

/// A file with the first `bytes` of the demo's speeches.
fn excerpt(name: &str, bytes: usize) -> PathBuf {
    let speeches = fs::read_to_string(workspace().join("models/demo/speeches.txt")).expect("the speeches");
    let end = (bytes..).find(|end| speeches.is_char_boundary(*end)).expect("a boundary");
    let file = scratch().join(name);
    fs::write(&file, &speeches[..end]).expect("a writable target folder");
    file
}

/// An empty folder of this process under the target folder; the next process of the same test clears it.
fn scratch() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let test = std::env::current_exe().expect("the test's path");
        let name = test.file_name().expect("the test's name");
        let folder = target_folder().join("edge-tests").join(name);
        drop(fs::remove_dir_all(&folder));
        fs::create_dir_all(&folder).expect("a writable target folder");
        folder
    })
}

/// Starts a command and kills it (SIGKILL on Unix) as soon as `now` says so, which must be within `limit` and before
/// it is over.
pub fn kill_when(command: &mut Command, limit: Duration, now: impl Fn() -> bool) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a program");
    let started = Instant::now();
    while !now() {
        assert!(child.try_wait().unwrap().is_none(), "the run was over before it could be killed");
        assert!(started.elapsed() < limit, "the run hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    kill(child);
}

/// Kills a command, which must not be over.
pub fn kill(mut child: Child) {
    child.kill().unwrap();
    assert!(!child.wait().unwrap().success(), "the run was over before it could be killed");
}

/// How a command ended and what it said.
pub struct Ran {
    /// Whether it succeeded.
    pub success: bool,
    /// The exit code; none where a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// Runs a command to its end.
    pub fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } =
            command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { success: status.success(), code: status.code(), out: text(stdout), err: text(stderr) }
    }

    /// Standard output as the one JSON document that it is.
    pub fn json(&self) -> serde_json::Value {
        assert!(self.success, "{}", self.err);
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }

    /// The refusal: one line that begins with `edgec: `, the last on standard error, with all of `parts`
    /// in it. Nothing may have panicked.
    pub fn assert_refused(&self, case: &str, parts: &[&str]) {
        let Self { code, out, err, .. } = self;
        // 2 is what arguments give that make no sense by themselves.
        assert!(matches!(code, Some(1 | 2)), "{case}: {code:?} {out}{err}");
        assert!(!err.contains("panicked") && !out.contains("panicked"), "{case}: {err}");
        let lines: Vec<_> = err.lines().filter(|line| line.starts_with("edgec: ")).collect();
        assert_eq!(lines.len(), 1, "{case}: {err}");
        assert_eq!(err.lines().last(), Some(lines[0]), "{case}: {err}");
        for part in parts {
            assert!(lines[0].contains(part), "{case}: no `{part}` in `{}`", lines[0]);
        }
    }
}
