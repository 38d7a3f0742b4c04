//! Prefill and decode speed, with the fields of llama-bench's JSON and the latencies that a user feels.

use std::time::Instant;

use edge_runtime::session::{Limits, Plan, Session};
use edge_runtime::workers::Pool;
use serde::Serialize;

use super::{Engine, Error, NativeFile};

/// What to time.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Tokens in the prompt; 0 skips the prefill test.
    pub prompt: usize,
    /// Tokens to generate; 0 skips the decode test.
    pub generate: usize,
    /// Repetitions, after one that is not counted.
    pub repetitions: usize,
}

/// One test, as llama-bench reports it, and what it leaves out.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Version of this tool.
    pub build_commit: String,
    /// The processor, as the system names it.
    pub cpu_info: String,
    /// What ran the model.
    pub backend: String,
    /// Kernel table.
    pub kernels: String,
    /// The model's file.
    pub model_filename: String,
    /// Family and tensor type.
    pub model_type: String,
    /// Bytes of the model's file.
    pub model_size: u64,
    /// Parameters.
    pub model_n_params: u64,
    /// Tokens of one prefill chunk.
    pub n_batch: usize,
    /// Threads.
    pub n_threads: usize,
    /// Tokens in the prompt.
    pub n_prompt: usize,
    /// Tokens generated.
    pub n_gen: usize,
    /// Mean time of a repetition.
    pub avg_ns: u64,
    /// Its standard deviation.
    pub stddev_ns: u64,
    /// Mean speed in tokens per second.
    pub avg_ts: f64,
    /// Its standard deviation.
    pub stddev_ts: f64,
    /// Time of each repetition.
    pub samples_ns: Vec<u64>,
    /// Speed of each repetition.
    pub samples_ts: Vec<f64>,
    /// Bytes of the arena that the plan asked for.
    pub arena_bytes: usize,
    /// Median, 95th and 99th percentile of one step in milliseconds: the whole prompt (time to the
    /// first token) in a prefill test, the gap between tokens in a decode test.
    pub p50_ms: f64,
    /// See `p50_ms`.
    pub p95_ms: f64,
    /// See `p50_ms`.
    pub p99_ms: f64,
}

const BATCH: usize = 128;

/// Times prefill and decode of one model.
///
/// # Errors
/// The runtime refuses the file.
pub fn bench(file: &NativeFile, config: Config, engine: &Engine) -> Result<Vec<Row>, Error> {
    let refuse = |error| file.error(error);
    let gguf = file.gguf()?;
    let kernels = engine.kernels()?;
    let context = config.prompt.max(config.generate + 1).max(1);
    let limits = Limits { context, batch: BATCH, logits_rows: 1, workers: engine.threads };
    let plan = Plan::new(&gguf, limits).map_err(refuse)?;
    let mut arena = vec![0; plan.arena_bytes()];
    let pool = Pool::new(engine.threads);
    let mut session = Session::new(&gguf, &plan, kernels, &pool, &mut arena).map_err(refuse)?;
    let vocab = session.spec().vocab;
    let tokens: Vec<u32> = (0..context).map(|i| (i * 7919 % vocab) as u32).collect();

    let mut rows = Vec::new();
    let new_row = |n_prompt, n_gen, repetitions: &[u64], steps: &[u64]| {
        row(file, &plan, kernels.name, engine.threads, (n_prompt, n_gen), repetitions, steps)
    };
    if config.prompt > 0 {
        let mut samples = Vec::new();
        for repetition in 0..=config.repetitions {
            session.truncate(0);
            let start = Instant::now();
            session.feed(&tokens[..config.prompt]).map_err(refuse)?;
            if repetition > 0 {
                samples.push(nanoseconds(start));
            }
        }
        rows.push(new_row(config.prompt, 0, &samples, &samples)?);
    }
    if config.generate > 0 {
        let (mut samples, mut gaps) = (Vec::new(), Vec::new());
        for repetition in 0..=config.repetitions {
            session.truncate(0);
            session.feed(&tokens[..1]).map_err(refuse)?;
            let start = Instant::now();
            for token in &tokens[1..=config.generate] {
                let step = Instant::now();
                session.feed(&[*token]).map_err(refuse)?;
                if repetition > 0 {
                    gaps.push(nanoseconds(step));
                }
            }
            if repetition > 0 {
                samples.push(nanoseconds(start));
            }
        }
        rows.push(new_row(0, config.generate, &samples, &gaps)?);
    }
    Ok(rows)
}

fn nanoseconds(since: Instant) -> u64 {
    since.elapsed().as_nanos().max(1) as u64
}

fn row(
    file: &NativeFile,
    plan: &Plan,
    kernels: &str,
    threads: usize,
    (n_prompt, n_gen): (usize, usize),
    repetitions: &[u64],
    steps: &[u64],
) -> Result<Row, Error> {
    let tokens = (n_prompt + n_gen) as f64;
    let samples_ts: Vec<f64> = repetitions.iter().map(|&ns| tokens * 1e9 / ns as f64).collect();
    let times: Vec<f64> = repetitions.iter().map(|&ns| ns as f64).collect();
    let (avg_ns, stddev_ns) = mean_and_deviation(&times);
    let (avg_ts, stddev_ts) = mean_and_deviation(&samples_ts);
    let mut sorted = steps.to_vec();
    sorted.sort_unstable();
    let percentile = |share: f64| percentile(&sorted, share) as f64 / 1e6;
    Ok(Row {
        build_commit: env!("CARGO_PKG_VERSION").to_owned(),
        cpu_info: cpu_name(),
        backend: "native".to_owned(),
        kernels: kernels.to_owned(),
        model_filename: file.path().display().to_string(),
        model_type: model_type(file)?,
        model_size: file.bytes().len() as u64,
        model_n_params: plan.spec().parameters(),
        n_batch: BATCH,
        n_threads: threads,
        n_prompt,
        n_gen,
        avg_ns: avg_ns as u64,
        stddev_ns: stddev_ns as u64,
        avg_ts,
        stddev_ts,
        samples_ns: repetitions.to_vec(),
        samples_ts,
        arena_bytes: plan.arena_bytes(),
        p50_ms: percentile(0.50),
        p95_ms: percentile(0.95),
        p99_ms: percentile(0.99),
    })
}

/// The family and the type that holds most of the weights.
fn model_type(file: &NativeFile) -> Result<String, Error> {
    let gguf = file.gguf()?;
    let mut bytes = std::collections::BTreeMap::new();
    for tensor in gguf.tensors() {
        *bytes.entry(tensor.dtype.map_or("?", |dtype| dtype.name())).or_insert(0) += tensor.data.len();
    }
    let main = bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or("?", |(name, _)| name);
    let family = gguf.architecture().map_err(|error| file.error(error))?;
    Ok(format!("{family} {main}"))
}

/// Mean and sample standard deviation.
fn mean_and_deviation(samples: &[f64]) -> (f64, f64) {
    let count = samples.len() as f64;
    let mean = samples.iter().sum::<f64>() / count;
    if samples.len() < 2 {
        return (mean, 0.0);
    }
    let squares: f64 = samples.iter().map(|x| (x - mean) * (x - mean)).sum();
    (mean, (squares / (count - 1.0)).sqrt())
}

/// The smallest value that at least `share` of the sorted samples do not exceed.
fn percentile(sorted: &[u64], share: f64) -> u64 {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// The processor, as the system names it.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned()))
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics() {
        assert_eq!(mean_and_deviation(&[1.0, 2.0, 3.0]), (2.0, 1.0));
        assert_eq!(mean_and_deviation(&[5.0]), (5.0, 0.0));
        let sorted: Vec<u64> = (1..=100).collect();
        assert_eq!(percentile(&sorted, 0.5), 50);
        assert_eq!(percentile(&sorted, 0.95), 95);
        assert_eq!(percentile(&sorted[..1], 0.99), 1);
    }
}
