//! `report.html`: student beside teacher, in one file that opens without a network.

mod curves;

use std::io;
use std::path::{Path, PathBuf};

use edge_run::Percentiles;
use minijinja::{Environment, context};
use serde::Serialize;

use crate::atomic;
use crate::model::Model;
use crate::pipeline::Recipe;
use crate::profile::bench::Test;
use crate::profile::eval::Outcome;
use crate::train::metrics;

/// Why the report could not be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("report template: {0}")]
    Template(#[from] minijinja::Error),
}

/// Everything that a run measured.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Name of the teacher.
    pub title: String,
    /// Name of the target.
    pub target: String,
    /// The teacher, as given; the student before its training where there is none of its vocabulary.
    pub teacher: ModelRow,
    /// The trained weights, before quantization.
    pub trained: ModelRow,
    /// What is shipped.
    pub student: ModelRow,
    /// Bytes of the device library.
    pub library_bytes: u64,
    /// Processor on which latency was measured.
    pub cpu: String,
}

/// One model's size, quality and speed.
#[derive(Clone, Debug, Serialize)]
pub struct ModelRow {
    /// What the reader calls it.
    pub name: String,
    /// Transformer blocks.
    pub layers: usize,
    /// Parameters.
    pub parameters: u64,
    /// Bytes of the file that the runtime reads.
    pub file_bytes: u64,
    /// Bytes of the arena in the latency test.
    pub arena_bytes: u64,
    /// Perplexity, KL and agreement on the text to judge on.
    pub quality: Outcome,
    /// Prompt tokens of the prefill test.
    pub prompt: usize,
    /// Prompt tokens per second.
    pub prefill_ts: f64,
    /// Time to the first token, median and 95th percentile, in milliseconds.
    pub first_token_ms: [f64; 2],
    /// Generated tokens per second.
    pub decode_ts: f64,
    /// Time between tokens, median and 95th percentile, in milliseconds.
    pub next_token_ms: [f64; 2],
}

impl ModelRow {
    /// A row from a model, its quality, and the two tests of a bench.
    pub fn new(name: &str, model: &Model, file_bytes: u64, quality: Outcome, tests: &[Test]) -> Self {
        let prefill = tests.iter().find(|test| test.n_prompt > 0);
        let decode = tests.iter().find(|test| test.n_gen > 0);
        let speed = |test: Option<&Test>| test.map_or(f64::NAN, |test| test.avg_ts);
        let latency = |times: Option<Percentiles>| {
            times.map_or([f64::NAN; 2], |times| [times.p50_ns, times.p95_ns].map(|ns| ns as f64 / 1e6))
        };
        Self {
            name: name.to_owned(),
            layers: model.spec.layers,
            parameters: model.spec.parameters(),
            file_bytes,
            arena_bytes: tests.iter().map(|test| test.arena_bytes).max().unwrap_or(0),
            quality,
            prompt: prefill.map_or(0, |test| test.n_prompt),
            prefill_ts: speed(prefill),
            first_token_ms: latency(prefill.and_then(|test| test.ttft)),
            decode_ts: speed(decode),
            next_token_ms: latency(decode.and_then(|test| test.inter_token)),
        }
    }
}

/// A line of the table: a label and one cell for each model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// What is measured, with its unit.
    pub label: String,
    /// Teacher, trained weights, shipped student.
    pub cells: [String; 3],
}

impl Summary {
    /// The columns of the table.
    pub fn models(&self) -> [&ModelRow; 3] {
        [&self.teacher, &self.trained, &self.student]
    }

    /// The lines of the table, the same on the terminal and in the page.
    pub fn lines(&self) -> Vec<Line> {
        let line = |label: &str, cell: &dyn Fn(&ModelRow) -> String| Line {
            label: label.to_owned(),
            cells: self.models().map(cell),
        };
        let mib = |bytes: u64| format!("{:.2}", bytes as f64 / 1_048_576.0);
        let optional = |value: Option<f64>, scale: f64, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{:.digits$}", value * scale))
        };
        let beside = &self.teacher.name;
        vec![
            line("parameters (M)", &|m| format!("{:.2}", m.parameters as f64 / 1e6)),
            line("layers", &|m| m.layers.to_string()),
            line("file (MiB)", &|m| mib(m.file_bytes)),
            line("arena (MiB)", &|m| mib(m.arena_bytes)),
            line("perplexity", &|m| format!("{:.2}", m.quality.ppl)),
            line(&format!("KL from {beside} (nats/token)"), &|m| optional(m.quality.kl, 1.0, 3)),
            line(&format!("agreement with {beside} (%)"), &|m| optional(m.quality.top1_agreement, 100.0, 1)),
            line(&format!("prefill {} (tok/s)", self.teacher.prompt), &|m| format!("{:.0}", m.prefill_ts)),
            line("first token p50 (ms)", &|m| format!("{:.2}", m.first_token_ms[0])),
            line("first token p95 (ms)", &|m| format!("{:.2}", m.first_token_ms[1])),
            line("decode (tok/s)", &|m| format!("{:.0}", m.decode_ts)),
            line("next token p50 (ms)", &|m| format!("{:.2}", m.next_token_ms[0])),
            line("next token p95 (ms)", &|m| format!("{:.2}", m.next_token_ms[1])),
        ]
    }
}

/// Writes the page for the run in `folder`.
///
/// # Errors
/// The folder cannot be written, or the metrics of the run cannot be read.
pub fn write(
    path: &Path,
    folder: &Path,
    recipe: &Recipe,
    kept_layers: &[usize],
    summary: &Summary,
) -> Result<(), Error> {
    let rows = metrics::read(folder).map_err(|source| Error::Io { path: folder.into(), source })?;
    let seen: Vec<u64> = rows.iter().map(|row| row.tokens).collect();
    let column = |value: fn(&metrics::Row) -> f64| -> Vec<f64> { rows.iter().map(value).collect() };
    let curve = |label: &str, value| curves::curve(label, &seen, &column(value));
    let mut environment = Environment::new();
    environment.add_template("report.html", include_str!("report.html"))?;
    let page = environment.get_template("report.html")?.render(context! {
        summary,
        lines => summary.lines(),
        models => summary.models().map(|model| model.name.clone()),
        recipe,
        soft => recipe.train.objective.loss(),
        kept_layers,
        library_kib => format!("{:.1}", summary.library_bytes as f64 / 1024.0),
        tokens => rows.last().map_or(0, |row| row.tokens),
        speed => format!("{:.0}", curves::mean(&column(|row| row.tok_s))),
        loss => curve("loss", |row| row.loss),
        kl => curve("nats per token", |row| row.kl),
        cross_entropy => curve("nats per token", |row| row.ce),
        learning_rate => curve("learning rate", |row| row.lr),
        grad_norm => curve("norm", |row| row.grad_norm),
        tokens_per_second => curve("tokens per second", |row| row.tok_s),
        version => env!("CARGO_PKG_VERSION"),
    })?;
    let page = page.as_bytes();
    atomic::write(path, |file| file.write_all(page))
        .map_err(|source| Error::Io { path: path.into(), source })?;
    Ok(())
}
