//! The tokenizer's metadata, read in one walk over the file.

use super::pretokenize::{self, PreTokenizer};
use crate::format::{Array, Gguf, Value, ValueType};
use crate::{Code, Error, Name, Result};

const PREFIX: &str = "tokenizer.ggml.";

/// What the file says about its tokenizer.
pub(super) struct Keys<'a> {
    pub(super) model: Model<'a>,
    /// Token texts: an array of strings.
    pub(super) tokens: Array<'a>,
    /// Token types, 4 bytes each, as many as tokens; or empty.
    pub(super) kinds: &'a [u8],
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// Further tokens that end a generation: end of turn, end of message, and fill-in-the-middle's
    /// padding, repository and file separators.
    pub(super) ends: [Option<u32>; 5],
    pub(super) add_bos: Option<bool>,
}

/// What only files of one tokenizer model have, by `tokenizer.ggml.model`.
pub(super) enum Model<'a> {
    /// `gpt2`.
    ByteLevel {
        /// `tokenizer.ggml.pre`.
        pre: &'static PreTokenizer,
        /// Merges: an array of strings. A pack has none.
        merges: Option<Array<'a>>,
    },
    /// `llama`.
    SentencePiece {
        /// Scores, an f32 in 4 bytes each, as many as tokens.
        scores: &'a [u8],
        unknown: Option<u32>,
        add_space_prefix: bool,
        /// The model's name, `general.name`, is one of Phi-3's.
        phi3: bool,
    },
}

/// What exists, for errors.
const MODELS: &str = "tokenizer models: gpt2, llama";

const ENDS: [&str; 5] =
    ["eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id"];

/// The values that are wanted, as found.
#[derive(Default)]
struct Found<'a> {
    model: Option<Value<'a>>,
    pre: Option<Value<'a>>,
    tokens: Option<Value<'a>>,
    kinds: Option<Value<'a>>,
    merges: Option<Value<'a>>,
    scores: Option<Value<'a>>,
    unknown: Option<Value<'a>>,
    add_space_prefix: Option<Value<'a>>,
    bos: Option<Value<'a>>,
    eos: Option<Value<'a>>,
    ends: [Option<Value<'a>>; 5],
    add_bos: Option<Value<'a>>,
}

impl<'a> Found<'a> {
    fn read(file: &Gguf<'a>) -> Self {
        let mut found = Self::default();
        for (key, value) in file.metadata() {
            let Some(key) = key.strip_prefix(PREFIX) else { continue };
            let slot = match key {
                "model" => &mut found.model,
                "pre" => &mut found.pre,
                "tokens" => &mut found.tokens,
                "token_type" => &mut found.kinds,
                "merges" => &mut found.merges,
                "scores" => &mut found.scores,
                "unknown_token_id" => &mut found.unknown,
                "add_space_prefix" => &mut found.add_space_prefix,
                "bos_token_id" => &mut found.bos,
                "eos_token_id" => &mut found.eos,
                "add_bos_token" => &mut found.add_bos,
                _ => match ENDS.iter().position(|end| *end == key) {
                    Some(i) => &mut found.ends[i],
                    None => continue,
                },
            };
            // Of a key that comes twice the first counts, as in `Gguf::get`.
            slot.get_or_insert(value);
        }
        found
    }
}

impl<'a> Keys<'a> {
    /// Reads and checks the metadata.
    ///
    /// # Errors
    /// A missing key, a key of the wrong type, an id beyond the vocabulary, as many token types or scores as
    /// there are not tokens, or a tokenizer model that does not exist here.
    pub(super) fn read(file: &Gguf<'a>) -> Result<Self> {
        let found = Found::read(file);
        let name = text(found.model, "model")?.ok_or_else(|| missing("model"))?;
        let by_score = match name {
            b"gpt2" => false,
            b"llama" => true,
            _ => return Err(unsupported(name, MODELS)),
        };
        let tokens = strings(found.tokens, "tokens")?;
        // The ids that SentencePiece gives unless told otherwise, as in llama.cpp.
        let usual = |id: u32| Some(id).filter(|&id| by_score && (id as usize) < tokens.len());
        let id = |value, key| id(value, key, tokens.len());
        let mut ends = [None; 5];
        for (end, (value, key)) in ends.iter_mut().zip(found.ends.into_iter().zip(ENDS)) {
            *end = id(value, key)?;
        }
        let model = if by_score {
            Model::SentencePiece {
                scores: numbers(found.scores, "scores", &[ValueType::F32], tokens.len())?
                    .ok_or_else(|| missing("scores"))?,
                unknown: id(found.unknown, "unknown_token_id")?.or(usual(0)),
                add_space_prefix: flag(found.add_space_prefix, "add_space_prefix")?.unwrap_or(true),
                phi3: is_phi3(file),
            }
        } else {
            let pre = match text(found.pre, "pre")? {
                None => &pretokenize::TABLE[0],
                Some(name) => {
                    PreTokenizer::find(name).ok_or_else(|| unsupported(name, pretokenize::NAMES))?
                }
            };
            let merges = found.merges.map(|merges| strings(Some(merges), "merges")).transpose()?;
            Model::ByteLevel { pre, merges }
        };
        let kinds = [ValueType::I32, ValueType::U32];
        Ok(Self {
            model,
            kinds: numbers(found.kinds, "token_type", &kinds, tokens.len())?.unwrap_or(&[]),
            bos: id(found.bos, "bos_token_id")?.or(usual(1)),
            eos: id(found.eos, "eos_token_id")?.or(usual(2)),
            ends,
            add_bos: flag(found.add_bos, "add_bos_token")?,
            tokens,
        })
    }

    /// The merges, which byte-level BPE must have.
    pub(super) fn merges(&self) -> Result<Array<'a>> {
        match self.model {
            Model::ByteLevel { merges: Some(merges), .. } => Ok(merges),
            _ => Err(missing("merges")),
        }
    }

    /// Bytes of the longest text of a token.
    pub(super) fn longest_text(&self) -> usize {
        self.tokens.texts().fold(0, |longest, text| longest.max(text.len()))
    }
}

/// llama.cpp knows by the model's name that special tokens take white space with them: no key says so.
fn is_phi3(file: &Gguf<'_>) -> bool {
    let Some(Value::String(name)) = file.get("general.name") else { return false };
    let has = |part: &[u8]| name.windows(part.len()).any(|window| window.eq_ignore_ascii_case(part));
    has(b"phi-3") || has(b"phi3")
}

/// The refusal of something that the file names and that does not exist here.
fn unsupported(found: &[u8], known: &'static str) -> Error {
    Error::new(Code::Unsupported, core::str::from_utf8(found).unwrap_or("a name that is not UTF-8"))
        .hint(known)
}

/// The refusal of a missing key, given without its prefix.
pub(super) fn missing(key: &'static str) -> Error {
    named(Code::MissingKey, key)
}

fn wrong_type(key: &'static str, expected: &'static str) -> Error {
    named(Code::WrongKeyType, key).hint(expected)
}

fn named(code: Code, key: &'static str) -> Error {
    let mut name = [0; 64];
    let len = PREFIX.len() + key.len();
    name[..PREFIX.len()].copy_from_slice(PREFIX.as_bytes());
    name[PREFIX.len()..len].copy_from_slice(key.as_bytes());
    Error { name: Name::new(core::str::from_utf8(&name[..len]).unwrap_or(key)), ..Error::new(code, "") }
}

fn text<'a>(value: Option<Value<'a>>, key: &'static str) -> Result<Option<&'a [u8]>> {
    match value {
        None => Ok(None),
        Some(Value::String(bytes)) => Ok(Some(bytes)),
        Some(_) => Err(wrong_type(key, "text")),
    }
}

fn strings<'a>(value: Option<Value<'a>>, key: &'static str) -> Result<Array<'a>> {
    match value.ok_or_else(|| missing(key))? {
        Value::Array(array) if array.element_type() == ValueType::String => Ok(array),
        _ => Err(wrong_type(key, "an array of strings")),
    }
}

fn flag(value: Option<Value<'_>>, key: &'static str) -> Result<Option<bool>> {
    let Some(value) = value else { return Ok(None) };
    value.as_bool().map(Some).ok_or_else(|| wrong_type(key, "a bool"))
}

/// The bytes of an array with one number of 4 bytes for each token.
fn numbers<'a>(
    value: Option<Value<'a>>,
    key: &'static str,
    types: &[ValueType],
    tokens: usize,
) -> Result<Option<&'a [u8]>> {
    let Some(value) = value else { return Ok(None) };
    match value {
        Value::Array(array) if types.contains(&array.element_type()) => {
            if array.len() != tokens {
                return Err(named(Code::BadLength, key)
                    .found(array.len() as u64, tokens as u64)
                    .hint("as many as tokens"));
            }
            Ok(Some(array.bytes()))
        }
        _ if types.contains(&ValueType::F32) => Err(wrong_type(key, "an array of f32")),
        _ => Err(wrong_type(key, "an array of i32")),
    }
}

fn id(value: Option<Value<'_>>, key: &'static str, tokens: usize) -> Result<Option<u32>> {
    let Some(value) = value else { return Ok(None) };
    let id = value.as_uint().ok_or_else(|| wrong_type(key, "a token id"))?;
    match u32::try_from(id) {
        Ok(short) if id < tokens as u64 => Ok(Some(short)),
        _ => Err(named(Code::OutOfRange, key).found(id, (tokens as u64).saturating_sub(1))),
    }
}
