//! Runs cargo on the runtime's C ABI for another platform, with the linker that comes with Rust.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::BundleError;

/// Which library is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Loaded at run time; needs nothing from the system.
    Shared,
    /// Linked into a program, which brings `memcpy` and its kin.
    Archive,
}

impl Kind {
    pub(super) fn file(self) -> &'static str {
        match self {
            Self::Shared => "libedge.so",
            Self::Archive => "libedge.a",
        }
    }

    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Shared => ["--crate-type", "cdylib", "--features", "freestanding,memory"],
            Self::Archive => ["--crate-type", "staticlib", "--features", "freestanding"],
        }
    }

    /// The shared library is linked once more, from the module of the whole program.
    fn compiler_arguments(self) -> &'static [&'static str] {
        match self {
            Self::Shared => &["--", "--emit=llvm-bc"],
            Self::Archive => &[],
        }
    }
}

/// Compiler flags of both libraries. The linker is the one that rustup ships with every toolchain; it
/// is given no library and no start file. Nothing unwinds, so there are no tables for it.
const FLAGS: &[&str] = &[
    "-Cforce-unwind-tables=no",
    "-Clinker=rust-lld",
    "-Clinker-flavor=ld.lld",
    "-Cdefault-linker-libraries=no",
    "-Clink-arg=-nostdlib",
];

/// How the shared library is linked from the one module that it was compiled to. The optimizations for a whole program
/// run again, twice: only now that no panic handler reads them are places and messages of panics known to be dead,
/// and what computes them after that. Symbols that nobody defines are refused. Pages are 16 KiB, as Android asks for.
const LINK: &[&str] = &[
    "-flavor",
    "gnu",
    "-shared",
    "--lto-newpm-passes=lto<Oz>,lto<Oz>",
    "--gc-sections",
    "--icf=all",
    "--strip-all",
    "-zdefs",
    "-zmax-page-size=16384",
    "-soname=libedge.so",
    "--build-id=sha1",
];

/// Relocations in a fortieth of the space, and one table of symbols' names, not an older one besides. Android reads them
/// so since version 11 (API level 30) and 6; elsewhere older loaders are still about, which would not notice.
fn compact(triple: &str) -> &'static [&'static str] {
    if triple.ends_with("-android") { &["--pack-dyn-relocs=relr", "--hash-style=gnu"] } else { &[] }
}

/// Without `crt-static`, since musl's default is a static program, which could not be a shared library.
/// Without `outline-atomics`, whose helper asks the C library what the CPU can do.
fn feature_flag(triple: &str) -> &'static str {
    if triple.starts_with("aarch64-") {
        "-Ctarget-feature=-crt-static,-outline-atomics"
    } else {
        "-Ctarget-feature=-crt-static"
    }
}

/// The folder with the sources of the runtime.
pub(super) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// `EDGEC_WORKSPACE`, or where this program was compiled.
    pub(super) fn find() -> Result<Self, BundleError> {
        let root = match std::env::var_os("EDGEC_WORKSPACE") {
            Some(folder) => PathBuf::from(folder),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".."),
        };
        let manifest = root.join("runtime/capi/Cargo.toml");
        match root.canonicalize() {
            Ok(root) if manifest.is_file() => Ok(Self { root }),
            _ => Err(BundleError::NoWorkspace(manifest)),
        }
    }

    /// The C header.
    pub(super) fn header(&self) -> PathBuf {
        self.root.join("runtime/capi/include/edge.h")
    }

    /// Adds Rust's libraries for `triple` if they are not there.
    pub(super) fn ensure_rust_target(&self, triple: &str) -> Result<(), BundleError> {
        let mut query = self.command("RUSTC", "rustc");
        query.args(["--print", "target-libdir", "--target", triple]);
        let answer = run(&mut query)?;
        let folder = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
        if answer.status.success() && Path::new(&folder).is_dir() {
            return Ok(());
        }
        eprintln!("adding Rust's libraries for {triple}: rustup target add {triple}");
        let mut add = self.command("RUSTUP", "rustup");
        add.args(["target", "add", triple]);
        let reason = match run(&mut add) {
            Ok(answer) if answer.status.success() => return Ok(()),
            Ok(answer) => last_line(&answer.stderr),
            Err(error) => error.to_string(),
        };
        Err(BundleError::NoRustTarget { triple: triple.into(), workspace: self.root.clone(), reason })
    }

    /// Waits until nobody else builds here. Cargo locks its folder for itself alone, and not for what is linked and read
    /// after it.
    pub(super) fn lock(&self) -> Result<File, BundleError> {
        let folder = self.target_folder();
        let path = folder.join("edgec.lock");
        let locked = std::fs::create_dir_all(folder).and_then(|()| {
            let file = File::create(&path)?;
            file.lock()?;
            Ok(file)
        });
        locked.map_err(|source| BundleError::Io { path, source })
    }

    /// Builds one library and returns where it is.
    pub(super) fn build(&self, kind: Kind, triple: &str) -> Result<PathBuf, BundleError> {
        let folder = self.target_folder();
        let mut command = self.command("CARGO", "cargo");
        command
            .args(["rustc", "--locked", "--quiet", "--profile", "device", "--package", "edge-capi", "--lib"])
            .args(kind.arguments())
            .args(["--target", triple])
            .args(kind.compiler_arguments())
            .env("CARGO_TARGET_DIR", &folder)
            .env("CARGO_ENCODED_RUSTFLAGS", self.rust_flags(triple))
            .env_remove("RUSTFLAGS");
        let answer = run(&mut command)?;
        if !answer.status.success() {
            let text = String::from_utf8_lossy(&answer.stderr);
            eprint!("{text}");
            let error = text.lines().find(|line| line.starts_with("error"));
            let reason = error.map_or_else(|| last_line(&answer.stderr), str::to_owned);
            return Err(BundleError::Build { file: kind.file(), triple: triple.into(), reason });
        }
        let folder = folder.join(triple).join("device");
        match kind {
            Kind::Archive => Ok(folder.join(kind.file())),
            Kind::Shared => self.link(triple, &folder),
        }
    }

    /// Links the shared library from what the compiler left in `folder`, and returns where it is.
    fn link(&self, triple: &str, folder: &Path) -> Result<PathBuf, BundleError> {
        let linked = folder.join("linked");
        let library = linked.join(Kind::Shared.file());
        std::fs::create_dir_all(&linked).map_err(|source| BundleError::Io { path: linked, source })?;
        let mut query = self.command("RUSTC", "rustc");
        let answer = run(query.args(["--print", "sysroot", "--print", "host-tuple"]))?;
        let answer = String::from_utf8_lossy(&answer.stdout).into_owned();
        let mut lines = answer.lines().map(str::trim);
        let (sysroot, host) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        let rustlib = Path::new(sysroot).join("lib/rustlib");
        let linker = rustlib.join(host).join("bin/rust-lld");
        let mut command = Command::new(linker);
        command
            .args(LINK)
            .args(compact(triple))
            .arg("-T")
            .arg(self.root.join("runtime/capi/libedge.ld"))
            .arg(folder.join("deps/edge.bc"))
            .args(compiler_builtins(&rustlib.join(triple).join("lib")))
            .arg("-o")
            .arg(&library);
        let answer = run(&mut command)?;
        if answer.status.success() {
            return Ok(library);
        }
        eprint!("{}", String::from_utf8_lossy(&answer.stderr));
        let reason = last_line(&answer.stderr);
        Err(BundleError::Build { file: Kind::Shared.file(), triple: triple.into(), reason })
    }

    /// Own folder, so that the build waits for no other one's lock.
    fn target_folder(&self) -> PathBuf {
        let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
        let target = target.and_then(|folder| std::path::absolute(folder).ok());
        target.unwrap_or_else(|| self.root.join("target")).join("bundle")
    }

    /// [`FLAGS`], and no folder of this machine in the messages of the library.
    fn rust_flags(&self, triple: &str) -> OsString {
        let mut flags = OsString::from(FLAGS.join("\u{1f}"));
        flags.push("\u{1f}");
        flags.push(feature_flag(triple));
        let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo")));
        for (folder, name) in [(Some(self.root.clone()), "edge"), (home, "cargo")] {
            if let Some(folder) = folder {
                flags.push("\u{1f}--remap-path-prefix=");
                flags.push(folder);
                flags.push("=");
                flags.push(name);
            }
        }
        flags
    }

    /// A tool of the Rust toolchain that belongs to the workspace; `variable` may name another one.
    fn command(&self, variable: &str, tool: &str) -> Command {
        let mut command = Command::new(std::env::var_os(variable).unwrap_or_else(|| tool.into()));
        command.current_dir(&self.root);
        command
    }
}

/// What compiled code calls where an instruction set has no instruction, among Rust's libraries in `folder`.
fn compiler_builtins(folder: &Path) -> Option<PathBuf> {
    let mut files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("libcompiler_builtins-") && name.ends_with(".rlib")
    })
}

fn run(command: &mut Command) -> Result<Output, BundleError> {
    command.output().map_err(|source| BundleError::Tool {
        tool: command.get_program().to_string_lossy().into_owned(),
        source,
    })
}

fn last_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("").to_owned()
}
