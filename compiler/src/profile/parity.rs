//! Whether a merged model still says what its base says with the adapters beside it.
//!
//! LoRAs run beside f32 weights in the runtime. A DoRA has no place there: it runs in the differentiable graph, and
//! the model that it was merged into is then the base of the others.

use std::path::Path;
use std::sync::Arc;

use super::eval::{Config, Outcome, evaluate_all};
use super::{Adapter, Error, ModelFile, Settings, lay_out};
use crate::adapter::{self, Adapter as HostAdapter};
use crate::model::Model;
use crate::train::Precision;
use crate::train::adapter::Base;
use crate::train::graph::Decoder;
use crate::train::loss::divergence;

/// What was found, on the same positions of the same text.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Parity {
    /// Perplexity of the base with the adapters beside it.
    pub unmerged_ppl: f64,
    /// Perplexity of the merged weights in f32.
    pub merged_ppl: f64,
    /// KL(unmerged || merged) in nats per token.
    pub merged_kl: f64,
    /// Perplexity of the exported file.
    pub exported_ppl: f64,
    /// KL(unmerged || exported) in nats per token; from the merged weights where there is a DoRA.
    pub exported_kl: f64,
    /// Positions that counted.
    pub tokens: usize,
}

/// Compares `base` with `adapters` beside it, `merged` and the file `exported` on the tokens `ids`.
///
/// # Errors
/// Several DoRAs, a text that is shorter than one window, or a model that the runtime refuses.
pub fn parity(
    base: &Model,
    adapters: &[(HostAdapter, f32)],
    merged: &Model,
    exported: &ModelFile,
    ids: &[u32],
    config: &Config,
) -> Result<Parity, Error> {
    let (doras, loras): (Vec<_>, Vec<_>) = adapters.iter().partition(|(adapter, _)| adapter.is_dora());
    let mut with_dora = None;
    let mut graph = None;
    if let Some((dora, scale)) = doras.first() {
        let mut model = base.clone();
        adapter::merge(&mut model, dora, *scale)?;
        graph = Some(in_graph(base, dora, *scale, &model, ids, config)?);
        with_dora = Some(model);
    }
    let base = lay_out(with_dora.as_ref().unwrap_or(base), Path::new("(base)"))?;
    let beside = loras.iter().map(|(adapter, scale)| {
        let bytes = adapter::export_to_vec(adapter, &merged.spec)?;
        Ok(Adapter { file: Arc::new(ModelFile::from_memory(&adapter.path, bytes)), scale: *scale })
    });
    let settings = Settings { adapters: beside.collect::<Result<_, Error>>()?, ..Settings::new(0) };
    let merged = lay_out(merged, Path::new("(merged)"))?;
    let pairs = [(1, Some(0)), (2, Some(0))];
    let models = [&base, &merged, exported];
    let [merged, exported]: [Outcome; 2] =
        evaluate_all(&models, pairs, ids, config, &settings, &mut |_, _, _| ())?;
    let (ppl, kl) = graph.unwrap_or((merged.teacher_ppl.unwrap_or(f64::NAN), 0.0));
    Ok(Parity {
        unmerged_ppl: ppl,
        merged_ppl: merged.ppl,
        merged_kl: kl + merged.kl.unwrap_or(f64::NAN),
        exported_ppl: exported.ppl,
        exported_kl: exported.kl.unwrap_or(f64::NAN),
        tokens: merged.tokens,
    })
}

/// Perplexity of `base` with `adapter` beside it, and KL from there to `merged`, both in the graph.
fn in_graph(
    base: &Model,
    adapter: &HostAdapter,
    scale: f32,
    merged: &Model,
    ids: &[u32],
    config: &Config,
) -> Result<(f64, f64), Error> {
    let mut adapter = adapter.clone();
    adapter.pairs.iter_mut().for_each(|pair| pair.scale *= scale);
    let beside = Base::dense(base, Precision::F32)?.with(&adapter)?;
    let merged = Decoder::new(&merged.spec, &merged.weights)?;
    let length = config.context - 1;
    let (mut nll, mut kl, mut count) = (0.0, 0.0, 0.0);
    for window in ids.chunks_exact(config.context).take(config.windows.unwrap_or(usize::MAX)) {
        let mut tokens = window[..length].to_vec();
        if let Some(bos) = config.bos {
            tokens[0] = bos;
        }
        let hidden = |decoder: &Decoder| decoder.hidden(&tokens, 1, length);
        let (theirs, ours) = (hidden(&beside)?, hidden(&merged)?);
        let found = divergence(&ours, &merged.head()?, &theirs, &beside.head()?, &window[1..])?;
        nll += found.teacher_cross_entropy * found.tokens as f64;
        kl += found.kl * found.tokens as f64;
        count += found.tokens as f64;
    }
    Ok(((nll / count).exp(), kl / count))
}
