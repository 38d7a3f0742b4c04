//! `edgec bundle`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use edge_targets::Target;
use edgec::profile::ModelFile;
use edgec::{atomic, bundle, pack, profile};

use super::output;
use super::progress::note;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, pack or run's folder
    model: PathBuf,
    /// Device to build for; `edgec targets` lists them
    #[arg(long, default_value = edge_targets::DEFAULT)]
    target: String,
    /// Folder to write lib/<target>/, the model and its pack into
    #[arg(long)]
    out: PathBuf,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let target = Target::by_name(&arguments.target)?;
    let model = profile::open(&arguments.model)?;
    fs::create_dir_all(&arguments.out).with_context(|| arguments.out.display().to_string())?;
    note("bundle", &format!("libedge for {} ({})", target.name, target.triple));
    let report = bundle::build(&target, &arguments.out)?;
    let (gguf, pack) = (arguments.out.join("student.gguf"), arguments.out.join(pack::PACK_FILE));
    if model.parse()?.packed_from().is_some() {
        copy(&model, &pack)?;
    } else {
        copy(&model, &gguf)?;
        let packed = pack::pack(&model, &pack)?;
        note("bundle", &format!("{} ({})", pack::PACK_FILE, output::bytes(packed.bytes)));
    }
    note("bundle", &bundle::write_chat(&model, &arguments.out)?);
    note(
        "bundle",
        &format!(
            "{} ({}), model {}, best with {} threads",
            report.folder.display(),
            output::bytes(report.shared_bytes),
            output::bytes(model.bytes().len() as u64),
            target.threads()
        ),
    );
    Ok(())
}

/// Copies a model; one that is already there, such as that of a run bundled into its own folder, stays.
fn copy(model: &ModelFile, to: &Path) -> anyhow::Result<()> {
    if to.exists() && fs::canonicalize(model.path()).ok() == fs::canonicalize(to).ok() {
        return Ok(());
    }
    atomic::write(to, |file| file.write_all(model.bytes())).with_context(|| to.display().to_string())
}
