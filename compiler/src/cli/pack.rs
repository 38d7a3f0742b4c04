//! `edgec pack`.

use std::path::PathBuf;

use clap::Args;
use edge_targets::Target;
use edgec::{pack, profile};

use super::output;
use super::progress::note;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file or run's folder
    model: PathBuf,
    /// Device that will run it; `edgec targets` lists them
    #[arg(long, default_value = edge_targets::DEFAULT)]
    target: String,
    /// The pack to write [default: beside the model, ending in .edgepack]
    #[arg(long)]
    out: Option<PathBuf>,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let target = Target::by_name(&arguments.target)?;
    let model = profile::open(&arguments.model)?;
    let out = arguments.out.clone().unwrap_or_else(|| model.path().with_extension("edgepack"));
    let report = pack::pack(&model, &out)?;
    let left = match report.left {
        0 => String::new(),
        left => format!(", {left} fused ones in rows"),
    };
    note(
        "pack",
        &format!(
            "{} {} for {}: {} matrices in tiles{left}",
            out.display(),
            output::bytes(report.bytes),
            target.name,
            report.tiled,
        ),
    );
    Ok(())
}
