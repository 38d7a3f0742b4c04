//! What `tokenizer.json` says by regular expressions and templates, found by trial.
//!
//! The library that defines the format encodes a text; the name of the pre-tokenizer is the one with
//! which the device's tokenizer gives the same ids. The library panics on some files, so it only gets
//! parts of known kinds, and a model whose merges were checked.

use edge_runtime::format::Gguf;
use serde::Serialize;
use serde_json::{Map, Value};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer};

use super::{NORMAL, Vocabulary, clip, set};
use crate::export::gguf::vocabulary_file;
use crate::text::{HostTokenizer, TextError};

/// Names to try, in this order.
const NAMES: [&str; 6] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "dbrx", "default"];

/// A text on which pre-tokenizers differ. Composed characters only: the device does not normalize, and
/// NFC, which some files ask for, must leave it alone.
pub(super) const PROBE: &str = "Hello world, it's what I'll say; we've, they're, you'd, I'm, don't. IT'S, I'LL, \
    WE'VE, THEY'RE, YOU'D, I'M, DON'T! 1 12 123 1234 12345 123456 1234567890 3.14 a1b22c333d4444 v2.0 ½ ² \
    ٣٤ a  b   c    d\te\t\tf \n g\n\nh \n\n\n i\r\nj\r\n\r\nk  \r\n  l \u{a0}m \u{3000}n\n    o !? ... (a) \
    [b] {c} <d> =+-*/ a+b=c $5 ^x ~y |z _x_ \"q\" 'r' «s» — … • !!!\n\n??\n 漢字かな交じり文 한국어 Привет \
    мир שלום café naïve Übung ÉTÉ ß 😀 👩‍💻 ❤️🎉 fn main() { let x_1 = a[0] += 2; }\n\t// done: https://a.b/c?d=1&e=2\n \
    the the The  THE 'tis 'S ''s end   \n  ";

/// `tokenizer.json` as the library reads it.
#[derive(Serialize)]
struct File<'j> {
    version: &'static str,
    truncation: Option<()>,
    padding: Option<()>,
    added_tokens: &'j Value,
    normalizer: &'j Value,
    pre_tokenizer: &'j Value,
    post_processor: &'j Value,
    decoder: Option<()>,
    model: Model<'j>,
}

#[derive(Serialize)]
struct Model<'j> {
    r#type: &'static str,
    ignore_merges: bool,
    byte_fallback: bool,
    fuse_unk: bool,
    unk_token: Option<&'j str>,
    vocab: &'j Value,
    merges: &'j Value,
}

/// The file's tokenizer, without what cuts or pads a text.
pub(super) fn library(file: &Value, ignore_merges: bool) -> Result<Tokenizer, String> {
    let none = Value::Array(Vec::new());
    let added = if file["added_tokens"].is_null() { &none } else { &file["added_tokens"] };
    build(file, added, &file["model"]["vocab"], &file["model"]["merges"], ignore_merges)
}

fn build(
    file: &Value,
    added_tokens: &Value,
    vocab: &Value,
    merges: &Value,
    ignore_merges: bool,
) -> Result<Tokenizer, String> {
    let by_score = super::sentence_piece::is(&file["model"]);
    let (normalizers, pre_tokenizers): (&[_], &[_]) = if by_score {
        (&["Prepend", "Replace"], &["Metaspace", "Split"])
    } else {
        (&["NFC"], &["ByteLevel", "Split", "Digits", "Punctuation"])
    };
    let parts = File {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens,
        normalizer: part(file, "normalizer", normalizers)?,
        pre_tokenizer: part(file, "pre_tokenizer", pre_tokenizers)?,
        post_processor: part(file, "post_processor", &["ByteLevel", "TemplateProcessing"])?,
        decoder: None,
        model: Model {
            r#type: "BPE",
            ignore_merges,
            byte_fallback: by_score,
            fuse_unk: by_score && file["model"]["fuse_unk"] == true,
            unk_token: file["model"]["unk_token"].as_str().filter(|_| by_score),
            vocab,
            merges,
        },
    };
    let bytes = serde_json::to_vec(&parts).map_err(|error| error.to_string())?;
    Tokenizer::from_bytes(bytes).map_err(clip)
}

/// A part of the file, if it and all parts within are of known kinds.
fn part<'j>(file: &'j Value, name: &str, known: &[&str]) -> Result<&'j Value, String> {
    let whole = &file[name];
    let mut rest = vec![whole];
    while let Some(part) = rest.pop() {
        match part["type"].as_str() {
            _ if part.is_null() => {}
            Some("Sequence") => {
                let lists = ["normalizers", "pretokenizers", "processors"].map(|key| part[key].as_array());
                rest.extend(lists.into_iter().flatten().flatten());
            }
            Some(kind) if known.contains(&kind) => {}
            _ => {
                let (known, kind) = (known.join(", "), clip(&part["type"]));
                return Err(format!(
                    "`{name}` is of type {kind}, expected one of {known}, or a Sequence of them"
                ));
            }
        }
        template(name, part)?;
    }
    Ok(whole)
}

/// Refuses a template with a piece that it does not define, or without the text.
fn template(name: &str, part: &Value) -> Result<(), String> {
    let Some(pieces) = part["single"].as_array() else { return Ok(()) };
    let mut texts = 0;
    for piece in pieces {
        let special = piece["SpecialToken"]["id"].as_str();
        match &piece["Sequence"]["id"] {
            id if id == "A" => texts += 1,
            _ if special.is_some_and(|id| !part["special_tokens"][id].is_null()) => {}
            _ => return Err(format!("`{name}` has piece {}, expected one that it defines", clip(piece))),
        }
    }
    if texts != 1 {
        return Err(format!("`{name}` holds the text {texts} times, expected once"));
    }
    Ok(())
}

/// The name of the pre-tokenizer.
///
/// Two vocabularies are compared: one whose ids show where words end even if the file's own is too
/// small for that, and the file's own. `ignore_merges` is part of what a name means.
pub(super) fn pre_tokenizer(
    file: &Value,
    library: &Tokenizer,
    vocabulary: &mut Vocabulary,
    ignore_merges: bool,
) -> Result<&'static str, String> {
    let (mut pairs, pairs_library) = pairs(file)?;
    let (cuts, ids) = (encode(&pairs_library, PROBE)?, encode(library, PROBE)?);
    for name in NAMES {
        if (name == "llama-bpe" && !ignore_merges) || (name == "dbrx" && ignore_merges) {
            continue;
        }
        let agree = |vocabulary: &mut Vocabulary, expected: &[u32]| {
            set(vocabulary, "tokenizer.ggml.pre", name.into());
            device_ids(vocabulary, PROBE).map(|ids| ids == expected).map_err(|error| error.to_string())
        };
        if agree(&mut pairs, &cuts)? && agree(vocabulary, &ids)? {
            return Ok(name);
        }
    }
    let names = NAMES.join(", ");
    Err(format!("`pre_tokenizer` cuts texts as none that the device has; tried {names}"))
}

/// The library's ids of a text.
pub(super) fn encode(library: &Tokenizer, text: &str) -> Result<Vec<u32>, String> {
    Ok(library.encode_fast(text, false).map_err(clip)?.get_ids().to_vec())
}

/// The device's.
pub(super) fn device_ids(vocabulary: &Vocabulary, text: &str) -> Result<Vec<u32>, TextError> {
    let file = vocabulary_file(Some(vocabulary));
    let gguf = Gguf::parse(&file).map_err(TextError::Tokenizer)?;
    // The library matches added tokens in any text.
    HostTokenizer::from_gguf(&gguf)?.encode(text, false, true)
}

/// A vocabulary of all bytes and of every two neighbours in the probe, for both tokenizers.
fn pairs(file: &Value) -> Result<(Vocabulary, Tokenizer), String> {
    let mut text = PreTokenizedString::from(PROBE);
    ByteLevel::new(false, false, false).pre_tokenize(&mut text).map_err(|error| error.to_string())?;
    let splits = text.get_splits(OffsetReferential::Original, OffsetType::None);
    let letters: Vec<String> = splits.iter().flat_map(|(word, ..)| word.chars()).map(String::from).collect();
    let mut tokens: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    tokens.sort_unstable();
    let mut vocab: Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
    let (mut merges, mut lines) = (Vec::new(), Vec::new());
    for pair in letters.windows(2) {
        let joined = pair.concat();
        if !vocab.contains_key(&joined) {
            vocab.insert(joined.clone(), tokens.len().into());
            tokens.push(joined);
            merges.push(Value::from(pair.to_vec()));
            lines.push(pair.join(" ").into_bytes());
        }
    }
    let kinds = vec![NORMAL; tokens.len()];
    let vocabulary = super::vocabulary(tokens.into_iter().map(String::into_bytes).collect(), kinds, lines);
    let none = Value::Array(Vec::new());
    let library = build(file, &none, &Value::Object(vocab), &Value::Array(merges), false)?;
    Ok((vocabulary, library))
}

/// The tokens that the file's post-processor puts before a text.
pub(super) fn first_tokens(library: &Tokenizer) -> Result<Vec<u32>, String> {
    let encode = |special| library.encode_fast("Hello", special).map_err(clip);
    let (plain, whole) = (encode(false)?, encode(true)?);
    let (plain, whole) = (plain.get_ids(), whole.get_ids());
    if plain.is_empty() {
        return Err("the library gives no ids for `Hello`, expected at least one".into());
    }
    match whole.windows(plain.len()).position(|window| window == plain) {
        Some(at) => Ok(whole[..at].to_vec()),
        None => Err("`post_processor` changes a text's own ids, expected it to add to them".into()),
    }
}
