//! Other programs that tests start.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Says that a check is skipped for want of `what`, so that it is seen; under CI that fails the test.
pub fn skip(what: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{what} is missing, and this is CI");
    eprintln!("SKIPPED: {what} is missing");
}

/// Whether `name` can be started; if not, the check is skipped as [`skip`] says.
pub fn require_tool(name: &str) -> bool {
    let start = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if start.is_err() {
        skip(&format!("`{name}`"));
    }
    start.is_ok()
}

/// The Python interpreter that `EDGE_TEST_PYTHON` names (default `python3`), if it has `module`; if not,
/// the check is skipped as [`skip`] says.
pub fn require_python(module: &str) -> Option<Command> {
    let python = std::env::var("EDGE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let mut import = Command::new(&python);
    import.args(["-c", &format!("import {module}")]).stdout(Stdio::null()).stderr(Stdio::null());
    if !import.status().is_ok_and(|status| status.success()) {
        skip(&format!("the Python module `{module}` of `{python}` (see EDGE_TEST_PYTHON)"));
        return None;
    }
    Some(Command::new(python))
}

/// Whether `edgec` is to be built with MPI for all tests, which needs an MPI library and libclang.
fn wants_mpi() -> bool {
    std::env::var("EDGE_TEST_MPI").as_deref() == Ok("1")
}

/// Whether `edgec` can be started by `mpirun`; if not, the check is skipped as [`skip`] says.
pub fn require_mpi() -> bool {
    if !wants_mpi() {
        skip("EDGE_TEST_MPI=1, which builds with an MPI library and libclang,");
    }
    wants_mpi() && require_tool("mpirun")
}

/// SmolLM2-135M-Instruct in Q4_1: the file that `EDGE_TEST_SMOLLM2` names, or the one that was fetched; if it is not
/// there, the check is skipped as [`skip`] says.
pub fn require_smollm2() -> Option<PathBuf> {
    let fetched = || target_folder().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("EDGE_TEST_SMOLLM2").map_or_else(fetched, PathBuf::from);
    if !path.is_file() {
        skip(&format!("{} (tests/fetch-models.sh fetches it)", path.display()));
        return None;
    }
    Some(path)
}

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

/// Cargo's target folder: this test itself is in `<folder>/<profile>/deps/`.
pub fn target_folder() -> PathBuf {
    let test = std::env::current_exe().expect("the test's path");
    test.ancestors().nth(3).expect("target/<profile>/deps/<test>").into()
}

/// Builds a package for release, for `target` or for the host, as its users are told to, and returns
/// the folder of what was built.
pub fn build(package: &str, target: Option<&str>) -> PathBuf {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workspace()).args(["build", "--quiet", "--release", "--package", package]);
    cargo.arg("--target-dir").arg(target_folder());
    if package == "edgec" && wants_mpi() {
        cargo.args(["--features", "mpi"]);
    }
    let mut folder = target_folder();
    if let Some(target) = target {
        cargo.args(["--target", target]);
        folder.push(target);
    }
    run(&mut cargo);
    folder.join("release")
}

/// A command with arguments of any kind.
pub fn command<const N: usize>(
    program: impl AsRef<Path>,
    arguments: [&dyn AsRef<std::ffi::OsStr>; N],
) -> Command {
    let mut command = Command::new(program.as_ref());
    command.args(arguments.iter().map(|argument| argument.as_ref()));
    command
}

/// Runs a command that must succeed and returns its standard output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{err}", output.status);
    out.into_owned()
}
