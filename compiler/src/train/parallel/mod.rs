//! Training in several processes at once, data-parallel.
//!
//! Every process holds all parameters and the whole optimizer, takes its share of the windows of each step, and
//! adds up the gradients with the others. Because every scored token weighs the same wherever it is, the sum is
//! the gradient of the whole step, and because the sums have the same bits everywhere, so have the parameters.
//! The first process alone reads and writes the run's folder. How bytes travel is a [`Communicator`]'s business.

#[cfg(feature = "mpi")]
mod mpi;
#[cfg(test)]
mod threads;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(test)]
pub(crate) use threads::Threads;

use std::fmt::Debug;
use std::ops::Range;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ops::with_values_mut;
use super::optimizer::AdamW;

/// The processes of a run. All of them make the same calls in the same order.
///
/// There are no errors: a process that cannot reach another has no run to go on with, and ends.
pub trait Communicator: Debug {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;
    /// How many there are.
    fn size(&self) -> usize;
    /// The number of this process among those of its machine, from 0.
    fn local_rank(&self) -> usize;
    /// Replaces `values` by their sums over all processes, which have the same bits in each of them.
    fn all_reduce(&self, values: &mut [f32]);
    /// Replaces `values` by those of the first process.
    fn broadcast(&self, values: &mut [f32]);
    /// Replaces `bytes`, of any length, by those of the first process.
    fn broadcast_bytes(&self, bytes: &mut Vec<u8>);
    /// Ends all processes over an error of this one, which has been told.
    fn abort(&self);
}

/// One process by itself.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        1
    }
    fn local_rank(&self) -> usize {
        0
    }
    fn all_reduce(&self, _: &mut [f32]) {}
    fn broadcast(&self, _: &mut [f32]) {}
    fn broadcast_bytes(&self, _: &mut Vec<u8>) {}
    fn abort(&self) {}
}

/// What the first process has made, in all of them; the value that another one gives is not looked at.
///
/// # Errors
/// The first process is another program, whose value cannot be read.
pub fn from_first<T: Serialize + DeserializeOwned>(
    processes: &dyn Communicator,
    value: Option<T>,
) -> serde_json::Result<T> {
    let mut bytes = serde_json::to_vec(&value)?;
    processes.broadcast_bytes(&mut bytes);
    serde_json::from_slice::<Option<T>>(&bytes)?.ok_or_else(|| serde::de::Error::custom("no value"))
}

/// Gives every process the parameters and moments of the first.
///
/// # Errors
/// A parameter is not a contiguous f32 tensor on the CPU.
pub(super) fn broadcast_state(
    processes: &dyn Communicator,
    optimizer: &mut AdamW,
) -> candle_core::Result<()> {
    for index in 0..optimizer.parameters().len() {
        with_values_mut(&optimizer.parameters()[index].var, |values| processes.broadcast(values))?;
        let moments = &mut optimizer.moments_mut()[index];
        processes.broadcast(&mut moments.first);
        processes.broadcast(&mut moments.second);
    }
    Ok(())
}

/// Which of `windows` windows a process takes: as many as every other, or one more.
pub(super) fn part(windows: usize, processes: &dyn Communicator) -> Range<usize> {
    let (rank, size) = (processes.rank(), processes.size());
    windows * rank / size..windows * (rank + 1) / size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_step() {
        for size in 1..5 {
            let ends: Vec<_> = Threads::group(size).iter().map(|process| part(7, process)).collect();
            assert_eq!((ends[0].start, ends[size - 1].end), (0, 7));
            assert!(ends.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(ends.iter().all(|part| part.len() == 7 / size || part.len() == 7 / size + 1));
        }
    }

    #[test]
    fn the_first_process_tells_the_others() {
        let told: Vec<Vec<usize>> = Threads::run(3, |process| {
            from_first(&*process, (process.rank() == 0).then(|| vec![7, 9])).unwrap()
        });
        assert_eq!(told, vec![vec![7, 9]; 3]);
        let sums = Threads::run(3, |process| {
            let mut values = [process.rank() as f32, 1.0];
            process.all_reduce(&mut values);
            values
        });
        assert_eq!(sums, [[3.0, 3.0]; 3]);
    }
}
