//! The student before its training: how deep and wide it is, which of the teacher's blocks, channels and tokens it
//! keeps, what makes up for those that are gone, and whether a given one fits its teacher. Never trains.

mod layers;
mod mend;
mod vocabulary;
mod width;

use candle_core::Tensor;
use edge_models::DecoderSpec;

use crate::model::{Model, Weights};

pub(crate) use layers::Reference;
pub use layers::{CALIBRATION_LENGTH, CALIBRATION_TOKENS, Choice, choose_layers};
pub use mend::{MENDING_TOKENS, mend};
pub use vocabulary::{tokens_to_keep, trim};
pub use width::{Widths, narrow};

/// Why a student cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum StudentError {
    /// The graph refused, which a well-formed model never makes it do.
    #[error("student graph: {0}")]
    Graph(#[from] candle_core::Error),
    /// The student would have no block, or more than its teacher.
    #[error("a student of {found} layers, expected 1 to {layers} (the teacher's)")]
    Layers {
        /// Layers asked for.
        found: usize,
        /// Layers of the teacher.
        layers: usize,
    },
    /// The list of layers to keep is not one.
    #[error("layers to keep: {found}, expected ascending numbers below {layers}")]
    Keep {
        /// The list.
        found: String,
        /// Layers of the teacher.
        layers: usize,
    },
    /// A share of the layers that is none.
    #[error("shrink is {0}, expected above 0, up to 1")]
    Fraction(f64),
    /// Teacher and student do not speak the same tokens.
    #[error("the student's vocabulary is not the teacher's: {0}")]
    Vocabulary(String),
    /// There is nothing to calibrate on.
    #[error("{found} calibration tokens, expected at least {length} (one window)")]
    Calibration {
        /// Tokens given.
        found: usize,
        /// Length of a window.
        length: usize,
    },
    /// A calibration token is not in the vocabulary.
    #[error("calibration token {token}, expected less than {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Tokens of the teacher.
        vocab: usize,
    },
    /// A width that a student of this teacher cannot have.
    #[error("a student of {found} {what}, expected 1 to {most} (the teacher's)")]
    Width {
        /// Of what.
        what: &'static str,
        /// The width asked for.
        found: usize,
        /// The teacher's.
        most: usize,
    },
    /// The residual stream has a scale that files do not keep.
    #[error(
        "the residual stream of {family} models cannot be narrowed: their embeddings' scale follows its width"
    )]
    Hidden {
        /// The family.
        family: &'static str,
    },
    /// A vocabulary cannot be trimmed.
    #[error("the vocabulary cannot be trimmed: {0}")]
    Trim(String),
    /// The teacher's output on the calibration text is not a number.
    #[error("the teacher's output is not finite on the calibration text: its weights are damaged")]
    NotFinite,
}

/// Layers of a student that keeps `fraction` of the teacher's, at least one.
///
/// # Errors
/// A fraction that is not above 0 and at most 1.
pub fn shrink_to_layers(spec: &DecoderSpec, fraction: f64) -> Result<usize, StudentError> {
    if !(fraction > 0.0 && fraction <= 1.0) {
        return Err(StudentError::Fraction(fraction));
    }
    Ok(((spec.layers as f64 * fraction).round() as usize).clamp(1, spec.layers))
}

/// The model that has only the layers `keep` of `model`, in that order, renumbered from 0.
///
/// Weights are shared with `model`, not copied.
///
/// # Errors
/// `keep` is empty, not ascending, or names a layer that is not there.
pub fn cut(model: &Model, keep: &[usize]) -> Result<Model, StudentError> {
    let layers = model.spec.layers;
    if keep.is_empty() || keep.len() > layers {
        return Err(StudentError::Layers { found: keep.len(), layers });
    }
    if !keep.is_sorted_by(|a, b| a < b) || keep.iter().any(|&layer| layer >= layers) {
        return Err(StudentError::Keep { found: format!("{keep:?}"), layers });
    }
    let mut weights = Weights::default();
    let mut put = |role, layer, tensor: &Tensor| weights.insert(role, layer, tensor.clone());
    for (role, layer, tensor) in model.weights.iter() {
        if !role.per_layer() {
            put(role, layer, tensor);
        } else if let Ok(position) = keep.binary_search(&layer) {
            put(role, position, tensor);
        }
    }
    // A layer keeps its kind of attention.
    let local = model.spec.local.select(keep);
    let spec = DecoderSpec { layers: keep.len(), local, ..model.spec };
    Ok(Model { spec, weights, vocabulary: model.vocabulary.clone(), name: model.name.clone() })
}

/// The whole windows of a calibration text.
fn calibration_windows<'a>(
    spec: &DecoderSpec,
    ids: &'a [u32],
    length: usize,
) -> Result<&'a [u32], StudentError> {
    let windows = ids.len().checked_div(length).unwrap_or(0);
    if windows == 0 {
        return Err(StudentError::Calibration { found: ids.len(), length: length.max(1) });
    }
    let (ids, vocab) = (&ids[..windows * length], spec.vocab);
    match ids.iter().find(|&&token| token as usize >= vocab) {
        Some(&token) => Err(StudentError::Token { token, vocab }),
        None => Ok(ids),
    }
}

/// Checks that `student` can learn from `teacher`: both assign the same numbers to the same tokens.
///
/// # Errors
/// [`StudentError::Vocabulary`] says what differs (in words of [`crate::model::Vocabulary::same_tokens`],
/// teacher first).
pub fn check(teacher: &Model, student: &Model) -> Result<(), StudentError> {
    let (mine, theirs) = (student.spec.vocab, teacher.spec.vocab);
    if mine != theirs {
        return Err(StudentError::Vocabulary(format!("it has {mine} tokens, the teacher {theirs}")));
    }
    match (&teacher.vocabulary, &student.vocabulary) {
        (Some(theirs), Some(mine)) => theirs.same_tokens(mine).map_err(StudentError::Vocabulary),
        // Bare weights have no vocabulary to compare; the width of the head is all that is known.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::fixture::tiny;
    use edge_models::Role;

    #[test]
    fn a_cut_renumbers_and_shares() {
        let teacher = tiny(5, 1);
        let student = cut(&teacher, &[1, 4]).unwrap();
        assert_eq!((student.spec.layers, student.spec.hidden), (2, 16));
        let id = |model: &Model, layer| model.weights.get(Role::FfnUp, layer).unwrap().id();
        assert_eq!(id(&student, 0), id(&teacher, 1));
        assert_eq!(id(&student, 1), id(&teacher, 4));
        assert!(student.weights.get(Role::FfnUp, 2).is_none());
        assert!(student.weights.get(Role::TokenEmbedding, 0).is_some());
        for keep in [&[][..], &[0, 0], &[2, 1], &[5], &[0, 1, 2, 3, 4, 5]] {
            assert!(cut(&teacher, keep).is_err(), "{keep:?}");
        }
    }

    #[test]
    fn another_vocabulary_is_refused() {
        use crate::export::gguf::MetaValue;
        use crate::model::Vocabulary;
        let with = |last: &str| {
            let mut tokens: Vec<Vec<u8>> = (0..60).map(|id| format!("t{id}").into_bytes()).collect();
            tokens.push(last.into());
            let entries = vec![("tokenizer.ggml.tokens".into(), MetaValue::Strings(tokens))];
            Model { vocabulary: Some(Vocabulary { entries }), ..tiny(1, 1) }
        };
        check(&with("same"), &with("same")).unwrap();
        check(&with("same"), &tiny(1, 1)).unwrap();
        let error = check(&with("same"), &with("other")).unwrap_err().to_string();
        assert!(error.contains("`same`") && error.contains("`other`"), "{error}");
        let smaller = Model { spec: DecoderSpec { vocab: 60, ..tiny(1, 1).spec }, ..tiny(1, 1) };
        let error = check(&tiny(1, 1), &smaller).unwrap_err().to_string();
        assert!(error.contains("60 tokens") && error.contains("61"), "{error}");
    }

    #[test]
    fn fractions_become_layers() {
        let spec = DecoderSpec { layers: 30, ..tiny(1, 1).spec };
        for (fraction, layers) in [(0.5, 15), (1.0, 30), (0.01, 1), (0.34, 10)] {
            assert_eq!(shrink_to_layers(&spec, fraction).unwrap(), layers);
        }
        for fraction in [0.0, -0.5, 1.01, f64::NAN] {
            assert!(shrink_to_layers(&spec, fraction).is_err());
        }
    }
}
