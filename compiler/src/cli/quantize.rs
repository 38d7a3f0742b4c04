//! `edgec quantize`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use edge_runtime::format::Gguf;
use edge_runtime::session::{Limits, Plan};
use edge_targets::Target;
use edgec::export::gguf::{Mix, encoded_to_vec, export_encoded, measure};
use edgec::model::Model;
use edgec::profile;
use edgec::quantize::budget::{self, Budget};
use edgec::quantize::calibrate::{Method, Rounding, Sample, imatrix, round_model, weigh};
use edgec::quantize::{Encoding, Imatrix, awq};
use edgec::teacher;
use edgec::text::{ChatTemplate, HostTokenizer, corpus};

use super::output;
use super::progress::{Progress, note};

/// Writes a model as GGUF in another tensor type.
///
/// Without text, every block is rounded by itself. With --calibration, each matrix is rounded for the activations
/// that the text brings to it, and makes up for the rounding before it (GPTQ). With --imatrix, columns weigh as
/// the file says, as in llama.cpp.
#[derive(Args)]
pub struct Arguments {
    /// GGUF file, Hugging Face folder or run's folder
    model: PathBuf,
    /// F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, Q6_K, Q5_K_M, Q5_K_S, Q4_K_M, Q4_K_S, IQ4_NL, Q3_K_L, Q3_K_M,
    /// Q3_K_S or Q2_K
    #[arg(long = "type", value_name = "TYPE")]
    mix: Option<Mix>,
    /// Choose a type for each tensor by what rounding it does to the predictions on the text of --calibration, for a
    /// file of at most so many bytes
    #[arg(long, value_name = "BYTES", conflicts_with = "mix", requires = "calibration")]
    budget_bytes: Option<u64>,
    /// The same for so many bits per weight
    #[arg(long, value_name = "BITS", conflicts_with_all = ["mix", "budget_bytes"], requires = "calibration")]
    budget_bpw: Option<f64>,
    /// The same for so many bytes of a device's memory: the file, and what a session of --budget-context tokens takes
    #[arg(long, value_name = "BYTES", conflicts_with_all = ["mix", "budget_bytes", "budget_bpw"], requires = "calibration")]
    budget_ram: Option<u64>,
    /// The same for so many milliseconds a token on --target, as its memory's bandwidth lets it read weights and KV cache
    /// at the end of --budget-context tokens
    #[arg(long, value_name = "MS", requires_all = ["calibration", "target"],
        conflicts_with_all = ["mix", "budget_bytes", "budget_bpw", "budget_ram"])]
    budget_ms: Option<f64>,
    /// Device of --budget-ms; `edgec targets` lists them
    #[arg(long, value_name = "NAME", requires = "budget_ms")]
    target: Option<String>,
    /// Tokens of context of --budget-ram and --budget-ms
    #[arg(long, value_name = "N", default_value_t = 2048)]
    budget_context: usize,
    /// The GGUF file to write; may be left out with --imatrix-out
    #[arg(long, required_unless_present = "imatrix_out")]
    out: Option<PathBuf>,
    #[command(flatten)]
    calibration: Calibration,
}

#[derive(Args)]
#[command(next_help_heading = "Calibration")]
struct Calibration {
    /// Text that is typical of the model's use, .txt or .jsonl; may be given again
    #[arg(long, value_name = "FILE")]
    calibration: Vec<PathBuf>,
    /// Tokens of it that are used, in windows from everywhere in it
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    calibration_tokens: usize,
    /// Tokens in a window
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=1 << 20))]
    calibration_length: u32,
    /// How to round [default: gptq with --calibration, imatrix with --imatrix, else plain]
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// Importance of columns, as llama.cpp's llama-imatrix or --imatrix-out wrote it
    #[arg(long, value_name = "FILE", conflicts_with = "calibration")]
    imatrix: Option<PathBuf>,
    /// Before rounding, make columns that matter larger and what feeds them smaller by as much (AWQ)
    #[arg(long)]
    awq: bool,
    /// Write the importance of columns on the text to this file, for here and for llama.cpp
    #[arg(long, value_name = "FILE", requires = "calibration")]
    imatrix_out: Option<PathBuf>,
    /// What is added to the diagonal of each Gram matrix of activations, as a share of its mean
    #[arg(long, value_name = "SHARE", default_value_t = Rounding::default().damping)]
    damping: f64,
    /// Share of the error of earlier matrices that a matrix makes up for, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = Rounding::default().propagation)]
    propagation: f32,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut model = teacher::load(&arguments.model)?;
    let ids = arguments.calibration.text(arguments)?;
    let sample = ids.as_ref().map(|(ids, bos)| Sample {
        ids,
        length: arguments.calibration.calibration_length as usize,
        bos: *bos,
    });
    let mut importance = arguments.calibration.importance(&model, sample)?;
    let Some(out) = &arguments.out else { return Ok(()) };
    let (name, encoding) = arguments.types(&model, sample)?;
    if arguments.calibration.awq {
        let importance = importance.as_mut().context("--awq needs --calibration or --imatrix")?;
        let mut progress = Progress::start("awq");
        let mut tell = |done, total, message: &str| progress.update(done, total, message);
        awq::scale(&mut model, importance, &encoding, &mut tell)?;
        progress.finish("columns are scaled");
    }
    let encoding = arguments.calibration.encode(&model, encoding, sample, importance.as_ref())?;
    let report = export_encoded(&model, &encoding, out).with_context(|| out.display().to_string())?;
    note(
        "quantize",
        &format!(
            "{name} {} to {}, {:.2} bits per weight",
            output::bytes(report.bytes),
            out.display(),
            report.bits_per_weight,
        ),
    );
    Ok(())
}

impl Arguments {
    /// What the types are called, and they.
    fn types(&self, model: &Model, sample: Option<Sample<'_>>) -> anyhow::Result<(String, Encoding)> {
        if let Some(mix) = self.mix {
            return Ok((mix.to_string(), mix.into()));
        }
        let budget = self.budget(model)?;
        let sample = sample.context("--calibration is missing")?;
        let mut progress = Progress::start("budget");
        let (method, damping) = (self.calibration.method(), self.calibration.rounding()?.damping);
        let mut tell = |done, total, name: &str| progress.update(done, total, name);
        let (encoding, kl) = budget::choose(model, budget, method, damping, sample, &mut tell)?;
        let mut counts = std::collections::BTreeMap::new();
        for (role, layer, _) in model.weights.iter().filter(|(role, ..)| !role.is_vector()) {
            *counts.entry(encoding.dtype(role, layer, &model.spec).name()).or_insert(0) += 1;
        }
        let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
        progress.finish(&format!("{}; KL {kl:.4} expected", counts.join(", ")));
        Ok(("mixed".to_owned(), encoding))
    }
}

impl Arguments {
    fn budget(&self, model: &Model) -> anyhow::Result<Budget> {
        if let Some(bytes) = self.budget_bytes {
            return Ok(Budget::File(bytes));
        }
        if let Some(bits) = self.budget_bpw {
            if !(bits > 0.0 && bits <= 32.0) {
                bail!("--budget-bpw is {bits}, expected above 0, up to 32");
            }
            let smallest = measure(model, &Mix::Q4_0.into())?;
            let data = (bits * smallest.weights as f64 / 8.0) as u64;
            return Ok(Budget::File(smallest.bytes - smallest.data_bytes + data));
        }
        if let Some(ram) = self.budget_ram {
            let session = self.session(model)?.arena_bytes() as u64;
            let file = ram.checked_sub(session).with_context(|| {
                format!(
                    "--budget-ram is {ram}, a session of {} tokens alone takes {session}",
                    self.budget_context
                )
            })?;
            return Ok(Budget::File(file));
        }
        let (Some(ms), Some(target)) = (self.budget_ms, &self.target) else {
            bail!("what to write is not said; give --type, or --budget-bytes, --budget-ram or --budget-ms");
        };
        if !(ms > 0.0 && ms.is_finite()) {
            bail!("--budget-ms is {ms}, expected above 0");
        }
        let target = Target::by_name(target)?;
        // A GB/s is a million bytes a millisecond.
        let read = (ms * target.bandwidth_gbs * 1e6) as u64;
        let cache = self.session(model)?.kv_bytes() as u64;
        let weights = read.checked_sub(cache).with_context(|| {
            format!("{} reads {read} bytes in {ms} ms, the KV cache alone has {cache}", target.name)
        })?;
        Ok(Budget::Read(weights))
    }

    /// What a session with quantized weights takes.
    fn session(&self, model: &Model) -> anyhow::Result<Plan> {
        let file = encoded_to_vec(model, &Mix::Q4_0.into())?;
        let limits = Limits { context: self.budget_context, ..Limits::default() };
        Ok(Plan::new(&Gguf::parse(&file)?, limits)?)
    }
}

impl Calibration {
    fn method(&self) -> Method {
        self.method.unwrap_or(match (self.calibration.is_empty(), &self.imatrix) {
            (_, Some(_)) => Method::Imatrix,
            (false, None) => Method::Gptq,
            (true, None) => Method::Plain,
        })
    }

    /// The settings of GPTQ.
    fn rounding(&self) -> anyhow::Result<Rounding> {
        if !(self.damping > 0.0 && self.damping <= 1.0) {
            bail!("--damping is {}, expected above 0, up to 1", self.damping);
        }
        if !(0.0..=1.0).contains(&self.propagation) {
            bail!("--propagation is {}, expected 0 to 1", self.propagation);
        }
        Ok(Rounding { damping: self.damping, propagation: self.propagation })
    }

    /// The tokens to calibrate on, and BOS where it begins a window.
    fn text(&self, arguments: &Arguments) -> anyhow::Result<Option<(Vec<u32>, Option<u32>)>> {
        if self.calibration.is_empty() {
            if self.method() == Method::Gptq || self.method() == Method::Imatrix && self.imatrix.is_none() {
                bail!("--method: there is no text to calibrate on; give --calibration FILE");
            }
            return Ok(None);
        }
        let tokenizer = HostTokenizer::of(&profile::open(&arguments.model)?)?;
        let template = ChatTemplate::of(&tokenizer);
        let ids = corpus::load(&self.calibration, &tokenizer, template.as_ref(), false)?.ids;
        let ids = corpus::spread(&ids, self.calibration_tokens, self.calibration_length as usize);
        Ok(Some((ids, tokenizer.bos_to_add())))
    }

    /// The importance of columns, from the file or the text, where it is needed.
    fn importance(&self, model: &Model, sample: Option<Sample<'_>>) -> anyhow::Result<Option<Imatrix>> {
        if let Some(path) = &self.imatrix {
            return Ok(Some(Imatrix::read(path)?));
        }
        let needed = self.imatrix_out.is_some() || self.awq || self.method() == Method::Imatrix;
        let Some(sample) = sample.filter(|_| needed) else {
            return Ok(None);
        };
        let mut progress = Progress::start("imatrix");
        let mut found =
            imatrix(model, sample, &mut |done, total, message| progress.update(done, total, message))
                .with_context(|| self.names())?;
        progress.finish(&format!("{} windows of {} tokens", found.windows, found.length));
        found.datasets = self.calibration.iter().map(|path| path.display().to_string()).collect();
        if let Some(path) = &self.imatrix_out {
            found.write(path)?;
        }
        Ok(Some(found))
    }

    fn names(&self) -> String {
        self.calibration.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    fn encode(
        &self,
        model: &Model,
        encoding: Encoding,
        sample: Option<Sample<'_>>,
        importance: Option<&Imatrix>,
    ) -> anyhow::Result<Encoding> {
        match (self.method(), sample, importance) {
            (Method::Gptq, Some(sample), _) => {
                let rounding = self.rounding()?;
                let mut progress = Progress::start("gptq");
                let mut tell = |done, total, message: &str| progress.update(done, total, message);
                let rounded = round_model(model, encoding, sample, rounding, &mut tell)
                    .with_context(|| self.names())?;
                progress.finish(&format!("{} tokens", sample.ids.len()));
                Ok(rounded.encoding)
            }
            (Method::Imatrix, _, Some(importance)) => {
                let place = self.imatrix.clone().unwrap_or_default();
                let mut known = std::collections::BTreeMap::new();
                for (role, layer, _) in model.weights.iter().filter(|(role, ..)| !role.is_vector()) {
                    known.insert((role, layer), importance.require(role, layer, &model.spec, &place)?);
                }
                Ok(weigh(model, encoding, |role, layer| known.get(&(role, layer)).cloned().flatten())?)
            }
            _ => Ok(encoding),
        }
    }
}
