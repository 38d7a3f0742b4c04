//! Cuts a token stream into training windows and says in which order they are seen.
//!
//! The order is a pure function of the seed and of how many windows were consumed, so that number is
//! all a checkpoint has to remember. Never reads a file and never tokenizes.

use std::collections::BTreeSet;
use std::ops::Range;

use super::loss::IGNORE;
use super::random::SplitMix64;

/// The windows of one token stream, shuffled anew for each epoch.
///
/// Window `i` predicts tokens `i * length + 1 ..= (i + 1) * length` from the token before each: windows
/// do not overlap and each scored token is a target once an epoch.
#[derive(Clone, Debug)]
pub struct Windows<'a> {
    ids: &'a [u32],
    scored: &'a [bool],
    length: usize,
    seed: u64,
    /// Windows with at least one scored target.
    useful: Vec<usize>,
    consumed: u64,
    epoch: u64,
    order: Vec<usize>,
}

/// Some windows, side by side.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Input tokens, `[windows * length]`.
    pub inputs: Vec<u32>,
    /// The token after each input, or [`IGNORE`], `[windows * length]`.
    pub targets: Vec<u32>,
    /// Targets that are not ignored.
    pub scored: usize,
    /// Where in the text each window begins.
    pub starts: Vec<usize>,
}

impl Batch {
    /// Some of the batch's windows, which are `length` long.
    pub fn part(&self, windows: Range<usize>, length: usize) -> Self {
        let range = windows.start * length..windows.end * length;
        let targets = self.targets[range.clone()].to_vec();
        let scored = targets.iter().filter(|&&target| target != IGNORE).count();
        let starts = self.starts[windows].to_vec();
        Self { inputs: self.inputs[range].to_vec(), targets, scored, starts }
    }
}

impl<'a> Windows<'a> {
    /// Windows of `length` inputs over `ids`; `scored[i]` says whether token `i` may be a target.
    ///
    /// `None` if `length` is 0, the two slices differ in length, or no window has a scored target
    /// (a stream needs at least `length + 1` tokens).
    pub fn new(ids: &'a [u32], scored: &'a [bool], length: usize, seed: u64) -> Option<Self> {
        if length == 0 || ids.len() != scored.len() {
            return None;
        }
        let whole = ids.len().saturating_sub(1) / length;
        let useful: Vec<usize> = (0..whole)
            .filter(|window| scored[window * length + 1..=(window + 1) * length].contains(&true))
            .collect();
        if useful.is_empty() {
            return None;
        }
        let mut windows =
            Self { ids, scored, length, seed, order: useful.clone(), useful, consumed: 0, epoch: 0 };
        windows.shuffle(0);
        Some(windows)
    }

    /// Windows in one epoch.
    pub fn per_epoch(&self) -> usize {
        self.useful.len()
    }

    /// Windows consumed so far.
    pub fn position(&self) -> u64 {
        self.consumed
    }

    /// Continues as if `consumed` windows had been taken.
    pub fn seek(&mut self, consumed: u64) {
        self.consumed = consumed;
        self.shuffle(consumed / self.useful.len() as u64);
    }

    /// The next `windows` windows; a batch may reach into the next epoch.
    pub fn batch(&mut self, windows: usize) -> Batch {
        let mut batch = Batch::default();
        for _ in 0..windows {
            let per_epoch = self.useful.len() as u64;
            if self.epoch != self.consumed / per_epoch {
                self.shuffle(self.consumed / per_epoch);
            }
            self.push(&mut batch, self.order[(self.consumed % per_epoch) as usize] * self.length);
            self.consumed += 1;
        }
        batch
    }

    /// Where the windows begin that the first `count` ones are, each once and in the order of the text.
    pub fn first(&self, count: u64) -> BTreeSet<usize> {
        let per_epoch = self.useful.len() as u64;
        let mut walk = Self { consumed: 0, ..self.clone() };
        walk.shuffle(0);
        let seen = if count < per_epoch { &walk.order[..count as usize] } else { &walk.order[..] };
        seen.iter().map(|window| window * self.length).collect()
    }

    /// The windows that begin at `starts`, without consuming any.
    pub fn at(&self, starts: &[usize]) -> Batch {
        let mut batch = Batch::default();
        starts.iter().for_each(|start| self.push(&mut batch, *start));
        batch
    }

    fn push(&self, batch: &mut Batch, start: usize) {
        batch.starts.push(start);
        batch.inputs.extend_from_slice(&self.ids[start..start + self.length]);
        for next in start + 1..=start + self.length {
            batch.targets.push(if self.scored[next] { self.ids[next] } else { IGNORE });
            batch.scored += usize::from(self.scored[next]);
        }
    }

    fn shuffle(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.order.copy_from_slice(&self.useful);
        SplitMix64::new(self.seed, epoch).shuffle(&mut self.order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> (Vec<u32>, Vec<bool>) {
        let ids: Vec<u32> = (0..103).collect();
        // Tokens 20..40 are not scored: windows 2 and 3 of length 10 predict 21..=40.
        let scored = (0..103).map(|i| !(20..40).contains(&i)).collect();
        (ids, scored)
    }

    #[test]
    fn an_epoch_predicts_every_scored_token_once() {
        let (ids, scored) = stream();
        let mut windows = Windows::new(&ids, &scored, 10, 1).unwrap();
        // Window 2 predicts 21..=30 (none scored), window 3 predicts 31..=40 (only token 40 scored).
        assert_eq!(windows.per_epoch(), 9);
        let batch = windows.batch(9);
        for (input, target) in batch.inputs.iter().zip(&batch.targets) {
            assert!(*target == IGNORE || *target == input + 1);
        }
        let mut seen: Vec<u32> = batch.targets.iter().copied().filter(|&t| t != IGNORE).collect();
        assert_eq!(seen.len(), batch.scored);
        seen.sort_unstable();
        let expected: Vec<u32> = (1..=100).filter(|t| !(20..40).contains(t)).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn seeking_equals_walking_and_epochs_differ() {
        let (ids, scored) = stream();
        let mut walked = Windows::new(&ids, &scored, 10, 5).unwrap();
        let first = walked.batch(9);
        let second = walked.batch(9);
        assert_ne!(first.inputs, second.inputs);
        for consumed in 0..18u64 {
            let mut a = Windows::new(&ids, &scored, 10, 5).unwrap();
            a.batch(consumed as usize);
            let mut b = Windows::new(&ids, &scored, 10, 5).unwrap();
            b.seek(consumed);
            assert_eq!(a.batch(4), b.batch(4));
            assert_eq!(b.position(), consumed + 4);
        }
    }

    #[test]
    fn windows_are_found_by_where_they_begin() {
        let (ids, scored) = stream();
        for count in [3, 9, 40] {
            let mut windows = Windows::new(&ids, &scored, 10, 5).unwrap();
            let first = windows.first(count);
            let batch = windows.batch(count as usize);
            assert_eq!(first, batch.starts.iter().copied().collect());
            assert_eq!(windows.at(&batch.starts), batch);
        }
    }

    #[test]
    fn a_batch_falls_into_parts() {
        let (ids, scored) = stream();
        let whole = Windows::new(&ids, &scored, 10, 5).unwrap().batch(5);
        let mut walked = Windows::new(&ids, &scored, 10, 5).unwrap();
        for windows in [0..2, 2..2, 2..5] {
            assert_eq!(whole.part(windows.clone(), 10), walked.batch(windows.len()));
        }
    }

    #[test]
    fn nothing_to_train_on() {
        let (ids, scored) = stream();
        assert!(Windows::new(&ids, &scored, 0, 0).is_none());
        assert!(Windows::new(&ids, &scored[1..], 10, 0).is_none());
        assert!(Windows::new(&ids[..10], &scored[..10], 10, 0).is_none());
        assert!(Windows::new(&ids, &[false; 103], 10, 0).is_none());
        assert!(Windows::new(&[], &[], 10, 0).is_none());
        assert_eq!(Windows::new(&ids[..11], &scored[..11], 10, 0).unwrap().per_epoch(), 1);
    }
}
