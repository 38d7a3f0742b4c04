//! Who teaches whom: the models of a run, who reads its text, and whose probabilities are learned.

use std::path::Path;

use super::stages::{Run, describe, hash_model};
use super::text::{self, Wanted};
use super::{Error, SoftSource, StudentSource, TeacherSource};
use crate::model::{Model, Weights};
use crate::profile::{self, ModelFile};
use crate::student::StudentError;
use crate::text::HostTokenizer;
use crate::text::corpus::Corpus;
use crate::train::TrainError;
use crate::train::interpreter::Interpreter;
use crate::train::trainer::Text;
use crate::{adapter, demo, student, teacher};

/// Windows of text in which two vocabularies are compared before training.
const COMPARED_WINDOWS: usize = 64;

/// A model and what reads text for it.
pub(super) struct Speaker {
    pub model: Model,
    pub file: ModelFile,
    pub tokenizer: HostTokenizer,
}

impl Speaker {
    fn load(path: &Path) -> Result<Self, Error> {
        let file = profile::open(path)?;
        Ok(Self { model: teacher::load(path)?, tokenizer: HostTokenizer::of(&file)?, file })
    }
}

/// Everything that the stages after loading need.
pub(super) struct Inputs {
    teacher: Option<Speaker>,
    /// A student that is not cut from the teacher.
    pub given: Option<Speaker>,
    /// The teacher has a vocabulary of its own.
    foreign: bool,
    pub train: Corpus,
    pub eval: Vec<u32>,
    pub hashes: Vec<(String, String)>,
    /// The tokens that stayed of a trimmed vocabulary.
    pub kept_tokens: Option<Vec<u32>>,
}

/// What a student learns from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lesson {
    /// A teacher of its vocabulary.
    Model,
    /// A teacher of another vocabulary.
    Foreign,
    /// What the data says.
    Data,
}

impl Inputs {
    /// The teacher's model.
    ///
    /// # Errors
    /// There is none, which a recipe that was checked does not ask for.
    pub fn teacher(&self) -> Result<&Model, Error> {
        let teacher = self.teacher.as_ref().ok_or_else(|| Error::Student("there is no teacher".into()))?;
        Ok(&teacher.model)
    }

    /// Gives its weights back; what it looks like stays.
    pub fn forget_teacher(&mut self) {
        if let Some(teacher) = &mut self.teacher {
            teacher.model.weights = Weights::default();
        }
    }

    /// Whose vocabulary the student has.
    pub fn reader(&self) -> &Speaker {
        reader(&self.teacher, &self.given, self.foreign).expect("a recipe has a teacher or a student")
    }

    /// What the student is judged beside: its teacher, or itself before where that has another vocabulary or is
    /// far away.
    pub fn beside(&self) -> (&'static str, &Speaker) {
        match &self.teacher {
            Some(teacher) if !self.foreign => ("teacher", teacher),
            _ => ("student before", self.reader()),
        }
    }

    /// What the run is called by.
    pub fn title(&self) -> String {
        self.teacher.as_ref().unwrap_or_else(|| self.reader()).model.name.clone()
    }

    pub fn text(&self) -> Text<'_> {
        Text { ids: &self.train.ids, scored: &self.train.scored }
    }

    /// Between the student's vocabulary and the teacher's.
    ///
    /// # Errors
    /// A refusal of a tokenizer.
    pub fn interpreter(&self) -> Result<Interpreter<'_>, Error> {
        let vocab = self.teacher()?.spec.vocab;
        let teacher = self.teacher.as_ref().map_or(&self.reader().tokenizer, |teacher| &teacher.tokenizer);
        Ok(Interpreter::new(&self.reader().tokenizer, teacher, vocab)?)
    }
}

/// Whose tokenizer reads the text.
fn reader<'a>(
    teacher: &'a Option<Speaker>,
    given: &'a Option<Speaker>,
    foreign: bool,
) -> Option<&'a Speaker> {
    match given {
        Some(given) if foreign || teacher.is_none() => Some(given),
        _ => teacher.as_ref(),
    }
}

impl Run<'_> {
    pub(super) fn load(&mut self) -> Result<Inputs, Error> {
        let recipe = self.recipe;
        let mut hashes = Vec::new();
        let mut teacher = match &recipe.teacher {
            Some(source) => Some(self.teacher(source, &mut hashes)?),
            None => {
                self.observer.note("teacher", "none: what the data says is learned");
                None
            }
        };
        let given = match &recipe.student {
            StudentSource::Path(path) => {
                hashes.extend(hash_model(path)?);
                Some(Speaker::load(path)?)
            }
            _ => None,
        };
        let wanted = Wanted {
            data: &recipe.data,
            eval_data: recipe.eval_data.as_deref(),
            mask_prompts: recipe.mask_prompts,
            length: recipe.train.length,
        };
        let foreign = recipe.train.other_vocabulary();
        if let (Some(teacher), Some(given), false) = (&teacher, &given, foreign) {
            student::check(&teacher.model, &given.model).map_err(|error| {
                let ways = "--align compares tokens that spell the same, --loss uld those of any vocabulary";
                Error::Student(format!("{error}; {ways}"))
            })?;
        }
        let mut kept_tokens = None;
        if let (Some(least), Some(teacher)) = (recipe.prune.vocabulary, &mut teacher) {
            let corpus = text::corpus(&wanted, &teacher.tokenizer)?;
            kept_tokens = Some(self.trim(teacher, &corpus, least)?);
        }
        let Some(reader) = reader(&teacher, &given, foreign) else {
            return Err(Error::Student("there is neither a teacher nor a student".into()));
        };
        let (train, eval) = text::read(&wanted, &reader.tokenizer, &mut hashes, self.observer)?;
        self.observer.note(
            "text",
            &format!("{} tokens to distill on, {} held out to judge on", train.ids.len(), eval.len()),
        );
        Ok(Inputs { teacher, given, foreign, train, eval, hashes, kept_tokens })
    }

    fn teacher(
        &mut self,
        source: &TeacherSource,
        hashes: &mut Vec<(String, String)>,
    ) -> Result<Speaker, Error> {
        let (mut model, mut file) = match source {
            TeacherSource::Embedded => {
                let file = demo::teacher();
                let model = teacher::from_gguf(&file.parse().map_err(profile::Error::from)?, file.path())?;
                self.observer.note("teacher", "none given: the small embedded one");
                (model, file)
            }
            TeacherSource::Path(path) => {
                hashes.extend(hash_model(path)?);
                (teacher::load(path)?, profile::open(path)?)
            }
        };
        if let Some(path) = &self.recipe.teacher_adapter {
            let adapter = adapter::read(path, &model.spec)?;
            adapter::merge(&mut model, &adapter, 1.0)?;
            hashes.extend(hash_model(&adapter.path)?);
            file = profile::lay_out(&model, file.path())?;
            self.observer.note("teacher", &format!("adapter {} is merged into it", adapter.path.display()));
        }
        self.observer.note("teacher", &describe(&model));
        Ok(Speaker { tokenizer: HostTokenizer::of(&file)?, model, file })
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

    /// Whether probabilities that came with the text are learned, or the text alone, and not what a teacher says.
    pub(super) fn learns_from_data(&self, inputs: &Inputs) -> bool {
        let train = &self.recipe.train;
        let asks = train.other_vocabulary()
            || train.cache.is_some()
            || train.hidden.any()
            || train.on_policy > 0.0;
        match self.recipe.soft_targets {
            Some(source) => source == SoftSource::Data,
            None => self.recipe.teacher.is_none() || (!asks && !inputs.train.soft.is_empty()),
        }
    }

    /// What is learned from; says so where it is not plain.
    pub(super) fn lesson(&mut self, inputs: &Inputs) -> Result<Lesson, Error> {
        let train = &inputs.train;
        let scored = train.scored.iter().filter(|scored| **scored).count();
        let said = train.soft.iter().filter(|(position, _)| train.scored[*position]).count();
        if self.learns_from_data(inputs) {
            let rest = "the others are learned as text";
            self.observer.note(
                "teacher",
                &format!("{said} of {scored} tokens have probabilities that came with them; {rest}"),
            );
            return Ok(Lesson::Data);
        }
        if said > 0 {
            let why = "the teacher is asked instead of the probabilities that came with the text";
            self.observer.note("teacher", why);
        }
        if !inputs.foreign {
            return Ok(Lesson::Model);
        }
        let interpreter = inputs.interpreter()?;
        let common = interpreter.common(&train.ids, self.recipe.train.length, COMPARED_WINDOWS)?;
        let universal = self.recipe.train.objective.universal;
        let (compared, how) = match universal {
            true => (common.grouped, "between boundaries that both have, whose probabilities are compared by rank"),
            false => (common.alike, "the same token on both sides; the others are learned as text"),
        };
        let share = 100.0 * compared as f64 / common.targets.max(1) as f64;
        let names = interpreter.in_common();
        self.observer.note("vocabulary", &format!("{names} tokens in common, {share:.1} % of the text is {how}"));
        let refuse = |message: &str| Err(TrainError::Vocabularies(message.into()).into());
        if !universal && names == 0 {
            return refuse("no token of one is a token of the other, expected most; --loss uld needs none");
        }
        if compared == 0 {
            return refuse("no token of the text begins and ends at the same bytes in both, expected most");
        }
        Ok(Lesson::Foreign)
    }
}
