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
    fn of(model: Model, file: ModelFile) -> Result<Self, Error> {
        Ok(Self { model, tokenizer: HostTokenizer::of(&file)?, file })
    }
}

/// Everything that the stages after loading need.
pub(super) struct Inputs {
    /// Who has the student's vocabulary: its teacher, or the student itself as it was given.
    pub reader: Speaker,
    /// Whether that is the teacher.
    taught_by_reader: bool,
    /// A teacher of another vocabulary.
    foreign: Option<Speaker>,
    /// A student that is not cut from the teacher.
    pub given: Option<Model>,
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
        match &self.foreign {
            Some(teacher) => Ok(&teacher.model),
            None if self.taught_by_reader => Ok(&self.reader.model),
            None => Err(Error::Student("there is no teacher".into())),
        }
    }

    /// Gives back the weights of who reads the text; what it looks like stays.
    pub fn forget_reader(&mut self) {
        self.reader.model.weights = Weights::default();
        self.given = None;
    }

    /// What the student is judged beside: its teacher, or itself before its training where that has another
    /// vocabulary or is far away. Called by its name.
    pub fn beside(&self) -> (&'static str, &Speaker) {
        (if self.taught_by_reader { "teacher" } else { "student before" }, &self.reader)
    }

    /// What the run is called by.
    pub fn title(&self) -> String {
        self.foreign.as_ref().unwrap_or(&self.reader).model.name.clone()
    }

    pub fn text(&self) -> Text<'_> {
        Text { ids: &self.train.ids, scored: &self.train.scored }
    }

    /// Between the student's vocabulary and the teacher's, if that is another one.
    ///
    /// # Errors
    /// A refusal of a tokenizer.
    pub fn interpreter(&self) -> Result<Option<Interpreter<'_>>, Error> {
        let Some(Speaker { model, tokenizer, .. }) = &self.foreign else { return Ok(None) };
        Ok(Some(Interpreter::new(&self.reader.tokenizer, tokenizer, model.spec.vocab)?))
    }
}

/// Refuses a student whose vocabulary is not its teacher's, and says what may be done.
fn check(teacher: &Model, student: &Model) -> Result<(), Error> {
    student::check(teacher, student).map_err(|error| {
        let ways = "--align compares tokens that spell the same, --loss uld those of any vocabulary";
        Error::Student(format!("{error}; {ways}"))
    })
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
        let foreign = recipe.train.other_vocabulary();
        let mut given = None;
        let mut reader = None;
        if let StudentSource::Path(path) = &recipe.student {
            hashes.extend(hash_model(path)?);
            let model = teacher::load(path)?;
            match &teacher {
                Some(teacher) if !foreign => check(&teacher.model, &model)?,
                _ => reader = Some(Speaker::of(model.clone(), profile::open(path)?)?),
            }
            given = Some(model);
        }
        let wanted = Wanted {
            data: &recipe.data,
            eval_data: recipe.eval_data.as_deref(),
            mask_prompts: recipe.mask_prompts,
            length: recipe.train.length,
        };
        let mut kept_tokens = None;
        if let (Some(least), Some(teacher)) = (recipe.prune.vocabulary, &mut teacher) {
            let corpus = text::corpus(&wanted, &teacher.tokenizer)?;
            kept_tokens = Some(self.trim(teacher, &corpus, least)?);
        }
        let (reader, foreign, taught_by_reader) = match (reader, teacher) {
            (Some(student), teacher) => (student, teacher, false),
            (None, Some(teacher)) => (teacher, None, true),
            (None, None) => return Err(Error::Student("there is neither a teacher nor a student".into())),
        };
        let (train, eval) = text::read(&wanted, &reader.tokenizer, &mut hashes, self.observer)?;
        self.observer.note(
            "text",
            &format!("{} tokens to distill on, {} held out to judge on", train.ids.len(), eval.len()),
        );
        Ok(Inputs { reader, taught_by_reader, foreign, given, train, eval, hashes, kept_tokens })
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
        Speaker::of(model, file)
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
        let asks =
            train.other_vocabulary() || train.cache.is_some() || train.hidden.any() || train.on_policy > 0.0;
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
        let Some(interpreter) = inputs.interpreter()? else { return Ok(Lesson::Model) };
        let common = interpreter.common(&train.ids, self.recipe.train.length, COMPARED_WINDOWS)?;
        let universal = self.recipe.train.objective.universal;
        let (compared, how) = match universal {
            true => (
                common.grouped,
                "between boundaries that both have, whose probabilities are compared by rank",
            ),
            false => (common.alike, "the same token on both sides; the others are learned as text"),
        };
        let share = 100.0 * compared as f64 / common.targets.max(1) as f64;
        let names = interpreter.in_common();
        self.observer
            .note("vocabulary", &format!("{names} tokens in common, {share:.1} % of the text is {how}"));
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
