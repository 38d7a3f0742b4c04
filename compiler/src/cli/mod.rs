//! The command line: arguments in, one library call, something readable out.
//!
//! Nothing here computes; every command is a thin file over the library.

mod bench;
mod bundle;
mod distill;
mod eval;
mod export;
mod generate;
mod inspect;
mod logits;
mod merge;
mod output;
mod pack;
mod pipeline;
mod pretrain;
mod processes;
mod progress;
mod quantize;
mod recipe;
mod synth;
mod targets;
mod tokenize;
mod training;
mod tune;

use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use edge_runtime::session::CacheType;
use edgec::profile::{self, Adapter, ModelFile, Processors, Settings};

/// Distills a large language model into a small one, quantizes it, and bundles it for a device.
#[derive(Parser)]
#[command(name = "edgec", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Distill a student from a teacher and bundle it for a target.
    Distill(Box<distill::Arguments>),
    /// Ask a server of a large teacher for training text.
    Synth(synth::Arguments),
    /// Train a LoRA, rsLoRA, DoRA or QLoRA adapter beside a model.
    Tune(tune::Arguments),
    /// Run a chain of commands, each on what the one before made: synth, tune, distill, quantize, bundle.
    Pipeline(pipeline::Arguments),
    /// Put adapters into the weights of their model.
    Merge(merge::Arguments),
    /// Write a model as GGUF in another tensor type.
    Quantize(quantize::Arguments),
    /// Write a model folder in an open format.
    Export(export::Arguments),
    /// Lay a model's weights out for a target's kernels.
    Pack(pack::Arguments),
    /// Build the device library for a target.
    Bundle(bundle::Arguments),
    /// Continue a prompt.
    Run(generate::RunArguments),
    /// Talk to a model with its chat template.
    Chat(generate::ChatArguments),
    /// Token ids of the text on standard input, as a JSON array.
    Tokenize(tokenize::Arguments),
    /// Logits after every token of a prompt, as a safetensors file.
    Logits(logits::Arguments),
    /// Perplexity, and KL and agreement beside a teacher.
    Eval(eval::Arguments),
    /// Time prefill and decode on this machine.
    Bench(bench::Arguments),
    /// What a model file holds, and what of it cannot be run.
    Inspect(inspect::Arguments),
    /// The devices that are known, or one of them.
    Targets(targets::Arguments),
    /// Train a small model and its vocabulary from scratch on text.
    Pretrain(pretrain::Arguments),
}

/// How to run a model on this machine.
#[derive(Args, Clone, Debug)]
struct EngineArguments {
    /// Threads, no more than can run at once [default: one for each big core]
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Let threads run on any core, also where they all find room on the big ones
    #[arg(long)]
    no_pin: bool,
    /// Kernel table: generic, avx2, avx512, neon, dotprod, i8mm [default: the best that this CPU has]
    #[arg(long)]
    kernels: Option<String>,
    /// LoRA adapter to run with: a GGUF file or PEFT's folder, perhaps with a scale; may be repeated
    #[arg(long, value_name = "FILE[=SCALE]", value_parser = Adapter::argument)]
    adapter: Vec<(PathBuf, f32)>,
    /// Type of the KV cache: auto (as precise as the weights), f16, f32 or q8_0
    #[arg(long, default_value = "auto", value_parser = cache_type)]
    kv: CacheType,
}

fn cache_type(name: &str) -> Result<CacheType, &'static str> {
    CacheType::by_name(name).ok_or("expected auto, f16, f32 or q8_0")
}

impl EngineArguments {
    /// A model with the adapters, and settings with room for `context` tokens.
    fn open(&self, model: &Path, context: usize) -> anyhow::Result<(ModelFile, Settings)> {
        let (file, adapters) = profile::open_with(model, &self.adapter)?;
        Ok((file, Settings { adapters, ..self.settings(context) }))
    }

    /// Settings without adapters. Keeps this thread, and those that it starts, on the big cores if there are
    /// others and the threads find room.
    fn settings(&self, context: usize) -> Settings {
        let default = Settings::new(context);
        let threads = self.threads.map_or(default.threads, usize::from);
        if !self.no_pin
            && let Err(error) = Processors::here().pin(threads)
        {
            progress::note("threads", &format!("may run on any core: {error}"));
        }
        Settings { threads, kernels: self.kernels.clone(), cache: self.kv, ..default }
    }
}

/// Parses the command line and runs the command.
pub fn run() -> anyhow::Result<()> {
    let cli: Cli = recipe::parse(std::env::args_os().collect()).unwrap_or_else(|error| refuse(&error));
    execute(cli.command)
}

fn execute(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Distill(arguments) => distill::run(&arguments),
        Command::Synth(arguments) => synth::run(arguments),
        Command::Tune(arguments) => tune::run(&arguments),
        Command::Pipeline(arguments) => pipeline::run(&arguments),
        Command::Merge(arguments) => merge::run(&arguments),
        Command::Quantize(arguments) => quantize::run(&arguments),
        Command::Export(arguments) => export::run(&arguments),
        Command::Pack(arguments) => pack::run(&arguments),
        Command::Bundle(arguments) => bundle::run(&arguments),
        Command::Run(arguments) => generate::run(&arguments),
        Command::Chat(arguments) => generate::chat(&arguments),
        Command::Tokenize(arguments) => tokenize::run(&arguments),
        Command::Logits(arguments) => logits::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Targets(arguments) => targets::run(&arguments),
        Command::Pretrain(arguments) => pretrain::run(arguments),
    }
}

/// An error with its causes as one line. Many messages say their cause themselves; it is not said twice.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if cause.starts_with(&line) {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace('\n', " ")
}

/// Ends the program over arguments that make no sense, in one line as for all errors; help and version are
/// printed as they are.
fn refuse(error: &clap::Error) -> ! {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        error.exit();
    }
    let text = error.render().to_string();
    let usage = text.find("\n\nUsage:").or_else(|| text.find("\n\nFor more")).unwrap_or(text.len());
    let words: Vec<&str> = text[..usage].trim_start_matches("error: ").split_whitespace().collect();
    eprintln!("edgec: {}; try --help", words.join(" "));
    std::process::exit(error.exit_code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once_and_in_one_line() {
        let line = |messages: &[&str]| {
            let inner = anyhow::anyhow!(messages[0].to_owned());
            one_line(&messages[1..].iter().fold(inner, |error, outer| error.context((*outer).to_owned())))
        };
        assert_eq!(line(&["no such file"]), "no such file");
        assert_eq!(line(&["no such file", "a.txt"]), "a.txt: no such file");
        assert_eq!(line(&["no such file", "a.txt: no such file"]), "a.txt: no such file");
        assert_eq!(line(&["a.txt: no such file", "a.txt"]), "a.txt: no such file");
        assert_eq!(line(&["one\ntwo"]), "one two");
    }
}
