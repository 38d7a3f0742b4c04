//! The stages of a run, in order, each from what the one before left in the folder.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use edge_targets::Target;
use serde::Serialize;

use super::manifest::{Artifact, Manifest, sha256};
use super::prune::Pruned;
use super::text::{self, EVAL_WINDOWS, Wanted};
use super::{Error, Observer, Recipe, TeacherSource, folder};
use crate::export::gguf::Mix;
use crate::model::{Model, Weights};
use crate::pack::{self, PACK_FILE};
use crate::profile::eval::{Config, Outcome, Score, evaluate_all};
use crate::profile::{self, ModelFile, Settings, bench};
use crate::quantize::Encoding;
use crate::quantize::calibrate::{self, Method, Rounding, Sample};
use crate::report::{self, ModelRow, Summary};
use crate::student::StudentError;
use crate::text::HostTokenizer;
use crate::text::corpus::{Corpus, spread};
use crate::train::parallel::Communicator;
use crate::train::trainer::{Progress, StepReport, Teacher, Text, fingerprint};
use crate::train::{self, Quantized, RunFolder, cache, trainee, trainer};
use crate::{adapter, bundle, demo, export, student, teacher};

/// Tokens on which a student is rounded.
const ROUNDING_TOKENS: usize = 16_384;

/// A run under way.
pub(super) struct Run<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) folder: &'a Path,
    pub(super) processes: &'a dyn Communicator,
    pub(super) observer: &'a mut dyn Observer,
}

/// Everything that the stages after loading need.
pub(super) struct Inputs {
    pub(super) teacher: Model,
    teacher_file: ModelFile,
    tokenizer: HostTokenizer,
    pub(super) train: Corpus,
    eval: Vec<u32>,
    hashes: Vec<(String, String)>,
    /// The tokens that stayed of a trimmed vocabulary.
    pub(super) kept_tokens: Option<Vec<u32>>,
}

/// A teacher and what reads text for it.
struct Speaker {
    model: Model,
    file: ModelFile,
    tokenizer: HostTokenizer,
}

/// Does what `recipe` asks in `folder`, which must be new or empty, or hold a run to resume.
///
/// Of several processes only the first one touches the folder and has an answer; the others train with it.
///
/// # Errors
/// Whatever stops a stage. What the stages before it made stays, and resuming goes on from there; inputs
/// that make no sense leave no trace in a new folder.
pub fn distill(
    recipe: &Recipe,
    folder: &RunFolder,
    observer: &mut dyn Observer,
) -> Result<Option<Manifest>, Error> {
    let target = Target::by_name(&recipe.target).map_err(|error| Error::Student(error.to_string()))?;
    let mix: Mix = recipe.quant.parse().map_err(|error| Error::Student(format!("--quant: {error}")))?;
    recipe.train.validate()?;
    let RunFolder { path, resume, processes, .. } = folder;
    recipe.fits(processes.size())?;
    let mut run = Run { recipe, folder: path, processes: &**processes, observer };
    let made = !path.exists();
    if run.is_first() {
        folder::open(path, *resume, recipe)?;
    }
    let inputs_and_student = run.load().and_then(|inputs| Ok((run.student(&inputs)?, inputs)));
    let (pruned, mut inputs) = inputs_and_student.inspect_err(|_| {
        if !*resume && run.is_first() {
            folder::abandon(path, made);
        }
    })?;
    let Pruned { model: untrained, kept } = run.heal(&inputs, pruned, folder)?;
    let Quantized { model: trained, encoding } = run.train(&mut inputs, untrained, &kept, mix, folder)?;
    if !run.is_first() {
        return Ok(None);
    }
    run.export(&trained, &encoding)?;
    run.observer.note("bundle", &format!("libedge for {} ({})", target.name, target.triple));
    let library = bundle::build(&target, path)?;
    let chat = bundle::write_chat(&profile::open(&run.path("student.gguf"))?, path)?;
    run.observer.note("bundle", &chat);
    run.judge(&inputs, &trained, kept, &library).map(Some)
}

impl Run<'_> {
    /// Whether this process is the one that reads and writes the folder.
    pub(super) fn is_first(&self) -> bool {
        self.processes.rank() == 0
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(super) fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), Error> {
        folder::write_json(self.folder, name, value)
    }

    fn load(&mut self) -> Result<Inputs, Error> {
        let recipe = self.recipe;
        let (mut model, mut file, mut hashes) = match &recipe.teacher {
            TeacherSource::Embedded => {
                let file = demo::teacher();
                let model = teacher::from_gguf(&file.parse().map_err(profile::Error::from)?, file.path())?;
                self.observer.note("teacher", "none given: the small embedded one");
                (model, file, vec![])
            }
            TeacherSource::Path(path) => {
                let hashes = hash_model(path)?;
                (teacher::load(path)?, profile::open(path)?, hashes)
            }
        };
        if let Some(path) = &recipe.teacher_adapter {
            let adapter = adapter::read(path, &model.spec)?;
            adapter::merge(&mut model, &adapter, 1.0)?;
            hashes.extend(hash_model(&adapter.path)?);
            file = profile::lay_out(&model, file.path())?;
            self.observer.note("teacher", &format!("adapter {} is merged into it", adapter.path.display()));
        }
        self.observer.note("teacher", &describe(&model));
        let tokenizer = HostTokenizer::of(&file)?;
        let mut speaker = Speaker { model, file, tokenizer };
        let wanted = Wanted {
            data: &recipe.data,
            eval_data: recipe.eval_data.as_deref(),
            mask_prompts: recipe.mask_prompts,
            length: recipe.train.length,
        };
        let mut kept_tokens = None;
        if let Some(least) = recipe.prune.vocabulary {
            let corpus = text::corpus(&wanted, &speaker.tokenizer)?;
            kept_tokens = Some(self.trim(&mut speaker, &corpus, least)?);
        }
        let Speaker { model: teacher, file: teacher_file, tokenizer } = speaker;
        let (train, eval) = text::read(&wanted, &tokenizer, &mut hashes, self.observer)?;
        self.observer.note(
            "text",
            &format!("{} tokens to distill on, {} held out to judge on", train.ids.len(), eval.len()),
        );
        Ok(Inputs { teacher, teacher_file, tokenizer, train, eval, hashes, kept_tokens })
    }

    /// Trims the teacher's vocabulary to what `corpus` uses at least `least` times; answers the tokens that stay.
    fn trim(&mut self, speaker: &mut Speaker, corpus: &Corpus, least: u32) -> Result<Vec<u32>, Error> {
        let vocabulary = speaker.model.vocabulary.as_ref();
        let vocabulary = vocabulary.ok_or_else(|| StudentError::Trim("the teacher has none".into()))?;
        let keep = student::tokens_to_keep(vocabulary, &corpus.ids, least)?;
        let before = speaker.model.spec.vocab;
        speaker.model = student::trim(&speaker.model, &keep)?;
        speaker.file = profile::lay_out(&speaker.model, Path::new("(teacher with a trimmed vocabulary)"))?;
        speaker.tokenizer = HostTokenizer::of(&speaker.file)?;
        let spoken = corpus.ids.iter().filter(|id| keep.binary_search(id).is_ok()).count();
        let share = 100.0 * spoken as f64 / corpus.ids.len().max(1) as f64;
        self.observer.note(
            "vocabulary",
            &format!("{} of {before} tokens stay: those of {share:.2} % of the text", keep.len()),
        );
        Ok(keep)
    }

    /// The trained student and what its file is to hold.
    fn train(
        &mut self,
        inputs: &mut Inputs,
        untrained: Model,
        kept: &[usize],
        mix: Mix,
        folder: &RunFolder,
    ) -> Result<Quantized, Error> {
        let config = &self.recipe.share();
        let sample = spread(&inputs.train.ids, ROUNDING_TOKENS, config.length);
        let sample = Sample { ids: &sample, length: config.length, bos: inputs.tokenizer.bos_to_add() };
        let start = if self.recipe.qat {
            let observer = &mut *self.observer;
            let mut tell = |done, total, message: &str| observer.progress("round", done, total, message);
            Some(calibrate::round_model(&untrained, mix.into(), sample, Rounding::default(), &mut tell)?)
        } else {
            None
        };
        let text = Text { ids: &inputs.train.ids, scored: &inputs.train.scored };
        let mut watch = Watch { stage: "distill", observer: &mut *self.observer };
        let cache = cache::fill(&inputs.teacher, text, config, folder, &mut watch)?;
        let teacher = Some(match &cache {
            Some(cache) => {
                // All that it has to say is on the disk.
                inputs.teacher.weights = Weights::default();
                Teacher::Cache(cache)
            }
            None => Teacher::Model(&inputs.teacher, kept),
        });
        if let Some(start) = start {
            let student = train::quantized(untrained, start)?;
            return Ok(trainer::train_from(teacher, student, text, config, folder, &mut watch)?);
        }
        let student = trainee::full(untrained, config.decay_embeddings)?;
        let trained = trainer::train_from(teacher, student, text, config, folder, &mut watch)?;
        // Who writes no file has none to round for.
        let method = if self.is_first() { self.recipe.rounding } else { Method::Plain };
        let observer = &mut *self.observer;
        let mut tell = |done, total, message: &str| observer.progress("round", done, total, message);
        let encoding = calibrate::encode(&trained, mix, method, sample, &mut tell)?;
        Ok(Quantized { model: trained, encoding })
    }

    fn export(&mut self, trained: &Model, encoding: &Encoding) -> Result<(), Error> {
        export::hf::write(trained, &self.path("student"))?;
        self.observer.note("export", "student/ (Hugging Face folder)");
        let path = self.path("student.gguf");
        let report = export::gguf::export_encoded(trained, encoding, &path)?;
        let mix = encoding.mix();
        self.observer
            .note("export", &format!("student.gguf ({mix}, {:.2} bits per weight)", report.bits_per_weight));
        let packed = pack::pack(&profile::open(&path)?, &self.path(PACK_FILE))?;
        self.observer.note("pack", &format!("{PACK_FILE}: {} matrices in tiles", packed.tiled));
        Ok(())
    }

    /// Measures student beside teacher, writes the report and the manifest.
    fn judge(
        &mut self,
        inputs: &Inputs,
        trained: &Model,
        kept_layers: Vec<usize>,
        library: &bundle::BundleReport,
    ) -> Result<Manifest, Error> {
        let teacher = &inputs.teacher_file;
        let trained_file = profile::lay_out(trained, Path::new("student (f32)"))?;
        let shipped = profile::open(&self.path("student.gguf"))?;
        let packed = profile::open(&self.path(PACK_FILE))?;
        let [quality, trained_quality, parity, pack_parity] =
            self.evaluate(inputs, [&trained_file, &shipped, &packed])?;
        let folder_parity = self.folder_parity(trained, trained_quality)?;
        let of_teacher = Outcome {
            ppl: quality.teacher_ppl.unwrap_or(f64::NAN),
            kl: Some(0.0),
            top1_agreement: Some(1.0),
            ..quality
        };
        let folder_bytes = fs::metadata(self.path("student/model.safetensors"))
            .map_err(|source| Error::Io { path: self.path("student"), source })?
            .len();
        let summary = Summary {
            title: inputs.teacher.name.clone(),
            target: self.recipe.target.clone(),
            teacher: self.row("teacher", &inputs.teacher, teacher, of_teacher)?,
            trained: self.row("student, f32", trained, &trained_file, trained_quality)?,
            student: self.row(&format!("student, {}", self.recipe.quant), trained, &shipped, quality)?,
            library_bytes: library.shared_bytes,
            cpu: bench::processor(),
        };
        report::write(&self.path("report.html"), self.folder, self.recipe, &kept_layers, &summary)?;
        let artifact = |path: &str, parity| {
            Artifact::new(self.folder, path, parity)
                .map_err(|source| Error::Io { path: self.folder.join(path), source })
        };
        let inside =
            |path: &Path| path.strip_prefix(self.folder).unwrap_or(path).to_string_lossy().into_owned();
        let mut artifacts = vec![
            Artifact {
                path: "student".into(),
                bytes: folder_bytes,
                ..artifact("student/model.safetensors", Some(folder_parity))?
            },
            artifact("student.gguf", Some(parity))?,
            artifact(PACK_FILE, Some(pack_parity))?,
            artifact(&inside(&library.shared), None)?,
            artifact(&inside(&library.archive), None)?,
            artifact("report.html", None)?,
        ];
        if self.path(bundle::CHAT_FILE).exists() {
            artifacts.push(artifact(bundle::CHAT_FILE, None)?);
        }
        let manifest = Manifest {
            edgec: env!("CARGO_PKG_VERSION").to_owned(),
            recipe: self.recipe.clone(),
            inputs: inputs.hashes.clone(),
            kept_layers,
            artifacts,
            summary,
        };
        self.write_json("manifest.json", &manifest)?;
        Ok(manifest)
    }

    /// The shipped student and the trained weights beside the teacher, and the shipped student and its pack beside
    /// the trained weights.
    fn evaluate(
        &mut self,
        inputs: &Inputs,
        [trained, shipped, packed]: [&ModelFile; 3],
    ) -> Result<[Outcome; 4], Error> {
        let config = Config {
            context: self.recipe.train.length,
            windows: Some(EVAL_WINDOWS),
            score: Score::All,
            bos: inputs.tokenizer.bos_to_add(),
        };
        let models = [&inputs.teacher_file, trained, shipped, packed];
        let pairs = [(2, Some(0)), (1, Some(0)), (2, Some(1)), (3, Some(1))];
        let observer = &mut *self.observer;
        let mut tell = |done, total, ppl| {
            observer.progress("evaluate", done, total, &format!("student's perplexity {ppl:.2}"));
        };
        Ok(evaluate_all(&models, pairs, &inputs.eval, &config, &Settings::new(0), &mut tell)?)
    }

    /// The folder must hold the very weights that were trained; then its predictions are theirs.
    fn folder_parity(&self, trained: &Model, quality: Outcome) -> Result<Outcome, Error> {
        let path = self.path("student");
        let (found, expected) = (fingerprint(&teacher::load(&path)?)?, fingerprint(trained)?);
        if found != expected {
            let message = format!("weights {found}, expected {expected} (the trained ones)");
            return Err(Error::Damaged { path, message });
        }
        Ok(Outcome { teacher_ppl: Some(quality.ppl), kl: Some(0.0), top1_agreement: Some(1.0), ..quality })
    }

    fn row(
        &mut self,
        name: &str,
        model: &Model,
        file: &ModelFile,
        quality: Outcome,
    ) -> Result<ModelRow, Error> {
        let prompt = 128.min(model.spec.context / 2).max(1);
        let options =
            bench::Options { n_prompt: prompt, n_gen: 32, repetitions: 3, ..bench::Options::default() };
        self.observer.progress("latency", 0, 1, name);
        let tests = bench::run(file, &options).map_err(profile::Error::from)?;
        Ok(ModelRow::new(name, model, file.bytes().len() as u64, quality, &tests))
    }
}

/// Passes the trainer's steps on, as those of a stage.
pub(super) struct Watch<'a> {
    pub stage: &'static str,
    pub observer: &'a mut dyn Observer,
}

impl Progress for Watch<'_> {
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        let row = &report.row;
        // Without a teacher there is none.
        let kl = if row.kl > 0.0 { format!("  KL {:.4}", row.kl) } else { String::new() };
        let message =
            format!("loss {:.4}{kl}  lr {:.1e}  {:.0} tok/s", row.loss, row.lr, report.tokens_per_second);
        self.observer.progress(self.stage, row.step as usize, report.steps as usize, &message);
        ControlFlow::Continue(())
    }

    fn note(&mut self, message: &str) {
        self.observer.note(self.stage, message);
    }

    fn cached(&mut self, done: usize, total: usize) -> ControlFlow<()> {
        self.observer.progress("teacher", done, total, "windows in its cache");
        ControlFlow::Continue(())
    }
}

pub(super) fn describe(model: &Model) -> String {
    let spec = &model.spec;
    format!(
        "{} ({}): {:.2} M parameters, {} layers of {}",
        model.name,
        spec.family.name,
        spec.parameters() as f64 / 1e6,
        spec.layers,
        spec.hidden
    )
}

pub(super) fn hash(path: &Path) -> Result<(String, String), Error> {
    let hash = sha256(path).map_err(|source| Error::Io { path: path.into(), source })?;
    Ok((path.display().to_string(), hash))
}

/// The hash of a model's file, or of each weight file in its folder.
pub(super) fn hash_model(path: &Path) -> Result<Vec<(String, String)>, Error> {
    if path.is_file() {
        return Ok(vec![hash(path)?]);
    }
    let io = |source| Error::Io { path: path.into(), source };
    let mut files: Vec<PathBuf> = fs::read_dir(path)
        .map_err(io)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .map_err(io)?;
    files.retain(|file| {
        matches!(file.extension().and_then(|e| e.to_str()), Some("safetensors" | "json" | "gguf"))
    });
    files.sort();
    files.iter().map(|file| hash(file)).collect()
}
