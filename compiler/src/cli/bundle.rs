//! `edgec bundle`.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use edge_targets::Target;
use edgec::{atomic, bundle, profile};

use super::output;
use super::progress::note;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file or run's folder
    model: PathBuf,
    /// Device to build for; `edgec targets` lists them
    #[arg(long, default_value = edge_targets::DEFAULT)]
    target: String,
    /// Folder to write lib/<target>/ and the model into
    #[arg(long)]
    out: PathBuf,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let target = Target::by_name(&arguments.target)?;
    let model = profile::open(&arguments.model)?;
    fs::create_dir_all(&arguments.out).with_context(|| arguments.out.display().to_string())?;
    note("bundle", &format!("libedge for {} ({})", target.name, target.triple));
    let report = bundle::build(&target, &arguments.out)?;
    let copy = arguments.out.join("student.gguf");
    // Bundling a run into its own folder leaves the model where it is.
    if fs::canonicalize(model.path()).ok() != fs::canonicalize(&copy).ok() || !copy.exists() {
        atomic::write(&copy, |file| file.write_all(model.bytes()))
            .with_context(|| copy.display().to_string())?;
    }
    note("bundle", &bundle::write_chat(&model, &arguments.out)?);
    note(
        "bundle",
        &format!(
            "{} ({}), model {}",
            report.folder.display(),
            output::bytes(report.shared_bytes),
            output::bytes(model.bytes().len() as u64)
        ),
    );
    Ok(())
}
