//! `edgec logits`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use edge_run::Engine;
use edgec::train::graph::Decoder;
use edgec::{adapter, teacher};

use super::EngineArguments;
use super::progress::note;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, pack, Hugging Face folder or run's folder
    model: PathBuf,
    /// Token ids: `1,2,3`, or a file that holds such a list or a JSON array
    #[arg(long)]
    ids: String,
    /// What computes them
    #[arg(long, value_enum, default_value_t = Backend::Native)]
    backend: Backend,
    /// Safetensors file with `logits` f32 [tokens, vocab]
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    engine: EngineArguments,
}

#[derive(Clone, Copy, ValueEnum)]
enum Backend {
    /// The runtime of the device.
    Native,
    /// The differentiable graph.
    Candle,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let ids = parse_ids(&arguments.ids)?;
    if ids.is_empty() {
        bail!("--ids: no token ids");
    }
    let (logits, vocab) = match arguments.backend {
        Backend::Native => native(arguments, &ids)?,
        Backend::Candle => candle(arguments, &ids)?,
    };
    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![ids.len(), vocab], &bytes)?;
    let file = safetensors::serialize([("logits", view)], None)?;
    edgec::atomic::write(&arguments.out, |out| out.write_all(&file))
        .with_context(|| arguments.out.display().to_string())?;
    note("logits", &format!("{} x {vocab} to {}", ids.len(), arguments.out.display()));
    Ok(())
}

fn native(arguments: &Arguments, ids: &[u32]) -> anyhow::Result<(Vec<f32>, usize)> {
    let (file, settings) = arguments.engine.open(&arguments.model, ids.len())?;
    let mut engine = Engine::new(&file, settings)?;
    let mut session = engine.session(&file)?;
    let vocab = session.spec().vocab;
    let mut logits = vec![0.0; ids.len() * vocab];
    session
        .feed_all(ids, &mut |row, values| logits[row * vocab..][..vocab].copy_from_slice(values))
        .map_err(|error| file.refused(error))?;
    Ok((logits, vocab))
}

fn candle(arguments: &Arguments, ids: &[u32]) -> anyhow::Result<(Vec<f32>, usize)> {
    let mut model = teacher::load(&arguments.model)?;
    let read = |(path, scale): &(PathBuf, f32)| Ok((adapter::read(path, &model.spec)?, *scale));
    let adapters: Vec<_> = arguments.engine.adapter.iter().map(read).collect::<anyhow::Result<_>>()?;
    adapter::merge_all(&mut model, &adapters)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= model.spec.vocab) {
        bail!("--ids: token id {id}, the vocabulary has {}", model.spec.vocab);
    }
    let decoder = Decoder::new(&model.spec, &model.weights)?;
    let logits = decoder.logits(ids, 1, ids.len())?;
    Ok((logits.flatten_all()?.to_vec1()?, model.spec.vocab))
}

fn parse_ids(argument: &str) -> anyhow::Result<Vec<u32>> {
    let is_list = argument.chars().all(|c| c.is_ascii_digit() || c == ',' || c == ' ');
    let text = if is_list {
        argument.to_owned()
    } else {
        std::fs::read_to_string(argument).with_context(|| format!("--ids {argument}"))?
    };
    text.trim()
        .trim_start_matches('[')
        .trim_end_matches(']')
        .split([',', ' ', '\n'])
        .map(str::trim)
        .filter(|id| !id.is_empty())
        .map(|id| id.parse().with_context(|| format!("--ids: `{id}` is not a token id")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_lists_or_files() {
        assert_eq!(parse_ids("1,2, 3").unwrap(), [1, 2, 3]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "[4, 5,\n6]\n").unwrap();
        assert_eq!(parse_ids(file.path().to_str().unwrap()).unwrap(), [4, 5, 6]);
        assert!(parse_ids("no such file").is_err());
        std::fs::write(file.path(), "4, x").unwrap();
        let error = parse_ids(file.path().to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("`x`"), "{error}");
    }
}
