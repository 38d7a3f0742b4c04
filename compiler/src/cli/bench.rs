//! `edgec bench`.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, ValueEnum};
use edgec::profile::Settings;
use edgec::profile::bench::{self, Options};

use super::{EngineArguments, output};

#[derive(Args)]
pub struct Arguments {
    /// GGUF files, packs, Hugging Face folders or runs' folders
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// Tokens in the prompt; 0 leaves the test out
    #[arg(short = 'p', long, default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate; 0 leaves the test out
    #[arg(short = 'n', long, default_value_t = 128)]
    generate: usize,
    /// Repetitions
    #[arg(short, long, default_value_t = 5)]
    repetitions: usize,
    /// Format of the output
    #[arg(short, long, value_enum, default_value_t = Format::Md)]
    output: Format,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A Markdown table.
    Md,
    /// llama-bench's JSON fields, and latencies.
    Json,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.repetitions == 0 || (arguments.prompt == 0 && arguments.generate == 0) {
        bail!("nothing to time: give a prompt or tokens to generate, and at least one repetition");
    }
    let settings = arguments.engine.settings(0);
    let options = Options {
        n_prompt: arguments.prompt,
        n_gen: arguments.generate,
        repetitions: arguments.repetitions,
        threads: settings.threads,
        kernels: settings.kernels,
        cache: settings.cache,
        ..Options::default()
    };
    let mut tests = Vec::new();
    for path in &arguments.models {
        let (file, Settings { adapters, .. }) = arguments.engine.open(path, 0)?;
        tests.extend(bench::run(&file, &Options { adapters, ..options.clone() })?);
    }
    match arguments.output {
        Format::Json => output::json(&tests),
        Format::Md => Ok(output::line(bench::markdown(&tests))?),
    }
}
