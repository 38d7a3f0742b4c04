//! The main job: from a teacher and text to a run's folder with everything a device needs; and tuning a model
//! beforehand ([`tune`]).
//!
//! Each stage leaves its result in the folder before the next one starts, so a stopped run goes on
//! where it was: [`recipe`] says what was asked, [`stages`] does it, [`manifest`] says what came out.
//! Nothing here knows how a stage is done.

mod folder;
pub mod ledger;
mod manifest;
mod prune;
mod recipe;
mod stages;
mod teaching;
mod text;
mod tune;

pub use manifest::{Artifact, Manifest};
pub use recipe::{Data, Prune, Recipe, SoftSource, StudentSource, TeacherSource};
pub use stages::distill;
pub use tune::{TuneRecipe, Tuned, tune};

use std::path::PathBuf;

/// Who is told how the run goes.
pub trait Observer {
    /// `done` of `total` units of a stage are done; `message` says more.
    fn progress(&mut self, stage: &'static str, done: usize, total: usize, message: &str);
    /// A stage is over, or something is worth a line.
    fn note(&mut self, stage: &'static str, message: &str);
}

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: the folder is not empty; give another --out, or --resume to go on with the run in it", path.display())]
    FolderInUse { path: PathBuf },
    #[error("{}: no run to resume ({})", path.display(), missing)]
    NothingToResume { path: PathBuf, missing: &'static str },
    #[error("{}: the run in this folder was asked for something else: {difference}", path.display())]
    OtherRecipe { path: PathBuf, difference: String },
    #[error("{}: {message}", path.display())]
    Damaged { path: PathBuf, message: String },
    #[error("{text}: {found} tokens, {needed} are needed")]
    TextTooShort { text: String, found: usize, needed: usize },
    #[error("{what} is for one process, this run has {processes}")]
    OneProcess { what: &'static str, processes: usize },
    #[error("{0}")]
    Student(String),
    #[error(transparent)]
    Load(#[from] crate::teacher::LoadError),
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
    #[error(transparent)]
    Train(#[from] crate::train::TrainError),
    #[error(transparent)]
    Choose(#[from] crate::student::StudentError),
    #[error(transparent)]
    Calibrate(#[from] crate::quantize::calibrate::CalibrationError),
    #[error(transparent)]
    ExportGguf(#[from] crate::export::gguf::ExportError),
    #[error(transparent)]
    ExportHf(#[from] crate::export::hf::HfError),
    #[error(transparent)]
    Pack(#[from] crate::pack::PackError),
    #[error(transparent)]
    Adapter(#[from] crate::adapter::AdapterError),
    #[error(transparent)]
    Bundle(#[from] crate::bundle::BundleError),
    #[error(transparent)]
    Measure(#[from] crate::profile::Error),
    #[error(transparent)]
    Report(#[from] crate::report::Error),
}
