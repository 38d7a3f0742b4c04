//! One file, one prompt, the same tokens: on x86-64 and aarch64, through every kernel table, as a program
//! and through the C ABI of the device library.

use std::path::{Path, PathBuf};

use edge_targets::Target;
use edge_tests::{TinyModel, build, command, require_tool, run, workspace};

const PROMPT: &str = "in the land of Athens, the king sang";
const TOKENS: &str = "20";
/// The processors that qemu plays: the oldest that we serve, and one with every extension.
const CPUS: [&str; 2] = ["cortex-a53", "max"];
const MUSL: &str = "aarch64-unknown-linux-musl";
const QEMU: &str = "qemu-aarch64";
const CROSS_CC: &str = "aarch64-linux-gnu-gcc";
const CROSS_ROOT: &str = "/usr/aarch64-linux-gnu";

/// What llama.cpp gives for the same file and prompt (xllamacpp 2026.10.11549, temperature 0, `tokens` of
/// its server's answer).
const LLAMA_CPP: &str = "[149,92,105,244,17,241,213,49,110,184,260,152,256,59,76,256,79,102,137,223]";

struct Model {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Model {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, TinyModel::gguf()).unwrap();
        Self { _folder: folder, path }
    }

    /// The reference: portable kernels, one thread, on the host.
    fn reference(&self) -> String {
        let host = build("edge-run", None).join("edge-run");
        self.ids(command(host, []), &["--kernels", "generic", "-t", "1"])
    }

    fn ids(&self, mut program: std::process::Command, options: &[&str]) -> String {
        program.arg("generate").arg(&self.path);
        program.args(["--prompt", PROMPT, "--max-tokens", TOKENS, "--ids"]).args(options);
        run(&mut program).trim().to_owned()
    }
}

#[test]
fn host_kernels_and_threads_agree_with_each_other_and_with_llama_cpp() {
    let (model, host) = (Model::new(), build("edge-run", None).join("edge-run"));
    let reference = model.reference();
    assert_eq!(reference, LLAMA_CPP);
    for kernels in edge_runtime::kernels::Kernels::available() {
        for threads in ["1", "2", "3"] {
            let found = model.ids(command(&host, []), &["--kernels", kernels.name(), "-t", threads]);
            assert_eq!(found, reference, "{} with {threads} threads", kernels.name());
        }
    }
}

#[test]
fn aarch64_kernels_agree_with_the_host() {
    if !require_tool(QEMU) {
        return;
    }
    let (model, device) = (Model::new(), build("edge-run", Some(MUSL)).join("edge-run"));
    let reference = model.reference();
    for cpu in CPUS {
        for options in [&["--kernels", "generic"][..], &["--kernels", "neon"], &["-t", "2"]] {
            let found = model.ids(command(QEMU, [&"-cpu", &cpu, &device]), options);
            assert_eq!(found, reference, "{cpu} {options:?}");
        }
    }
}

#[test]
fn the_device_library_agrees_with_the_host() {
    if !require_tool(QEMU) || !require_tool(CROSS_CC) {
        return;
    }
    let (model, out) = (Model::new(), tempfile::tempdir().unwrap());
    let reference = model.reference();
    for name in ["aarch64-android", "aarch64-linux"] {
        let bundle = edgec::bundle::build(&Target::by_name(name).unwrap(), out.path()).unwrap();
        let loader = compile(CROSS_CC, &bundle.folder, &["-ldl"]);
        let linked = compile(CROSS_CC, &bundle.folder, &["-DEDGE_STATIC", "libedge.a"]);
        for cpu in CPUS {
            for (program, threads) in [(&loader, "1"), (&loader, "3"), (&linked, "1")] {
                let qemu = command(QEMU, [&"-cpu", &cpu, &"-L", &CROSS_ROOT, program]);
                let found = through_c(qemu, &bundle.shared, &model.path, threads);
                assert_eq!(found, reference, "{name} {cpu} {} {threads}", program.display());
            }
        }
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn the_host_library_agrees_with_the_host() {
    if !require_tool("cc") {
        return;
    }
    let (model, out) = (Model::new(), tempfile::tempdir().unwrap());
    let bundle = edgec::bundle::build(&Target::by_name("x86_64-linux").unwrap(), out.path()).unwrap();
    let loader = compile("cc", &bundle.folder, &["-ldl"]);
    let linked = compile("cc", &bundle.folder, &["-DEDGE_STATIC", "libedge.a"]);
    for program in [loader, linked] {
        let found = through_c(command(program, []), &bundle.shared, &model.path, "2");
        assert_eq!(found, model.reference());
    }
}

/// Compiles `dlopen.c` in a bundle's folder, with its header.
fn compile(compiler: &str, folder: &Path, options: &[&str]) -> PathBuf {
    let source = workspace().join("tests/conformance/dlopen.c");
    let program = folder.join(if options.contains(&"-DEDGE_STATIC") { "linked" } else { "loader" });
    let mut cc =
        command(compiler, [&"-std=gnu99", &"-Wall", &"-Wextra", &"-Werror", &"-O1", &"-I.", &"-pthread"]);
    cc.current_dir(folder).arg(source).arg("-o").arg(&program).args(options);
    run(&mut cc);
    program
}

/// The ids that `dlopen.c` prints on its first line.
fn through_c(mut program: std::process::Command, library: &Path, model: &Path, threads: &str) -> String {
    program.arg(library).arg(model).args([PROMPT, TOKENS, threads]);
    run(&mut program).lines().next().unwrap_or_default().to_owned()
}
