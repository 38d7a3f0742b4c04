//! SentencePiece's BPE, as `tokenizer.json` has it since its conversion: merges by rank, with bytes to fall
//! back on, and spaces that a normalizer or pre-tokenizer spells U+2581.
//!
//! GGUF has no merges for it but a score for each token, and two neighbours merge wherever their joined text
//! is a token. A token's score is minus the rank of the first merge that makes it. That gives the same ids
//! if the merges come from scores in the first place, which is found by trial.
//!
//! Two things are not tried and are as llama.cpp has them: where a space is put before a text, a text that
//! begins with one gets another, and so does text behind a special token. `Metaspace` does the first never
//! and the second only by `prepend_scheme` = `always`.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::probe::{PROBE, device_ids, encode};
use super::{BYTE, NORMAL, Vocabulary, clip, set};
use crate::export::gguf::MetaValue;

const SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";

/// Tokens of which a text is made for the trial.
const SAMPLE: usize = 2000;

/// The file is of this kind.
pub(super) fn is(model: &Value) -> bool {
    model["byte_fallback"] == true
}

/// What a token of the model's table is by its text: that of a byte is `<0x0A>`.
pub(super) fn kind(token: &str) -> i32 {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    let byte = |digits: &str| digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if digits.is_some_and(byte) { BYTE } else { NORMAL }
}

/// The entries that every vocabulary of this kind has; the space before a text and BOS are set when they are
/// known.
pub(super) fn vocabulary(tokens: Vec<Vec<u8>>, kinds: Vec<i32>, merges: &[Vec<u8>]) -> Vocabulary {
    let mut ranks = HashMap::with_capacity(merges.len());
    for (rank, line) in merges.iter().enumerate() {
        let joined: Vec<u8> = line.iter().copied().filter(|&byte| byte != b' ').collect();
        ranks.entry(joined).or_insert(rank);
    }
    let score = |(token, &kind): (&Vec<u8>, &i32)| match ranks.get(token) {
        Some(&rank) => -(rank as f32),
        // Single characters, which nothing makes.
        None if kind == NORMAL => -(merges.len() as f32),
        None => 0.0,
    };
    let scores = tokens.iter().zip(&kinds).map(score).collect();
    let entries = [
        ("tokenizer.ggml.model", "llama".into()),
        ("tokenizer.ggml.pre", "default".into()),
        ("tokenizer.ggml.tokens", MetaValue::Strings(tokens)),
        ("tokenizer.ggml.scores", MetaValue::F32s(scores)),
        ("tokenizer.ggml.token_type", MetaValue::I32s(kinds)),
        (SPACE_PREFIX, MetaValue::Bool(true)),
        ("tokenizer.ggml.add_bos_token", MetaValue::Bool(false)),
    ];
    Vocabulary { entries: entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
}

/// Finds whether a space is put before a text, such that the device gives the library's ids.
pub(super) fn set_space_prefix(library: &Tokenizer, vocabulary: &mut Vocabulary) -> Result<(), String> {
    let mut differs = String::new();
    for prefix in [true, false] {
        set(vocabulary, SPACE_PREFIX, MetaValue::Bool(prefix));
        match agree(library, vocabulary) {
            Ok(()) => return Ok(()),
            Err(message) if differs.is_empty() => differs = message,
            Err(_) => {}
        }
    }
    Err(format!("{differs}; without a space before the text neither"))
}

/// Refuses a vocabulary for which the device and the library disagree: on the probe, or on a text made of
/// many of its tokens.
pub(in crate::text) fn agree(library: &Tokenizer, vocabulary: &Vocabulary) -> Result<(), String> {
    for text in [PROBE.to_owned(), sample(vocabulary)] {
        let expected = encode(library, &text)?;
        let found = device_ids(vocabulary, &text).map_err(|error| error.to_string())?;
        if let Some(at) = (0..expected.len().max(found.len())).find(|&at| expected.get(at) != found.get(at)) {
            let shown = |ids: &[u32]| format!("{:?}", &ids[at.min(ids.len())..ids.len().min(at + 3)]);
            return Err(format!(
                "token {at} of the probe `{}` and what follows is {} in the library and {} on the device, \
                 expected the same: normalizer, pre-tokenizer or merges are none that scores can say",
                clip(text),
                shown(&expected),
                shown(&found)
            ));
        }
    }
    Ok(())
}

/// Normal tokens, evenly taken from the vocabulary, one behind the other.
fn sample(vocabulary: &Vocabulary) -> String {
    let normal: Vec<&Vec<u8>> = match vocabulary.get("tokenizer.ggml.token_type") {
        Some(MetaValue::I32s(kinds)) => {
            let listed = vocabulary.tokens().iter().zip(kinds);
            listed.filter(|(_, kind)| **kind == NORMAL).map(|(token, _)| token).collect()
        }
        _ => vocabulary.tokens().iter().collect(),
    };
    let step = normal.len() / SAMPLE + 1;
    let texts = normal.iter().step_by(step).map(|token| String::from_utf8_lossy(token));
    let text: String =
        texts.filter(|text| !text.contains('<')).map(|text| text.replace('\u{2581}', " ")).collect();
    text.trim_start().to_owned()
}
