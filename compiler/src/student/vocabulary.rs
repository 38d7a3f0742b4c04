//! A vocabulary trimmed to a domain's text: the embedding table, and with it the head, is most of a small
//! model, and most of its rows are never spoken. Never changes how the text itself falls into tokens.
//!
//! What stays: every token that the text uses often enough, everything that these are merged from, and all
//! tokens that are not ordinary text (control tokens, bytes, single characters of byte-level BPE), so that any text
//! can still be written down. A teacher is trimmed as its student is: the softmax over the rest is its
//! distribution, given that the next token is one of those that stayed.

use std::collections::{BTreeSet, HashMap};

use candle_core::{Device, Tensor};
use edge_models::{DecoderSpec, Role};

use super::StudentError;
use crate::export::gguf::MetaValue;
use crate::model::{Model, Vocabulary};

/// `tokenizer.ggml.token_type` of ordinary text; all others stay.
const NORMAL: i32 = 1;

const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const MODEL: &str = "tokenizer.ggml.model";

/// What a vocabulary cannot be trimmed for.
fn refuse(message: impl Into<String>) -> StudentError {
    StudentError::Trim(message.into())
}

/// The tokens that stay of `vocabulary`, ascending, when those that occur at least `least` times in `ids` do.
///
/// # Errors
/// The vocabulary is neither byte-level nor SentencePiece BPE, an entry of it is missing, or a token of `ids` is
/// not in it.
pub fn tokens_to_keep(vocabulary: &Vocabulary, ids: &[u32], least: u32) -> Result<Vec<u32>, StudentError> {
    let tokens = vocabulary.tokens();
    let mut counts = vec![0u32; tokens.len()];
    for &token in ids {
        match counts.get_mut(token as usize) {
            Some(count) => *count = count.saturating_add(1),
            None => return Err(StudentError::Token { token, vocab: tokens.len() }),
        }
    }
    let merging = Merging::of(vocabulary)?;
    let mut keep: BTreeSet<u32> = always(vocabulary, &merging);
    for (token, &count) in counts.iter().enumerate() {
        if count >= least.max(1) && keep.insert(token as u32) {
            merging.parts(token, &mut keep);
        }
    }
    Ok(keep.into_iter().collect())
}

/// `model` with the tokens `keep` alone, renumbered in that order.
///
/// # Errors
/// `model` has no vocabulary, or `keep` is not ascending, names a token that is not there, or lacks one that the
/// vocabulary gives a meaning.
pub fn trim(model: &Model, keep: &[u32]) -> Result<Model, StudentError> {
    let vocabulary = model.vocabulary.as_ref().ok_or_else(|| refuse("the model has none"))?;
    let tokens = vocabulary.tokens().len();
    if keep.is_empty() || !keep.is_sorted_by(|a, b| a < b) || keep.iter().any(|&id| id as usize >= tokens) {
        return Err(refuse(format!(
            "tokens to keep are {}, expected ascending ids below {tokens}",
            keep.len()
        )));
    }
    let mut weights = model.weights.clone();
    let rows = Tensor::new(keep, &Device::Cpu)?;
    for role in [Role::TokenEmbedding, Role::Output] {
        if let Some(table) = model.weights.get(role, 0) {
            weights.insert(role, 0, table.index_select(&rows, 0)?);
        }
    }
    let spec = DecoderSpec { vocab: keep.len(), ..model.spec };
    let entries = vocabulary.entries.iter();
    let texts: BTreeSet<&[u8]> = keep.iter().map(|&id| vocabulary.tokens()[id as usize].as_slice()).collect();
    let entries = entries.filter_map(|(key, value)| trim_entry(key, value, keep, &texts, tokens).transpose());
    let vocabulary = Some(Vocabulary { entries: entries.collect::<Result<_, _>>()? });
    Ok(Model { spec, weights, vocabulary, name: model.name.clone() })
}

/// An entry of the vocabulary for the tokens that stay; `None` for one that goes.
fn trim_entry(
    key: &str,
    value: &MetaValue,
    keep: &[u32],
    texts: &BTreeSet<&[u8]>,
    tokens: usize,
) -> Result<Option<(String, MetaValue)>, StudentError> {
    let length = |found: usize| match found == tokens {
        true => Ok(()),
        false => Err(refuse(format!("`{key}` has {found} entries, expected {tokens}"))),
    };
    let renumbered = |id: i64| {
        let found = u32::try_from(id).ok().and_then(|id| keep.binary_search(&id).ok());
        // A role that a file gives to a token beyond its vocabulary is no token's.
        found.map(|place| place as u32).ok_or_else(|| refuse(format!("`{key}` is {id}, which does not stay")))
    };
    let trimmed = match (key, value) {
        // The same vocabulary in another format, which would say what is no longer true.
        ("tokenizer.huggingface.json", _) => return Ok(None),
        (TOKENS, MetaValue::Strings(all)) => {
            MetaValue::Strings(keep.iter().map(|&id| all[id as usize].clone()).collect())
        }
        (KINDS, MetaValue::I32s(all)) => {
            length(all.len())?;
            MetaValue::I32s(keep.iter().map(|&id| all[id as usize]).collect())
        }
        (SCORES, MetaValue::F32s(all)) => {
            length(all.len())?;
            MetaValue::F32s(keep.iter().map(|&id| all[id as usize]).collect())
        }
        (MERGES, MetaValue::Strings(all)) => {
            let stays = |line: &&Vec<u8>| {
                pair(line).is_some_and(|(a, b)| {
                    texts.contains(a) && texts.contains(b) && texts.contains([a, b].concat().as_slice())
                })
            };
            MetaValue::Strings(all.iter().filter(stays).cloned().collect())
        }
        (_, MetaValue::U32(id)) if key.ends_with("_token_id") => MetaValue::U32(renumbered(i64::from(*id))?),
        (_, MetaValue::I32(id)) if key.ends_with("_token_id") => MetaValue::U32(renumbered(i64::from(*id))?),
        _ => value.clone(),
    };
    Ok(Some((key.to_owned(), trimmed)))
}

/// Tokens that stay whatever the text: those that are not ordinary text, those that a role is given to, and what
/// any text can be written with.
fn always(vocabulary: &Vocabulary, merging: &Merging<'_>) -> BTreeSet<u32> {
    let count = vocabulary.tokens().len() as u32;
    let mut keep = BTreeSet::new();
    if let Some(MetaValue::I32s(kinds)) = vocabulary.get(KINDS) {
        keep.extend((0..count).zip(kinds).filter(|(_, kind)| **kind != NORMAL).map(|(id, _)| id));
    }
    for (key, value) in vocabulary.entries.iter().filter(|(key, _)| key.ends_with("_token_id")) {
        debug_assert!(key.starts_with("tokenizer."));
        match *value {
            MetaValue::U32(id) if id < count => drop(keep.insert(id)),
            MetaValue::I32(id) if (0..count as i32).contains(&id) => drop(keep.insert(id as u32)),
            _ => {}
        }
    }
    if let Merging::ByRank { .. } = merging {
        let single = |text: &Vec<u8>| std::str::from_utf8(text).is_ok_and(|text| text.chars().count() == 1);
        keep.extend((0..count).zip(vocabulary.tokens()).filter(|(_, text)| single(text)).map(|(id, _)| id));
    }
    keep
}

/// The two halves of a line of merges.
fn pair(line: &[u8]) -> Option<(&[u8], &[u8])> {
    // A half may begin with a space only where it is one: the separator is the first after the first byte.
    let space = line.iter().skip(1).position(|&byte| byte == b' ')? + 1;
    Some((&line[..space], &line[space + 1..]))
}

/// How a vocabulary makes tokens of characters: of all neighbours the pair of lowest key is merged first.
enum Merging<'a> {
    /// Byte-level BPE: ranks of pairs.
    ByRank { tokens: &'a [Vec<u8>], ids: HashMap<&'a [u8], u32>, ranks: HashMap<(&'a [u8], &'a [u8]), usize> },
    /// SentencePiece BPE: the pair whose token has the highest score.
    ByScore { tokens: &'a [Vec<u8>], ids: HashMap<&'a [u8], u32>, scores: &'a [f32] },
}

impl<'a> Merging<'a> {
    fn of(vocabulary: &'a Vocabulary) -> Result<Self, StudentError> {
        let tokens = vocabulary.tokens();
        // The first of equal texts is the one that is found.
        let ids: HashMap<&[u8], u32> =
            tokens.iter().enumerate().rev().map(|(id, text)| (text.as_slice(), id as u32)).collect();
        let model = match vocabulary.get(MODEL) {
            Some(MetaValue::String(model)) => model.as_slice(),
            _ => return Err(refuse(format!("`{MODEL}` is missing"))),
        };
        match (model, vocabulary.get(MERGES), vocabulary.get(SCORES)) {
            (b"gpt2", Some(MetaValue::Strings(lines)), _) => {
                let pairs = lines.iter().enumerate();
                let ranks = pairs.rev().filter_map(|(rank, line)| Some((pair(line)?, rank))).collect();
                Ok(Self::ByRank { tokens, ids, ranks })
            }
            (b"gpt2", ..) => Err(refuse(format!("`{MERGES}` is missing"))),
            (b"llama", _, Some(MetaValue::F32s(scores))) if scores.len() == tokens.len() => {
                Ok(Self::ByScore { tokens, ids, scores })
            }
            (b"llama", ..) => Err(refuse(format!("`{SCORES}` is missing or has not one score a token"))),
            (other, ..) => {
                let other = String::from_utf8_lossy(other);
                Err(refuse(format!("`{MODEL}` is `{other}`, expected gpt2 or llama")))
            }
        }
    }

    fn tokens(&self) -> &'a [Vec<u8>] {
        match self {
            Self::ByRank { tokens, .. } | Self::ByScore { tokens, .. } => tokens,
        }
    }

    fn id(&self, text: &[u8]) -> Option<u32> {
        match self {
            Self::ByRank { ids, .. } | Self::ByScore { ids, .. } => ids.get(text).copied(),
        }
    }

    /// The key of a pair, lower is earlier; `None` if it is not merged.
    fn key(&self, left: &[u8], right: &[u8]) -> Option<f64> {
        match self {
            Self::ByRank { ranks, .. } => ranks.get(&(left, right)).map(|&rank| rank as f64),
            Self::ByScore { ids, scores, .. } => {
                let id = *ids.get([left, right].concat().as_slice())?;
                Some(-f64::from(scores[id as usize]))
            }
        }
    }

    /// Adds to `keep` what `token` is merged from, step by step.
    fn parts(&self, token: usize, keep: &mut BTreeSet<u32>) {
        let text = &self.tokens()[token];
        let Ok(characters) = std::str::from_utf8(text) else { return };
        let mut ends: Vec<usize> = characters.char_indices().map(|(start, c)| start + c.len_utf8()).collect();
        loop {
            let mut start = 0;
            let mut best = None;
            for (place, &end) in ends.iter().enumerate() {
                keep.extend(self.id(&text[start..end]));
                if let Some(&next) = ends.get(place + 1)
                    && let Some(key) = self.key(&text[start..end], &text[end..next])
                    && best.is_none_or(|(lowest, _)| key < lowest)
                {
                    best = Some((key, place));
                }
                start = end;
            }
            match best {
                Some((_, place)) => drop(ends.remove(place)),
                None => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::HostTokenizer;
    use crate::{demo, profile, teacher};

    fn demo_teacher() -> Model {
        let file = demo::teacher();
        teacher::from_gguf(&file.parse().unwrap(), file.path()).unwrap()
    }

    fn tokenizer(model: &Model) -> HostTokenizer {
        HostTokenizer::of(&profile::lay_out(model, std::path::Path::new("trimmed")).unwrap()).unwrap()
    }

    /// The text falls into the very tokens that it fell into before, and any other can be written.
    #[test]
    fn a_trimmed_vocabulary_reads_its_text_as_before() {
        let model = demo_teacher();
        let text = &demo::HELD_OUT[..4000];
        let whole = tokenizer(&model);
        let ids = whole.encode(text, false, false).unwrap();
        let keep = tokens_to_keep(model.vocabulary.as_ref().unwrap(), &ids, 1).unwrap();
        assert!(keep.len() < model.spec.vocab * 2 / 3, "{} of {}", keep.len(), model.spec.vocab);
        let trimmed = trim(&model, &keep).unwrap();
        let small = tokenizer(&trimmed);
        let renumbered = small.encode(text, false, false).unwrap();
        let back: Vec<u32> = renumbered.iter().map(|&id| keep[id as usize]).collect();
        assert_eq!(back, ids);
        let strange = "ζ 漢字 \u{1F600} \0 naïve xylophones";
        let ids = small.encode(strange, false, false).unwrap();
        assert_eq!(small.decode(&ids).unwrap(), strange);
        assert_eq!(small.eos().map(|id| keep[id as usize]), whole.eos());

        let rows =
            |model: &Model| model.weights.get(Role::TokenEmbedding, 0).unwrap().to_vec2::<f32>().unwrap();
        let (all, few) = (rows(&model), rows(&trimmed));
        assert!(keep.iter().zip(&few).all(|(&id, row)| all[id as usize] == *row));
    }

    #[test]
    fn pairs_are_merged_by_score_in_sentence_piece() {
        let texts = ["<unk>", "<0x41>", "a", "b", "c", "ab", "bc", "abc", "abcabc", "unused"];
        let kinds = [2, 6, 1, 1, 1, 1, 1, 1, 1, 1];
        let scores = [0.0, 0.0, -9.0, -9.0, -9.0, -3.0, -2.0, -4.0, -5.0, -1.0];
        let vocabulary = Vocabulary {
            entries: vec![
                (MODEL.into(), "llama".into()),
                (
                    TOKENS.into(),
                    MetaValue::Strings(texts.iter().map(|text| text.as_bytes().to_vec()).collect()),
                ),
                (KINDS.into(), MetaValue::I32s(kinds.to_vec())),
                (SCORES.into(), MetaValue::F32s(scores.to_vec())),
                ("tokenizer.ggml.unknown_token_id".into(), MetaValue::U32(0)),
            ],
        };
        // `bc` is merged before `ab`, so `ab` is no part of it.
        assert_eq!(tokens_to_keep(&vocabulary, &[8, 8, 2], 2).unwrap(), [0, 1, 2, 3, 4, 6, 7, 8]);
        assert_eq!(tokens_to_keep(&vocabulary, &[9], 1).unwrap(), [0, 1, 9]);
        assert!(matches!(
            tokens_to_keep(&vocabulary, &[10], 1),
            Err(StudentError::Token { token: 10, vocab: 10 })
        ));
        let unknown = Vocabulary { entries: vec![(MODEL.into(), "t5".into())] };
        assert!(tokens_to_keep(&unknown, &[], 1).unwrap_err().to_string().contains("`t5`"));
    }

    #[test]
    fn bad_lists_are_refused() {
        let model = demo_teacher();
        for keep in [&[][..], &[2, 1], &[0, u32::MAX]] {
            assert!(trim(&model, keep).is_err(), "{keep:?}");
        }
        // EOS must stay.
        let error = trim(&model, &[5, 6]).unwrap_err().to_string();
        assert!(error.contains("_token_id` is"), "{error}");
        assert!(trim(&crate::train::fixture::tiny(1, 1), &[0]).unwrap_err().to_string().contains("has none"));
    }
}
