//! `edgec pretrain`.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, bail};
use clap::Args;
use edge_models::{DecoderSpec, family_by_gguf_name};
use edgec::export::gguf::Mix;
use edgec::model::Model;
use edgec::profile;
use edgec::text::HostTokenizer;
use edgec::text::corpus::{self, Corpus};
use edgec::train::parallel::Communicator;
use edgec::train::pretrain::{initialize, learn_vocabulary};
use edgec::train::trainer::{self, Progress as Watch, StepReport, Text};
use edgec::train::{Accelerator, RunFolder, TrainConfig, trainee};
use edgec::{export, quantize};

use super::output;
use super::processes::{choose, together};
use super::progress::{Progress, note};

#[derive(Args)]
pub struct Arguments {
    /// UTF-8 text, one document to a line
    #[arg(long, required = true)]
    data: Vec<PathBuf>,
    /// Folder of the run
    #[arg(long)]
    out: PathBuf,
    /// Name of the model
    #[arg(long, default_value = "pretrained")]
    name: String,
    /// Tokens of the vocabulary, learned from the text
    #[arg(long, default_value_t = 4096)]
    vocab: usize,
    /// Transformer blocks
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Width
    #[arg(long, default_value_t = 256)]
    hidden: usize,
    /// Query heads
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Key/value heads
    #[arg(long, default_value_t = 2)]
    kv_heads: usize,
    /// Inner width of the feed-forward network
    #[arg(long, default_value_t = 768)]
    ffn: usize,
    /// Tokens to train on
    #[arg(long, default_value_t = 5_000_000)]
    tokens: u64,
    /// Sequences in an optimizer step
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Tokens in a sequence, and the model's context
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Peak learning rate
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Decoupled weight decay of the matrices
    #[arg(long, default_value_t = 0.1)]
    weight_decay: f64,
    /// Tensor types of model.gguf
    #[arg(long, default_value = "Q8_0")]
    quant: Mix,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where the large matrix products are computed: cpu, cuda or metal; cuda:1 is the second GPU. A GPU needs a
    /// build with that feature
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Accelerator,
    /// Steps between checkpoints; every two minutes there is one anyway
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: Option<u64>,
    /// Keep fewer activations and compute them again: less memory, more time, the same result
    #[arg(long)]
    checkpoint_activations: bool,
    /// Go on with the run in --out
    #[arg(long)]
    resume: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    together(|processes| pretrain(&arguments, processes))
}

fn pretrain(arguments: &Arguments, processes: Rc<dyn Communicator>) -> anyhow::Result<()> {
    let first = processes.rank() == 0;
    choose(arguments.device, &*processes)?;
    let documents = documents(&arguments.data)?;
    let lines: Vec<&str> = documents.iter().map(String::as_str).collect();
    let vocabulary = learn_vocabulary(&lines, arguments.vocab)?;
    let spec = spec(arguments)?;
    let weights = initialize(&spec, arguments.seed)?;
    let model = Model { spec, weights, vocabulary: Some(vocabulary), name: arguments.name.clone() };
    let corpus = tokens(&model, &lines)?;
    if first {
        let (parameters, tokens) = (output::parameters(spec.parameters()), corpus.ids.len());
        note("pretrain", &format!("{parameters} parameters, {} documents, {tokens} tokens", lines.len()));
        fs::create_dir_all(&arguments.out).with_context(|| arguments.out.display().to_string())?;
    }
    let config = TrainConfig {
        tokens: arguments.tokens,
        batch: arguments.batch,
        length: arguments.length,
        lr: arguments.lr,
        weight_decay: arguments.weight_decay,
        seed: arguments.seed,
        ..TrainConfig::default()
    };
    let text = Text { ids: &corpus.ids, scored: &corpus.scored };
    let folder = RunFolder {
        processes,
        checkpoint_activations: arguments.checkpoint_activations,
        ..RunFolder::new(&arguments.out, arguments.resume, arguments.checkpoint_every)
    };
    let mut screen = Screen(first.then(|| Progress::start("pretrain")));
    let model = trainee::full(model, &config)?;
    let trained = trainer::train(None, model, text, &config, &folder, &mut screen)?;
    let Some(screen) = screen.0 else { return Ok(()) };
    screen.finish("trained");
    export::hf::write(&trained, &arguments.out.join("student"))?;
    let file = arguments.out.join("model.gguf");
    let report = quantize::quantize_file(&trained, arguments.quant, &file)?;
    note("pretrain", &format!("{}: {}", file.display(), output::bytes(report.bytes)));
    Ok(())
}

fn documents(paths: &[PathBuf]) -> anyhow::Result<Vec<String>> {
    let mut documents = Vec::new();
    for path in paths {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        documents.extend(text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned));
    }
    if documents.is_empty() {
        bail!("--data: no text");
    }
    Ok(documents)
}

fn spec(arguments: &Arguments) -> anyhow::Result<DecoderSpec> {
    let family = family_by_gguf_name("llama").context("the family table has no llama")?;
    if arguments.heads == 0 || !arguments.hidden.is_multiple_of(arguments.heads) {
        bail!("--hidden {}: not a multiple of --heads {}", arguments.hidden, arguments.heads);
    }
    Ok(DecoderSpec {
        layers: arguments.layers,
        hidden: arguments.hidden,
        heads: arguments.heads,
        kv_heads: arguments.kv_heads,
        head_dim: arguments.hidden / arguments.heads,
        rope_dims: arguments.hidden / arguments.heads,
        ffn: arguments.ffn,
        vocab: arguments.vocab,
        context: arguments.length,
        norm_eps: 1e-5,
        tied_embeddings: true,
        ..DecoderSpec::plain(family)
    }
    .validate()?)
}

fn tokens(model: &Model, documents: &[&str]) -> anyhow::Result<Corpus> {
    let file = profile::lay_out(model, "(new model)".as_ref())?;
    let tokenizer = HostTokenizer::from_gguf(&file.parse()?)?;
    let mut corpus = Corpus::default();
    for document in documents {
        let more = corpus::from_text(document, &tokenizer)?;
        corpus.ids.extend(more.ids);
        corpus.scored.extend(more.scored);
    }
    Ok(corpus)
}

/// The screen of the first process; the others show nothing.
struct Screen(Option<Progress>);

impl Watch for Screen {
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        let row = &report.row;
        let message =
            format!("loss {:.4}  lr {:.1e}  {:.0} tok/s", row.loss, row.lr, report.tokens_per_second);
        if let Some(screen) = &mut self.0 {
            screen.update(row.step as usize, report.steps as usize, &message);
        }
        ControlFlow::Continue(())
    }

    fn note(&mut self, message: &str) {
        note("pretrain", message);
    }
}
