//! `edgec eval`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use edgec::profile;
use edgec::profile::eval::{Config, Score, evaluate};
use edgec::text::HostTokenizer;

use super::progress::Progress;
use super::{EngineArguments, output};

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, pack, Hugging Face folder or run's folder
    model: PathBuf,
    /// Model to compare with; of the same vocabulary
    #[arg(long)]
    teacher: Option<PathBuf>,
    /// Text to evaluate on
    #[arg(long)]
    data: PathBuf,
    /// Tokens in a window
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    context: u32,
    /// Most windows, from the start of the text
    #[arg(long)]
    windows: Option<usize>,
    /// Positions of a window that count
    #[arg(long, value_enum, default_value_t = ScoreArgument::Half)]
    score: ScoreArgument,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScoreArgument {
    /// The second half, as llama.cpp's perplexity tool does.
    Half,
    /// All of them.
    All,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let bytes = std::fs::read(&arguments.data).with_context(|| arguments.data.display().to_string())?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        anyhow::anyhow!("{}: not UTF-8 at byte {}", arguments.data.display(), error.valid_up_to())
    })?;
    if text.is_empty() {
        bail!("{}: the file is empty", arguments.data.display());
    }
    let (student, settings) = arguments.engine.open(&arguments.model, 0)?;
    let teacher = arguments.teacher.as_deref().map(profile::open).transpose()?;
    let tokenizer =
        HostTokenizer::from_gguf(&student.parse()?).with_context(|| arguments.model.display().to_string())?;
    let ids = tokenizer.encode(text, true, false)?;
    let config = Config {
        context: arguments.context as usize,
        windows: arguments.windows,
        score: match arguments.score {
            ScoreArgument::Half => Score::Half,
            ScoreArgument::All => Score::All,
        },
        bos: tokenizer.bos_to_add(),
    };
    let mut progress = Progress::start("eval");
    let outcome = evaluate(&student, teacher.as_ref(), &ids, &config, &settings, &mut |done, total, ppl| {
        progress.update(done, total, &format!("ppl {ppl:.4}"));
    })
    .map_err(|error| match error {
        profile::Error::TextTooShort { .. } => {
            anyhow::Error::new(error).context(arguments.data.display().to_string())
        }
        other => other.into(),
    })?;
    progress.finish(&format!("{} windows of {} tokens", outcome.windows, config.context));
    if arguments.json {
        return output::json(&outcome);
    }
    output::line(format!("perplexity      {:.4}", outcome.ppl))?;
    if let (Some(ppl), Some(kl), Some(agreement)) = (outcome.teacher_ppl, outcome.kl, outcome.top1_agreement)
    {
        output::line(format!("teacher         {ppl:.4}"))?;
        output::line(format!("KL              {kl:.4} nats per token"))?;
        output::line(format!("agreement       {:.2} %", agreement * 100.0))?;
    }
    output::line(format!("tokens scored   {}", outcome.tokens))?;
    Ok(())
}
