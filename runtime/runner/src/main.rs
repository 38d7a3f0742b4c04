//! `edge-run`: runs and times a model on a device.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use edge_run::bench::{self, Options};
use edge_run::{Adapter, ChatPieces, Drafter, Engine, ModelFile, Processors, Settings};
use edge_runtime::session::{CacheType, Sampler, SamplerConfig, argmax};
use edge_runtime::tokenizer::{Encode, Tokenizer, Utf8Stream};
use lexopt::prelude::*;

const HELP: &str = "\
Runs and times a small language model.

edge-run generate MODEL --prompt TEXT [--max-tokens N] [-t THREADS] [--no-pin] [--kernels NAME] [--ids]
                  [--adapter FILE[=SCALE]]... [--kv f16|q8_0] [--logits FILE]
                  [--draft MODEL [--draft-tokens N]] [--chat CHAT.JSON [--system TEXT]]
    continues TEXT with the most likely tokens; --ids prints their numbers as a JSON array; with --draft, a small
    model of the same vocabulary drafts N tokens (4) at a time, which MODEL verifies: the tokens stay the same;
    --logits writes the last logits as f32, for comparing devices;
    with the file that `edgec bundle` puts beside the model, TEXT is a message to be answered
edge-run bench MODEL [-p N] [-n N] [-b N] [-r N] [-t THREADS] [--no-pin] [--kernels NAME] [-o json|md]
               [--adapter FILE[=SCALE]]... [--kv f16|q8_0]
    times a prompt of N tokens (512), N single tokens (128), each R times (5)

MODEL is a GGUF file or a pack, an adapter's FILE a GGUF LoRA for it. NAME is generic, neon, dotprod, i8mm, avx2 or
avx512; by default the fastest that the processor has. THREADS is as many as there are big cores unless given, and
never more than can run at once; where there are little cores besides, threads are kept on the big ones if they all
find room there, unless --no-pin is given.
";

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("edge-run: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = lexopt::Parser::from_env();
    match arguments.next()? {
        Some(Value(command)) if command == "generate" => generate(GenerateArguments::parse(arguments)?),
        Some(Value(command)) if command == "bench" => bench(BenchArguments::parse(arguments)?),
        Some(Long("help") | Short('h')) => {
            print!("{HELP}");
            Ok(())
        }
        Some(other) => Err(other.unexpected().into()),
        None => bail!("a command is missing: generate or bench; --help says more"),
    }
}

struct GenerateArguments {
    model: PathBuf,
    prompt: String,
    chat: Option<PathBuf>,
    system: Option<String>,
    max_tokens: usize,
    threads: usize,
    pin: bool,
    kernels: Option<String>,
    adapters: Vec<Adapter>,
    cache: CacheType,
    draft: Option<PathBuf>,
    draft_tokens: usize,
    ids: bool,
    logits: Option<PathBuf>,
}

impl GenerateArguments {
    fn parse(mut arguments: lexopt::Parser) -> Result<Self> {
        let (mut model, mut prompt, mut kernels, mut adapters) = (None, None, None, Vec::new());
        let (mut cache, mut draft, mut draft_tokens) = (CacheType::Auto, None, 4);
        let (mut chat, mut system, mut logits) = (None, None, None);
        let (mut max_tokens, mut threads, mut ids) = (128, Options::default().threads, false);
        let mut pin = true;
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("prompt") => prompt = Some(arguments.value()?.string()?),
                Long("chat") => chat = Some(PathBuf::from(arguments.value()?)),
                Long("system") => system = Some(arguments.value()?.string()?),
                Long("max-tokens") | Short('n') => max_tokens = arguments.value()?.parse()?,
                Long("threads") | Short('t') => threads = arguments.value()?.parse()?,
                Long("no-pin") => pin = false,
                Long("kernels") => kernels = Some(arguments.value()?.string()?),
                Long("adapter") => adapters.push(adapter(&mut arguments)?),
                Long("kv") => cache = arguments.value()?.parse_with(cache_type)?,
                Long("draft") => draft = Some(PathBuf::from(arguments.value()?)),
                Long("draft-tokens") => draft_tokens = arguments.value()?.parse()?,
                Long("ids") => ids = true,
                Long("logits") => logits = Some(PathBuf::from(arguments.value()?)),
                Value(path) if model.is_none() => model = Some(PathBuf::from(path)),
                other => return Err(other.unexpected().into()),
            }
        }
        let model = model.context("MODEL is missing")?;
        let prompt = prompt.context("--prompt is missing")?;
        if system.is_some() && chat.is_none() {
            bail!("--system needs --chat");
        }
        Ok(Self {
            model,
            prompt,
            chat,
            system,
            max_tokens,
            threads,
            pin,
            kernels,
            adapters,
            cache,
            draft,
            draft_tokens,
            ids,
            logits,
        })
    }

    /// The text to continue, and how to read it: one made by a chat template has all special tokens in it.
    fn text(&self) -> Result<(String, Encode)> {
        let Some(path) = &self.chat else {
            return Ok((self.prompt.clone(), Encode { add_bos: true, parse_special: false }));
        };
        let place = || path.display().to_string();
        let pieces: ChatPieces =
            serde_json::from_slice(&std::fs::read(path).with_context(place)?).with_context(place)?;
        let text = pieces.render(self.system.as_deref(), &[], &self.prompt).with_context(place)?;
        Ok((text, Encode { add_bos: false, parse_special: true }))
    }
}

/// Keeps this thread, and those that it starts, on the big cores if that makes sense for `threads` threads.
fn pin(threads: usize) {
    if let Err(error) = Processors::here().pin(threads) {
        eprintln!("edge-run: threads may run on any core: {error}");
    }
}

/// The value of `--adapter`.
fn adapter(arguments: &mut lexopt::Parser) -> Result<Adapter> {
    let (path, scale) = arguments.value()?.parse_with(Adapter::argument)?;
    Ok(Adapter { file: ModelFile::open(&path)?.into(), scale })
}

/// The value of `--kv`.
fn cache_type(name: &str) -> Result<CacheType, &'static str> {
    CacheType::by_name(name).ok_or("expected auto, f16, f32 or q8_0")
}

/// Greedy continuation of a prompt.
fn generate(arguments: GenerateArguments) -> Result<()> {
    if arguments.pin {
        pin(arguments.threads);
    }
    let model = ModelFile::open(&arguments.model)?;
    let file = model.parse()?;
    let refused = |error| model.refused(error);
    let mut index = vec![0; Tokenizer::index_bytes(&file).map_err(refused)?];
    let tokenizer = Tokenizer::new(&file, &mut index).map_err(refused)?;
    let (text, options) = arguments.text()?;
    let prompt = encode(&tokenizer, &text, options).map_err(refused)?;
    let draft = arguments.draft.as_deref().map(ModelFile::open).transpose()?;
    let drafted = if draft.is_some() { arguments.draft_tokens } else { 0 };
    let settings = Settings {
        batch: prompt.len().clamp(1, 512).max(drafted + 1),
        logits_rows: drafted + 1,
        threads: arguments.threads,
        kernels: arguments.kernels,
        adapters: arguments.adapters,
        cache: arguments.cache,
        ..Settings::new(prompt.len() + arguments.max_tokens)
    };
    let mut drafter = match &draft {
        None => None,
        Some(file) => Some(Drafter::new(&model, file, &settings, drafted)?),
    };
    let mut engine = Engine::new(&model, settings)?;
    let mut session = engine.session(&model)?;
    session.feed(&prompt).map_err(refused)?;
    let mut drafting = drafter.as_mut().map(Drafter::start).transpose()?;

    let mut printer = Printer::new(Tokenizer::longest_text(&file).map_err(refused)?, !arguments.ids);
    let mut sampler = Sampler::new(SamplerConfig::default())?;
    let (mut ids, mut next) = (Vec::new(), vec![0; drafted + 1]);
    'all: while ids.len() < arguments.max_tokens {
        let count = match &mut drafting {
            Some(drafting) => drafting.round(&mut session, &mut sampler, &mut next)?,
            None => {
                if let Some(last) = ids.last() {
                    session.feed(&[*last]).map_err(refused)?;
                }
                next[0] = argmax(session.logits());
                1
            }
        };
        for &token in &next[..count.min(arguments.max_tokens - ids.len())] {
            if tokenizer.is_end_of_generation(token) {
                break 'all;
            }
            ids.push(token);
            printer.print(&tokenizer, token).map_err(refused)?;
        }
    }
    if let Some(path) = &arguments.logits {
        let bytes: Vec<u8> = session.logits().iter().flat_map(|logit| logit.to_le_bytes()).collect();
        std::fs::write(path, bytes).with_context(|| path.display().to_string())?;
    }
    if let Some(drafting) = drafting {
        eprintln!("{}", drafting.report());
    }
    if arguments.ids {
        println!("{}", serde_json::to_string(&ids)?);
    } else {
        printer.finish().map_err(refused)?;
    }
    Ok(())
}

fn encode(tokenizer: &Tokenizer<'_>, text: &str, options: Encode) -> edge_runtime::Result<Vec<u32>> {
    let mut scratch = vec![0; Tokenizer::scratch_words(text.len())];
    let mut ids = vec![0; Tokenizer::most_ids(text.len())];
    let count = tokenizer.encode(text.as_bytes(), options, &mut scratch, &mut ids)?;
    ids.truncate(count);
    Ok(ids)
}

/// Prints text as it comes, whole characters at a time.
struct Printer {
    stream: Utf8Stream,
    piece: Vec<u8>,
    text: Vec<u8>,
    on: bool,
}

impl Printer {
    /// For tokens of at most `longest` bytes.
    fn new(longest: usize, on: bool) -> Self {
        let (piece, text) = (vec![0; longest], vec![0; Utf8Stream::most(longest)]);
        Self { stream: Utf8Stream::new(), piece, text, on }
    }

    fn print(&mut self, tokenizer: &Tokenizer<'_>, token: u32) -> edge_runtime::Result<()> {
        if !self.on {
            return Ok(());
        }
        let length = tokenizer.piece(token, &mut self.piece)?;
        let length = self.stream.push(&self.piece[..length], &mut self.text)?;
        self.show(length);
        Ok(())
    }

    /// Ends the text, with a mark if it stops within a character, and the line.
    fn finish(&mut self) -> edge_runtime::Result<()> {
        let length = self.stream.finish(&mut self.text)?;
        self.show(length);
        println!();
        Ok(())
    }

    fn show(&self, length: usize) {
        let mut out = std::io::stdout().lock();
        // A reader that went away is no reason to fail.
        let _ = out.write_all(&self.text[..length]).and_then(|()| out.flush());
    }
}

struct BenchArguments {
    model: PathBuf,
    options: Options,
    pin: bool,
    json: bool,
}

impl BenchArguments {
    fn parse(mut arguments: lexopt::Parser) -> Result<Self> {
        let (mut model, mut options, mut pin, mut json) = (None, Options::default(), true, false);
        while let Some(argument) = arguments.next()? {
            match argument {
                Short('p') => options.n_prompt = arguments.value()?.parse()?,
                Short('n') => options.n_gen = arguments.value()?.parse()?,
                Short('b') => options.n_batch = arguments.value()?.parse()?,
                Short('r') => options.repetitions = arguments.value()?.parse()?,
                Long("threads") | Short('t') => options.threads = arguments.value()?.parse()?,
                Long("no-pin") => pin = false,
                Long("kernels") => options.kernels = Some(arguments.value()?.string()?),
                Long("adapter") => options.adapters.push(adapter(&mut arguments)?),
                Long("kv") => options.cache = arguments.value()?.parse_with(cache_type)?,
                Short('o') => {
                    json = arguments.value()?.parse_with(|format| match format {
                        "json" => Ok(true),
                        "md" => Ok(false),
                        _ => Err("expected json or md"),
                    })?;
                }
                Value(path) if model.is_none() => model = Some(PathBuf::from(path)),
                other => return Err(other.unexpected().into()),
            }
        }
        if options.repetitions == 0 {
            bail!("-r 0: at least one run is needed");
        }
        Ok(Self { model: model.context("MODEL is missing")?, options, pin, json })
    }
}

fn bench(arguments: BenchArguments) -> Result<()> {
    if arguments.pin {
        pin(arguments.options.threads);
    }
    let model = ModelFile::open(&arguments.model)?;
    let tests = bench::run(&model, &arguments.options)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&tests)?);
    } else {
        println!("{}", bench::markdown(&tests));
    }
    Ok(())
}
