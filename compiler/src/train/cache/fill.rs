//! The teacher's one pass over the text.

use std::ops::ControlFlow;

use super::{Cache, FILE, Key};
use crate::model::Model;
use crate::train::config::{RunFolder, TrainConfig};
use crate::train::error::TrainError;
use crate::train::loss::{SparseTargets, Sparsity};
use crate::train::trainer::{Progress, Text, text_fingerprint, windows};

/// Windows between two waits for the disk.
const SYNC: usize = 64;

/// The cache in `folder` with everything that a run of `config` on `text` will ask of `teacher`; `None` if it
/// is to be asked itself. What is there already is kept.
///
/// # Errors
/// See [`TrainError`].
pub fn fill(
    teacher: &Model,
    text: Text<'_>,
    config: &TrainConfig,
    folder: &RunFolder,
    progress: &mut dyn Progress,
) -> Result<Option<Cache>, TrainError> {
    let Some(sparsity) = config.cache else { return Ok(None) };
    config.validate()?;
    if folder.processes.size() > 1 {
        return Err(TrainError::Setting {
            setting: "the number of processes",
            found: folder.processes.size().to_string(),
            expected: "1 with a cache of the teacher, which one process writes",
        });
    }
    let vocab = teacher.spec.vocab;
    if matches!(sparsity, Sparsity::TopK(k) if k > vocab) {
        return Err(TrainError::Setting {
            setting: "top-k of the teacher's cache",
            found: sparsity.tokens().to_string(),
            expected: "at most the vocabulary",
        });
    }
    let windows = windows(text, vocab, config)?;
    let key = Key {
        sparsity,
        vocab,
        length: config.length,
        temperature: config.objective.temperature,
        seed: config.seed,
        teacher: config.teacher_precision.fingerprint(teacher)?,
        text: text_fingerprint(text),
    };
    let mut cache = Cache::open(&folder.path.join(FILE), key)?;
    let needed = windows.first(config.steps() * (config.batch * config.accumulate) as u64);
    let missing: Vec<usize> = needed.iter().copied().filter(|start| !cache.has(*start as u64)).collect();
    if missing.len() < needed.len() {
        progress.note(&format!(
            "{} of {} windows of the teacher were in the cache",
            needed.len() - missing.len(),
            needed.len()
        ));
    }
    let decoder = config.teacher_precision.decoder(teacher, progress)?;
    let head = decoder.head()?;
    let mut done = 0;
    for starts in missing.chunks(config.batch) {
        let batch = windows.at(starts);
        let hidden = decoder.hidden(&batch.inputs, starts.len(), config.length)?;
        for (index, start) in starts.iter().enumerate() {
            let hidden = hidden.narrow(0, index * config.length, config.length)?;
            let targets = &batch.targets[index * config.length..][..config.length];
            let Key { temperature, seed, .. } = *cache.key();
            let kept =
                SparseTargets::of(&hidden, &head, sparsity, temperature, seed, *start as u64, targets)?;
            cache.append(*start as u64, &kept.rows)?;
            done += 1;
            if done % SYNC == 0 {
                cache.sync()?;
            }
        }
        if progress.cached(done, missing.len()) == ControlFlow::Break(()) {
            return Err(TrainError::Stopped { step: 0 });
        }
    }
    cache.sync()?;
    Ok(Some(cache))
}
