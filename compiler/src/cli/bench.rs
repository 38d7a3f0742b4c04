//! `edgec bench`.

use std::path::PathBuf;

use anyhow::bail;
use clap::{Args, ValueEnum};
use edgec::profile::bench::{Config, Row, bench};
use edgec::profile::NativeFile;

use super::{EngineArguments, output};

#[derive(Args)]
pub struct Arguments {
    /// GGUF files, Hugging Face folders or runs' folders
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
    let config = Config {
        prompt: arguments.prompt,
        generate: arguments.generate,
        repetitions: arguments.repetitions,
    };
    let mut rows = Vec::new();
    for path in &arguments.models {
        rows.extend(bench(&NativeFile::open(path)?, config, &arguments.engine.engine())?);
    }
    match arguments.output {
        Format::Json => output::json(&rows),
        Format::Md => Ok(output::line(markdown(&rows))?),
    }
}

fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "| model | size | params | kernels | threads | test | tok/s | p50 ms | p95 ms | arena |\n\
         |---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    );
    for row in rows {
        let test =
            if row.n_prompt > 0 { format!("pp{}", row.n_prompt) } else { format!("tg{}", row.n_gen) };
        text.push_str(&format!(
            "\n| {} | {} | {} | {} | {} | {test} | {:.2} ± {:.2} | {:.2} | {:.2} | {} |",
            row.model_type,
            output::bytes(row.model_size),
            output::parameters(row.model_n_params),
            row.kernels,
            row.n_threads,
            row.avg_ts,
            row.stddev_ts,
            row.p50_ms,
            row.p95_ms,
            output::bytes(row.arena_bytes as u64),
        ));
    }
    text
}
