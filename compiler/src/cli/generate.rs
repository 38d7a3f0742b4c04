//! `edgec run` and `edgec chat`.

use std::io::{BufRead, IsTerminal, Write, stdin, stdout};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use edge_run::{Drafter, Drafting, Engine};
use edge_runtime::session::{Sampler, SamplerConfig, Session};
use edgec::profile;
use edgec::text::{ChatTemplate, HostTokenizer, Message};

use super::{EngineArguments, output};

#[derive(Args)]
pub struct RunArguments {
    /// GGUF file, Hugging Face folder or run's folder
    model: PathBuf,
    /// Text to continue
    #[arg(long)]
    prompt: String,
    /// Most tokens to generate
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Print the ids of the generated tokens as a JSON array instead of their text
    #[arg(long)]
    ids: bool,
    /// Small model of the same vocabulary that drafts tokens for the model to verify; what comes out is
    /// distributed the same
    #[arg(long)]
    draft: Option<PathBuf>,
    /// Tokens to draft at a time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    draft_tokens: u16,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Args)]
pub struct ChatArguments {
    /// GGUF file, Hugging Face folder or run's folder
    model: PathBuf,
    /// What the model is told first
    #[arg(long)]
    system: Option<String>,
    /// Most tokens in an answer
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArguments,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Args)]
struct SamplingArguments {
    /// Softmax temperature; 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temp: f32,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 40)]
    top_k: usize,
    /// Keep the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 0.95)]
    top_p: f32,
    /// Keep tokens at least this likely, relative to the likeliest
    #[arg(long, default_value_t = 0.05)]
    min_p: f32,
    /// Penalty on tokens among the last 64; 1 is none
    #[arg(long, default_value_t = 1.0)]
    repeat_penalty: f32,
    /// Seed of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens of context [default: the model's, at most 4096]
    #[arg(long)]
    context: Option<usize>,
}

impl SamplingArguments {
    fn sampler(&self) -> anyhow::Result<Sampler> {
        Ok(Sampler::new(SamplerConfig {
            temperature: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_window: 64,
            seed: self.seed,
        })?)
    }
}

/// A model that generates: a session with its tokenizer and sampler.
struct Generator<'a> {
    session: Session<'a>,
    tokenizer: &'a HostTokenizer,
    sampler: Sampler,
    scratch: Vec<u32>,
    logits: Vec<f32>,
    draft: Option<Drafting<'a>>,
    /// Tokens that were chosen together, in reverse.
    ahead: Vec<u32>,
    out: Vec<u32>,
}

impl Generator<'_> {
    /// Feeds `prompt` and generates; `sink` gets each token with the text that became whole.
    fn generate(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        sink: &mut dyn FnMut(u32, &str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Speed> {
        let start = Instant::now();
        self.session.feed(prompt)?;
        let prefill = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut stream = self.tokenizer.stream();
        let mut generated = 0;
        while generated < max_tokens {
            let token = self.next()?;
            if self.tokenizer.is_end_of_generation(token) {
                break;
            }
            generated += 1;
            sink(token, &stream.push(token)?)?;
            if self.session.position() == self.session.context() {
                eprintln!("\nthe context of {} tokens is full", self.session.context());
                break;
            }
            if self.draft.is_none() {
                self.session.feed(&[token])?;
            }
        }
        let tail = stream.finish();
        if !tail.is_empty() {
            stdout().lock().write_all(tail.as_bytes())?;
        }
        Ok(Speed { prompt: prompt.len(), prefill, generated, decode: start.elapsed().as_secs_f64() })
    }
}

impl Generator<'_> {
    /// The next token; without a draft it is still to be fed.
    fn next(&mut self) -> anyhow::Result<u32> {
        let Some(draft) = &mut self.draft else {
            self.logits.copy_from_slice(self.session.logits());
            return Ok(self.sampler.sample(&mut self.logits, self.session.tokens(), &mut self.scratch)?);
        };
        if self.ahead.is_empty() {
            let count = draft.round(&mut self.session, &mut self.sampler, &mut self.out)?;
            self.ahead.extend(self.out[..count].iter().rev());
        }
        self.ahead.pop().context("a round without a token")
    }
}

struct Speed {
    prompt: usize,
    prefill: f64,
    generated: usize,
    decode: f64,
}

impl Speed {
    fn report(&self) {
        eprintln!(
            "prompt {} tokens at {:.1} tok/s, generated {} at {:.1} tok/s",
            self.prompt,
            self.prompt as f64 / self.prefill.max(1e-9),
            self.generated,
            self.generated as f64 / self.decode.max(1e-9),
        );
    }
}

/// Opens a model and hands a ready generator to `body`.
fn with_generator<T>(
    model: &Path,
    sampling: &SamplingArguments,
    engine: &EngineArguments,
    draft: Option<(&Path, usize)>,
    body: impl FnOnce(&mut Generator<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    const LONGEST_DEFAULT: usize = 4096;
    let (file, mut settings) = engine.open(model, 0)?;
    let gguf = file.parse()?;
    let tokenizer = HostTokenizer::from_gguf(&gguf).with_context(|| model.display().to_string())?;
    let own = profile::spec_of(&file)?.context;
    settings.context = sampling.context.unwrap_or(own.min(LONGEST_DEFAULT));
    let drafted = draft.map_or(0, |(_, tokens)| tokens);
    settings.logits_rows = drafted + 1;
    settings.batch = settings.batch.max(drafted + 1);
    let draft_file = draft.map(|(path, _)| profile::open(path)).transpose()?;
    let mut drafter = match &draft_file {
        None => None,
        Some(draft) => Some(Drafter::new(&file, draft, &settings, drafted)?),
    };
    let mut engine = Engine::new(&file, settings)?;
    let session = engine.session(&file)?;
    let vocab = session.spec().vocab;
    let mut generator = Generator {
        session,
        tokenizer: &tokenizer,
        sampler: sampling.sampler()?,
        scratch: vec![0; vocab],
        logits: vec![0.0; vocab],
        draft: drafter.as_mut().map(Drafter::start).transpose()?,
        ahead: Vec::new(),
        out: vec![0; drafted + 1],
    };
    body(&mut generator)
}

pub fn run(arguments: &RunArguments) -> anyhow::Result<()> {
    let draft = arguments.draft.as_deref().map(|path| (path, usize::from(arguments.draft_tokens)));
    with_generator(&arguments.model, &arguments.sampling, &arguments.engine, draft, |generator| {
        let prompt = generator.tokenizer.encode(&arguments.prompt, true, true)?;
        if prompt.is_empty() {
            bail!("--prompt: the text has no tokens");
        }
        let mut ids = Vec::new();
        let speed = generator.generate(&prompt, arguments.max_tokens, &mut |token, text| {
            ids.push(token);
            if !arguments.ids {
                let mut out = stdout().lock();
                out.write_all(text.as_bytes())?;
                out.flush()?;
            }
            Ok(())
        })?;
        output::line(if arguments.ids { serde_json::to_string(&ids)? } else { String::new() })?;
        speed.report();
        if let Some(draft) = &generator.draft {
            eprintln!("{}", draft.report());
        }
        Ok(())
    })
}

pub fn chat(arguments: &ChatArguments) -> anyhow::Result<()> {
    with_generator(&arguments.model, &arguments.sampling, &arguments.engine, None, |generator| {
        let template = ChatTemplate::of(generator.tokenizer)
            .with_context(|| format!("{}: no chat template; use `edgec run`", arguments.model.display()))?;
        let mut messages = Vec::new();
        if let Some(system) = &arguments.system {
            messages.push(Message::new("system", system));
        }
        let interactive = stdin().is_terminal();
        if interactive {
            eprintln!("Type a message; an empty line or Ctrl-D ends the chat.");
        }
        let mut lines = stdin().lock().lines();
        loop {
            if interactive {
                eprint!("> ");
            }
            let Some(line) = lines.next().transpose()? else { break };
            if line.trim().is_empty() {
                break;
            }
            messages.push(Message::new("user", &line));
            let text = template.render(&messages, true)?;
            let prompt = generator.tokenizer.encode(&text, false, true)?;
            // What the cache already holds is not computed again.
            let shared = generator.session.reuse(&prompt);
            let mut answer = String::new();
            let speed = generator.generate(&prompt[shared..], arguments.max_tokens, &mut |_, text| {
                answer.push_str(text);
                let mut out = stdout().lock();
                out.write_all(text.as_bytes())?;
                Ok(out.flush()?)
            })?;
            output::line("")?;
            if interactive {
                speed.report();
            }
            messages.push(Message::new("assistant", &answer));
        }
        Ok(())
    })
}
