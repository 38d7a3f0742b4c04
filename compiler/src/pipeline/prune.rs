//! The student before its training: loaded, or cut from the teacher, at once or in steps with training between them.

use std::fs;

use serde::{Deserialize, Serialize};

use super::stages::{Run, Watch, describe};
use super::teaching::Inputs;
use super::{Error, StudentSource};
use crate::model::Model;
use crate::student::{self, Widths};
use crate::text::corpus::spread;
use crate::train::trainer::{self, Teacher, Text};
use crate::train::{RunFolder, TrainConfig, TrainError, parallel, trainee};
use crate::{export, teacher};

/// Tokens by which channels and heads are chosen, and to which what stays of them is fitted.
const NARROWING_TOKENS: usize = 16_384;

/// The choice of layers, as the run's folder keeps it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layers {
    kept: Vec<usize>,
    kl: f64,
}

/// A student cut from its teacher.
pub(super) struct Pruned {
    pub model: Model,
    /// The layers of the teacher that its layers come from; empty if it comes from elsewhere.
    pub kept: Vec<usize>,
}

impl Run<'_> {
    /// The student before any training: after the first step of pruning, if it has several.
    pub(super) fn student(&mut self, inputs: &Inputs) -> Result<Pruned, Error> {
        if let Some(given) = &inputs.given {
            let mut model = given.clone();
            if let Some(keep) = &inputs.kept_tokens {
                model = student::trim(&model, keep)?;
            }
            self.observer.note("student", &describe(&model));
            return Ok(Pruned { model, kept: vec![] });
        }
        let teacher = inputs.teacher()?;
        let whole = Pruned { model: teacher.clone(), kept: (0..teacher.spec.layers).collect() };
        self.prune(inputs, whole, 1)
    }

    /// Trains and prunes again until the student has the size that was asked for.
    pub(super) fn heal(
        &mut self,
        inputs: &Inputs,
        mut pruned: Pruned,
        folder: &RunFolder,
    ) -> Result<Pruned, Error> {
        if let StudentSource::Path(_) = &self.recipe.student {
            return Ok(pruned);
        }
        for step in 1..self.recipe.prune.steps {
            let path = self.path(&format!("prune-{step}"));
            let student = path.join("student");
            if student.exists() {
                // The folder appears whole or not at all. What a file says of a vocabulary is in the teacher.
                let vocabulary = pruned.model.vocabulary.take();
                pruned.model = Model { vocabulary, ..teacher::load(&student)? };
            } else {
                fs::create_dir_all(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
                self.observer.note("heal", &format!("step {step} of {}", self.recipe.prune.steps));
                let text = Text { ids: &inputs.train.ids, scored: &inputs.train.scored };
                // Other windows than those of the steps before.
                let seed = self.recipe.train.seed.wrapping_add(step as u64);
                // A cache is of one run's windows; it is for the last step.
                let config = TrainConfig { seed, cache: None, ..self.recipe.share() };
                let folder = RunFolder { path, ..folder.clone() };
                let trainee = trainee::full(pruned.model, &config)?;
                let teacher = Some(match self.learns_from_data(inputs) {
                    true => Teacher::Said(&inputs.train.soft),
                    false => Teacher::Model(inputs.teacher()?, &pruned.kept),
                });
                let mut watch = Watch { stage: "heal", observer: &mut *self.observer };
                pruned.model = trainer::train_from(teacher, trainee, text, &config, &folder, &mut watch)?;
                export::hf::write(&pruned.model, &student)?;
            }
            pruned = self.prune(inputs, pruned, step + 1)?;
        }
        Ok(pruned)
    }

    /// Prunes to the size of `step` on the way to the layers and widths that were asked for.
    fn prune(&mut self, inputs: &Inputs, mut pruned: Pruned, step: usize) -> Result<Pruned, Error> {
        let (spec, asked) = (&inputs.teacher()?.spec, &self.recipe.prune);
        let whole = Widths::of(spec);
        let between = |from: usize, to: usize| {
            // What does not fit a step comes first, while there is most to spare.
            to + from.saturating_sub(to) * (asked.steps - step) / asked.steps
        };
        let widths = Widths {
            ffn: between(whole.ffn, asked.ffn.unwrap_or(whole.ffn)),
            kv_heads: between(whole.kv_heads, asked.kv_heads.unwrap_or(whole.kv_heads)),
            hidden: between(whole.hidden, asked.hidden.unwrap_or(whole.hidden)),
        };
        let layers = match &self.recipe.student {
            StudentSource::Path(_) => spec.layers,
            StudentSource::Layers(layers) => *layers,
            StudentSource::Shrink(share) => student::shrink_to_layers(spec, *share)?,
        };
        let keep = between(spec.layers, layers);
        let chosen =
            if self.is_first() { Some(self.layers(inputs, &pruned.model, keep, step)?) } else { None };
        let chosen = parallel::from_first(self.processes, chosen).map_err(TrainError::from)?;
        pruned.model = student::cut(&pruned.model, &chosen.kept)?;
        pruned.kept = chosen.kept.iter().map(|&layer| pruned.kept[layer]).collect();
        let length = self.recipe.train.length;
        let calibration = |tokens| spread(&inputs.train.ids, tokens, length);
        let observer = &mut *self.observer;
        if widths != Widths::of(&pruned.model.spec) {
            pruned.model = student::narrow(
                &pruned.model,
                widths,
                &calibration(NARROWING_TOKENS),
                length,
                &mut |done, total| {
                    observer.progress("widths", done, total, "");
                },
            )?;
        }
        let mends = self.recipe.prune.mending_tokens > 0
            && pruned.kept.len() < spec.layers
            && widths.hidden == whole.hidden;
        if mends && spec.post_norms {
            observer.note("mend", "left out: norms stand behind the blocks of this family");
        } else if mends {
            pruned.model = student::mend(
                inputs.teacher()?,
                &pruned.model,
                &pruned.kept,
                &calibration(self.recipe.prune.mending_tokens),
                length,
                &mut |done, total| observer.progress("mend", done, total, ""),
            )?;
        }
        let kept: Vec<String> = pruned.kept.iter().map(ToString::to_string).collect();
        self.observer.note(
            "student",
            &format!(
                "{}, layers {} (KL {:.3} by the choice of layers)",
                describe(&pruned.model),
                kept.join(" "),
                chosen.kl
            ),
        );
        Ok(pruned)
    }

    /// The layers of `model` to keep, chosen or as chosen before.
    fn layers(&mut self, inputs: &Inputs, model: &Model, keep: usize, step: usize) -> Result<Layers, Error> {
        let name = match step {
            1 => "layers.json".to_owned(),
            _ => format!("prune-{}/layers.json", step - 1),
        };
        let path = self.path(&name);
        if let Ok(text) = fs::read(&path) {
            return serde_json::from_slice(&text)
                .map_err(|error| Error::Damaged { path, message: error.to_string() });
        }
        let length = self.recipe.train.length;
        let calibration = self.calibration(inputs, self.recipe.calibration);
        let observer = &mut *self.observer;
        let choice = student::choose_layers(model, keep, calibration, length, &mut |done, total, kl| {
            observer.progress("layers", done, total, &format!("KL {kl:.3}"));
        })?;
        let layers = Layers { kept: choice.kept, kl: choice.kl };
        self.write_json(&name, &layers)?;
        Ok(layers)
    }

    /// The first `tokens` of the text in whole windows, at least one: enough to choose layers by.
    fn calibration<'a>(&self, inputs: &'a Inputs, tokens: usize) -> &'a [u32] {
        let length = self.recipe.train.length;
        let wanted = (tokens / length).max(1) * length;
        let ids = &inputs.train.ids;
        &ids[..wanted.min(ids.len() / length * length)]
    }
}
