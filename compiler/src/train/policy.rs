//! Sequences that the student writes itself, for its teacher to score (Agarwal et al., "On-policy distillation
//! of language models", ICLR 2024).
//!
//! A share of the windows of each step keep their beginning; the rest is drawn from the student as it is in that
//! step, on the device's own runtime, and only what was drawn is learned. What is drawn is a function of the
//! weights, the seed and the window's number, so a resumed run draws the same and there is nothing to keep. No
//! gradient goes through the drawing, and the end of a text does not end a window: packed text goes on too.

use std::path::Path;

use edge_run::{Engine, ModelFile, Settings};
use edge_runtime::session::{Sampler, SamplerConfig};

use super::error::TrainError;
use super::graph::Decoder;
use super::loss::IGNORE;
use super::random::SplitMix64;
use super::windows::Batch;
use crate::export::gguf::{Mix, export_to_vec};
use crate::model::Model;
use crate::profile;

/// What errors call the student's file in memory.
const NAME: &str = "(student in training)";

/// Which windows are drawn.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    /// Share of the windows, 0 to 1.
    pub share: f64,
    /// Seed of the choice and of the draws.
    pub seed: u64,
    /// Inputs of a window.
    pub length: usize,
}

impl Policy {
    /// Rewrites the windows of a step whose turn it is; the first one has the number `first` in the run.
    ///
    /// # Errors
    /// The student cannot be laid out for the runtime, or its logits are no numbers.
    pub fn rewrite(&self, student: &Decoder, batches: &mut [Batch], first: u64) -> Result<(), TrainError> {
        let mut number = first;
        let mut chosen = Vec::new();
        for (batch, starts) in batches.iter().map(|batch| batch.starts.len()).enumerate() {
            for window in 0..starts {
                let mut random = SplitMix64::new(self.seed ^ 0x706f_6c69_6379, number);
                number += 1;
                if random.unit() <= self.share {
                    chosen.push((batch, window, random));
                }
            }
        }
        if chosen.is_empty() {
            return Ok(());
        }
        let file = lay_out(student)?;
        let settings = Settings { batch: self.length.min(64), ..Settings::new(self.length + 1) };
        let mut engine = Engine::new(&file, settings).map_err(profile::Error::from)?;
        for (batch, window, mut random) in chosen {
            let batch = &mut batches[batch];
            let at = window * self.length..(window + 1) * self.length;
            // Prompts of an eighth to a half of the window.
            let shortest = (self.length / 8).max(1);
            let prompt = shortest + random.below((self.length / 2).saturating_sub(shortest) + 1);
            let text = &batch.inputs[at.start..][..prompt.min(self.length)];
            let written = self.write(&mut engine, &file, text, random.next_u64())?;
            batch.inputs[at.clone()].copy_from_slice(&written[..self.length]);
            for (index, target) in batch.targets[at].iter_mut().enumerate() {
                *target = if index + 1 < prompt { IGNORE } else { written[index + 1] };
            }
        }
        for batch in batches {
            batch.scored = batch.targets.iter().filter(|target| **target != IGNORE).count();
        }
        Ok(())
    }

    /// `prompt` and what the student goes on with, one token more than a window.
    fn write(
        &self,
        engine: &mut Engine,
        file: &ModelFile,
        prompt: &[u32],
        seed: u64,
    ) -> Result<Vec<u32>, TrainError> {
        let mut written = prompt.to_vec();
        let mut session = engine.session(file).map_err(profile::Error::from)?;
        let mut draw = || -> Result<(), edge_runtime::Error> {
            // Unchanged probabilities: the policy is the student.
            let mut sampler =
                Sampler::new(SamplerConfig { temperature: 1.0, seed, ..SamplerConfig::default() })?;
            let vocab = session.spec().vocab;
            let (mut logits, mut scratch) = (vec![0.0; vocab], vec![0; vocab]);
            session.feed(prompt)?;
            while written.len() <= self.length {
                logits.copy_from_slice(session.logits());
                let token = sampler.sample(&mut logits, &[], &mut scratch)?;
                written.push(token);
                if written.len() <= self.length {
                    session.feed(&[token])?;
                }
            }
            Ok(())
        };
        draw().map_err(|error| profile::Error::from(file.refused(error)))?;
        Ok(written)
    }
}

/// The student as the runtime reads it: 8-bit blocks, which say nearly the same and are the quickest to make and
/// to run; half precision where rows are no whole blocks.
fn lay_out(student: &Decoder) -> Result<ModelFile, TrainError> {
    let spec = *student.spec();
    let model = Model { spec, weights: student.weights()?, vocabulary: None, name: "student".into() };
    let whole = [spec.hidden, spec.ffn, spec.heads * spec.head_dim].iter().all(|row| row.is_multiple_of(32));
    let mix = if whole { Mix::Q8_0 } else { Mix::F16 };
    let bytes =
        export_to_vec(&model, mix).map_err(|source| profile::Error::Export { path: NAME.into(), source })?;
    Ok(ModelFile::from_memory(Path::new(NAME), bytes))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{text, tiny};
    use super::super::windows::Windows;
    use super::*;

    const LENGTH: usize = 16;

    fn rewritten(share: f64, first: u64) -> (Batch, Batch) {
        let model = tiny(2, 1);
        let student = Decoder::new(&model.spec, &model.weights).unwrap();
        let ids = text(400);
        let scored = vec![true; ids.len()];
        let mut windows = Windows::new(&ids, &scored, LENGTH, 1).unwrap();
        let batch = windows.batch(20);
        let mut batches = [batch.clone()];
        let policy = Policy { share, seed: 5, length: LENGTH };
        policy.rewrite(&student, &mut batches, first).unwrap();
        let [after] = batches;
        (batch, after)
    }

    #[test]
    fn a_share_of_the_windows_is_written_by_the_student() {
        let (before, after) = rewritten(0.5, 0);
        let mut changed = 0;
        for window in 0..20 {
            let at = window * LENGTH..(window + 1) * LENGTH;
            let (inputs, targets) = (&after.inputs[at.clone()], &after.targets[at.clone()]);
            if targets == &before.targets[at.clone()] {
                assert_eq!(inputs, &before.inputs[at]);
                continue;
            }
            changed += 1;
            let prompt = 1 + targets.iter().take_while(|target| **target == IGNORE).count();
            assert!((LENGTH / 8..=LENGTH / 2).contains(&prompt), "{prompt}");
            assert_eq!(inputs[..prompt], before.inputs[at.clone()][..prompt]);
            assert_ne!(inputs[prompt..], before.inputs[at][prompt..]);
            // Each target is the token after its input.
            assert_eq!(targets[prompt - 1..LENGTH - 1], inputs[prompt..]);
            assert!(targets[LENGTH - 1] < 61);
        }
        assert!((5..=15).contains(&changed), "{changed} of 20");
        assert_eq!(after.scored, after.targets.iter().filter(|target| **target != IGNORE).count());
        assert_eq!(rewritten(0.0, 0).1, before);
    }

    #[test]
    fn the_same_step_draws_the_same_and_another_one_does_not() {
        let (_, first) = rewritten(1.0, 40);
        assert_eq!(rewritten(1.0, 40).1, first);
        assert_ne!(rewritten(1.0, 60).1.inputs, first.inputs);
    }

    /// What is drawn follows the student's own distribution: on average it is as likely under it as its entropy
    /// says.
    #[test]
    fn draws_are_the_students() {
        let (_, batch) = rewritten(1.0, 0);
        let model = tiny(2, 1);
        let student = Decoder::new(&model.spec, &model.weights).unwrap();
        let logits = student.logits(&batch.inputs, 20, LENGTH).unwrap().to_vec2::<f32>().unwrap();
        let (mut surprise, mut entropy, mut variance) = (0.0, 0.0, 0.0);
        for (row, target) in logits.iter().zip(&batch.targets).filter(|(_, target)| **target != IGNORE) {
            let sum = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
            let surprises = row.iter().map(|x| sum - f64::from(*x));
            let of_row: f64 = surprises.clone().map(|s| (-s).exp() * s).sum();
            surprise += sum - f64::from(row[*target as usize]);
            entropy += of_row;
            variance += surprises.map(|s| (-s).exp() * (s - of_row).powi(2)).sum::<f64>();
        }
        assert!((surprise - entropy).abs() < 4.0 * variance.sqrt(), "{surprise} {entropy} {variance}");
        assert!(variance > 1.0, "the student is sure of everything");
    }
}
