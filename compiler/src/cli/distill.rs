//! `edgec distill`.

use std::path::PathBuf;
use std::rc::Rc;

use anyhow::bail;
use clap::Args;
use edgec::pipeline::{self, Observer, Recipe, SoftSource, StudentSource, TeacherSource};
use edgec::quantize::calibrate::Method;
use edgec::student::MENDING_TOKENS;
use edgec::train::loss::{HiddenTerms, Mixture, Objective, Sparsity, ULD};
use edgec::train::parallel::Communicator;
use edgec::train::{Precision, RunFolder, TrainConfig};

use super::output;
use super::processes::{choose, together};
use super::progress::{Progress, note};
use super::training::Training;

/// Peak learning rate of quantization-aware training: what is nearly right moves little.
const QAT_LR: f64 = 2e-5;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file or Hugging Face folder [default: a small teacher inside this program; with --student and --data none:
    /// what the data says is learned]
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// An adapter to merge into the teacher first: PEFT's folder, a folder of `edgec tune`, or a GGUF LoRA
    #[arg(long)]
    teacher_adapter: Option<PathBuf>,
    /// A smaller model to train, instead of one cut from the teacher; of the same vocabulary, or see --align
    #[arg(long, conflicts_with_all = ["shrink", "layers"])]
    student: Option<PathBuf>,
    /// The student has another vocabulary: compare tokens that spell the same, learn the others as text
    #[arg(long, requires = "student")]
    align: bool,
    /// Whose probabilities to learn; data has those that `edgec synth` wrote with --top-logprobs [default: data where
    /// it has any]
    #[arg(long, value_name = "FROM", value_enum)]
    soft_targets: Option<SoftSource>,
    /// Share of the teacher's layers that the student keeps [default: 0.5]
    #[arg(long, conflicts_with = "layers")]
    shrink: Option<f64>,
    /// Number of the teacher's layers that the student keeps
    #[arg(long)]
    layers: Option<usize>,
    #[command(flatten)]
    prune: Prune,
    #[command(flatten)]
    training: Training,
    /// Device to build for; `edgec targets` lists them
    #[arg(long, default_value = edge_targets::DEFAULT)]
    target: String,
    /// Folder of the run [default: runs/<target>, or the next free number]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Divergence from the teacher: fkl, rkl, jsd, skl, srkl, tvd, or a mixture: fkl=0.7,tvd=0.3; uld for a student of
    /// another vocabulary: probabilities by rank
    #[arg(long, default_value = "fkl", value_parser = loss)]
    loss: Loss,
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
    /// In what numbers the teacher is asked while the student trains; a run is resumed with the same
    #[arg(long, value_name = "TYPE", value_enum, default_value_t)]
    teacher_precision: Precision,
    /// Peak learning rate [default: 4e-4, with --qat 2e-5]
    #[arg(long)]
    lr: Option<f64>,
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
    /// Leave the embedding table, and the head if that is the same, as they are [default: true for a student
    /// that is cut from the teacher at its width]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", conflicts_with = "qat")]
    freeze_embeddings: Option<bool>,
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
    /// Tokens on which what stays is fitted, by regression, to make up for dropped layers; 0 leaves it as it is
    #[arg(long, value_name = "N", default_value_t = MENDING_TOKENS)]
    mend_tokens: usize,
}

/// The soft loss.
#[derive(Clone, Copy)]
enum Loss {
    Divergence(Mixture),
    Universal,
}

fn loss(text: &str) -> Result<Loss, String> {
    match text {
        ULD => Ok(Loss::Universal),
        text => text.parse().map(Loss::Divergence).map_err(|error: String| format!("{error}, or {ULD}")),
    }
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
            mending_tokens: self.mend_tokens,
        }
    }
}

impl Arguments {
    fn recipe(&self) -> Recipe {
        Recipe {
            teacher: match &self.teacher {
                Some(path) => Some(TeacherSource::Path(path.clone())),
                None if self.student.is_some() && !self.training.data.is_empty() => None,
                None => Some(TeacherSource::Embedded),
            },
            teacher_adapter: self.teacher_adapter.clone(),
            student: match (&self.student, self.layers) {
                (Some(path), _) => StudentSource::Path(path.clone()),
                (None, Some(layers)) => StudentSource::Layers(layers),
                (None, None) => StudentSource::Shrink(self.shrink.unwrap_or(0.5)),
            },
            data: self.training.text(),
            soft_targets: self.soft_targets,
            eval_data: self.training.eval_data.clone(),
            prune: self.prune.recipe(),
            mask_prompts: self.training.mask_prompts,
            target: self.target.clone(),
            quant: self.qat.clone().unwrap_or_else(|| self.quant.clone()),
            rounding: self.rounding,
            qat: self.qat.is_some(),
            calibration: self.calibration,
            train: TrainConfig {
                lr: self.lr.unwrap_or(if self.qat.is_some() { QAT_LR } else { TrainConfig::default().lr }),
                embeddings: !self.freeze_embeddings.unwrap_or(self.cut_at_its_width()),
                objective: Objective {
                    alpha: self.alpha,
                    temperature: self.temperature,
                    soft: match self.loss {
                        Loss::Divergence(mixture) => mixture,
                        Loss::Universal => Mixture::default(),
                    },
                    universal: matches!(self.loss, Loss::Universal),
                    beta: self.beta,
                    skew: self.skew,
                },
                hidden: self.hidden.unwrap_or_default().at(&self.hidden_layers),
                cache: self.cache_teacher,
                align: self.align,
                on_policy: self.on_policy,
                teacher_precision: self.teacher_precision,
                ..self.training.config()
            },
        }
    }

    /// Whether the student is the teacher without some of its layers, heads or channels inside.
    fn cut_at_its_width(&self) -> bool {
        self.student.is_none() && self.prune.hidden_size.is_none() && self.qat.is_none()
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
    choose(arguments.training.device, &*processes)?;
    let folder = arguments.folder();
    let mut screen = Screen::of(&*processes);
    let run = RunFolder {
        processes,
        checkpoint_activations: arguments.checkpoint_activations,
        ..RunFolder::new(&folder, arguments.resume, arguments.training.checkpoint_every)
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
pub(super) struct Screen {
    /// Another process shows the same.
    silent: bool,
    current: Option<(&'static str, Progress, String)>,
}

impl Screen {
    /// The screen of one of `processes`: the first shows what all do.
    pub(super) fn of(processes: &dyn Communicator) -> Self {
        Self { silent: processes.rank() > 0, current: None }
    }

    pub(super) fn end(&mut self) {
        if let Some((_, progress, message)) = self.current.take() {
            progress.finish(&message);
            crate::memory::give_back();
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
