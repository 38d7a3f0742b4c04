//! `edgec tokenize`.

use std::io::Read;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use edgec::text::HostTokenizer;

use super::output;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file (a vocabulary alone will do), Hugging Face folder or run's folder
    model: PathBuf,
    /// Leave out the BOS that the vocabulary asks for
    #[arg(long)]
    no_bos: bool,
    /// Read special tokens such as <|im_start|> in the text as tokens
    #[arg(long)]
    special: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let tokenizer = HostTokenizer::open(&arguments.model)?;
    let mut text = Vec::new();
    std::io::stdin().lock().read_to_end(&mut text).context("standard input")?;
    let ids = tokenizer.encode_bytes(&text, !arguments.no_bos, arguments.special)?;
    Ok(output::line(serde_json::to_string(&ids)?)?)
}
