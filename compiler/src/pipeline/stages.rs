//! The stages of a run, in order, each from what the one before left in the folder.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use edge_targets::Target;
use serde::{Deserialize, Serialize};

use super::manifest::{Artifact, Manifest, sha256};
use super::{Data, Error, Observer, Recipe, StudentSource, TeacherSource};
use crate::export::gguf::Mix;
use crate::model::Model;
use crate::pack::{self, PACK_FILE};
use crate::profile::eval::{Config, Outcome, Score, evaluate_all};
use crate::profile::{self, ModelFile, Settings, bench};
use crate::report::{self, ModelRow, Summary};
use crate::text::corpus::{self, Corpus};
use crate::text::{ChatTemplate, HostTokenizer};
use crate::train::parallel::{self, Communicator};
use crate::train::trainer::{Progress, StepReport, Text, fingerprint};
use crate::train::{RunFolder, TrainError, trainer};
use crate::{atomic, bundle, demo, export, quantize, student, teacher};

/// Windows of held-out text on which a run is judged, at most.
const EVAL_WINDOWS: usize = 16;

/// Share of the text that is held out where no other text to judge on is given.
const HELD_OUT: f64 = 0.05;

/// The choice of layers, as the run's folder keeps it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layers {
    kept: Vec<usize>,
    kl: f64,
}

/// A run under way.
struct Run<'a> {
    recipe: &'a Recipe,
    folder: &'a Path,
    processes: &'a dyn Communicator,
    observer: &'a mut dyn Observer,
}

/// Everything that the stages after loading need.
struct Inputs {
    teacher: Model,
    teacher_file: ModelFile,
    tokenizer: HostTokenizer,
    train: Corpus,
    eval: Vec<u32>,
    hashes: Vec<(String, String)>,
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
    let mut run = Run { recipe, folder: path, processes: &**processes, observer };
    let made = !path.exists();
    if run.is_first() {
        run.open(*resume)?;
    }
    let inputs_and_student = run.load().and_then(|inputs| Ok((run.student(&inputs)?, inputs)));
    let ((untrained, kept), inputs) = inputs_and_student.inspect_err(|_| {
        if !*resume && run.is_first() {
            run.abandon(made);
        }
    })?;
    let trained = run.train(&inputs, untrained, folder)?;
    if !run.is_first() {
        return Ok(None);
    }
    run.export(&trained, mix)?;
    run.observer.note("bundle", &format!("libedge for {} ({})", target.name, target.triple));
    let library = bundle::build(&target, path)?;
    let chat = bundle::write_chat(&profile::open(&run.path("student.gguf"))?, path)?;
    run.observer.note("bundle", &chat);
    run.judge(&inputs, &trained, kept, &library).map(Some)
}

impl Run<'_> {
    /// Whether this process is the one that reads and writes the folder.
    fn is_first(&self) -> bool {
        self.processes.rank() == 0
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Takes the folder: a new run writes down its recipe, a resumed one must find the same.
    fn open(&mut self, resume: bool) -> Result<(), Error> {
        let path = self.path("recipe.json");
        if resume {
            let text = match fs::read(&path) {
                Ok(text) => text,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(Error::NothingToResume {
                        path: self.folder.into(),
                        missing: "recipe.json is missing",
                    });
                }
                Err(source) => return Err(Error::Io { path, source }),
            };
            let found: Recipe = serde_json::from_slice(&text)
                .map_err(|error| Error::Damaged { path: path.clone(), message: error.to_string() })?;
            return match found.difference(self.recipe) {
                None => {
                    atomic::tidy(self.folder).map_err(|source| Error::Io { path: self.folder.into(), source })
                }
                Some(difference) => Err(Error::OtherRecipe { path: self.folder.into(), difference }),
            };
        }
        let in_use = fs::read_dir(self.folder).is_ok_and(|mut entries| entries.next().is_some());
        if in_use {
            return Err(Error::FolderInUse { path: self.folder.into() });
        }
        fs::create_dir_all(self.folder).map_err(|source| Error::Io { path: self.folder.into(), source })?;
        self.write_json("recipe.json", self.recipe)
    }

    /// Leaves the folder as it was before [`Run::open`]; `made` says that it was not there.
    fn abandon(&self, made: bool) {
        // This follows an error that is reported; whatever is left, the next run names.
        drop(fs::remove_file(self.path("recipe.json")));
        if made {
            drop(fs::remove_dir(self.folder));
        }
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), Error> {
        let path = self.path(name);
        atomic::write(&path, |file| {
            serde_json::to_writer_pretty(&mut *file, value)?;
            file.write_all(b"\n")
        })
        .map_err(|source| Error::Io { path, source })
    }

    fn load(&mut self) -> Result<Inputs, Error> {
        let recipe = self.recipe;
        let (teacher, teacher_file, mut hashes) = match &recipe.teacher {
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
        self.observer.note("teacher", &describe(&teacher));
        let tokenizer = HostTokenizer::of(&teacher_file)?;
        let template = ChatTemplate::of(&tokenizer);
        let corpus = match &recipe.data {
            Data::Embedded => {
                self.observer.note("text", "none given: the embedded one");
                corpus::from_text(demo::TEXT, &tokenizer)?
            }
            Data::Files(paths) => {
                for path in paths {
                    hashes.push(hash(path)?);
                }
                corpus::load(paths, &tokenizer, template.as_ref(), recipe.mask_prompts)?
            }
        };
        let length = recipe.train.length;
        let (train, eval) = match &recipe.eval_data {
            Some(path) => {
                hashes.push(hash(path)?);
                let paths = std::slice::from_ref(path);
                (corpus, corpus::load(paths, &tokenizer, template.as_ref(), false)?.ids)
            }
            None if recipe.data == Data::Embedded => {
                (corpus, corpus::from_text(demo::HELD_OUT, &tokenizer)?.ids)
            }
            None => {
                let count = held_out(corpus.ids.len(), length);
                corpus.split(count)
            }
        };
        if eval.len() < length || train.ids.len() <= length {
            let (text, found) = (recipe.text(), train.ids.len() + eval.len());
            return Err(Error::TextTooShort { text, found, needed: 2 * length + 1 });
        }
        self.observer.note(
            "text",
            &format!("{} tokens to distill on, {} held out to judge on", train.ids.len(), eval.len()),
        );
        Ok(Inputs { teacher, teacher_file, tokenizer, train, eval, hashes })
    }

    /// The student before training, and which of the teacher's layers it kept.
    fn student(&mut self, inputs: &Inputs) -> Result<(Model, Vec<usize>), Error> {
        let teacher = &inputs.teacher;
        let keep = match &self.recipe.student {
            StudentSource::Path(path) => {
                let model = teacher::load(path)?;
                student::check(teacher, &model)?;
                self.observer.note("student", &describe(&model));
                return Ok((model, vec![]));
            }
            StudentSource::Layers(layers) => *layers,
            StudentSource::Shrink(share) => student::shrink_to_layers(&teacher.spec, *share)?,
        };
        let layers = if self.is_first() { Some(self.layers(inputs, keep)?) } else { None };
        let layers = parallel::from_first(self.processes, layers).map_err(TrainError::from)?;
        let cut = student::cut(teacher, &layers.kept)?;
        let kept: Vec<String> = layers.kept.iter().map(ToString::to_string).collect();
        self.observer.note(
            "student",
            &format!("{}, layers {} (KL {:.3} before training)", describe(&cut), kept.join(" "), layers.kl),
        );
        Ok((cut, layers.kept))
    }

    /// The layers that the folder says, or a choice that is written there.
    fn layers(&mut self, inputs: &Inputs, keep: usize) -> Result<Layers, Error> {
        let path = self.path("layers.json");
        if let Ok(text) = fs::read(&path) {
            return serde_json::from_slice(&text)
                .map_err(|error| Error::Damaged { path, message: error.to_string() });
        }
        let layers = self.choose(inputs, keep)?;
        self.write_json("layers.json", &layers)?;
        Ok(layers)
    }

    fn choose(&mut self, inputs: &Inputs, keep: usize) -> Result<Layers, Error> {
        let length = self.recipe.train.length;
        let wanted = (self.recipe.calibration / length).max(1) * length;
        let ids = &inputs.train.ids;
        let calibration = &ids[..wanted.min(ids.len() / length * length)];
        let observer = &mut *self.observer;
        let choice =
            student::choose_layers(&inputs.teacher, keep, calibration, length, &mut |done, total, kl| {
                observer.progress("layers", done, total, &format!("KL {kl:.3}"));
            })?;
        Ok(Layers { kept: choice.kept, kl: choice.kl })
    }

    fn train(&mut self, inputs: &Inputs, untrained: Model, folder: &RunFolder) -> Result<Model, Error> {
        let text = Text { ids: &inputs.train.ids, scored: &inputs.train.scored };
        let mut watch = Watch { observer: &mut *self.observer };
        let trained =
            trainer::distill(&inputs.teacher, untrained, text, &self.recipe.train, folder, &mut watch)?;
        Ok(trained)
    }

    fn export(&mut self, trained: &Model, mix: Mix) -> Result<(), Error> {
        export::hf::write(trained, &self.path("student"))?;
        self.observer.note("export", "student/ (Hugging Face folder)");
        let path = self.path("student.gguf");
        let report = quantize::quantize_file(trained, mix, &path)?;
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

/// Passes the trainer's steps on.
struct Watch<'a> {
    observer: &'a mut dyn Observer,
}

impl Progress for Watch<'_> {
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        let row = &report.row;
        let message = format!(
            "loss {:.4}  KL {:.4}  lr {:.1e}  {:.0} tok/s",
            row.loss, row.kl, row.lr, report.tokens_per_second
        );
        self.observer.progress("distill", row.step as usize, report.steps as usize, &message);
        ControlFlow::Continue(())
    }

    fn note(&mut self, message: &str) {
        self.observer.note("distill", message);
    }
}

/// Tokens at the end of a text that are held out: a share of it, whole windows, at least one.
fn held_out(tokens: usize, length: usize) -> usize {
    let share = (tokens as f64 * HELD_OUT) as usize / length;
    share.clamp(1, EVAL_WINDOWS) * length
}

fn describe(model: &Model) -> String {
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

fn hash(path: &Path) -> Result<(String, String), Error> {
    let hash = sha256(path).map_err(|source| Error::Io { path: path.into(), source })?;
    Ok((path.display().to_string(), hash))
}

/// The hash of a model's file, or of each weight file in its folder.
fn hash_model(path: &Path) -> Result<Vec<(String, String)>, Error> {
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
