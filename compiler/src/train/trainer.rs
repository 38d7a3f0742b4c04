//! The training loop: from a teacher, or from text alone, to a trained model.
//!
//! One loop serves distillation (a teacher's distribution is the target) and plain language modelling
//! (the text is). It measures nothing on held-out text, reads no model file and prints nothing: what
//! happens is told to a [`Progress`] and written as metrics and checkpoints into the run's folder.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use edge_models::DecoderSpec;
use sha2::{Digest, Sha256};

use super::cache::{self, Cache};
use super::checkpoint::{self, Header, Recipe};
use super::config::{RunFolder, TrainConfig};
use super::error::TrainError;
use super::gradients::{self, Gradients};
use super::graph::Decoder;
use super::inner::Inner;
use super::interpreter::Interpreter;
use super::loss::{self, LossParts, Target};
use super::metrics::{Metrics, Row};
use super::ops::with_values;
use super::optimizer::AdamW;
use super::parallel;
use super::policy::Policy;
use super::said;
use super::schedule::Schedule;
use super::start::begin;
use super::trainee::{self, Trainee};
use super::windows::{Batch, Windows};
use crate::model::Model;
use crate::pack;
use crate::text::soft::SoftTargets;

/// A mean square error of hidden states, beside the teacher's mean square, beyond which training is lost.
const LARGEST_STATES: f64 = 1e4;

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
    /// `done` of `total` windows of a teacher are in its cache. [`ControlFlow::Break`] ends the run.
    fn cached(&mut self, _done: usize, _total: usize) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Who says what the student is to say.
#[derive(Clone, Copy)]
pub enum Teacher<'a> {
    /// A model that is asked in every step; its layers from which the student's came, empty if they came from
    /// elsewhere.
    Model(&'a Model, &'a [usize]),
    /// What a model said before.
    Cache(&'a Cache),
    /// What came with the text; where nothing did, the text itself.
    Said(&'a SoftTargets),
    /// A model of another vocabulary, and who knows both.
    Foreign(&'a Model, &'a Interpreter<'a>),
}

/// Trains `student` to say what `teacher` says on the tokens `ids`.
///
/// `scored[i]` says whether token `i` may be a target; what is minimized is [`TrainConfig::objective`].
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
    let student = trainee::full(student, config)?;
    match cache::fill(teacher, text, config, folder, progress)? {
        Some(cache) => train_from(Some(Teacher::Cache(&cache)), student, text, config, folder, progress),
        None => train(Some(teacher), student, text, config, folder, progress),
    }
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
    student: Trainee<R>,
    text: Text<'_>,
    config: &TrainConfig,
    folder: &RunFolder,
    progress: &mut dyn Progress,
) -> Result<R, TrainError> {
    let teacher = teacher.map(|teacher| Teacher::Model(teacher, &[]));
    train_from(teacher, student, text, config, folder, progress)
}

/// The same with any [`Teacher`].
///
/// # Errors
/// As [`distill`].
pub fn train_from<R>(
    teacher: Option<Teacher<'_>>,
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

/// A teacher, ready to say what it thinks of a batch.
enum Scorer<'a> {
    /// There is none.
    Text,
    Model(Box<Decoder>),
    Cache(&'a Cache),
    Said(&'a SoftTargets),
    Foreign(Box<Decoder>, &'a Interpreter<'a>),
}

/// A run under way.
struct Trainer<'a> {
    teacher: Scorer<'a>,
    inner: Option<Inner>,
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
        teacher: Option<Teacher<'a>>,
        student: &'a Trainee<R>,
        text: Text<'a>,
        config: &'a TrainConfig,
        folder: &'a RunFolder,
        progress: &mut dyn Progress,
    ) -> Result<Self, TrainError> {
        let mut windows = windows(text, student.decoder.spec().vocab, config)?;
        let mut recipe = config.recipe();
        let (name, teacher, inner) = scorer(teacher, student.decoder.spec(), config, progress)?;
        recipe.insert("teacher".into(), name);
        recipe.insert("compared".into(), inner.as_ref().map_or(String::new(), Inner::describe));
        recipe.extend(student.recipe.clone());
        recipe.insert("text".into(), text_fingerprint(text));

        let projections = inner.iter().flat_map(Inner::parameters);
        let parameters = student.parameters.iter().cloned().chain(projections).collect();
        let mut optimizer = AdamW::new(parameters, config.optimizer());

        let (step, position) = begin(config, folder, &recipe, &mut optimizer, progress)?;
        windows.seek(position);
        let metrics = (folder.processes.rank() == 0).then(|| Metrics::open(&folder.path, step)).transpose();
        let (metrics, seconds) =
            metrics.map_err(|source| TrainError::Metrics { folder: folder.path.clone(), source })?.unzip();
        Ok(Self {
            teacher,
            inner,
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
            let says_stop = progress.step(&report).is_break();
            let stop = self.over_all(f32::from(u8::from(says_stop))) > 0.0;
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

    /// The sum of `value` over all processes.
    fn over_all(&self, value: f32) -> f32 {
        let mut sum = [value];
        self.folder.processes.all_reduce(&mut sum);
        sum[0]
    }

    /// One optimizer step over `accumulate` batches, or this process's share of them.
    fn step(&mut self) -> Result<StepReport, TrainError> {
        let started = Instant::now();
        let TrainConfig { batch, accumulate, length, on_policy, seed, .. } = *self.config;
        let first = self.windows.position();
        let whole = self.windows.batch(batch * accumulate);
        let range = parallel::part(batch * accumulate, &*self.folder.processes);
        let (mut own, mut scored) = (whole.part(range.clone(), length), whole.scored);
        if on_policy > 0.0 {
            let policy = Policy { share: on_policy, seed, length };
            policy.rewrite(self.student, std::slice::from_mut(&mut own), first + range.start as u64)?;
            scored = self.over_all(own.scored as f32) as usize;
        }
        let mut total = LossParts { loss: 0.0, kl: 0.0, cross_entropy: 0.0, tokens: 0 };
        self.gradients.clear();
        for start in (0..range.len()).step_by(batch) {
            let part = own.part(start..range.len().min(start + batch), length);
            // Every scored token of the step weighs the same, however they fell into batches.
            let share = part.scored as f64 / scored as f64;
            let (loss, parts) = self.forward(&part, share)?;
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
    fn forward(&self, batch: &Batch, share: f64) -> Result<(Tensor, LossParts), TrainError> {
        let Batch { inputs, targets, starts, .. } = batch;
        let shape = (starts.len(), self.config.length);
        let objective = &self.config.objective;
        let fused = |hidden: &Tensor, target: Target<'_>| {
            loss::loss(hidden, &self.student.head()?, target, targets, objective, share)
        };
        let plain = || self.student.hidden(inputs, shape.0, shape.1);
        let (teacher, inner) = match (&self.teacher, &self.inner) {
            (Scorer::Text, _) => return Ok(fused(&plain()?, Target::Text)?),
            (Scorer::Cache(cache), _) => {
                let kept = Arc::new(cache.read(starts, targets)?);
                return Ok(fused(&plain()?, Target::Sparse(&kept))?);
            }
            (Scorer::Said(soft), _) => {
                let said = Arc::new(said::targets(soft, batch, self.config.length));
                return Ok(fused(&plain()?, Target::Sparse(&said))?);
            }
            (Scorer::Foreign(teacher, interpreter), _) if objective.universal => {
                let groups = interpreter.group(teacher, batch, self.config.length)?;
                return Ok(fused(&plain()?, Target::Universal(&groups))?);
            }
            (Scorer::Foreign(teacher, interpreter), _) => {
                let (length, temperature) = (self.config.length, objective.temperature);
                let translated = interpreter.translate(teacher, batch, length, temperature)?;
                return Ok(fused(&plain()?, Target::Sparse(&translated))?);
            }
            (Scorer::Model(teacher), None) => {
                let hidden = teacher.hidden(inputs, shape.0, shape.1)?;
                return Ok(fused(&plain()?, Target::Teacher(&hidden, &teacher.head()?))?);
            }
            (Scorer::Model(teacher), Some(inner)) => (teacher, inner),
        };
        let of_teacher = inner.of_teacher(teacher, inputs, shape)?;
        let of_student = inner.of_student(self.student, inputs, shape)?;
        let (loss, mut parts) = fused(&of_student.last, Target::Teacher(&of_teacher.last, &teacher.head()?))?;
        let (compared, value) = inner.loss(&of_student, &of_teacher, targets, share)?;
        parts.loss += value;
        Ok(((loss + compared)?, parts))
    }

    /// Stops a run whose numbers have left the range that training comes back from.
    ///
    /// A model that knows nothing has a cross-entropy of `ln(vocab)`; ten times that is far beyond
    /// what any start with sane weights shows.
    fn check(&self, parts: &LossParts, grad_norm: f64) -> Result<(), TrainError> {
        let limit = 10.0
            * (self.student.spec().vocab as f64).ln().max(1.0)
            * self.config.objective.temperature.powi(2).max(1.0)
            * self.config.objective.soft.total().max(1.0)
            + LARGEST_STATES * self.config.hidden.mse
            + 2.0 * self.config.hidden.cosine;
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

/// The name of a teacher in a checkpoint, what it says, and what is compared inside.
fn scorer<'a>(
    teacher: Option<Teacher<'a>>,
    student: &DecoderSpec,
    config: &TrainConfig,
    progress: &mut dyn Progress,
) -> Result<(String, Scorer<'a>, Option<Inner>), TrainError> {
    let nobody = |setting, found: String| {
        Err(TrainError::Setting { setting, found, expected: "none without a teacher" })
    };
    Ok(match teacher {
        None | Some(Teacher::Said(_)) if config.on_policy > 0.0 => {
            return nobody("share on policy", config.on_policy.to_string());
        }
        None | Some(Teacher::Said(_)) if config.hidden.any() => {
            return nobody("hidden-state term", config.hidden.to_string());
        }
        None => ("none".into(), Scorer::Text, None),
        Some(Teacher::Said(_)) if config.cache.is_some() || config.other_vocabulary() => {
            return nobody("a cache of the teacher, --align or uld", "asked for".into());
        }
        Some(Teacher::Said(soft)) => {
            // Of the tail only the sum is known, which no temperature can be applied to.
            if !soft.is_empty() && config.objective.temperature != 1.0 {
                let found = config.objective.temperature.to_string();
                let expected = "1 with probabilities that came with the text";
                return Err(TrainError::Setting { setting: "temperature", found, expected });
            }
            (format!("said {}", said::fingerprint(soft)), Scorer::Said(soft), None)
        }
        Some(Teacher::Foreign(model, interpreter)) => {
            let decoder = config.teacher_precision.decoder(model, progress)?;
            (format!("foreign {}", fingerprint(model)?), Scorer::Foreign(decoder.into(), interpreter), None)
        }
        Some(Teacher::Cache(cache)) => (cache.key().teacher.clone(), Scorer::Cache(cache), None),
        Some(Teacher::Model(model, kept)) => {
            let inner = Inner::new(&config.hidden, student, &model.spec, kept, config.seed)?;
            let decoder = config.teacher_precision.decoder(model, progress)?;
            (fingerprint(model)?, Scorer::Model(Box::new(decoder)), inner)
        }
    })
}

/// The windows of `text`, every token of which must be below `vocab`.
pub(super) fn windows<'a>(
    text: Text<'a>,
    vocab: usize,
    config: &TrainConfig,
) -> Result<Windows<'a>, TrainError> {
    if let Some(position) = text.ids.iter().position(|&token| token as usize >= vocab) {
        return Err(TrainError::Token { token: text.ids[position], position, vocab });
    }
    Windows::new(text.ids, text.scored, config.length, config.seed).ok_or_else(|| TrainError::TooLittleText {
        found: text.ids.len(),
        scored: text.scored.iter().filter(|&&scored| scored).count(),
        length: config.length,
    })
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
    Ok(pack::hex(&hash.finalize()))
}

pub(super) fn text_fingerprint(text: Text<'_>) -> String {
    let mut hash = Sha256::new();
    hash_words(&mut hash, text.ids.iter().copied());
    hash_words(&mut hash, text.scored.iter().map(|&scored| u32::from(scored)));
    pack::hex(&hash.finalize())
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
