//! `edgec distill`.

use std::path::PathBuf;
use std::rc::Rc;

use anyhow::bail;
use clap::Args;
use edgec::pipeline::{self, Data, Observer, Recipe, StudentSource, TeacherSource};
use edgec::quantize::calibrate::Method;
use edgec::train::loss::{HiddenTerms, Mixture, Objective, Sparsity};
use edgec::train::parallel::Communicator;
use edgec::train::{RunFolder, TrainConfig};

use super::output;
use super::processes::together;
use super::progress::{Progress, note};

/// Peak learning rate of quantization-aware training: what is nearly right moves little.
const QAT_LR: f64 = 2e-5;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file or Hugging Face folder [default: a small teacher inside this program]
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// An adapter to merge into the teacher first: PEFT's folder, a folder of `edgec tune`, or a GGUF LoRA
    #[arg(long)]
    teacher_adapter: Option<PathBuf>,
    /// A smaller model of the same vocabulary to train, instead of one cut from the teacher
    #[arg(long, conflicts_with_all = ["shrink", "layers"])]
    student: Option<PathBuf>,
    /// Share of the teacher's layers that the student keeps [default: 0.5]
    #[arg(long, conflicts_with = "layers")]
    shrink: Option<f64>,
    /// Number of the teacher's layers that the student keeps
    #[arg(long)]
    layers: Option<usize>,
    #[command(flatten)]
    prune: Prune,
    /// Text to distill on, .txt or .jsonl; may be given again [default: text inside this program]
    #[arg(long)]
    data: Vec<PathBuf>,
    /// Text to judge on [default: the end of the data is held out]
    #[arg(long)]
    eval_data: Option<PathBuf>,
    /// Learn completions and the assistant's turns only
    #[arg(long)]
    mask_prompts: bool,
    /// Device to build for; `edgec targets` lists them
    #[arg(long, default_value = edge_targets::DEFAULT)]
    target: String,
    /// Folder of the run [default: runs/<target>, or the next free number]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Tokens to train on
    #[arg(long, default_value_t = 122_880)]
    tokens: u64,
    /// Divergence from the teacher: fkl, rkl, jsd, skl, srkl, tvd, or a mixture: fkl=0.7,tvd=0.3
    #[arg(long, default_value_t)]
    loss: Mixture,
    /// Share of the teacher in the middle of jsd, 0 (fkl) to 1 (rkl)
    #[arg(long, default_value_t = Objective::default().beta)]
    beta: f64,
    /// Share of the other distribution in skl and srkl, 0 to below 1
    #[arg(long, default_value_t = Objective::default().skew)]
    skew: f64,
    /// Share of the soft loss: alpha * T^2 * divergence + (1 - alpha) * cross-entropy
    #[arg(long, default_value_t = 1.0)]
    alpha: f64,
    /// Temperature of the soft loss
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Terms between hidden states of student and teacher: mse=0.1, cos=0.05, or both with a comma
    #[arg(long, value_name = "TERMS")]
    hidden: Option<HiddenTerms>,
    /// Blocks of the student, from 0, whose output is compared [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(..512))]
    hidden_layers: Vec<u16>,
    /// Share of the sequences that the student writes itself, from a prompt of the data, for the teacher to score
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    on_policy: f64,
    /// Ask the teacher once, keep top-k=N or sampled=N tokens a position in a file, and train from it
    #[arg(long, value_name = "FORM")]
    cache_teacher: Option<Sparsity>,
    /// Peak learning rate [default: 6e-4, with --qat 2e-5]
    #[arg(long)]
    lr: Option<f64>,
    /// Sequences in a forward pass
    #[arg(long, default_value_t = TrainConfig::default().batch)]
    batch: usize,
    /// Tokens in a sequence
    #[arg(long, default_value_t = TrainConfig::default().length)]
    length: usize,
    /// Forward passes in an optimizer step
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// Tokens on which the layers to keep are chosen
    #[arg(long, default_value_t = 512)]
    calibration: usize,
    /// Tensor types of student.gguf: F16, Q8_0, Q4_0, Q4_1, Q4_K_M, Q6_K, ...
    #[arg(long, default_value = "Q8_0")]
    quant: String,
    /// How the student is rounded to types of fewer than eight bits, knowing some of the data
    #[arg(long, value_enum, default_value_t, conflicts_with = "qat")]
    rounding: Method,
    /// Quantization-aware: train with the weights that these tensor types leave, and ship exactly those; with
    /// --shrink 1 the whole teacher
    #[arg(long, value_name = "TYPE", conflicts_with = "quant")]
    qat: Option<String>,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps between checkpoints; every two minutes there is one anyway
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: Option<u64>,
    /// Keep fewer activations and compute them again: less memory, more time, the same result
    #[arg(long)]
    checkpoint_activations: bool,
    /// Read these flags from a TOML file; those on the command line win
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Print what was asked as a recipe file, and do nothing
    #[arg(long)]
    print_recipe: bool,
    /// Go on with the run in --out
    #[arg(long, requires = "out")]
    resume: bool,
}

/// What is cut off besides layers.
#[derive(Args)]
struct Prune {
    /// Feed-forward channels that the student keeps; multiples of 256 suit every tensor type [default: all]
    #[arg(long, value_name = "N", conflicts_with = "student")]
    ffn: Option<usize>,
    /// Key/value heads that the student keeps, each with its query heads [default: all]
    #[arg(long, value_name = "N", conflicts_with = "student")]
    kv_heads: Option<usize>,
    /// Width of the student's residual stream; multiples of 256 suit every tensor type [default: all]
    #[arg(long, value_name = "N", conflicts_with = "student")]
    hidden_size: Option<usize>,
    /// Trim the vocabulary of teacher and student to the tokens that occur at least N times in the data (and what
    /// they are made of)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    trim_vocab: Option<u32>,
    /// Shrink the student in N steps, each followed by its share of the training
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count(16), conflicts_with = "student")]
    prune_steps: usize,
    /// Leave what stays as it is instead of fitting it to make up for dropped layers
    #[arg(long)]
    no_mend: bool,
}

/// A count from 1 to `most`.
fn count(most: usize) -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser;
    clap::builder::RangedU64ValueParser::<u64>::new().range(1..=most as u64).map(|count| count as usize)
}

impl Prune {
    fn recipe(&self) -> pipeline::Prune {
        pipeline::Prune {
            ffn: self.ffn,
            kv_heads: self.kv_heads,
            hidden: self.hidden_size,
            vocabulary: self.trim_vocab,
            steps: self.prune_steps,
            mend: !self.no_mend,
        }
    }
}

impl Arguments {
    fn recipe(&self) -> Recipe {
        Recipe {
            teacher: self.teacher.clone().map_or(TeacherSource::Embedded, TeacherSource::Path),
            teacher_adapter: self.teacher_adapter.clone(),
            student: match (&self.student, self.layers) {
                (Some(path), _) => StudentSource::Path(path.clone()),
                (None, Some(layers)) => StudentSource::Layers(layers),
                (None, None) => StudentSource::Shrink(self.shrink.unwrap_or(0.5)),
            },
            data: if self.data.is_empty() { Data::Embedded } else { Data::Files(self.data.clone()) },
            eval_data: self.eval_data.clone(),
            prune: self.prune.recipe(),
            mask_prompts: self.mask_prompts,
            target: self.target.clone(),
            quant: self.qat.clone().unwrap_or_else(|| self.quant.clone()),
            rounding: self.rounding,
            qat: self.qat.is_some(),
            calibration: self.calibration,
            train: TrainConfig {
                tokens: self.tokens,
                batch: self.batch,
                length: self.length,
                accumulate: self.accumulate,
                lr: self.lr.unwrap_or(if self.qat.is_some() { QAT_LR } else { TrainConfig::default().lr }),
                seed: self.seed,
                objective: Objective {
                    alpha: self.alpha,
                    temperature: self.temperature,
                    soft: self.loss,
                    beta: self.beta,
                    skew: self.skew,
                },
                hidden: self.hidden.unwrap_or_default().at(&self.hidden_layers),
                cache: self.cache_teacher,
                on_policy: self.on_policy,
                ..TrainConfig::default()
            },
        }
    }

    /// The folder that was asked for, or the next free one.
    fn folder(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| {
            let numbered = |number: usize| match number {
                1 => PathBuf::from(format!("runs/{}", self.target)),
                _ => PathBuf::from(format!("runs/{}-{number}", self.target)),
            };
            (1..).map(numbered).find(|folder| !folder.exists()).unwrap_or_else(|| numbered(1))
        })
    }
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.print_recipe {
        return Ok(output::line(super::recipe::print::<super::Cli>(
            std::env::args_os().collect(),
            "distill",
        )?)?);
    }
    together(|processes| distill(arguments, processes))
}

fn distill(arguments: &Arguments, processes: Rc<dyn Communicator>) -> anyhow::Result<()> {
    if processes.size() > 1 && arguments.out.is_none() {
        bail!("--out is missing: {} processes need the name of one folder", processes.size());
    }
    let folder = arguments.folder();
    let mut screen = Screen { silent: processes.rank() > 0, current: None };
    let run = RunFolder {
        processes,
        checkpoint_activations: arguments.checkpoint_activations,
        ..RunFolder::new(&folder, arguments.resume, arguments.checkpoint_every)
    };
    let Some(manifest) = pipeline::distill(&arguments.recipe(), &run, &mut screen)? else { return Ok(()) };
    screen.end();
    let summary = &manifest.summary;
    let mut rows = vec![vec![String::new()]];
    rows[0].extend(summary.models().map(|model| model.name.clone()));
    rows.extend(summary.lines().into_iter().map(|line| {
        let mut row = vec![line.label];
        row.extend(line.cells);
        row
    }));
    output::line(output::table(&rows))?;
    output::line(format!(
        "\nlibedge.so for {}: {}\neverything is in {}: student.gguf, student.edgepack, student/, lib/, report.html",
        summary.target,
        output::bytes(summary.library_bytes),
        folder.display()
    ))?;
    Ok(())
}

/// Shows one stage at a time.
#[derive(Default)]
pub(super) struct Screen {
    /// Another process shows the same.
    silent: bool,
    current: Option<(&'static str, Progress, String)>,
}

impl Screen {
    pub(super) fn end(&mut self) {
        if let Some((_, progress, message)) = self.current.take() {
            progress.finish(&message);
        }
    }
}

impl Observer for Screen {
    fn progress(&mut self, stage: &'static str, done: usize, total: usize, message: &str) {
        if self.silent {
            return;
        }
        if self.current.as_ref().is_none_or(|(current, ..)| *current != stage) {
            self.end();
            self.current = Some((stage, Progress::start(stage), String::new()));
        }
        if let Some((_, progress, last)) = &mut self.current {
            progress.update(done, total, message);
            message.clone_into(last);
        }
    }

    fn note(&mut self, stage: &'static str, message: &str) {
        if self.silent {
            return;
        }
        self.end();
        note(stage, message);
    }
}
