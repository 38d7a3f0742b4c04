//! `edgec distill`.

use std::path::PathBuf;
use std::rc::Rc;

use anyhow::bail;
use clap::{Args, ValueEnum};
use edgec::pipeline::{self, Data, Observer, Recipe, StudentSource, TeacherSource};
use edgec::train::loss::Objective;
use edgec::train::parallel::Communicator;
use edgec::train::{RunFolder, TrainConfig};

use super::output;
use super::processes::together;
use super::progress::{Progress, note};

#[derive(Args)]
pub struct Arguments {
    /// GGUF file or Hugging Face folder [default: a small teacher inside this program]
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// A smaller model of the same vocabulary to train, instead of one cut from the teacher
    #[arg(long, conflicts_with_all = ["shrink", "layers"])]
    student: Option<PathBuf>,
    /// Share of the teacher's layers that the student keeps [default: 0.5]
    #[arg(long, conflicts_with = "layers")]
    shrink: Option<f64>,
    /// Number of the teacher's layers that the student keeps
    #[arg(long)]
    layers: Option<usize>,
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
    /// Loss
    #[arg(long, value_enum, default_value_t = Loss::Fkl)]
    loss: Loss,
    /// Share of the soft loss: alpha * T^2 * KL + (1 - alpha) * cross-entropy
    #[arg(long, default_value_t = 1.0)]
    alpha: f64,
    /// Temperature of the soft loss
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Peak learning rate
    #[arg(long, default_value_t = TrainConfig::default().lr)]
    lr: f64,
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
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps between checkpoints; every two minutes there is one anyway
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: Option<u64>,
    /// Keep fewer activations and compute them again: less memory, more time, the same result
    #[arg(long)]
    checkpoint_activations: bool,
    /// Go on with the run in --out
    #[arg(long, requires = "out")]
    resume: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Loss {
    /// Forward KL divergence, KL(teacher || student).
    Fkl,
}

impl Arguments {
    fn recipe(&self) -> Recipe {
        // One loss today; the match makes the compiler ask for the next.
        match self.loss {
            Loss::Fkl => {}
        }
        Recipe {
            teacher: self.teacher.clone().map_or(TeacherSource::Embedded, TeacherSource::Path),
            student: match (&self.student, self.layers) {
                (Some(path), _) => StudentSource::Path(path.clone()),
                (None, Some(layers)) => StudentSource::Layers(layers),
                (None, None) => StudentSource::Shrink(self.shrink.unwrap_or(0.5)),
            },
            data: if self.data.is_empty() { Data::Embedded } else { Data::Files(self.data.clone()) },
            eval_data: self.eval_data.clone(),
            mask_prompts: self.mask_prompts,
            target: self.target.clone(),
            quant: self.quant.clone(),
            calibration: self.calibration,
            train: TrainConfig {
                tokens: self.tokens,
                batch: self.batch,
                length: self.length,
                accumulate: self.accumulate,
                lr: self.lr,
                seed: self.seed,
                objective: Objective { alpha: self.alpha, temperature: self.temperature },
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

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    together(|processes| distill(&arguments, processes))
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
struct Screen {
    /// Another process shows the same.
    silent: bool,
    current: Option<(&'static str, Progress, String)>,
}

impl Screen {
    fn end(&mut self) {
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
