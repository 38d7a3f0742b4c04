//! Where a run begins: at its first step or at its checkpoint, and in all its processes alike.

use super::checkpoint::{self, Header, Recipe};
use super::config::{RunFolder, TrainConfig};
use super::error::TrainError;
use super::optimizer::AdamW;
use super::parallel::{self, Communicator};
use super::trainer::Progress;

/// Puts every process where the run begins or goes on: steps and windows done, and the first one's state in
/// `optimizer` and its parameters.
pub(super) fn begin(
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
