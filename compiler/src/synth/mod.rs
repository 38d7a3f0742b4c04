//! Training text from a teacher that only a server can run: any that speaks OpenAI's HTTP interface.
//!
//! [`prompts`] says what is asked, [`request`] what is sent, [`client`] sends it and tells answers, passing
//! faults and refusals apart, [`answer`] reads what came, [`rows`] keeps it, [`pace`] says when, and
//! [`run()`] holds them together. A row is written whole or not at all, each request once: a run that was
//! killed goes on where it was.
//!
//! Never writes or shows the key, never follows a redirect, and never judges an answer beyond whether there
//! is one.

mod answer;
mod client;
mod pace;
pub mod prompts;
mod request;
mod rows;
mod run;

pub use client::Key;
pub use request::{Endpoint, Sampling};
pub use run::run;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use prompts::Prompt;

/// What to ask, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Root of the interface, usually ending in `/v1`.
    pub url: String,
    /// Where the key came from, if there is one.
    pub key: Option<Key>,
    /// Chat or plain completions.
    pub endpoint: Endpoint,
    /// What is asked of the model beside the prompt.
    pub sampling: Sampling,
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// Answers to each prompt, at least 1.
    pub answers: usize,
    /// Rows that are enough.
    pub count: Option<usize>,
    /// Answers that the token limit cut are refused rather than kept as cut.
    pub drop_truncated: bool,
    /// Requests at the same time, at least 1.
    pub concurrency: usize,
    /// Requests a second, if limited; above 0.
    pub rate: Option<f64>,
    /// How often a request is sent again before it is given up.
    pub retries: u32,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Seed of the delays between tries.
    pub seed: u64,
    /// The file of rows.
    pub out: PathBuf,
    /// Go on with the rows in it.
    pub resume: bool,
}

/// How a run went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Rows of these requests that were in the file before.
    pub present: usize,
    /// Requests that the server was asked in this run, each counted once.
    pub asked: usize,
    /// Rows written in this run.
    pub written: usize,
    /// Of those, answers that the token limit cut.
    pub truncated: usize,
    /// Of those, rows with token probabilities.
    pub with_logprobs: usize,
    /// Requests sent again after a passing fault.
    pub retried: usize,
    /// Requests given up: refused by the server, or without a usable answer.
    pub refused: usize,
    /// Prompts that were the same as an earlier one.
    pub duplicate_prompts: usize,
    /// Answers that were the same as an earlier one to the same prompt.
    pub duplicate_answers: usize,
    /// Tokens of prompts, as the server counts them.
    pub prompt_tokens: u64,
    /// Tokens of answers, as the server counts them.
    pub completion_tokens: u64,
}

/// Who is told how the run goes.
pub trait Watch {
    /// `done` of `total` rows are there.
    fn progress(&mut self, done: usize, total: usize, message: &str);
    /// Something is worth a line.
    fn note(&mut self, message: &str);
}

/// Why a run ended early, or did not begin.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: line {line}: {message}", path.display())]
    Line { path: PathBuf, line: usize, message: String },
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("{0}")]
    Argument(String),
    #[error("{}: {}", path.display(), source)]
    Template { path: PathBuf, source: minijinja::Error },
    #[error("{message}; {rows} rows are in {}, --resume goes on", path.display())]
    Server { message: String, rows: usize, path: PathBuf },
}
