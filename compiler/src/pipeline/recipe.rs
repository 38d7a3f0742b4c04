//! What a run was asked to do.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::train::TrainConfig;

/// What a run was asked to do. It is kept in the run's folder and must be the same on resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Where the teacher comes from.
    pub teacher: TeacherSource,
    /// An adapter that is merged into the teacher first.
    #[serde(default)]
    pub teacher_adapter: Option<PathBuf>,
    /// Where the student comes from.
    pub student: StudentSource,
    /// Text to distill on.
    pub data: Data,
    /// Text to judge on; `None` holds out the end of `data`.
    pub eval_data: Option<PathBuf>,
    /// Train on answers only where the data says what is prompt and what is answer.
    pub mask_prompts: bool,
    /// Device to build for.
    pub target: String,
    /// Tensor types of `student.gguf`.
    pub quant: String,
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
    /// Another model of the same vocabulary.
    Path(PathBuf),
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
    /// What errors call the text: its files.
    pub fn text(&self) -> String {
        self.data.names(self.eval_data.as_deref())
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
