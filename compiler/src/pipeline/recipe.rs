//! What a run was asked to do.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::train::TrainConfig;

/// What a run was asked to do. It is kept in the run's folder and must be the same on resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Where the teacher comes from.
    pub teacher: TeacherSource,
    /// Where the student comes from.
    pub student: StudentSource,
    /// Text to distill on.
    pub data: Data,
    /// Text to judge on; `None` holds out the end of `data`.
    pub eval_data: Option<PathBuf>,
    /// Trim the vocabulary to the tokens that occur this often in the text.
    #[serde(default)]
    pub trim_vocab: Option<u32>,
    /// Train on answers only where the data says what is prompt and what is answer.
    pub mask_prompts: bool,
    /// Device to build for.
    pub target: String,
    /// Tensor types of `student.gguf`.
    pub quant: String,
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
        let files = match &self.data {
            Data::Embedded => return "the embedded text".to_owned(),
            Data::Files(files) => files.iter().chain(&self.eval_data),
        };
        files.map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    /// In what `self` and `other` differ, in words; `None` if in nothing.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let fields = |recipe: &Self| match serde_json::to_value(recipe) {
            Ok(serde_json::Value::Object(mut fields)) => {
                if let Some(serde_json::Value::Object(train)) = fields.remove("train") {
                    fields.extend(train);
                }
                fields
            }
            _ => serde_json::Map::new(),
        };
        let (mine, others) = (fields(self), fields(other));
        let differing: Vec<String> = mine
            .iter()
            .filter(|(key, value)| others.get(*key) != Some(value))
            .map(|(key, value)| {
                format!("{key} was {value}, now {}", others.get(key).unwrap_or(&serde_json::Value::Null))
            })
            .collect();
        (!differing.is_empty()).then(|| differing.join("; "))
    }
}
