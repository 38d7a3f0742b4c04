//! What a run was asked to do.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::quantize::calibrate::Method;
use crate::student;
use crate::train::{Precision, TrainConfig};

/// What a run was asked to do. It is kept in the run's folder and must be the same on resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Where the teacher comes from; `None` learns what the data says alone (black-box distillation).
    pub teacher: Option<TeacherSource>,
    /// An adapter that is merged into the teacher first.
    #[serde(default)]
    pub teacher_adapter: Option<PathBuf>,
    /// Where the student comes from.
    pub student: StudentSource,
    /// Text to distill on.
    pub data: Data,
    /// Whose probabilities are learned; `None` takes those of the data where it has any, else the teacher's.
    #[serde(default)]
    pub soft_targets: Option<SoftSource>,
    /// Text to judge on; `None` holds out the end of `data`.
    pub eval_data: Option<PathBuf>,
    /// What is cut off besides layers, and how.
    #[serde(default)]
    pub prune: Prune,
    /// Train on answers only where the data says what is prompt and what is answer.
    pub mask_prompts: bool,
    /// Device to build for.
    pub target: String,
    /// Tensor types of `student.gguf`.
    pub quant: String,
    /// How weights are rounded to those types after training, without `qat`.
    #[serde(default)]
    pub rounding: Method,
    /// Train with the weights that `quant` leaves of the student's.
    #[serde(default)]
    pub qat: bool,
    /// Tokens on which layers are chosen.
    pub calibration: usize,
    /// Settings of the training.
    pub train: TrainConfig,
}

/// Where the teacher comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TeacherSource {
    /// The small one inside this program.
    Embedded,
    /// A GGUF file or a Hugging Face folder.
    Path(PathBuf),
}

/// Where the student comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum StudentSource {
    /// Cut from the teacher, with this share of its layers.
    Shrink(f64),
    /// Cut from the teacher, with this many layers.
    Layers(usize),
    /// Another model, of the teacher's vocabulary or, aligned, of another one.
    Path(PathBuf),
}

/// Whose probabilities a student learns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum SoftSource {
    /// The teacher's.
    Teacher,
    /// Those that came with the text; where none did, the text itself.
    Data,
}

/// What is cut off a student besides layers, and how. Widths that are not given are the teacher's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prune {
    /// Feed-forward channels to keep.
    pub ffn: Option<usize>,
    /// Key/value heads to keep, each with its query heads.
    pub kv_heads: Option<usize>,
    /// Channels of the residual stream to keep.
    pub hidden: Option<usize>,
    /// Trim the vocabulary to the tokens that occur this often in the text.
    pub vocabulary: Option<u32>,
    /// Steps in which the student shrinks; after each it is trained on its share of the tokens.
    pub steps: usize,
    /// Tokens on which what stays is fitted to make up for dropped layers before training; 0 leaves it as it is.
    pub mending_tokens: usize,
}

impl Default for Prune {
    fn default() -> Self {
        Self {
            ffn: None,
            kv_heads: None,
            hidden: None,
            vocabulary: None,
            steps: 1,
            mending_tokens: student::MENDING_TOKENS,
        }
    }
}

/// Text to distill on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Data {
    /// The text inside this program.
    Embedded,
    /// `.txt` and `.jsonl` files.
    Files(Vec<PathBuf>),
}

impl Recipe {
    /// The training of one step of pruning.
    pub fn share(&self) -> TrainConfig {
        let tokens = self.train.tokens.div_ceil(self.prune.steps.max(1) as u64);
        TrainConfig { tokens, ..self.train }
    }

    /// Refuses a teacher that cannot teach this student.
    pub(super) fn check_teacher(&self) -> Result<(), Error> {
        let refuse = |message: &str| Err(Error::Student(message.into()));
        let (given, teacher) = (matches!(self.student, StudentSource::Path(_)), self.teacher.is_some());
        if !given && !teacher {
            return refuse("a student is cut from a teacher, and there is none");
        }
        if self.train.other_vocabulary() && !(given && teacher) {
            return refuse(
                "--align and --loss uld compare a --teacher with a --student of another vocabulary",
            );
        }
        match (self.soft_targets, teacher) {
            (Some(SoftSource::Teacher), false) => refuse("--soft-targets teacher: there is no --teacher"),
            (Some(SoftSource::Data), _) if self.train.other_vocabulary() => {
                refuse("--soft-targets data: --align and --loss uld ask the teacher")
            }
            (_, false) if self.teacher_adapter.is_some() => {
                refuse("--teacher-adapter: there is no --teacher")
            }
            (_, false) if self.train.teacher_precision != Precision::F32 => {
                refuse("--teacher-precision: there is no --teacher")
            }
            (_, false) if self.prune.vocabulary.is_some() => {
                refuse("--trim-vocab trims a teacher too, and there is none")
            }
            _ if self.train.other_vocabulary() && self.prune.vocabulary.is_some() => {
                refuse("--trim-vocab is for a teacher and a student of one vocabulary")
            }
            _ => Ok(()),
        }
    }

    /// Refuses what several processes cannot do together.
    pub(super) fn fits(&self, processes: usize) -> Result<(), Error> {
        let alone = [
            (self.prune.steps > 1, "pruning in several steps"),
            (self.qat, "quantization-aware training"),
            (self.train.cache.is_some(), "the cache of a teacher"),
        ];
        match alone.into_iter().find(|(asked, _)| *asked && processes > 1) {
            Some((_, what)) => Err(Error::OneProcess { what, processes }),
            None => Ok(()),
        }
    }
}

impl Data {
    /// What errors call the text: its files, and the one to judge on.
    pub(super) fn names(&self, eval: Option<&Path>) -> String {
        let files = match self {
            Self::Embedded => return "the embedded text".to_owned(),
            Self::Files(files) => files.iter().map(PathBuf::as_path).chain(eval),
        };
        files.map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_several_processes_cannot_do_is_refused() {
        let plain = || Recipe {
            teacher: Some(TeacherSource::Embedded),
            teacher_adapter: None,
            student: StudentSource::Layers(1),
            data: Data::Embedded,
            soft_targets: None,
            eval_data: None,
            prune: Prune::default(),
            mask_prompts: false,
            target: edge_targets::DEFAULT.into(),
            quant: "Q4_0".into(),
            rounding: Method::default(),
            qat: false,
            calibration: 64,
            train: TrainConfig::default(),
        };
        assert!(plain().fits(4).is_ok());
        let steps = Recipe { prune: Prune { steps: 2, ..Prune::default() }, ..plain() };
        let cache = "top-k=5".parse().ok();
        let cached = Recipe { train: TrainConfig { cache, ..TrainConfig::default() }, ..plain() };
        assert!(cache.is_some());
        for (recipe, what) in
            [(steps, "several steps"), (Recipe { qat: true, ..plain() }, "quantization"), (cached, "cache")]
        {
            assert!(recipe.fits(1).is_ok());
            let error = recipe.fits(2).unwrap_err().to_string();
            assert!(error.contains(what) && error.ends_with("this run has 2"), "{error}");
        }
    }
}
