//! `edgec export`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use edgec::export::gguf::Mix;
use edgec::{export, quantize, teacher};

use super::progress::note;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, Hugging Face folder or run's folder
    model: PathBuf,
    /// Format to write
    #[arg(long, value_enum)]
    format: Format,
    /// The file or folder to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// One GGUF file in F16; `edgec quantize` writes other types.
    Gguf,
    /// A Hugging Face folder in f32.
    Hf,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let model = teacher::load(&arguments.model)?;
    let place = || arguments.out.display().to_string();
    match arguments.format {
        Format::Gguf => {
            quantize::quantize_file(&model, Mix::F16, &arguments.out).with_context(place)?;
        }
        Format::Hf => export::hf::write(&model, &arguments.out).with_context(place)?,
    }
    note("export", &place());
    Ok(())
}
