//! Times prompts and single tokens, with llama-bench's fields and what it leaves out.
//!
//! Two tests: a prompt of `n_prompt` tokens from an empty context, and `n_gen` tokens one after the
//! other from an empty context. One run of each to warm up is not counted.

use std::time::Instant;

use edge_runtime::session::{CacheType, Session, argmax};
use serde::Serialize;

use crate::engine::{Adapter, Engine, Error, ModelFile, Settings, describe};
use crate::statistics::{Percentiles, Statistics};

/// What is timed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens of the prompt; 0 leaves the test out.
    pub n_prompt: usize,
    /// Tokens that follow one another; 0 leaves the test out.
    pub n_gen: usize,
    /// Prompt tokens computed together.
    pub n_batch: usize,
    /// Threads.
    pub threads: usize,
    /// Counted runs of each test.
    pub repetitions: usize,
    /// Name of the kernels; `None` for the fastest.
    pub kernels: Option<String>,
    /// Adapters at work meanwhile.
    pub adapters: Vec<Adapter>,
    /// How keys and values are kept.
    pub cache: CacheType,
}

impl Default for Options {
    fn default() -> Self {
        let Settings { threads, kernels, adapters, cache, .. } = Settings::new(0);
        Self { n_prompt: 512, n_gen: 128, n_batch: 512, threads, repetitions: 5, kernels, adapters, cache }
    }
}

/// One test; the names are llama-bench's as far as it has them.
#[derive(Clone, Debug, Serialize)]
pub struct Test {
    /// Version of this program.
    pub build_commit: &'static str,
    /// The same as a number: a hundred for each minor version, ten thousand for each major one.
    pub build_number: u32,
    /// What computes: the CPU.
    pub backends: &'static str,
    /// Name of the processor.
    pub cpu_info: String,
    /// The file.
    pub model_filename: String,
    /// Family, size and prevailing tensor type.
    pub model_type: String,
    /// Bytes of all tensors.
    pub model_size: u64,
    /// Number of parameters.
    pub model_n_params: u64,
    /// Prompt tokens computed together.
    pub n_batch: usize,
    /// The same: a batch is not divided further.
    pub n_ubatch: usize,
    /// Threads.
    pub n_threads: usize,
    /// Type of the keys in the cache.
    pub type_k: &'static str,
    /// Type of the values in the cache.
    pub type_v: &'static str,
    /// Kernels in use.
    pub kernels: &'static str,
    /// Bytes of the arena.
    pub arena_bytes: u64,
    /// The part of it that is the KV cache.
    pub kv_bytes: u64,
    /// Memory of the process after the test; `None` where the system does not tell.
    #[serde(flatten)]
    pub memory: Memory,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Tokens that followed one another.
    pub n_gen: usize,
    /// Tokens in the context before.
    pub n_depth: usize,
    /// Mean duration of a run.
    pub avg_ns: u64,
    /// Its standard deviation.
    pub stddev_ns: u64,
    /// Mean tokens per second.
    pub avg_ts: f64,
    /// Its standard deviation.
    pub stddev_ts: f64,
    /// Duration of each run.
    pub samples_ns: Vec<u64>,
    /// Tokens per second of each run.
    pub samples_ts: Vec<f64>,
    /// Time to the first token: from the prompt to the choice of a token after it. Prompt test only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft: Option<Percentiles>,
    /// Time from one token to the next, over all runs. Token test only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inter_token: Option<Percentiles>,
}

/// Memory that the process occupies, as Linux and Android tell. What is anonymous is its own and cannot be had
/// back; what belongs to a file, such as a mapped model, can be read again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// The most that was ever resident.
    pub peak_rss_bytes: Option<u64>,
    /// Of what is resident now, the anonymous part. It only grows while a model runs.
    pub rss_anon_bytes: Option<u64>,
    /// Of what is resident now, the part that belongs to files.
    pub rss_file_bytes: Option<u64>,
}

impl Memory {
    /// Of this process.
    pub fn now() -> Self {
        Self::of(&std::fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    /// As `/proc/PID/status` says (Linux `Documentation/filesystems/proc.rst`).
    fn of(status: &str) -> Self {
        let value = |key: &str| {
            let rest = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            let kibibytes: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(kibibytes * 1024)
        };
        Self {
            peak_rss_bytes: value("VmHWM"),
            rss_anon_bytes: value("RssAnon"),
            rss_file_bytes: value("RssFile"),
        }
    }
}

/// Runs both tests on a model.
///
/// # Errors
/// Whatever [`Engine`] or the session refuses.
pub fn run(model: &ModelFile, options: &Options) -> Result<Vec<Test>, Error> {
    let settings = Settings {
        batch: options.n_batch.min(options.n_prompt.max(1)).max(1),
        threads: options.threads,
        kernels: options.kernels.clone(),
        adapters: options.adapters.clone(),
        cache: options.cache,
        ..Settings::new(options.n_prompt.max(options.n_gen).max(1))
    };
    let mut engine = Engine::new(model, settings)?;
    let blank = blank_test(model, &engine)?;
    let vocabulary = engine.plan.spec().vocab;
    let mut bench = Bench { model, session: engine.session(model)?, state: 1, vocabulary };
    let mut tests = Vec::new();
    if options.n_prompt > 0 {
        bench.prompt(options.n_prompt)?;
        let mut runs = Vec::new();
        for _ in 0..options.repetitions {
            runs.push(bench.prompt(options.n_prompt)?);
        }
        let test = timed(&blank, options.n_prompt, &runs);
        tests.push(Test { n_prompt: options.n_prompt, ttft: Some(Percentiles::of(&runs)), ..test });
    }
    if options.n_gen > 0 {
        bench.tokens(options.n_gen)?;
        let (mut runs, mut gaps) = (Vec::new(), Vec::new());
        for _ in 0..options.repetitions {
            let times = bench.tokens(options.n_gen)?;
            runs.push(times.iter().sum());
            gaps.extend(times);
        }
        let test = timed(&blank, options.n_gen, &runs);
        tests.push(Test { n_gen: options.n_gen, inter_token: Some(Percentiles::of(&gaps)), ..test });
    }
    Ok(tests)
}

/// The tests as a Markdown table.
pub fn markdown(tests: &[Test]) -> String {
    let mut table = String::from(
        "| model | size MiB | kernels | threads | test | tok/s | p50 ms | p95 ms | p99 ms | arena MiB |\n\
         |---|---:|---|---:|---|---:|---:|---:|---:|---:|",
    );
    for test in tests {
        let name =
            if test.n_prompt > 0 { format!("pp{}", test.n_prompt) } else { format!("tg{}", test.n_gen) };
        let times = test.ttft.or(test.inter_token).unwrap_or_default();
        let ms = |ns: u64| ns as f64 / 1e6;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        table.push_str(&format!(
            "\n| {} | {:.1} | {} | {} | {name} | {:.2} ± {:.2} | {:.2} | {:.2} | {:.2} | {:.1} |",
            test.model_type,
            mib(test.model_size),
            test.kernels,
            test.n_threads,
            test.avg_ts,
            test.stddev_ts,
            ms(times.p50_ns),
            ms(times.p95_ns),
            ms(times.p99_ns),
            mib(test.arena_bytes),
        ));
    }
    table
}

struct Bench<'a> {
    model: &'a ModelFile,
    session: Session<'a>,
    state: u64,
    vocabulary: usize,
}

impl Bench<'_> {
    /// Nanoseconds from an empty context to the first token after a prompt of `count` tokens.
    fn prompt(&mut self, count: usize) -> Result<u64, Error> {
        let tokens: Vec<u32> = (0..count).map(|_| self.any_token()).collect();
        self.restart()?;
        self.feed(&tokens)
    }

    /// Nanoseconds of each of `count` tokens from an empty context.
    fn tokens(&mut self, count: usize) -> Result<Vec<u64>, Error> {
        self.restart()?;
        (0..count)
            .map(|_| self.any_token())
            .collect::<Vec<_>>()
            .iter()
            .map(|token| self.feed(&[*token]))
            .collect()
    }

    fn restart(&mut self) -> Result<(), Error> {
        self.session.truncate(0).map_err(|error| self.model.refused(error))
    }

    fn feed(&mut self, tokens: &[u32]) -> Result<u64, Error> {
        let start = Instant::now();
        self.session.feed(tokens).map_err(|error| self.model.refused(error))?;
        std::hint::black_box(argmax(self.session.logits()));
        Ok(start.elapsed().as_nanos() as u64)
    }

    /// Any token will do: no kernel's time depends on its inputs. Steele and Vigna's 64-bit multiplier.
    fn any_token(&mut self) -> u32 {
        self.state = self.state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
        ((self.state >> 33) % self.vocabulary.max(1) as u64) as u32
    }
}

fn blank_test(model: &ModelFile, engine: &Engine) -> Result<Test, Error> {
    let (model_type, model_size, model_n_params) = describe(&model.parse()?);
    Ok(Test {
        build_commit: env!("CARGO_PKG_VERSION"),
        build_number: build_number(env!("CARGO_PKG_VERSION")),
        backends: "CPU",
        cpu_info: processor(),
        model_filename: model.path().display().to_string(),
        model_type,
        model_size,
        model_n_params,
        n_batch: engine.settings.batch,
        n_ubatch: engine.settings.batch,
        n_threads: engine.settings.threads.max(1),
        type_k: engine.plan.limits().cache.name(),
        type_v: engine.plan.limits().cache.name(),
        kernels: engine.kernels.name(),
        arena_bytes: engine.plan.arena_bytes() as u64,
        kv_bytes: engine.plan.kv_bytes() as u64,
        memory: Memory::default(),
        n_prompt: 0,
        n_gen: 0,
        n_depth: 0,
        avg_ns: 0,
        stddev_ns: 0,
        avg_ts: 0.0,
        stddev_ts: 0.0,
        samples_ns: Vec::new(),
        samples_ts: Vec::new(),
        ttft: None,
        inter_token: None,
    })
}

/// A test with the durations of its runs of `tokens` tokens.
fn timed(blank: &Test, tokens: usize, runs: &[u64]) -> Test {
    let times: Vec<f64> = runs.iter().map(|ns| *ns as f64).collect();
    let samples_ts: Vec<f64> = times.iter().map(|ns| tokens as f64 * 1e9 / ns.max(1.0)).collect();
    let (time, speed) = (Statistics::of(&times), Statistics::of(&samples_ts));
    Test {
        memory: Memory::now(),
        avg_ns: time.mean as u64,
        stddev_ns: time.deviation as u64,
        avg_ts: speed.mean,
        stddev_ts: speed.deviation,
        samples_ns: runs.to_vec(),
        samples_ts,
        ..blank.clone()
    }
}

/// A version `major.minor.patch` as one number.
fn build_number(version: &str) -> u32 {
    version.split('.').fold(0, |number, part| number * 100 + part.parse::<u32>().unwrap_or(0))
}

/// What Linux calls the processor; elsewhere, and where it has no name, the architecture.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        matches!(key.trim(), "model name" | "Model" | "Hardware").then(|| value.trim().to_owned())
    });
    named.filter(|name| !name.is_empty()).unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_system_says() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t    1536 kB\nRssAnon:\t     512 kB\nRssFile:\t    1024 kB\n";
        let found = Memory::of(status);
        let expected = [2 << 20, 512 << 10, 1 << 20].map(Some);
        assert_eq!([found.peak_rss_bytes, found.rss_anon_bytes, found.rss_file_bytes], expected);
        assert_eq!(Memory::of(""), Memory::default());
        assert_eq!(Memory::of("VmHWM: many kB"), Memory::default());
        assert_eq!(
            Memory::now().rss_anon_bytes.is_some(),
            cfg!(any(target_os = "linux", target_os = "android"))
        );
    }

    #[test]
    fn a_version_is_a_number() {
        assert_eq!(["0.1.0", "1.0.7"].map(build_number), [100, 10_007]);
    }
}
