//! An adapter for a model: from text to PEFT's folder and a GGUF LoRA.

use std::path::{Path, PathBuf};

use edge_models::DecoderSpec;
use serde::{Deserialize, Serialize};

use super::stages::{Watch, describe, hash_model};
use super::text::{self, EVAL_WINDOWS, Wanted};
use super::{Data, Error, Observer, TeacherSource, folder};
use crate::adapter::{self, Adapter, Settings as AdapterSettings, Targets};
use crate::export::gguf::Mix;
use crate::model::Model;
use crate::profile::eval::{Config, Outcome, Score, evaluate};
use crate::profile::{self, ModelFile, Settings};
use crate::quantize::{HeldModel, quantize_file};
use crate::text::HostTokenizer;
use crate::text::corpus::Corpus;
use crate::train::adapter::{self as train_adapter, Base, Start};
use crate::train::trainee::Trainee;
use crate::train::trainer::{self, Text};
use crate::train::{Precision, RunFolder, TrainConfig};
use crate::{demo, teacher};

/// PEFT's folder inside a run's.
const ADAPTER: &str = "adapter";
/// The same for devices.
const GGUF: &str = "adapter.gguf";
/// The base in the blocks that were made for it.
const BASE: &str = "base.gguf";

/// What a run is asked to do. It is kept in the run's folder and must be the same on resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuneRecipe {
    /// The base.
    pub model: TeacherSource,
    /// The model whose predictions are learned, instead of the text itself; of the same vocabulary.
    #[serde(default)]
    pub teacher: Option<PathBuf>,
    /// Text to learn from.
    pub data: Data,
    /// Text to judge on; `None` holds out the end of `data`.
    pub eval_data: Option<PathBuf>,
    /// Learn answers only.
    pub mask_prompts: bool,
    /// Modules that are adapted, as [`Targets`] reads them.
    pub targets: String,
    /// Ranks and scales.
    pub adapter: AdapterSettings,
    /// Share of the inputs of `A` that is dropped.
    pub dropout: f32,
    /// Types of the base's blocks; `None` holds it in f32.
    pub base_quant: Option<String>,
    /// In what numbers a base in f32 is multiplied with.
    #[serde(default)]
    pub base_precision: Precision,
    /// Settings of the training.
    pub train: TrainConfig,
}

/// What came out of a run; `tune.json` in its folder.
#[derive(Clone, Debug, Serialize)]
pub struct Tuned {
    /// Version of this tool.
    pub edgec: String,
    /// What was asked.
    pub recipe: TuneRecipe,
    /// Hash of each input: name, SHA-256 in hexadecimal.
    pub inputs: Vec<(String, String)>,
    /// Numbers that were trained.
    pub parameters: u64,
    /// Bytes that the base took while it was trained beside.
    pub base_bytes: u64,
    /// Bytes that it takes in f32.
    pub base_f32_bytes: u64,
    /// The base by itself.
    pub before: Outcome,
    /// The base with the adapter.
    pub after: Outcome,
    /// What was written, inside the folder.
    pub artifacts: Vec<String>,
}

impl TuneRecipe {
    /// The base as the runtime reads it. Opened anew by each stage: what is laid out in memory for one of them is
    /// not there while training.
    fn file(&self) -> Result<ModelFile, Error> {
        Ok(match &self.model {
            TeacherSource::Embedded => demo::teacher(),
            TeacherSource::Path(path) => profile::open(path)?,
        })
    }

    /// All weights of the base in f32.
    fn dense(&self) -> Result<Model, Error> {
        Ok(match &self.model {
            TeacherSource::Embedded => from_file(&demo::teacher())?,
            TeacherSource::Path(path) => teacher::load(path)?,
        })
    }

    /// The base in blocks.
    fn held(&self, mix: Mix) -> Result<HeldModel, Error> {
        Ok(match &self.model {
            TeacherSource::Embedded => {
                let file = demo::teacher();
                teacher::held_from_gguf(&file.parse().map_err(profile::Error::from)?, file.path(), mix)?
            }
            TeacherSource::Path(path) => teacher::load_held(path, mix)?,
        })
    }
}

fn from_file(file: &ModelFile) -> Result<Model, Error> {
    Ok(teacher::from_gguf(&file.parse().map_err(profile::Error::from)?, file.path())?)
}

/// Does what `recipe` asks in `folder`, which must be new or empty, or hold a run to resume.
///
/// Of several processes only the first one touches the folder and has an answer; the others train with it.
///
/// # Errors
/// Whatever stops a stage; the checkpoint stays, and resuming goes on from there. Inputs that make no sense leave no
/// trace in a new folder.
pub fn tune(
    recipe: &TuneRecipe,
    folder: &RunFolder,
    observer: &mut dyn Observer,
) -> Result<Option<Tuned>, Error> {
    recipe.train.validate()?;
    let targets: Targets = recipe.targets.parse()?;
    let mix = recipe.base_quant.as_deref().map(str::parse::<Mix>).transpose();
    let mix = mix.map_err(|error| Error::Student(format!("--base-quant: {error}")))?;
    if mix.is_some() && recipe.base_precision != Precision::F32 {
        return Err(Error::Student("--base-precision: a base in blocks (--base-quant) has its own".into()));
    }
    let first = folder.processes.rank() == 0;
    let made = !folder.path.exists();
    if first {
        folder::open(&folder.path, folder.resume, recipe)?;
    }
    let prepared = prepare(recipe, &targets, mix, observer).inspect_err(|_| {
        if !folder.resume && first {
            folder::abandon(&folder.path, made);
        }
    })?;
    train(recipe, prepared, mix, folder, observer)
}

/// Everything that training needs.
struct Prepared {
    spec: DecoderSpec,
    base: Base,
    teacher: Option<Model>,
    /// The base is in blocks that its file has not.
    requantized: bool,
    trainee: Trainee<Adapter>,
    train: Corpus,
    eval: Vec<u32>,
    bos: Option<u32>,
    hashes: Vec<(String, String)>,
}

fn prepare(
    recipe: &TuneRecipe,
    targets: &Targets,
    mix: Option<Mix>,
    observer: &mut dyn Observer,
) -> Result<Prepared, Error> {
    let mut hashes = match &recipe.model {
        TeacherSource::Embedded => {
            observer.note("model", "none given: the small embedded one");
            vec![]
        }
        TeacherSource::Path(path) => hash_model(path)?,
    };
    let file = recipe.file()?;
    let spec = profile::spec_of(&file)?;
    let teacher = recipe.teacher.as_deref().map(teacher::load).transpose()?;
    if let (Some(teacher), Some(path)) = (&teacher, &recipe.teacher) {
        hashes.extend(hash_model(path)?);
        observer.note("teacher", &describe(teacher));
        if teacher.spec.vocab != spec.vocab {
            let (path, found) = (path.display(), teacher.spec.vocab);
            return Err(Error::Student(format!(
                "{path}: the teacher has {found} tokens, expected {} as the model has",
                spec.vocab
            )));
        }
    }
    let chosen = targets.choose(&spec)?;
    let tokenizer = HostTokenizer::of(&file)?;
    drop(file);
    let wanted = Wanted {
        data: &recipe.data,
        eval_data: recipe.eval_data.as_deref(),
        mask_prompts: recipe.mask_prompts,
        length: recipe.train.length,
    };
    let (train, eval) = text::read(&wanted, &tokenizer, &mut hashes, observer)?;
    observer.note(
        "text",
        &format!("{} tokens to learn from, {} held out to judge on", train.ids.len(), eval.len()),
    );
    let (base, requantized) = match mix {
        None => {
            let dense = recipe.dense()?;
            observer.note("model", &describe(&dense));
            (Base::dense(&dense, recipe.base_precision)?, false)
        }
        Some(mix) => {
            let held = recipe.held(mix)?;
            let how = if held.as_in_file { "as its file has them" } else { "made from its weights" };
            observer.note("model", &format!("matrices in blocks {how}: {}", held.types()));
            (Base::held(&held)?, !held.as_in_file)
        }
    };
    let [bytes, dense] = base.bytes();
    let share = 100.0 * bytes as f64 / dense as f64;
    let (megabytes, numbers) = (bytes as f64 / 1e6, base.numbers());
    observer.note(
        "model",
        &format!("frozen weights take {megabytes:.1} MB, {share:.1} % of f32; multiplied in {numbers}"),
    );
    let start = Start { dropout: recipe.dropout, seed: recipe.train.seed };
    let trainee = train_adapter::adapter(&base, &recipe.adapter, &chosen, start, Path::new(ADAPTER))?;
    let (trained, modules) = (trainee.trained(), chosen.len());
    observer.note("adapter", &format!("{trained} parameters beside {modules} matrices"));
    let bos = tokenizer.bos_to_add();
    Ok(Prepared { spec, base, teacher, requantized, trainee, train, eval, bos, hashes })
}

fn train(
    recipe: &TuneRecipe,
    prepared: Prepared,
    mix: Option<Mix>,
    folder: &RunFolder,
    observer: &mut dyn Observer,
) -> Result<Option<Tuned>, Error> {
    let Prepared { spec, base, teacher, requantized, trainee, train, eval, bos, hashes } = prepared;
    let parameters = trainee.trained();
    let text = Text { ids: &train.ids, scored: &train.scored };
    let mut watch = Watch { stage: "tune", observer: &mut *observer };
    let adapter = trainer::train(teacher.as_ref(), trainee, text, &recipe.train, folder, &mut watch)?;
    if folder.processes.rank() > 0 {
        return Ok(None);
    }
    let [base_bytes, base_f32_bytes] = base.bytes();
    // What follows may need the model in f32.
    drop((base, teacher));
    let mut artifacts = write(&adapter, recipe, &spec, &folder.path, observer)?;
    let file = match mix.filter(|_| requantized) {
        None => recipe.file()?,
        Some(mix) => {
            let path = folder.path.join(BASE);
            quantize_file(&recipe.dense()?, mix, &path)?;
            observer.note("export", &format!("{BASE}: the base as it was trained beside ({mix})"));
            artifacts.push(BASE.into());
            profile::open(&path)?
        }
    };
    let teacher = recipe.teacher.as_deref().map(profile::open).transpose()?;
    let judge = Judge { length: recipe.train.length, bos, eval: &eval, teacher: teacher.as_ref() };
    let before = judge.outcome(&file, Settings::new(0), "before", observer)?;
    let after = judge.adapted(file, &adapter, observer)?;
    let tuned = Tuned {
        edgec: env!("CARGO_PKG_VERSION").to_owned(),
        recipe: recipe.clone(),
        inputs: hashes,
        parameters,
        base_bytes,
        base_f32_bytes,
        before,
        after,
        artifacts,
    };
    folder::write_json(&folder.path, "tune.json", &tuned)?;
    Ok(Some(tuned))
}

/// Writes the adapter in both formats, as far as they can hold it; answers what was written.
fn write(
    adapter: &Adapter,
    recipe: &TuneRecipe,
    spec: &DecoderSpec,
    folder: &Path,
    observer: &mut dyn Observer,
) -> Result<Vec<String>, Error> {
    let base = match &recipe.model {
        TeacherSource::Embedded => "(embedded)".to_owned(),
        TeacherSource::Path(path) => path.display().to_string(),
    };
    adapter::write(adapter, spec, &base, &folder.join(ADAPTER))?;
    observer.note("export", &format!("{ADAPTER}/ (PEFT's folder)"));
    if adapter.is_dora() {
        let how = "`edgec merge` writes the model that it makes, `edgec export` a LoRA as large as they are";
        observer.note("export", &format!("no {GGUF}: a DoRA changes the weights themselves; {how}"));
        return Ok(vec![ADAPTER.into()]);
    }
    adapter::export(adapter, spec, &folder.join(GGUF))?;
    observer.note("export", &format!("{GGUF} (for devices and llama.cpp)"));
    Ok(vec![ADAPTER.into(), GGUF.into()])
}

/// How a model is judged.
struct Judge<'a> {
    length: usize,
    bos: Option<u32>,
    eval: &'a [u32],
    teacher: Option<&'a ModelFile>,
}

impl Judge<'_> {
    fn outcome(
        &self,
        file: &ModelFile,
        settings: Settings,
        name: &str,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, Error> {
        let config =
            Config { context: self.length, windows: Some(EVAL_WINDOWS), score: Score::All, bos: self.bos };
        Ok(evaluate(file, self.teacher, self.eval, &config, &settings, &mut |done, total, ppl| {
            observer.progress("evaluate", done, total, &format!("perplexity {name} {ppl:.2}"));
        })?)
    }

    /// The model with the adapter beside it, or merged where it cannot be.
    fn adapted(
        &self,
        file: ModelFile,
        adapter: &Adapter,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, Error> {
        let mut settings = Settings::new(0);
        let spec = profile::spec_of(&file)?;
        if !adapter.is_dora() {
            let bytes = adapter::export_to_vec(adapter, &spec)?;
            let beside = ModelFile::from_memory(&adapter.path, bytes);
            settings.adapters.push(profile::Adapter { file: beside.into(), scale: 1.0 });
            return self.outcome(&file, settings, "after", observer);
        }
        let mut merged = from_file(&file)?;
        adapter::merge(&mut merged, adapter, 1.0)?;
        self.outcome(&profile::lay_out(&merged, file.path())?, settings, "after", observer)
    }
}
