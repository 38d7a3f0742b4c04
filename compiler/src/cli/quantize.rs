//! `edgec quantize`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use edgec::export::gguf::Mix;
use edgec::{quantize, teacher};

use super::output;
use super::progress::note;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, Hugging Face folder or run's folder
    model: PathBuf,
    /// F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K_M, Q5_K_M or Q6_K
    #[arg(long = "type", value_name = "TYPE")]
    mix: Mix,
    /// The GGUF file to write
    #[arg(long)]
    out: PathBuf,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let model = teacher::load(&arguments.model)?;
    let report = quantize::quantize_file(&model, arguments.mix, &arguments.out)
        .with_context(|| arguments.out.display().to_string())?;
    note(
        "quantize",
        &format!(
            "{} {} to {}, {:.2} bits per weight",
            arguments.mix,
            output::bytes(report.bytes),
            arguments.out.display(),
            report.bits_per_weight,
        ),
    );
    Ok(())
}
