//! `edgec export`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use edgec::export::gguf::Mix;
use edgec::{adapter, export, profile, quantize, teacher};

use super::progress::note;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, Hugging Face folder or run's folder; for lora-gguf PEFT's folder of an adapter
    model: PathBuf,
    /// Format to write
    #[arg(long, value_enum)]
    format: Format,
    /// The model that an adapter is for: GGUF file, pack, Hugging Face folder or run's folder
    #[arg(long, required_if_eq("format", "lora-gguf"))]
    base: Option<PathBuf>,
    /// Write the hash of --base, a GGUF file or a pack, into the adapter: it is refused beside any other file, also
    /// beside the same model in another tensor type
    #[arg(long, requires = "base")]
    pin_base: bool,
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
    /// A LoRA adapter as GGUF, for the model that --base names.
    LoraGguf,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let place = || arguments.out.display().to_string();
    match arguments.format {
        Format::Gguf => {
            let model = teacher::load(&arguments.model)?;
            quantize::quantize_file(&model, Mix::F16, &arguments.out).with_context(place)?;
        }
        Format::Hf => {
            export::hf::write(&teacher::load(&arguments.model)?, &arguments.out).with_context(place)?;
        }
        Format::LoraGguf => {
            let base = arguments.base.as_deref().context("--base is missing")?;
            let base = profile::open(base)?;
            let spec = profile::spec_of(&base)?;
            let mut adapter = adapter::read(&arguments.model, &spec)?;
            if adapter.is_dora() {
                adapter = adapter::as_lora(adapter, &teacher::load(base.path())?)?;
                note("export", "a DoRA changes whole matrices, so as a LoRA it is as large as they are");
            }
            if arguments.pin_base {
                let hash = adapter::base_of(&base).with_context(|| {
                    format!(
                        "--pin-base: {} is a folder; a GGUF file or a pack has a hash",
                        base.path().display()
                    )
                })?;
                adapter::export_for(&adapter, &spec, &hash, &arguments.out)?;
            } else {
                adapter::export(&adapter, &spec, &arguments.out)?;
            }
        }
    }
    note("export", &place());
    Ok(())
}
