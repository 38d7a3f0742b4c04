//! The tokenizer's metadata, read in one walk over the file.

use crate::format::{Array, Gguf, Value, ValueType};
use crate::{Code, Error, Name, Result};

const PREFIX: &str = "tokenizer.ggml.";

/// What the file says about its tokenizer.
pub(super) struct Keys<'a> {
    /// `tokenizer.ggml.pre`.
    pub(super) pre: Option<&'a [u8]>,
    /// Token texts: an array of strings.
    pub(super) tokens: Array<'a>,
    /// Token types, 4 bytes each, as many as tokens; or empty.
    pub(super) kinds: &'a [u8],
    /// Merges: an array of strings.
    pub(super) merges: Array<'a>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// Further tokens that end a generation: end of turn, end of message, and fill-in-the-middle's
    /// padding, repository and file separators.
    pub(super) ends: [Option<u32>; 5],
    pub(super) add_bos: Option<bool>,
}

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
    /// A missing key, a key of the wrong type, an id beyond the vocabulary, as many token types as there
    /// are not tokens, or a tokenizer model other than byte-level BPE.
    pub(super) fn read(file: &Gguf<'a>) -> Result<Self> {
        let found = Found::read(file);
        let model = text(found.model, "model")?.ok_or_else(|| missing("model"))?;
        if model != b"gpt2" {
            return Err(unsupported(model, "tokenizer models: gpt2, which is byte-level BPE"));
        }
        let tokens = strings(found.tokens, "tokens")?;
        let id = |value, key| id(value, key, tokens.len());
        let mut ends = [None; 5];
        for (end, (value, key)) in ends.iter_mut().zip(found.ends.into_iter().zip(ENDS)) {
            *end = id(value, key)?;
        }
        Ok(Self {
            pre: text(found.pre, "pre")?,
            kinds: kinds(found.kinds, tokens.len())?,
            merges: strings(found.merges, "merges")?,
            bos: id(found.bos, "bos_token_id")?,
            eos: id(found.eos, "eos_token_id")?,
            ends,
            add_bos: match found.add_bos {
                None => None,
                Some(value) => Some(value.as_bool().ok_or_else(|| wrong_type("add_bos_token", "a bool"))?),
            },
            tokens,
        })
    }
}

/// The refusal of something that the file names and that does not exist here.
pub(super) fn unsupported(found: &[u8], known: &'static str) -> Error {
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

fn kinds(value: Option<Value<'_>>, tokens: usize) -> Result<&[u8]> {
    let Some(value) = value else { return Ok(&[]) };
    match value {
        Value::Array(array) if matches!(array.element_type(), ValueType::I32 | ValueType::U32) => {
            if array.len() != tokens {
                return Err(named(Code::BadLength, "token_type")
                    .found(array.len() as u64, tokens as u64)
                    .hint("as many as tokens"));
            }
            Ok(array.bytes())
        }
        _ => Err(wrong_type("token_type", "an array of i32")),
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
