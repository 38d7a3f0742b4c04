//! Builds the device library for a target and puts it, checked, into a run's folder, with the model's chat
//! template in a form that devices can use.
//!
//! The library is compiled from this workspace with the Rust toolchain alone: no NDK, no cross
//! compiler, no C library. What comes out is read back and refused unless it keeps the promises that
//! the device side relies on; see [`elf::check`]. Nothing here looks at a model's weights.

mod cargo;
mod chat;
pub mod elf;

pub use chat::{CHAT_FILE, write_chat};

use std::path::{Path, PathBuf};

use edge_targets::Target;

use crate::atomic;
use cargo::{Kind, Workspace};

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The sources of the runtime are not where they are expected.
    #[error("`{}` is not there; set EDGEC_WORKSPACE to the folder that holds the sources", .0.display())]
    NoWorkspace(PathBuf),
    /// A program cannot be started.
    #[error("cannot run `{tool}`: {source}")]
    Tool {
        /// The program.
        tool: String,
        /// What the system answers.
        source: std::io::Error,
    },
    /// Rust's libraries for the target are missing and could not be had.
    #[error(
        "Rust's libraries for `{triple}` are missing and could not be added ({reason}); \
         run `rustup target add {triple}` in `{}` with a network", workspace.display()
    )]
    NoRustTarget {
        /// The target's triple.
        triple: String,
        /// Folder whose toolchain is meant.
        workspace: PathBuf,
        /// Last line of what rustup said.
        reason: String,
    },
    /// The compiler refused.
    #[error("cargo could not build {file} for `{triple}`: {reason}")]
    Build {
        /// The library.
        file: &'static str,
        /// The target's triple.
        triple: String,
        /// First error that it printed.
        reason: String,
    },
    /// The library that was built breaks a promise.
    #[error("{}: {fault}", path.display())]
    Promise {
        /// The library.
        path: PathBuf,
        /// Which promise.
        fault: elf::Fault,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system answers.
        source: std::io::Error,
    },
}

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleReport {
    /// `out/lib/<target>`.
    pub folder: PathBuf,
    /// The shared library.
    pub shared: PathBuf,
    /// Its size in bytes, stripped.
    pub shared_bytes: u64,
    /// The static library.
    pub archive: PathBuf,
    /// Its size in bytes; a linker takes from it only what a program uses.
    pub archive_bytes: u64,
    /// The C header.
    pub header: PathBuf,
}

/// Builds `libedge.so`, `libedge.a` and `edge.h` for `target` into `out/lib/<target>/`.
///
/// Each file appears whole or not at all, and none appears before
/// the shared library has been checked.
///
/// # Errors
/// Missing sources, a missing toolchain part that cannot be added, a failed build, a library that
/// breaks a promise, or a folder that cannot be written.
pub fn build(target: &Target, out: &Path) -> Result<BundleReport, BundleError> {
    let workspace = Workspace::find()?;
    workspace.ensure_rust_target(&target.triple)?;
    let lock = workspace.lock()?;
    let shared = read(&workspace.build(Kind::Shared, &target.triple)?)?;
    let archive = read(&workspace.build(Kind::Archive, &target.triple)?)?;
    drop(lock);
    let header = read(&workspace.header())?;

    let folder = out.join("lib").join(&target.name);
    let report = BundleReport {
        shared: folder.join(Kind::Shared.file()),
        shared_bytes: shared.len() as u64,
        archive: folder.join(Kind::Archive.file()),
        archive_bytes: archive.len() as u64,
        header: folder.join("edge.h"),
        folder,
    };
    elf::check(&shared, target.architecture())
        .map_err(|fault| BundleError::Promise { path: report.shared.clone(), fault })?;
    std::fs::create_dir_all(&report.folder)
        .map_err(|source| BundleError::Io { path: report.folder.clone(), source })?;
    write(&report.shared, &shared)?;
    write(&report.archive, &archive)?;
    write(&report.header, &header)?;
    Ok(report)
}

fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    std::fs::read(path).map_err(|source| BundleError::Io { path: path.into(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    atomic::write(path, |file| file.write_all(bytes))
        .map_err(|source| BundleError::Io { path: path.into(), source })
}
