//! What a training run is asked to do and where it keeps its state.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::checkpoint::Recipe;
use super::error::TrainError;
use super::loss::{HiddenTerms, Kind, Objective, Sparsity};
use super::optimizer::AdamWConfig;
use super::parallel::{Alone, Communicator};
use super::precision::Precision;
use super::schedule::Schedule;

/// What a run is asked to do. Everything here is part of the recipe that a checkpoint remembers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainConfig {
    /// Tokens to train on, in all; rounded up to whole steps.
    pub tokens: u64,
    /// Windows in one forward pass.
    pub batch: usize,
    /// Tokens of a window.
    pub length: usize,
    /// Forward passes whose gradients one optimizer step sums.
    pub accumulate: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Share of the steps over which the learning rate rises.
    pub warmup: f64,
    /// Learning rate at the end, as a share of `lr`.
    pub min_lr: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Weight decay acts on the embedding table too.
    pub decay_embeddings: bool,
    /// The embedding table is trained, and with it a head that is the same.
    pub embeddings: bool,
    /// Decay rates of AdamW's moments.
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub eps: f64,
    /// Largest norm of the gradient; longer ones are scaled down to it.
    pub clip: f64,
    /// Seed of the data order.
    pub seed: u64,
    /// What is minimised.
    pub objective: Objective,
    /// Terms between hidden states; they need the teacher itself.
    #[serde(default)]
    pub hidden: HiddenTerms,
    /// What is kept of the teacher's distributions, where it is asked once and not in every step.
    #[serde(default)]
    pub cache: Option<Sparsity>,
    /// The teacher has a vocabulary of its own: tokens are compared that spell the same.
    #[serde(default)]
    pub align: bool,
    /// Share of the windows that the student writes itself but for their beginning, 0 to 1.
    #[serde(default)]
    pub on_policy: f64,
    /// In what numbers a teacher that is a model is asked.
    #[serde(default)]
    pub teacher_precision: Precision,
}

impl Default for TrainConfig {
    /// Settings with which a half-depth student of a small teacher recovers well in a short run.
    fn default() -> Self {
        Self {
            tokens: 122_880,
            batch: 2,
            length: 256,
            accumulate: 1,
            lr: 4e-4,
            warmup: 0.1,
            min_lr: 0.05,
            weight_decay: 0.01,
            decay_embeddings: false,
            embeddings: true,
            betas: (0.9, 0.95),
            eps: 1e-8,
            clip: 1.0,
            seed: 0,
            objective: Objective::default(),
            hidden: HiddenTerms::default(),
            cache: None,
            align: false,
            on_policy: 0.0,
            teacher_precision: Precision::F32,
        }
    }
}

impl TrainConfig {
    /// Tokens of one optimizer step.
    pub fn tokens_per_step(&self) -> u64 {
        (self.batch * self.length * self.accumulate) as u64
    }

    /// Optimizer steps of the run.
    pub fn steps(&self) -> u64 {
        self.tokens.div_ceil(self.tokens_per_step().max(1))
    }

    /// The teacher may have any vocabulary.
    pub fn other_vocabulary(&self) -> bool {
        self.align || self.objective.universal
    }

    /// What the optimizer is asked.
    pub(super) fn optimizer(&self) -> AdamWConfig {
        AdamWConfig { betas: self.betas, eps: self.eps, weight_decay: self.weight_decay }
    }

    /// The learning rate over the run.
    pub(super) fn schedule(&self) -> Schedule {
        let steps = self.steps() as usize;
        let warmup = (self.warmup * steps as f64).ceil() as usize;
        Schedule { peak: self.lr, floor: self.lr * self.min_lr, warmup, steps }
    }

    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`TrainError::Setting`] names the first one.
    pub fn validate(&self) -> Result<(), TrainError> {
        const MOST: usize = 1 << 20;
        let Objective { alpha, temperature, beta, skew, .. } = self.objective;
        let unit = |x: f64| (0.0..=1.0).contains(&x);
        let decay = |x: f64| (0.0..1.0).contains(&x);
        let checks: [(&'static str, f64, bool, &'static str); 16] = [
            ("tokens", self.tokens as f64, self.tokens > 0, "at least 1"),
            ("batch", self.batch as f64, (1..=MOST).contains(&self.batch), "1 to 1048576"),
            ("length", self.length as f64, (1..=MOST).contains(&self.length), "1 to 1048576"),
            ("accumulate", self.accumulate as f64, (1..=MOST).contains(&self.accumulate), "1 to 1048576"),
            ("learning rate", self.lr, self.lr > 0.0 && self.lr.is_finite(), "a positive number"),
            ("warm-up", self.warmup, unit(self.warmup), "a share from 0 to 1"),
            ("lowest learning rate", self.min_lr, unit(self.min_lr), "a share from 0 to 1"),
            ("weight decay", self.weight_decay, unit(self.weight_decay), "0 to 1"),
            ("beta1", self.betas.0, decay(self.betas.0), "0 to below 1"),
            ("beta2", self.betas.1, decay(self.betas.1), "0 to below 1"),
            ("epsilon", self.eps, self.eps > 0.0 && self.eps < 1.0, "a small positive number"),
            ("clip", self.clip, self.clip > 0.0, "a positive number"),
            ("alpha", alpha, unit(alpha), "a share from 0 to 1"),
            ("beta", beta, unit(beta), "a share from 0 to 1"),
            ("share on policy", self.on_policy, unit(self.on_policy), "a share from 0 to 1"),
            ("skew", skew, decay(skew), "0 to below 1"),
        ];
        for (setting, found, good, expected) in checks {
            if !good {
                return Err(TrainError::Setting { setting, found: found.to_string(), expected });
            }
        }
        if !(temperature > 0.0 && temperature <= 100.0) {
            let found = temperature.to_string();
            return Err(TrainError::Setting {
                setting: "temperature",
                found,
                expected: "above 0, up to 100",
            });
        }
        self.validate_teacher()
    }

    /// Refuses what the teacher, or a cache of it, cannot give.
    fn validate_teacher(&self) -> Result<(), TrainError> {
        let refuse = |setting, found: String, expected| Err(TrainError::Setting { setting, found, expected });
        if !self.hidden.any() && !self.hidden.layers.is_empty() {
            let found = format!("{:?}", self.hidden.numbers());
            return refuse("layers with hidden-state terms", found, "none without such a term");
        }
        if self.on_policy > 0.0 && self.objective.alpha < 1.0 {
            let expected = "1 with text that the student writes, which is no example for it";
            return refuse("alpha", self.objective.alpha.to_string(), expected);
        }
        if self.align && self.objective.universal {
            return refuse(
                "loss",
                "uld".into(),
                "a divergence between tokens that are aligned, or uld alone",
            );
        }
        if self.other_vocabulary() && self.hidden.any() {
            let expected = "none with --align or uld, where positions differ";
            return refuse("hidden-state term", self.hidden.to_string(), expected);
        }
        match self.cache {
            Some(_) if self.other_vocabulary() => {
                let expected = "none with --align or uld, for which the teacher is asked in every step";
                refuse("the teacher's cache", "asked for".into(), expected)
            }
            Some(_) if self.on_policy > 0.0 => {
                let expected = "0 with a cache of the teacher, which has not seen what the student writes";
                refuse("share on policy", self.on_policy.to_string(), expected)
            }
            Some(_) if self.hidden.any() => {
                let expected = "none with a cache of the teacher, which has no hidden states";
                refuse("hidden-state term", self.hidden.to_string(), expected)
            }
            // Only there is the gradient linear in the teacher's probabilities.
            Some(Sparsity::Sampled(_))
                if self.objective.soft.terms().any(|(kind, _)| kind != Kind::Forward) =>
            {
                refuse(
                    "loss",
                    self.objective.soft.to_string(),
                    "fkl, for which draws are unbiased, or a top-k cache",
                )
            }
            _ => Ok(()),
        }
    }

    /// The settings by name, as a checkpoint remembers them.
    pub(super) fn recipe(&self) -> Recipe {
        let entries: [(&str, String); 26] = [
            ("tokens", self.tokens.to_string()),
            ("batch", self.batch.to_string()),
            ("length", self.length.to_string()),
            ("accumulate", self.accumulate.to_string()),
            ("lr", self.lr.to_string()),
            ("warmup", self.warmup.to_string()),
            ("min_lr", self.min_lr.to_string()),
            ("weight_decay", self.weight_decay.to_string()),
            ("decay_embeddings", self.decay_embeddings.to_string()),
            ("embeddings", self.embeddings.to_string()),
            ("beta1", self.betas.0.to_string()),
            ("beta2", self.betas.1.to_string()),
            ("eps", self.eps.to_string()),
            ("clip", self.clip.to_string()),
            ("seed", self.seed.to_string()),
            ("alpha", self.objective.alpha.to_string()),
            ("temperature", self.objective.temperature.to_string()),
            ("loss", self.objective.loss()),
            ("beta", self.objective.beta.to_string()),
            ("skew", self.objective.skew.to_string()),
            ("hidden", self.hidden.to_string()),
            ("hidden_layers", format!("{:?}", self.hidden.numbers())),
            ("align", self.align.to_string()),
            ("on_policy", self.on_policy.to_string()),
            ("teacher_precision", self.teacher_precision.to_string()),
            ("cache", self.cache.map_or("none".into(), |cache| cache.to_string())),
        ];
        entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

/// Where a run keeps its state, and how it is carried out: nothing here changes what comes out, but for rounding.
#[derive(Clone, Debug)]
pub struct RunFolder {
    /// The folder for the checkpoint and the metrics; training wants it to exist.
    pub path: PathBuf,
    /// Go on from the checkpoint in the folder, if there is one.
    pub resume: bool,
    /// Steps between checkpoints; with `None` only time counts.
    pub every_steps: Option<u64>,
    /// Time between checkpoints.
    pub every: Duration,
    /// The processes that train together; only the first one reads and writes here.
    pub processes: Rc<dyn Communicator>,
    /// Keep the inputs of blocks only and compute the rest again in the backward pass, to save memory.
    pub checkpoint_activations: bool,
}

impl RunFolder {
    /// A run of one process in `path` with a checkpoint every two minutes, after each `every_steps` steps if that
    /// is given, and at the end.
    pub fn new(path: &Path, resume: bool, every_steps: Option<u64>) -> Self {
        Self {
            path: path.into(),
            resume,
            every_steps,
            every: Duration::from_secs(120),
            processes: Rc::new(Alone),
            checkpoint_activations: false,
        }
    }
}
