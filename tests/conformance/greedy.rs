//! One file, one prompt, the same tokens: on x86-64 and aarch64, through every kernel table, as a program
//! and through the C ABI of the device library.

use std::path::{Path, PathBuf};

use edge_targets::Target;
use edge_tests::{TinyModel, build, command, require_tool, run, target_folder, workspace};

const PROMPT: &str = "in the land of Athens, the king sang";
const TOKENS: &str = "20";
/// The processors that qemu plays, each with the fastest kernels that it can run: the oldest that we serve, one with
/// the dot product, and one with every extension.
const CPUS: [(&str, &str); 3] = [("cortex-a53", "neon"), ("cortex-a76", "dotprod"), ("max", "i8mm")];
const MUSL: &str = "aarch64-unknown-linux-musl";
const QEMU: &str = "qemu-aarch64";
const CROSS_CC: &str = "aarch64-linux-gnu-gcc";
const CROSS_ROOT: &str = "/usr/aarch64-linux-gnu";

/// What llama.cpp gives for the same file and prompt (xllamacpp 2026.10.11549, temperature 0, `tokens` of
/// its server's answer).
const LLAMA_CPP: &str = "[149,92,105,244,17,241,213,49,110,184,260,152,256,59,76,256,79,102,137,223]";

struct Model {
    folder: tempfile::TempDir,
    path: PathBuf,
}

/// What a model said: the ids of its tokens, and the bits of the logits after the last of them.
#[derive(Debug, PartialEq)]
struct Said {
    ids: String,
    logits: Vec<u8>,
}

impl Model {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        std::fs::write(&path, TinyModel::gguf()).unwrap();
        Self { folder, path }
    }

    /// The same weights as a pack.
    fn packed() -> Self {
        let Self { folder, path } = Self::new();
        let pack = folder.path().join("tiny.edgepack");
        edgec::pack::pack(&edgec::profile::open(&path).unwrap(), &pack).unwrap();
        Self { folder, path: pack }
    }

    /// The reference: portable kernels, one thread, on the host.
    fn reference(&self) -> Said {
        let host = build("edge-run", None).join("edge-run");
        self.say(command(host, []), &["--kernels", "generic", "-t", "1"])
    }

    fn say(&self, mut program: std::process::Command, options: &[&str]) -> Said {
        let logits = self.folder.path().join("logits");
        program.arg("generate").arg(&self.path);
        program.args(["--prompt", PROMPT, "--max-tokens", TOKENS, "--ids", "--logits"]).arg(&logits);
        let ids = run(program.args(options)).trim().to_owned();
        let said = Said { ids, logits: std::fs::read(&logits).unwrap() };
        std::fs::remove_file(&logits).unwrap();
        said
    }
}

#[test]
fn host_kernels_and_threads_agree_with_each_other_and_with_llama_cpp() {
    let host = build("edge-run", None).join("edge-run");
    for model in [Model::new(), Model::packed()] {
        let reference = model.reference();
        // A pack sums its products in another order: its choices are the same, its logits are not.
        assert_eq!(reference.ids, LLAMA_CPP, "{}", model.path.display());
        assert!(!reference.logits.is_empty());
        for kernels in edge_runtime::kernels::Kernels::available() {
            for threads in ["1", "2", "3"] {
                let found = model.say(command(&host, []), &["--kernels", kernels.name(), "-t", threads]);
                assert!(found == reference, "{} with {threads} threads: {}", kernels.name(), found.ids);
            }
        }
    }
}

#[test]
fn aarch64_kernels_agree_with_the_host() {
    if !require_tool(QEMU) {
        return;
    }
    let device = build("edge-run", Some(MUSL)).join("edge-run");
    for model in [Model::new(), Model::packed()] {
        let reference = model.reference();
        for (index, (cpu, fastest)) in CPUS.into_iter().enumerate() {
            let qemu = || command(QEMU, [&"-cpu", &cpu, &device]);
            let slower = CPUS[..index].iter().map(|(_, kernels)| *kernels);
            for kernels in slower.chain(["generic", fastest]) {
                let found = model.say(qemu(), &["--kernels", kernels, "-t", "1"]);
                assert!(found == reference, "{cpu} {kernels}: {}", found.ids);
            }
            assert!(model.say(qemu(), &["-t", "2"]) == reference, "{cpu}");
            // What the processor has not cannot be asked for.
            for (_, missing) in &CPUS[index + 1..] {
                let mut refused = qemu();
                refused.arg("generate").arg(&model.path).args(["--prompt", "x", "--kernels", missing]);
                let refused = refused.output().unwrap();
                let error = String::from_utf8_lossy(&refused.stderr);
                assert!(
                    !refused.status.success() && error.contains(&format!("no kernels `{missing}`")),
                    "{error}"
                );
            }
        }
    }
}

#[test]
fn the_device_library_agrees_with_the_host() {
    if !require_tool(QEMU) || !require_tool(CROSS_CC) {
        return;
    }
    let out = tempfile::tempdir().unwrap();
    let models = [Model::new(), Model::packed()].map(|model| (model.reference(), model));
    for name in ["aarch64-android", "aarch64-linux"] {
        let bundle = edgec::bundle::build(&Target::by_name(name).unwrap(), out.path()).unwrap();
        let loader = compile(CROSS_CC, &bundle.folder, &["-ldl"]);
        // Atomics of the program's own, inline: the archive's helpers for them are bionic's, which is not here.
        let inline = "-mno-outline-atomics";
        let linked = compile(CROSS_CC, &bundle.folder, &["-DEDGE_STATIC", inline, "libedge.a"]);
        for (cpu, fastest) in CPUS {
            let ways = [(&loader, ["1", "own"]), (&loader, ["3", "own"]), (&loader, ["3", "team"])];
            for (program, threads) in ways.into_iter().chain([(&linked, ["2", "calls"])]) {
                for (reference, model) in &models {
                    let qemu = command(QEMU, [&"-cpu", &cpu, &"-L", &CROSS_ROOT, program]);
                    let (ids, kernels) = through_c(qemu, &bundle.shared, &model.path, &threads);
                    assert_eq!(ids, reference.ids, "{name} {cpu} {} {threads:?}", program.display());
                    // Nobody told the library: it found out what the processor has.
                    assert_eq!(kernels, fastest, "{name} {cpu} {}", program.display());
                }
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
    for (program, how) in [(&loader, "own"), (&linked, "own"), (&loader, "team"), (&loader, "calls")] {
        let (ids, kernels) = through_c(command(program, []), &bundle.shared, &model.path, &["2", how]);
        // On x86-64 the application says what its processor has; this one does not.
        assert_eq!((ids, kernels.as_str()), (model.reference().ids, "generic"));
    }
}

/// On a system of which the library knows nothing the application says what the processor has, and a team's threads
/// wait without the kernel. A library for bare metal is such a one, and its code runs under Linux too.
#[test]
fn the_library_for_no_system_believes_the_application() {
    if !require_tool(QEMU) || !require_tool(CROSS_CC) {
        return;
    }
    const NONE: &str = "aarch64-unknown-none";
    let (model, out) = (Model::new(), tempfile::tempdir().unwrap());
    let mut cargo = command(env!("CARGO"), [&"rustc", &"--quiet", &"--profile", &"device", &"--lib"]);
    cargo.args(["--package", "edge-capi", "--crate-type", "staticlib", "--features", "freestanding"]);
    cargo.args(["--target", NONE, "--target-dir"]).arg(target_folder()).current_dir(workspace());
    run(&mut cargo);
    for (file, from) in [
        ("libedge.a", target_folder().join(NONE).join("device/libedge.a")),
        ("edge.h", workspace().join("runtime/capi/include/edge.h")),
    ] {
        std::fs::copy(from, out.path().join(file)).unwrap();
    }
    let program = compile(CROSS_CC, out.path(), &["-DEDGE_STATIC", "-no-pie", "libedge.a"]);
    let reference = model.reference();
    // EDGE_CPU_DOTPROD is 2, EDGE_CPU_I8MM 4 and nothing alone; 1 is x86-64's.
    for (features, how, kernels) in
        [("0", "team", "neon"), ("3", "calls", "dotprod"), ("4", "own", "neon"), ("6", "team", "i8mm")]
    {
        let qemu = command(QEMU, [&"-cpu", &"max", &"-L", &CROSS_ROOT, &program]);
        let said = through_c(qemu, Path::new("libedge.a"), &model.path, &["2", how, features]);
        assert_eq!(said, (reference.ids.clone(), kernels.to_owned()), "{features}");
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

/// The ids and the kernels that `dlopen.c` prints on its first lines.
fn through_c(
    mut program: std::process::Command,
    library: &Path,
    model: &Path,
    threads: &[&str],
) -> (String, String) {
    program.arg(library).arg(model).args([PROMPT, TOKENS]).args(threads);
    let said = run(&mut program);
    let mut lines = said.lines().map(str::to_owned);
    (lines.next().unwrap_or_default(), lines.next().unwrap_or_default())
}
