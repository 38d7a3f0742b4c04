//! The stages of a run, in order, each from what the one before left in the folder.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use edge_targets::Target;
use serde::Serialize;

use super::manifest::{Artifact, Manifest, sha256};
use super::prune::Pruned;
use super::teaching::{Inputs, Lesson};
use super::text::EVAL_WINDOWS;
use super::{Error, Observer, Recipe, folder};
use crate::export::gguf::Mix;
use crate::model::Model;
use crate::pack::{self, PACK_FILE};
use crate::profile::eval::{Config, Outcome, Score, evaluate_all};
use crate::profile::{self, ModelFile, Settings, bench};
use crate::quantize::Encoding;
use crate::quantize::calibrate::{self, Method, Rounding, Sample};
use crate::report::{self, ModelRow, Summary};
use crate::text::corpus::spread;
use crate::train::parallel::Communicator;
use crate::train::trainer::{Progress, StepReport, Teacher, fingerprint};
use crate::train::{self, Quantized, RunFolder, cache, trainee, trainer};
use crate::{bundle, export, teacher};

/// Tokens on which a student is rounded.
const ROUNDING_TOKENS: usize = 16_384;

/// A run under way.
pub(super) struct Run<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) folder: &'a Path,
    pub(super) processes: &'a dyn Communicator,
    pub(super) observer: &'a mut dyn Observer,
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
    recipe.check_teacher()?;
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
        let sample =
            Sample { ids: &sample, length: config.length, bos: inputs.reader.tokenizer.bos_to_add() };
        let start = if self.recipe.qat {
            let observer = &mut *self.observer;
            let mut tell = |done, total, message: &str| observer.progress("round", done, total, message);
            Some(calibrate::round_model(&untrained, mix.into(), sample, Rounding::default(), &mut tell)?)
        } else {
            None
        };
        let lesson = self.lesson(inputs)?;
        let mut watch = Watch { stage: "distill", observer: &mut *self.observer };
        let cache = match lesson {
            Lesson::Model => cache::fill(inputs.teacher()?, inputs.text(), config, folder, &mut watch)?,
            _ => None,
        };
        if lesson != Lesson::Model || cache.is_some() {
            // All that it has to say is on the disk, or said by another.
            inputs.forget_reader();
        }
        let interpreter = inputs.interpreter()?;
        let teacher = Some(match (lesson, &cache, &interpreter) {
            (Lesson::Data, ..) => Teacher::Said(&inputs.train.soft),
            (_, Some(cache), _) => Teacher::Cache(cache),
            (_, _, Some(interpreter)) => Teacher::Foreign(inputs.teacher()?, interpreter),
            (..) => Teacher::Model(inputs.teacher()?, kept),
        });
        let text = inputs.text();
        if let Some(start) = start {
            let student = train::quantized(untrained, start)?;
            return Ok(trainer::train_from(teacher, student, text, config, folder, &mut watch)?);
        }
        let student = trainee::full(untrained, config)?;
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
        let (name, beside) = inputs.beside();
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
            title: inputs.title(),
            target: self.recipe.target.clone(),
            teacher: self.row(name, &beside.model, &beside.file, of_teacher)?,
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
            bos: inputs.reader.tokenizer.bos_to_add(),
        };
        let models = [&inputs.beside().1.file, trained, shipped, packed];
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
