//! `tokenizer.json` of a vocabulary with scores: merges by rank that lead to the same ids.
//!
//! Every way in which two tokens join to a third is a merge, in the order of the third's score; of equal
//! ones the longest left part comes first, so that a run of one character grows from its left, as it does
//! where the leftmost of equal pairs is merged. `transformers` orders them so too.

use std::cmp::Reverse;
use std::collections::HashSet;

use edge_runtime::tokenizer::Tokenizer;
use serde_json::{Value, json};

use super::tokenizer::{Parts, ids};
use crate::export::gguf::MetaValue;
use crate::model::Vocabulary;

/// The parts of the file, for the tokens' texts; `unknown` is that of the unknown token.
pub(super) fn parts(
    vocabulary: &Vocabulary,
    view: &Tokenizer<'_>,
    tokens: &[&str],
    unknown: Option<&str>,
) -> Result<Parts, String> {
    let Some(MetaValue::F32s(scores)) = vocabulary.get("tokenizer.ggml.scores") else {
        return Err("`tokenizer.ggml.scores` is missing, expected a number for each token".into());
    };
    let spell = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let unspell = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let (mut normalizers, mut decoders) =
        (Vec::new(), vec![unspell, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})]);
    if view.adds_space_prefix() {
        normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(spell);
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": ids(tokens),
            "merges": merges(tokens, scores),
        }),
    })
}

fn merges(tokens: &[&str], scores: &[f32]) -> Vec<Value> {
    // Spaces are spelled otherwise: Gemma's user-defined tokens that have them are met before any merge.
    let known: HashSet<&str> = tokens.iter().copied().filter(|token| !token.contains(' ')).collect();
    let mut merges = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let joined = cuts.filter(|(left, right)| known.contains(left) && known.contains(right));
        merges.extend(joined.map(|(left, right)| (score, left, right)));
    }
    let length = |text: &str| Reverse(text.chars().count());
    // Stable: what is equal stays in the order of the ids.
    merges.sort_by(|(a, left, right), (b, other_left, other_right)| {
        let lengths = (length(left), length(right)).cmp(&(length(other_left), length(other_right)));
        b.total_cmp(a).then(lengths)
    });
    merges.into_iter().map(|(_, left, right)| json!([left, right])).collect()
}
