//! `edgec synth`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use edgec::synth::prompts::{Form, Prompt};
use edgec::synth::{self, Endpoint, Key, Options, Sampling, Summary, Watch};
use serde_json::{Map, Value};

use super::output;
use super::progress::{Progress, note};

#[derive(Args)]
pub struct Arguments {
    /// Root of the server's OpenAI-compatible interface, e.g. http://127.0.0.1:8080/v1. The key, if it wants
    /// one, is read from EDGE_API_KEY or OPENAI_API_KEY
    #[arg(long)]
    url: String,
    /// The server's name of the model
    #[arg(long)]
    model: String,
    /// Prompts: .txt (one to a line) or .jsonl (`prompt` or `messages` on each line); may be given again
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "seed_data")]
    prompts: Vec<PathBuf>,
    /// Text that is cut into passages, which the model is asked to continue
    #[arg(long, value_name = "FILE", conflicts_with = "prompts")]
    seed_data: Option<PathBuf>,
    /// Bytes of a passage of --seed-data
    #[arg(long, default_value_t = 800, value_parser = clap::value_parser!(u32).range(16..), requires = "seed_data")]
    passage: u32,
    /// System message of conversations that do not begin with one
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Jinja template of what is asked, with the prompt or the passage as `text`
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// What the server is asked for: answers in conversations, or continuations of plain texts
    #[arg(long, value_enum, default_value_t = Kind::Chat)]
    endpoint: Kind,
    /// Answers to each prompt
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    n: u32,
    /// Rows that are enough [default: an answer to everything]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Longest answer, in tokens [default: the server's]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Sampling temperature [default: the server's]
    #[arg(long, value_parser = not_negative)]
    temperature: Option<f64>,
    /// Share of the probability that is sampled from [default: the server's]
    #[arg(long, value_parser = share)]
    top_p: Option<f64>,
    /// Ask for the probabilities of this many alternatives to each token, as soft targets
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=1000))]
    top_logprobs: Option<u32>,
    /// Further fields of the requests as a JSON object, e.g. '{"top_k": 20}'
    #[arg(long, value_name = "JSON", value_parser = object)]
    extra: Option<Map<String, Value>>,
    /// Refuse answers that --max-tokens cut, instead of keeping them as cut
    #[arg(long)]
    drop_truncated: bool,
    /// Requests at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// Most requests a second
    #[arg(long, value_name = "RPS", value_parser = rate)]
    rate: Option<f64>,
    /// How often a request is sent again after a fault that may pass
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(..=100))]
    retries: u32,
    /// Seconds that an answer may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0, value_parser = seconds)]
    timeout: f64,
    /// Seed of the server's sampling, of the order of passages, and of the delays between tries [default: the
    /// server's, 0 and 0]
    #[arg(long)]
    seed: Option<u64>,
    /// File of the rows, for `edgec distill --data`
    #[arg(long, value_name = "FILE.jsonl", value_parser = jsonl)]
    out: PathBuf,
    /// Go on with the rows in --out
    #[arg(long)]
    resume: bool,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    /// `chat/completions`.
    Chat,
    /// `completions`.
    Completions,
}

fn number(text: &str, fits: impl Fn(f64) -> bool, wanted: &str) -> Result<f64, String> {
    text.parse().ok().filter(|&value| fits(value)).ok_or_else(|| format!("expected {wanted}"))
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, |value| value >= 0.0 && value.is_finite(), "a number from 0")
}

fn share(text: &str) -> Result<f64, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "a number above 0 and up to 1")
}

fn rate(text: &str) -> Result<f64, String> {
    number(text, |value| (1e-4..=1e6).contains(&value), "a number from 0.0001 to 1000000")
}

fn seconds(text: &str) -> Result<f64, String> {
    number(text, |value| (1e-3..=1e6).contains(&value), "a number from 0.001 to 1000000")
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
}

/// `edgec distill` knows what is in a file by how its name ends.
fn jsonl(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    match path.extension() {
        Some(extension) if extension == "jsonl" => Ok(path),
        _ => Err("expected a name that ends in .jsonl".into()),
    }
}

impl Arguments {
    fn prompts(&self) -> anyhow::Result<Vec<Prompt>> {
        let template = match &self.template {
            Some(path) => {
                let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
                Some((path.clone(), text))
            }
            None => None,
        };
        let form = Form { endpoint: self.endpoint(), system: self.system.clone(), template };
        if form.endpoint == Endpoint::Completions && form.system.is_some() {
            anyhow::bail!("--system: plain completions have no messages");
        }
        Ok(match &self.seed_data {
            Some(path) => form.passages(path, self.passage as usize, self.seed.unwrap_or(0))?,
            None => form.read(&self.prompts)?,
        })
    }

    fn endpoint(&self) -> Endpoint {
        match self.endpoint {
            Kind::Chat => Endpoint::Chat,
            Kind::Completions => Endpoint::Completions,
        }
    }
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let key = Key::from_environment()?;
    if let Some(key) = &key {
        note("synth", &format!("the key is that of {}", key.variable()));
    }
    let options = Options {
        prompts: arguments.prompts()?,
        endpoint: arguments.endpoint(),
        sampling: Sampling {
            model: arguments.model,
            max_tokens: arguments.max_tokens,
            temperature: arguments.temperature,
            top_p: arguments.top_p,
            top_logprobs: arguments.top_logprobs,
            seed: arguments.seed,
            extra: arguments.extra.unwrap_or_default(),
        },
        url: arguments.url,
        key,
        answers: arguments.n as usize,
        count: arguments.count.map(|count| count as usize),
        drop_truncated: arguments.drop_truncated,
        concurrency: arguments.concurrency.into(),
        rate: arguments.rate,
        retries: arguments.retries,
        timeout: Duration::from_secs_f64(arguments.timeout),
        seed: arguments.seed.unwrap_or(0),
        out: arguments.out,
        resume: arguments.resume,
    };
    let mut screen = Screen(Progress::start("synth"));
    let summary = synth::run(&options, &mut screen)?;
    screen.0.finish(&format!("{}: {} rows", options.out.display(), summary.present + summary.written));
    if arguments.json {
        return output::json(&summary);
    }
    output::line(output::table(&rows(&summary)))?;
    Ok(())
}

fn rows(summary: &Summary) -> Vec<Vec<String>> {
    let rows = [
        ("there before", summary.present as u64),
        ("asked", summary.asked as u64),
        ("written", summary.written as u64),
        ("  cut by the token limit", summary.truncated as u64),
        ("  with token probabilities", summary.with_logprobs as u64),
        ("retried", summary.retried as u64),
        ("given up", summary.refused as u64),
        ("the same prompt again", summary.duplicate_prompts as u64),
        ("the same answer again", summary.duplicate_answers as u64),
        ("tokens of prompts", summary.prompt_tokens),
        ("tokens of answers", summary.completion_tokens),
    ];
    let header = vec![String::new(), "count".to_owned()];
    std::iter::once(header)
        .chain(rows.map(|(name, count)| vec![name.to_owned(), count.to_string()]))
        .collect()
}

struct Screen(Progress);

impl Watch for Screen {
    fn progress(&mut self, done: usize, total: usize, message: &str) {
        self.0.update(done, total, message);
    }

    fn note(&mut self, message: &str) {
        note("synth", message);
    }
}
