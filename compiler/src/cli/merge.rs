//! `edgec merge`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use edgec::adapter;
use edgec::export::gguf::Mix;
use edgec::model::Model;
use edgec::profile::eval::{Config, Score};
use edgec::profile::parity::{Parity, parity};
use edgec::profile::{self, Adapter, ModelFile};
use edgec::text::HostTokenizer;
use edgec::train::random::SplitMix64;
use edgec::train::trainer::fingerprint;
use edgec::{demo, export, quantize, teacher};

use super::output;
use super::progress::note;

/// Tokens of a window on which the models are compared.
const WINDOW: usize = 256;

/// KL in nats per token that rounding may make of merging in f32.
const ROUNDING: f64 = 1e-5;

#[derive(Args)]
pub struct Arguments {
    /// GGUF file, Hugging Face folder or run's folder
    base: PathBuf,
    /// Adapters: PEFT's folders, folders of `edgec tune` or GGUF LoRAs, perhaps with a scale
    #[arg(required = true, value_name = "ADAPTER[=SCALE]", value_parser = Adapter::argument)]
    adapters: Vec<(PathBuf, f32)>,
    /// The file (.gguf) or the Hugging Face folder to write
    #[arg(long)]
    out: PathBuf,
    /// Tensor types of a GGUF file
    #[arg(long = "type", value_name = "TYPE", default_value = "F16")]
    mix: Mix,
    /// Text on which base with adapters, merged and written model are compared [default: text inside this program]
    #[arg(long)]
    data: Option<PathBuf>,
    /// Windows of 256 tokens of it
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    windows: u32,
    /// Largest KL, nats per token, of what is written from base and adapters [default: 1e-5 for F32, 1e-3 for F16, 1e-2
    /// for BF16 and Q8_0; what coarser types lose is printed alone]
    #[arg(long)]
    tolerance: Option<f64>,
    /// One JSON document on standard output
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// The largest KL of what is written; infinite where there is no reason to refuse it.
    fn limit(&self) -> f64 {
        let usual = match self.mix {
            _ if !self.writes_file() => ROUNDING,
            Mix::F32 => ROUNDING,
            Mix::F16 => 1e-3,
            Mix::BF16 | Mix::Q8_0 => 1e-2,
            _ => f64::INFINITY,
        };
        self.tolerance.unwrap_or(usual)
    }

    fn writes_file(&self) -> bool {
        self.out.extension().is_some_and(|extension| extension == "gguf")
    }
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let base = teacher::load(&arguments.base)?;
    let read = |(path, scale): &(PathBuf, f32)| Ok((adapter::read(path, &base.spec)?, *scale));
    let adapters: Vec<_> = arguments.adapters.iter().map(read).collect::<anyhow::Result<_>>()?;
    let mut merged = base.clone();
    adapter::merge_all(&mut merged, &adapters)?;
    let (ids, config) = text(arguments, &base)?;
    let compare = |file: &ModelFile| {
        note("merge", "comparing base with adapters, merged weights and what is written");
        let found = parity(&base, &adapters, &merged, file, &ids, &config)?;
        check(&found, arguments)?;
        anyhow::Ok(found)
    };
    let found = if arguments.writes_file() {
        // Beside its place until it is known to be right.
        let folder = arguments.out.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let place = || arguments.out.display().to_string();
        let unchecked = tempfile::Builder::new().prefix(".edgec-").suffix(".gguf").tempfile_in(folder);
        let unchecked = unchecked.with_context(place)?.into_temp_path();
        quantize::quantize_file(&merged, arguments.mix, &unchecked).with_context(place)?;
        let found = compare(&profile::open(&unchecked)?)?;
        unchecked.persist(&arguments.out).with_context(place)?;
        found
    } else {
        let found = compare(&profile::lay_out(&merged, &arguments.out)?)?;
        export::hf::write(&merged, &arguments.out)?;
        if fingerprint(&teacher::load(&arguments.out)?)? != fingerprint(&merged)? {
            bail!("{}: other weights than were merged are in the folder", arguments.out.display());
        }
        found
    };
    print(arguments, &found)
}

/// The tokens on which models are compared: of the text, or, for a model without a vocabulary, any.
fn text(arguments: &Arguments, base: &Model) -> anyhow::Result<(Vec<u32>, Config)> {
    let windows = arguments.windows as usize;
    let context = WINDOW.min(base.spec.context);
    let mut config = Config { context, windows: Some(windows), score: Score::All, bos: None };
    if base.vocabulary.is_none() {
        if let Some(data) = &arguments.data {
            bail!("{}: {} has no vocabulary for it", data.display(), arguments.base.display());
        }
        note("merge", "the model has no vocabulary: compared on random tokens");
        let mut random = SplitMix64::new(0, 0);
        let ids = (0..windows * context).map(|_| random.below(base.spec.vocab) as u32).collect();
        return Ok((ids, config));
    }
    let text = match &arguments.data {
        Some(path) => fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => demo::HELD_OUT.to_owned(),
    };
    let tokenizer = HostTokenizer::of(&profile::open(&arguments.base)?)?;
    config.bos = tokenizer.bos_to_add();
    Ok((tokenizer.encode(&text, true, false)?, config))
}

fn check(found: &Parity, arguments: &Arguments) -> anyhow::Result<()> {
    let rounding = arguments.tolerance.unwrap_or(0.0).max(ROUNDING);
    let written = arguments.limit();
    for (what, kl, limit) in [("merged", found.merged_kl, rounding), ("written", found.exported_kl, written)]
    {
        // What is no number is above every limit.
        if !kl.is_finite() || kl > limit {
            let place = arguments.out.display();
            bail!(
                "{place}: KL of the {what} model from base and adapters is {kl:.2e}, expected at most {limit:.0e}"
            );
        }
    }
    Ok(())
}

fn print(arguments: &Arguments, found: &Parity) -> anyhow::Result<()> {
    if arguments.json {
        return output::json(found);
    }
    let row = |name: &str, ppl: f64, kl: f64| vec![name.to_owned(), format!("{ppl:.4}"), format!("{kl:.2e}")];
    let written = match arguments.writes_file() {
        true => format!("{} ({})", arguments.out.display(), arguments.mix),
        false => arguments.out.display().to_string(),
    };
    let header = ["", "perplexity", "KL (nats/token)"].map(str::to_owned).to_vec();
    output::line(output::table(&[
        header,
        row("base + adapters", found.unmerged_ppl, 0.0),
        row("merged", found.merged_ppl, found.merged_kl),
        row(&written, found.exported_ppl, found.exported_kl),
    ]))?;
    Ok(())
}
