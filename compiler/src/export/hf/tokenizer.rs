//! `tokenizer.json` and `tokenizer_config.json` from the entries of a GGUF file.
//!
//! The device's tokenizer reads the entries first: it refuses what is malformed, and says which
//! pre-tokenizer a name means and which tokens are special.

use std::collections::HashSet;
use std::path::Path;

use edge_models::DecoderSpec;
use edge_runtime::format::Gguf;
use edge_runtime::tokenizer::Tokenizer;
use serde_json::{Map, Value, json};

use super::{HfError, TOKENIZER, TOKENIZER_CONFIG, sentence_piece};
use crate::export::gguf::{MetaValue, vocabulary_file};
use crate::model::Vocabulary;
use crate::text::{HostTokenizer, TextError, hf_vocabulary};

// The regular expressions of `runtime/src/tokenizer/pretokenize.rs`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const CL100K_ONE_DIGIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const CL100K_THREE_DIGITS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const PUNCTUATION: &str = r"[\p{P}\$\+<=>\^~\|]+";
const NUMBER: &str = r"\p{N}+";
const THREE_DIGITS: &str = "[0-9][0-9][0-9]";

/// Ids that configurations name.
#[derive(Clone, Copy, Default)]
pub(super) struct Special {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) pad: Option<u32>,
}

pub(super) struct Files {
    pub(super) tokenizer: Value,
    pub(super) config: Value,
    pub(super) special: Special,
}

/// The two files of `vocabulary`; errors name them as if they were in `folder` already.
pub(super) fn files(vocabulary: &Vocabulary, spec: &DecoderSpec, folder: &Path) -> Result<Files, HfError> {
    let path = folder.join(TOKENIZER);
    let unreadable = |source| HfError::Tokenizer { path: path.clone(), source: Box::new(source) };
    let refuse = |message| HfError::Vocabulary { path: path.clone(), message };
    let file = vocabulary_file(Some(vocabulary));
    let gguf = Gguf::parse(&file).map_err(|error| unreadable(TextError::Tokenizer(error)))?;
    let host = HostTokenizer::from_gguf(&gguf).map_err(unreadable)?;
    let view = host.view();
    if view.len() > spec.vocab {
        return Err(refuse(format!("{} tokens, expected at most {}", view.len(), spec.vocab)));
    }
    let role = |key: &str| match vocabulary.get(key) {
        Some(MetaValue::U32(id)) if (*id as usize) < view.len() => Some(*id),
        _ => None,
    };
    let pad = role("tokenizer.ggml.padding_token_id");
    let special = Special { bos: view.bos(), eos: view.eos(), pad };
    let tokens = texts(view).map_err(refuse)?;
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.context,
        "clean_up_tokenization_spaces": false,
    });
    let unknown = role("tokenizer.ggml.unknown_token_id");
    for (key, id) in [("bos", special.bos), ("eos", special.eos), ("unk", unknown), ("pad", pad)] {
        if let Some(id) = id {
            config[format!("{key}_token")] = tokens[id as usize].into();
        }
    }
    if let Some(template) = vocabulary.get("tokenizer.chat_template") {
        let MetaValue::String(template) = template else {
            let message = "`chat_template` is not text".into();
            return Err(HfError::Vocabulary { path: folder.join(TOKENIZER_CONFIG), message });
        };
        let template = std::str::from_utf8(template).map_err(|error| HfError::Vocabulary {
            path: folder.join(TOKENIZER_CONFIG),
            message: format!("`chat_template` is not UTF-8: {error}"),
        })?;
        config["chat_template"] = template.into();
    }
    let by_score = view.model() == "llama";
    let parts = if by_score {
        let unknown = unknown.map(|id| tokens[id as usize]);
        sentence_piece::parts(vocabulary, view, &tokens, unknown)
    } else {
        byte_level_parts(vocabulary, view, &tokens)
    };
    let Parts { normalizer, pre_tokenizer, decoder, model } = parts.map_err(refuse)?;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added(vocabulary, view, &tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": special.bos.filter(|_| view.adds_bos()).map(|id| begins_with(id, tokens[id as usize])),
        "decoder": decoder,
        "model": model,
    });
    if by_score {
        hf_vocabulary::same_ids(&tokenizer, vocabulary).map_err(refuse)?;
    }
    Ok(Files { tokenizer, config, special })
}

/// What `tokenizer.json` says differently of each tokenizer model.
pub(super) struct Parts {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Value,
}

fn byte_level_parts(vocabulary: &Vocabulary, view: &Tokenizer<'_>, tokens: &[&str]) -> Result<Parts, String> {
    let pre = view.pre_tokenizer();
    Ok(Parts {
        normalizer: Value::Null,
        pre_tokenizer: pre_tokenizer(pre).ok_or_else(|| format!("no pattern for `{pre}`"))?,
        decoder: byte_level(false),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": pre == "llama-bpe",
            "vocab": ids(tokens),
            "merges": merges(vocabulary)?,
        }),
    })
}

fn texts<'a>(view: &Tokenizer<'a>) -> Result<Vec<&'a str>, String> {
    let text = |id| {
        let bytes = view.raw_text(id).unwrap_or_default();
        std::str::from_utf8(bytes)
            .map_err(|_| format!("token {id} is `{}`, expected UTF-8", String::from_utf8_lossy(bytes)))
    };
    (0..view.len() as u32).map(text).collect()
}

/// All tokens, those of [`added`] too: the library then never gives one another id. An empty text,
/// which several ids may have, is never met.
pub(super) fn ids(tokens: &[&str]) -> Map<String, Value> {
    let named = tokens.iter().enumerate().filter(|(_, token)| !token.is_empty());
    named.map(|(id, token)| ((*token).to_owned(), id.into())).collect()
}

/// Special and user-defined tokens.
fn added(vocabulary: &Vocabulary, view: &Tokenizer<'_>, tokens: &[&str]) -> Vec<Value> {
    let kinds = vocabulary.get("tokenizer.ggml.token_type");
    let declared = |id: usize| match kinds {
        Some(MetaValue::I32s(kinds)) => kinds.get(id).copied(),
        Some(MetaValue::U32s(kinds)) => kinds.get(id).map(|kind| *kind as i32),
        _ => None,
    };
    let entry = |(id, token): (usize, &&str)| {
        // A well-known marker is special whatever its type; the device shows it by giving it no text.
        let silent = matches!(view.piece(id as u32, &mut []), Ok(0));
        let special = match declared(id).unwrap_or(1) {
            2 | 3 => true,
            1 if silent => true,
            4 => silent,
            _ => return None,
        };
        (!token.is_empty()).then(|| {
            json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            })
        })
    };
    tokens.iter().enumerate().filter_map(entry).collect()
}

/// The merges as pairs; of one that comes twice the first counts, as on the device.
fn merges(vocabulary: &Vocabulary) -> Result<Vec<Value>, String> {
    let Some(MetaValue::Strings(lines)) = vocabulary.get("tokenizer.ggml.merges") else {
        return Err("`tokenizer.ggml.merges` is missing, expected a list of merges".into());
    };
    let mut seen = HashSet::new();
    let pair = |line: &Vec<u8>| {
        let text = std::str::from_utf8(line).ok()?;
        // The space may be the left part itself.
        let cut = text.bytes().skip(1).position(|byte| byte == b' ')? + 1;
        Some(json!([text.get(..cut)?, text.get(cut + 1..)?]))
    };
    lines
        .iter()
        .filter(|line| seen.insert(*line))
        .map(|line| {
            pair(line).ok_or_else(|| {
                format!("merge `{}`, expected two tokens in UTF-8", String::from_utf8_lossy(line))
            })
        })
        .collect()
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex})
}

/// The pre-tokenizer that the device's table calls `name`.
fn pre_tokenizer(name: &str) -> Option<Value> {
    let sequence = |parts: Vec<Value>| json!({"type": "Sequence", "pretokenizers": parts});
    let splits = |patterns: &[&str]| {
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        sequence(patterns.iter().map(split).chain([byte_level(false)]).collect())
    };
    Some(match name {
        "gpt-2" => byte_level(true),
        "smollm" => sequence(vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)]),
        "qwen2" => splits(&[CL100K_ONE_DIGIT]),
        "llama-bpe" | "dbrx" => splits(&[CL100K_THREE_DIGITS]),
        "default" => splits(&[PUNCTUATION, GPT2, NUMBER, THREE_DIGITS]),
        _ => return None,
    })
}

/// A post-processor that puts BOS before each text.
fn begins_with(bos: u32, token: &str) -> Value {
    let piece = |type_id: u32| json!({"SpecialToken": {"id": token, "type_id": type_id}});
    let text = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    json!({
        "type": "TemplateProcessing",
        "single": [piece(0), text("A", 0)],
        "pair": [piece(0), text("A", 0), piece(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
    })
}
