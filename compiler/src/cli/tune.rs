//! `edgec tune`.

use std::path::PathBuf;
use std::rc::Rc;

use anyhow::bail;
use clap::Args;
use edgec::adapter::Settings;
use edgec::pipeline::{self, TeacherSource, TuneRecipe};
use edgec::train::parallel::Communicator;
use edgec::train::{Precision, RunFolder, TrainConfig};

use super::distill::Screen;
use super::output;
use super::processes::{choose, together};
use super::training::Training;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, Hugging Face folder or run's folder [default: a small model inside this program]
    model: Option<PathBuf>,
    /// Learn what this model says to the text, instead of the text: GGUF file or Hugging Face folder of the same
    /// vocabulary. Beside a base in blocks the adapter makes up for what rounding cost (LoRA-QAD)
    #[arg(long)]
    teacher: Option<PathBuf>,
    #[command(flatten)]
    training: Training,
    /// Folder of the run
    #[arg(long)]
    out: PathBuf,
    /// Rank of the update
    #[arg(long, default_value_t = 16)]
    rank: usize,
    /// The update is multiplied by alpha / rank
    #[arg(long, default_value_t = 32.0)]
    alpha: f64,
    /// Modules to adapt: all-linear, names between commas, or a regular expression for the whole name
    #[arg(long, default_value = "all-linear")]
    targets: String,
    /// Another rank for modules whose name ends so; may be repeated
    #[arg(long, value_name = "NAME=RANK", value_parser = pattern::<usize>)]
    rank_pattern: Vec<(String, usize)>,
    /// Another alpha for modules whose name ends so; may be repeated
    #[arg(long, value_name = "NAME=ALPHA", value_parser = pattern::<f64>)]
    alpha_pattern: Vec<(String, f64)>,
    /// rsLoRA: multiply by alpha / sqrt(rank)
    #[arg(long)]
    rslora: bool,
    /// DoRA: train the lengths of rows too
    #[arg(long)]
    dora: bool,
    /// Share of an adapter's inputs that is dropped while training
    #[arg(long, default_value_t = 0.0)]
    dropout: f32,
    /// QLoRA: hold the base in blocks (Q4_0, Q8_0, Q4_K, ...); a GGUF that is quantized already is held as it is
    #[arg(long, value_name = "TYPE")]
    base_quant: Option<String>,
    /// Multiply with the base in these numbers, both ways: `int8` is faster and a little coarser
    #[arg(long, value_enum, default_value_t, conflicts_with = "base_quant")]
    base_precision: Precision,
    /// Peak learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Decoupled weight decay of A and B
    #[arg(long, default_value_t = 0.0)]
    weight_decay: f64,
    /// Go on with the run in --out
    #[arg(long)]
    resume: bool,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

/// `NAME=NUMBER`.
fn pattern<T: std::str::FromStr>(text: &str) -> Result<(String, T), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && name.chars().all(plain) => match value.parse() {
            Ok(value) => Ok((name.to_owned(), value)),
            Err(_) => Err(format!("`{value}` in `{text}` is not a number as it is needed here")),
        },
        _ => Err(format!("`{text}` is not the end of a module's name, `=` and a number")),
    }
}

impl Arguments {
    fn recipe(&self) -> TuneRecipe {
        TuneRecipe {
            model: self.model.clone().map_or(TeacherSource::Embedded, TeacherSource::Path),
            teacher: self.teacher.clone(),
            data: self.training.text(),
            eval_data: self.training.eval_data.clone(),
            mask_prompts: self.training.mask_prompts,
            targets: self.targets.clone(),
            adapter: Settings {
                rank: self.rank,
                alpha: self.alpha,
                ranks: self.rank_pattern.clone(),
                alphas: self.alpha_pattern.clone(),
                rs: self.rslora,
                dora: self.dora,
            },
            dropout: self.dropout,
            // As llama.cpp calls the mix of that type.
            base_quant: self.base_quant.clone().map(|name| match name.as_str() {
                "Q4_K" | "Q5_K" => format!("{name}_M"),
                _ => name,
            }),
            base_precision: self.base_precision,
            train: TrainConfig { lr: self.lr, weight_decay: self.weight_decay, ..self.training.config() },
        }
    }
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if let Some(model) = arguments.model.as_ref().filter(|_| arguments.training.data.is_empty()) {
        bail!("--data is missing: text for {} to learn from", model.display());
    }
    together(|processes| tune(arguments, processes))
}

fn tune(arguments: &Arguments, processes: Rc<dyn Communicator>) -> anyhow::Result<()> {
    choose(arguments.training.device, &*processes)?;
    let mut screen = Screen::of(&*processes);
    let run = RunFolder {
        processes,
        ..RunFolder::new(&arguments.out, arguments.resume, arguments.training.checkpoint_every)
    };
    let Some(tuned) = pipeline::tune(&arguments.recipe(), &run, &mut screen)? else { return Ok(()) };
    screen.end();
    if arguments.json {
        return output::json(&tuned);
    }
    let share = 100.0 * tuned.base_bytes as f64 / tuned.base_f32_bytes as f64;
    let megabytes = tuned.base_bytes as f64 / 1e6;
    output::line(format!("perplexity before  {:.4}", tuned.before.ppl))?;
    output::line(format!("perplexity after   {:.4}", tuned.after.ppl))?;
    if let (Some(before), Some(after)) = (tuned.before.kl, tuned.after.kl) {
        output::line(format!("KL from teacher    {before:.4} before, {after:.4} after"))?;
    }
    output::line(format!("tokens scored      {}", tuned.after.tokens))?;
    output::line(format!("trained            {}", output::parameters(tuned.parameters)))?;
    output::line(format!("frozen base        {megabytes:.1} MB, {share:.1} % of f32"))?;
    output::line(format!("{} in {}", tuned.artifacts.join(", "), arguments.out.display()))?;
    Ok(())
}
