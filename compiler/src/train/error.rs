//! Why training stops before its end.

use std::io;
use std::path::PathBuf;

use super::cache::CacheError;
use super::checkpoint::CheckpointError;
use crate::student::StudentError;

/// Why a training run stopped before its end.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The graph refused, which a well-formed model never makes it do.
    #[error("training graph: {0}")]
    Graph(#[from] candle_core::Error),
    /// A setting makes no sense.
    #[error("{setting} is {found}, expected {expected}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What was asked for.
        found: String,
        /// What makes sense.
        expected: &'static str,
    },
    /// The text is too short.
    #[error(
        "{found} tokens of text with {scored} to be learned, expected at least one window of {length} + 1"
    )]
    TooLittleText {
        /// Tokens of text.
        found: usize,
        /// Tokens that may be targets.
        scored: usize,
        /// Length of a window.
        length: usize,
    },
    /// A token of the text is not in the model's vocabulary.
    #[error("token {token} at position {position} of the text, expected less than {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Its position.
        position: usize,
        /// Tokens of the model.
        vocab: usize,
    },
    /// A step has less to share than there are processes.
    #[error(
        "a step has {windows} windows (batch x accumulate), expected at least one for each of {processes} processes"
    )]
    TooFewWindows {
        /// Windows of a step.
        windows: usize,
        /// Processes of the run.
        processes: usize,
    },
    /// This process was not asked for what the first one was asked for.
    #[error("process {rank} does not train the same as process 0: {differences}")]
    OtherProcess {
        /// This process.
        rank: usize,
        /// What differs: in the first process, then here.
        differences: String,
    },
    /// What the first process says cannot be read.
    #[error("what process 0 says cannot be read: {0}")]
    Told(#[from] serde_json::Error),
    /// The student does not fit its teacher.
    #[error(transparent)]
    Student(#[from] StudentError),
    /// The loss does not reach a parameter.
    #[error("no gradient reaches `{name}`, expected every parameter to be trained")]
    NoGradient {
        /// The parameter.
        name: String,
    },
    /// The loss or the gradient left the numbers that training can come back from.
    #[error(
        "training diverged in step {step}: {what} is {value}; the last checkpoint is from step {checkpoint} \
         (a lower learning rate may help)"
    )]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// What went wrong.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Step of the last checkpoint, 0 if there is none.
        checkpoint: u64,
    },
    /// The caller stopped the run; its checkpoint is on the disk.
    #[error("stopped after step {step}; resume to go on from there")]
    Stopped {
        /// Steps done.
        step: u64,
    },
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The student could not write text on the runtime.
    #[error("on-policy text: {0}")]
    Policy(Box<crate::profile::Error>),
    /// The teacher's cache could not be written or read.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A teacher of another vocabulary and its student have nothing to be compared by.
    #[error("teacher and student have different vocabularies: {0}")]
    Vocabularies(String),
    /// A tokenizer refused.
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
    /// A metrics file could not be written.
    #[error("metrics in {}: {source}", folder.display())]
    Metrics {
        /// The run's folder.
        folder: PathBuf,
        /// What the file system answered.
        source: io::Error,
    },
}

impl From<crate::profile::Error> for TrainError {
    fn from(error: crate::profile::Error) -> Self {
        Self::Policy(Box::new(error))
    }
}
