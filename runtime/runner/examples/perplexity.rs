//! Perplexity of a model through one table of kernels, on a host or under qemu: what the paths of all processors make
//! of the same weights.
//!
//! `cargo run --release -p edge-run --example perplexity -- MODEL TEXT WINDOWS CONTEXT [KERNELS]`
//!
//! The first WINDOWS windows of CONTEXT tokens of TEXT, without BOS; tokens of the second half of each count.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;

use edge_run::{Engine, ModelFile, Settings};
use edge_runtime::tokenizer::{Encode, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [model, text, windows, context, kernels @ ..] = &arguments[..] else {
        return Err("expected MODEL TEXT WINDOWS CONTEXT [KERNELS]".into());
    };
    let (windows, context): (usize, usize) = (windows.parse()?, context.parse()?);
    let model = ModelFile::open(Path::new(model))?;
    let ids = tokens(&model, &fs::read(text)?)?;
    let found = ids.len() / context.max(1);
    if found < windows || windows == 0 || context < 4 {
        return Err(format!("{found} windows of {context} tokens in {text}, {windows} wanted").into());
    }
    let settings = Settings { kernels: kernels.first().cloned(), logits_rows: 16, ..Settings::new(context) };
    let mut engine = Engine::new(&model, settings)?;
    let (name, mut session) = (engine.kernels.name(), engine.session(&model)?);
    let (mut sum, mut count) = (0.0, 0);
    for window in ids.chunks_exact(context).take(windows) {
        session.truncate(0)?;
        // The last token before the second half is the first whose logits count.
        let (before, scored) = window.split_at(context / 2 - 1);
        session.feed(before)?;
        session.feed_all(&scored[..scored.len() - 1], &mut |at, logits| {
            sum += negative_log_likelihood(logits, scored[at + 1]);
            count += 1;
        })?;
    }
    println!("{name} {:.5}", (sum / f64::from(count)).exp());
    Ok(())
}

fn tokens(model: &ModelFile, text: &[u8]) -> Result<Vec<u32>, Box<dyn Error>> {
    let file = model.parse()?;
    let mut index = vec![0; Tokenizer::index_bytes(&file)?];
    let tokenizer = Tokenizer::new(&file, &mut index)?;
    let mut ids = vec![0; Tokenizer::most_ids(text.len())];
    let mut scratch = vec![0; Tokenizer::scratch_words(text.len())];
    let count = tokenizer.encode(text, Encode::default(), &mut scratch, &mut ids)?;
    ids.truncate(count);
    Ok(ids)
}

/// In nats.
fn negative_log_likelihood(logits: &[f32], token: u32) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - most).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - most)
}
