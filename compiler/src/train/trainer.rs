//! The training loop: from a teacher, or from text alone, to a trained model.
//!
//! One loop serves distillation (a teacher's distribution is the target) and plain language modelling
//! (the text is). It measures nothing on held-out text, reads no model file and prints nothing: what
//! happens is told to a [`Progress`] and written as metrics and checkpoints into the run's folder.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::checkpoint::{self, Header, Recipe};
use super::config::{RunFolder, TrainConfig};
use super::error::TrainError;
use super::gradients::{self, Gradients};
use super::graph::Decoder;
use super::loss::{self, LossParts};
use super::metrics::{Metrics, Row};
use super::ops::with_values;
use super::optimizer::AdamW;
use super::parallel::{self, Communicator};
use super::schedule::Schedule;
use super::trainee::{self, Trainee};
use super::windows::Windows;
use crate::model::Model;

/// What a finished step looks like.
#[derive(Clone, Copy, Debug)]
pub struct StepReport {
    /// Numbers of the step.
    pub row: Row,
    /// Steps of the whole run.
    pub steps: u64,
    /// Tokens per second, smoothed over recent steps.
    pub tokens_per_second: f64,
    /// Time left at that rate.
    pub remaining: Duration,
}

/// Who is told how the run goes.
pub trait Progress {
    /// A step is done. [`ControlFlow::Break`] writes a checkpoint and ends the run.
    fn step(&mut self, report: &StepReport) -> ControlFlow<()>;
    /// Something that the user should know.
    fn note(&mut self, message: &str);
}

/// Trains `student` to say what `teacher` says on the tokens `ids`.
///
/// `scored[i]` says whether token `i` may be a target. Loss: [`Objective`] with
/// `alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy`.
///
/// # Errors
/// See [`TrainError`]; whatever happens, an earlier checkpoint stays until a later one is on the disk.
pub fn distill(
    teacher: &Model,
    student: Model,
    text: Text<'_>,
    config: &TrainConfig,
    folder: &RunFolder,
    progress: &mut dyn Progress,
) -> Result<Model, TrainError> {
    crate::student::check(teacher, &student)?;
    config.validate()?;
    let student = trainee::full(student, config.decay_embeddings)?;
    train(Some(teacher), student, text, config, folder, progress)
}

/// Tokens to train on.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    /// The tokens.
    pub ids: &'a [u32],
    /// Which of them may be targets.
    pub scored: &'a [bool],
}

/// Trains whatever is to be trained: with a teacher as [`distill`], without one as a language model
/// (cross-entropy alone).
///
/// # Errors
/// As [`distill`].
pub fn train<R>(
    teacher: Option<&Model>,
    mut student: Trainee<R>,
    text: Text<'_>,
    config: &TrainConfig,
    folder: &RunFolder,
    progress: &mut dyn Progress,
) -> Result<R, TrainError> {
    config.validate()?;
    student.decoder.recompute(folder.checkpoint_activations);
    let mut run = Trainer::new(teacher, &student, text, config, folder, progress)?;
    run.run(progress)?;
    drop(run);
    student.finish()
}

/// A run under way.
struct Trainer<'a> {
    teacher: Option<Decoder>,
    student: &'a Decoder,
    optimizer: AdamW,
    gradients: Gradients,
    windows: Windows<'a>,
    schedule: Schedule,
    config: &'a TrainConfig,
    folder: &'a RunFolder,
    recipe: Recipe,
    /// Of the first process.
    metrics: Option<Metrics>,
    /// Step and time of the last checkpoint.
    saved: (u64, Instant),
    seconds: f64,
    rate: Option<f64>,
}

impl<'a> Trainer<'a> {
    /// A run at its beginning, or at its checkpoint.
    fn new<R>(
        teacher: Option<&Model>,
        student: &'a Trainee<R>,
        text: Text<'a>,
        config: &'a TrainConfig,
        folder: &'a RunFolder,
        progress: &mut dyn Progress,
    ) -> Result<Self, TrainError> {
        let mut windows = windows(text, student.decoder.spec().vocab, config)?;
        let mut recipe = config.recipe();
        recipe.insert("teacher".into(), teacher.map_or(Ok("none".into()), fingerprint)?);
        recipe.extend(student.recipe.clone());
        recipe.insert("text".into(), text_fingerprint(text));

        let teacher = teacher.map(|teacher| Decoder::new(&teacher.spec, &teacher.weights)).transpose()?;
        let mut optimizer = AdamW::new(student.parameters.clone(), config.optimizer());

        let (step, position) = begin(config, folder, &recipe, &mut optimizer, progress)?;
        windows.seek(position);
        let metrics = (folder.processes.rank() == 0).then(|| Metrics::open(&folder.path, step)).transpose();
        let (metrics, seconds) =
            metrics.map_err(|source| TrainError::Metrics { folder: folder.path.clone(), source })?.unzip();
        Ok(Self {
            teacher,
            student: &student.decoder,
            gradients: Gradients::new(optimizer.parameters()),
            optimizer,
            windows,
            schedule: config.schedule(),
            config,
            folder,
            recipe,
            metrics,
            saved: (step, Instant::now()),
            seconds: seconds.unwrap_or(0.0),
            rate: None,
        })
    }

    fn run(&mut self, progress: &mut dyn Progress) -> Result<(), TrainError> {
        let steps = self.config.steps();
        while self.optimizer.steps() < steps {
            let report = self.step()?;
            let step = report.row.step;
            let stop = self.any(progress.step(&report).is_break());
            let due = self.folder.every_steps.is_some_and(|every| step >= self.saved.0 + every)
                || self.saved.1.elapsed() >= self.folder.every;
            if stop || due || step == steps {
                self.save()?;
            }
            if stop && step < steps {
                return Err(TrainError::Stopped { step });
            }
        }
        Ok(())
    }

    /// Whether a process says so.
    fn any(&self, says: bool) -> bool {
        let mut says = [f32::from(u8::from(says))];
        self.folder.processes.all_reduce(&mut says);
        says[0] > 0.0
    }

    /// One optimizer step over `accumulate` batches, or this process's share of them.
    fn step(&mut self) -> Result<StepReport, TrainError> {
        let started = Instant::now();
        let TrainConfig { batch, accumulate, length, .. } = *self.config;
        let whole = self.windows.batch(batch * accumulate);
        let own = parallel::part(batch * accumulate, &*self.folder.processes);
        let mut total = LossParts { loss: 0.0, kl: 0.0, cross_entropy: 0.0, tokens: 0 };
        self.gradients.clear();
        for start in own.clone().step_by(batch) {
            let part = whole.part(start..own.end.min(start + batch), length);
            // Every scored token of the step weighs the same, however they fell into batches.
            let share = part.scored as f64 / whole.scored as f64;
            let (loss, parts) = self.forward(&part.inputs, &part.targets, share)?;
            self.gradients.add(&loss)?;
            total.loss += parts.loss * share;
            total.kl += parts.kl * share;
            total.cross_entropy += parts.cross_entropy * share;
            total.tokens += parts.tokens;
        }
        self.add_up(&mut total);
        let lr = self.schedule.at(self.optimizer.steps() as usize);
        let gradients = self.gradients.sums(self.optimizer.parameters())?;
        let grad_norm = gradients::norm(&gradients);
        self.check(&total, grad_norm)?;
        self.optimizer.step(&gradients, lr, (self.config.clip / grad_norm).min(1.0))?;
        let report = self.report(&total, lr, grad_norm, started.elapsed());
        if let Some(metrics) = &mut self.metrics {
            let appended = metrics.append(&report.row);
            appended.map_err(|source| TrainError::Metrics { folder: self.folder.path.clone(), source })?;
        }
        Ok(report)
    }

    /// Adds up gradients and losses of all processes.
    fn add_up(&mut self, total: &mut LossParts) {
        let processes = &*self.folder.processes;
        if processes.size() == 1 {
            return;
        }
        self.gradients.sums_mut().for_each(|sum| processes.all_reduce(sum));
        let mut parts = [total.loss, total.kl, total.cross_entropy].map(|part| part as f32);
        processes.all_reduce(&mut parts);
        [total.loss, total.kl, total.cross_entropy] = parts.map(f64::from);
    }

    /// The loss of one batch, multiplied by `share`, with its graph.
    fn forward(
        &self,
        inputs: &[u32],
        targets: &[u32],
        share: f64,
    ) -> Result<(candle_core::Tensor, LossParts), TrainError> {
        let length = self.config.length;
        let batch = inputs.len() / length;
        let teacher = match &self.teacher {
            Some(teacher) => Some((teacher.hidden(inputs, batch, length)?, teacher.head()?)),
            None => None,
        };
        let hidden = self.student.hidden(inputs, batch, length)?;
        let teacher = teacher.as_ref().map(|(hidden, head)| (hidden, head));
        Ok(loss::loss(&hidden, &self.student.head()?, teacher, targets, &self.config.objective, share)?)
    }

    /// Stops a run whose numbers have left the range that training comes back from.
    ///
    /// A model that knows nothing has a cross-entropy of `ln(vocab)`; ten times that is far beyond
    /// what any start with sane weights shows.
    fn check(&self, parts: &LossParts, grad_norm: f64) -> Result<(), TrainError> {
        let limit = 10.0
            * (self.student.spec().vocab as f64).ln().max(1.0)
            * self.config.objective.temperature.powi(2).max(1.0);
        let (what, value) = if parts.loss.is_nan() || parts.loss > limit {
            ("the loss", parts.loss)
        } else if !grad_norm.is_finite() {
            ("the norm of the gradient", grad_norm)
        } else {
            return Ok(());
        };
        Err(TrainError::Diverged { step: self.optimizer.steps() + 1, what, value, checkpoint: self.saved.0 })
    }

    fn report(&mut self, parts: &LossParts, lr: f64, grad_norm: f64, elapsed: Duration) -> StepReport {
        let (step, steps) = (self.optimizer.steps(), self.config.steps());
        let per_step = self.config.tokens_per_step();
        self.seconds += elapsed.as_secs_f64();
        let tok_s = per_step as f64 / elapsed.as_secs_f64().max(1e-9);
        let rate = self.rate.map_or(tok_s, |rate| rate + 0.1 * (tok_s - rate));
        self.rate = Some(rate);
        StepReport {
            row: Row {
                step,
                tokens: step * per_step,
                loss: parts.loss,
                kl: parts.kl,
                ce: parts.cross_entropy,
                lr,
                grad_norm,
                tok_s,
                seconds: self.seconds,
            },
            steps,
            tokens_per_second: rate,
            remaining: Duration::from_secs_f64(((steps - step) * per_step) as f64 / rate),
        }
    }

    fn save(&mut self) -> Result<(), TrainError> {
        let step = self.optimizer.steps();
        if self.folder.processes.rank() == 0 {
            let processes = self.folder.processes.size();
            let header = Header::new(step, self.windows.position(), processes, self.recipe.clone());
            checkpoint::save(&self.folder.path, &header, &self.optimizer)?;
        }
        self.saved = (step, Instant::now());
        Ok(())
    }
}

/// The windows of `text`, every token of which must be below `vocab`.
fn windows<'a>(text: Text<'a>, vocab: usize, config: &TrainConfig) -> Result<Windows<'a>, TrainError> {
    if let Some(position) = text.ids.iter().position(|&token| token as usize >= vocab) {
        return Err(TrainError::Token { token: text.ids[position], position, vocab });
    }
    Windows::new(text.ids, text.scored, config.length, config.seed).ok_or_else(|| TrainError::TooLittleText {
        found: text.ids.len(),
        scored: text.scored.iter().filter(|&&scored| scored).count(),
        length: config.length,
    })
}

/// Puts every process where the run begins or goes on: steps and windows done, and the first one's state in
/// `optimizer` and its parameters.
fn begin(
    config: &TrainConfig,
    folder: &RunFolder,
    recipe: &Recipe,
    optimizer: &mut AdamW,
    progress: &mut dyn Progress,
) -> Result<(u64, u64), TrainError> {
    let processes = &*folder.processes;
    let windows = config.batch * config.accumulate;
    if windows < processes.size() {
        return Err(TrainError::TooFewWindows { windows, processes: processes.size() });
    }
    let first = processes.rank() == 0;
    let mut place = (0, 0);
    if first && !folder.resume {
        checkpoint::discard(&folder.path)?;
    } else if first {
        match checkpoint::load(&folder.path, recipe, optimizer)? {
            Some(header) => {
                place = (header.step, header.position);
                note_resume(&header, config.steps(), processes, progress);
            }
            None => {
                let path = folder.path.display();
                progress.note(&format!("no checkpoint in {path}, starting from the beginning"));
            }
        }
    }
    if processes.size() == 1 {
        return Ok(place);
    }
    let (place, asked) = parallel::from_first(processes, first.then(|| (place, recipe.clone())))?;
    let differences = checkpoint::differences(&asked, recipe);
    if !differences.is_empty() {
        return Err(TrainError::OtherProcess { rank: processes.rank(), differences });
    }
    optimizer.set_steps(place.0);
    parallel::broadcast_state(processes, optimizer)?;
    Ok(place)
}

fn note_resume(header: &Header, steps: u64, processes: &dyn Communicator, progress: &mut dyn Progress) {
    progress.note(&format!("resumed after step {} of {steps}", header.step));
    let before = format!("{} processes with {} threads", header.processes, header.threads);
    let now = format!("{} processes with {} threads", processes.size(), rayon::current_num_threads());
    if before != now {
        progress.note(&format!(
            "the checkpoint was made by {before}, this run has {now}: the result may differ in rounding"
        ));
    }
}

/// SHA-256 of a model's specification and weights, hexadecimal.
///
/// # Errors
/// A weight that is not contiguous f32 on the CPU.
pub fn fingerprint(model: &Model) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    hash.update(format!("{:?}", model.spec));
    for (role, layer, tensor) in model.weights.iter() {
        hash.update(format!("{role:?} {layer} {:?}", tensor.dims()));
        with_values(&tensor.contiguous()?, |values| {
            hash_words(&mut hash, values.iter().map(|x| x.to_bits()));
            Ok(())
        })?;
    }
    Ok(hex(hash))
}

fn text_fingerprint(text: Text<'_>) -> String {
    let mut hash = Sha256::new();
    hash_words(&mut hash, text.ids.iter().copied());
    hash_words(&mut hash, text.scored.iter().map(|&scored| u32::from(scored)));
    hex(hash)
}

fn hash_words(hash: &mut Sha256, words: impl Iterator<Item = u32>) {
    let mut bytes = Vec::with_capacity(1 << 16);
    for word in words {
        bytes.extend_from_slice(&word.to_le_bytes());
        if bytes.len() == 1 << 16 {
            hash.update(&bytes);
            bytes.clear();
        }
    }
    hash.update(&bytes);
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
