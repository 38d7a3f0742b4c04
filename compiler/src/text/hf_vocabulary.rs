//! The tokenizer of a Hugging Face folder as the `tokenizer.*` entries of a GGUF file.
//!
//! Byte-level BPE, and SentencePiece's BPE with bytes to fall back on (see `sentence_piece`). What `tokenizer.json` says by regular expressions and
//! templates GGUF says by name, and the names are found by trial (see `probe`). White space that an
//! added token takes with it (`lstrip`, `rstrip`) has no entry in GGUF and is not kept.

mod probe;
mod sentence_piece;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::TextError;
use crate::export::gguf::MetaValue;
use crate::model::Vocabulary;
use crate::teacher::json;

/// Ids below the highest one that may have no token: they are filled, so a file must not ask for many.
const MAX_HOLES: usize = 1 << 16;

// Values of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Tokens with a role: their name in Hugging Face's files and their key in a GGUF file.
const ROLES: [(&str, &str); 4] = [
    ("bos", "tokenizer.ggml.bos_token_id"),
    ("eos", "tokenizer.ggml.eos_token_id"),
    ("unk", "tokenizer.ggml.unknown_token_id"),
    ("pad", "tokenizer.ggml.padding_token_id"),
];

const UNKNOWN_ROLE: usize = 2;

/// Refuses a `tokenizer.json` of SentencePiece's BPE to which the library gives other ids than the device to
/// `vocabulary`.
///
/// # Errors
/// Where they differ, or why the library does not read the file.
pub(crate) fn same_ids(file: &Value, vocabulary: &Vocabulary) -> Result<(), String> {
    sentence_piece::agree(&probe::library(file, false)?, vocabulary)
}

/// The vocabulary of a Hugging Face folder; `None` if it has none.
///
/// # Errors
/// A file that cannot be read, a tokenizer that is not BPE or with which the device does not agree, or entries that contradict each other. Every message names the file.
pub fn read(folder: &Path) -> Result<Option<Vocabulary>, TextError> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        let pieces = folder.join("tokenizer.model");
        if pieces.is_file() {
            let message = "a SentencePiece vocabulary alone, expected a tokenizer.json beside it";
            return Err(refuse(&pieces)(message.into()));
        }
        return Ok(None);
    }
    let file = document(&path)?;
    let bpe = Bpe::read(&file).map_err(refuse(&path))?;
    let settings = Settings::read(folder)?;
    let mut roles = settings.roles(&bpe)?;
    let library = probe::library(&file, bpe.ignore_merges).map_err(refuse(&path))?;
    let mut vocabulary = if bpe.by_score {
        roles[UNKNOWN_ROLE] = roles[UNKNOWN_ROLE].or(bpe.unknown);
        let mut vocabulary = sentence_piece::vocabulary(bpe.tokens, bpe.kinds, &bpe.merges);
        sentence_piece::set_space_prefix(&library, &mut vocabulary).map_err(refuse(&path))?;
        vocabulary
    } else {
        let mut vocabulary = vocabulary(bpe.tokens, bpe.kinds, bpe.merges);
        let pre = probe::pre_tokenizer(&file, &library, &mut vocabulary, bpe.ignore_merges);
        set(&mut vocabulary, "tokenizer.ggml.pre", pre.map_err(refuse(&path))?.into());
        vocabulary
    };
    let first = probe::first_tokens(&library).map_err(refuse(&path))?;
    let add_bos = settings.adds_bos(&first, &mut roles, vocabulary.tokens().len()).map_err(refuse(&path))?;
    set(&mut vocabulary, "tokenizer.ggml.add_bos_token", MetaValue::Bool(add_bos));
    for ((_, key), id) in ROLES.iter().zip(roles) {
        if let Some(id) = id {
            set(&mut vocabulary, key, MetaValue::U32(id));
        }
    }
    if let Some(template) = chat_template(folder, &settings)? {
        set(&mut vocabulary, "tokenizer.chat_template", template.as_str().into());
    }
    Ok(Some(vocabulary))
}

fn refuse(path: &Path) -> impl Fn(String) -> TextError + '_ {
    move |message| TextError::Vocabulary { path: path.into(), message }
}

fn document(path: &Path) -> Result<Value, TextError> {
    json(path).map_err(|source| TextError::Io { path: path.into(), source })
}

/// The entries that every vocabulary has; the pre-tokenizer and BOS are set when they are known.
fn vocabulary(tokens: Vec<Vec<u8>>, kinds: Vec<i32>, merges: Vec<Vec<u8>>) -> Vocabulary {
    let entries = [
        ("tokenizer.ggml.model", "gpt2".into()),
        ("tokenizer.ggml.pre", "default".into()),
        ("tokenizer.ggml.tokens", MetaValue::Strings(tokens)),
        ("tokenizer.ggml.token_type", MetaValue::I32s(kinds)),
        ("tokenizer.ggml.merges", MetaValue::Strings(merges)),
        ("tokenizer.ggml.add_bos_token", MetaValue::Bool(false)),
    ];
    Vocabulary { entries: entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
}

fn set(vocabulary: &mut Vocabulary, key: &str, value: MetaValue) {
    match vocabulary.entries.iter_mut().find(|(found, _)| found == key) {
        Some((_, slot)) => *slot = value,
        None => vocabulary.entries.push((key.to_owned(), value)),
    }
}

/// Text from a file as far as a message shows it.
fn clip(text: impl ToString) -> String {
    let text = text.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// What `tokenizer.json` holds, checked.
struct Bpe {
    tokens: Vec<Vec<u8>>,
    kinds: Vec<i32>,
    merges: Vec<Vec<u8>>,
    ids: HashMap<String, u32>,
    ignore_merges: bool,
    /// SentencePiece's: scores instead of merges, byte tokens, an unknown token.
    by_score: bool,
    unknown: Option<u32>,
}

impl Bpe {
    fn read(file: &Value) -> Result<Self, String> {
        let model = &file["model"];
        match (&model["type"], &model["merges"]) {
            (Value::String(kind), _) if kind == "BPE" => {}
            // Files from before the key existed.
            (Value::Null, Value::Array(_)) => {}
            (kind, _) => return Err(format!("`model.type` is {}, expected BPE", clip(kind))),
        }
        for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if !matches!(&model[key], Value::Null) && model[key] != "" {
                return Err(format!("`model.{key}` is {}, expected none", clip(&model[key])));
            }
        }
        let by_score = sentence_piece::is(model);
        let table = model["vocab"].as_object().ok_or("`model.vocab` is missing, expected tokens and ids")?;
        let mut ids = HashMap::with_capacity(table.len());
        let mut kinds = Vec::with_capacity(table.len());
        for (token, value) in table {
            let id = id(token, value)?;
            let normal = if by_score { sentence_piece::kind(token) } else { NORMAL };
            let kind = if *token == unused(id) { UNUSED } else { normal };
            ids.insert(token.clone(), id);
            kinds.push((id, token.as_str(), kind));
        }
        let merges = merges(model, &ids)?;
        for added in file["added_tokens"].as_array().into_iter().flatten() {
            let Some(token) = added["content"].as_str().filter(|token| !token.is_empty()) else {
                return Err(format!("added token {} has no text", clip(added)));
            };
            let id = id(token, &added["id"])?;
            let kind = if added["special"] == true { CONTROL } else { USER_DEFINED };
            if let Some(other) = ids.insert(token.to_owned(), id).filter(|other| *other != id) {
                return Err(format!("token `{}` has ids {other} and {id}, expected one", clip(token)));
            }
            kinds.push((id, token, kind));
        }
        let unknown = match model["unk_token"].as_str().filter(|_| by_score) {
            None => None,
            Some(token) => {
                let id = ids.get(token).copied();
                let id =
                    id.ok_or_else(|| format!("`model.unk_token` is `{}`, which is no token", clip(token)))?;
                kinds.push((id, token, UNKNOWN));
                Some(id)
            }
        };
        let (tokens, kinds) = by_id(kinds)?;
        let ignore_merges = model["ignore_merges"] == true;
        Ok(Self { tokens, kinds, merges, ids, ignore_merges, by_score, unknown })
    }
}

fn unused(id: u32) -> String {
    format!("[PAD{id}]")
}

fn id(token: &str, value: &Value) -> Result<u32, String> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| {
        format!("token `{}` has id {}, expected a whole number below 2^32", clip(token), clip(value))
    })
}

/// Texts and types by id; of a token that comes twice the later type counts.
fn by_id(mut found: Vec<(u32, &str, i32)>) -> Result<(Vec<Vec<u8>>, Vec<i32>), String> {
    // Stable: added tokens stay behind those of the model.
    found.sort_by_key(|(id, ..)| *id);
    let Some(&(highest, last, _)) = found.last() else { return Err("no tokens".into()) };
    let most = found.len() + MAX_HOLES;
    if highest as usize >= most {
        return Err(format!("token `{}` has id {highest}, expected less than {most}", clip(last)));
    }
    let (mut tokens, mut kinds) = (Vec::<Vec<u8>>::new(), Vec::new());
    for (id, token, kind) in found {
        match tokens.get(id as usize) {
            Some(earlier) if earlier == token.as_bytes() => kinds[id as usize] = kind,
            Some(earlier) => {
                let earlier = clip(String::from_utf8_lossy(earlier));
                return Err(format!("tokens `{earlier}` and `{}` both have id {id}", clip(token)));
            }
            None => {
                for hole in tokens.len() as u32..id {
                    tokens.push(unused(hole).into_bytes());
                    kinds.push(UNUSED);
                }
                tokens.push(token.as_bytes().to_vec());
                kinds.push(kind);
            }
        }
    }
    Ok((tokens, kinds))
}

/// The merges as GGUF writes them. Both spellings occur: `"a b"` and, newer, `["a", "b"]`.
fn merges(model: &Value, ids: &HashMap<String, u32>) -> Result<Vec<Vec<u8>>, String> {
    let list = model["merges"].as_array().ok_or("`model.merges` is missing, expected a list of pairs")?;
    let pair = |(rank, merge): (usize, &Value)| {
        let parts = match merge {
            Value::String(text) => text.split_once(' '),
            Value::Array(parts) => match parts.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = parts else {
            return Err(format!("merge {rank} is {}, expected two tokens", clip(merge)));
        };
        // The library is given what passes here and trusts it; GGUF parts a merge at its first space.
        let known = |token: &str| !token.is_empty() && ids.contains_key(token);
        if !(known(left) && known(right) && ids.contains_key(&format!("{left}{right}"))) {
            return Err(format!(
                "merge {rank} is {}, expected two tokens whose joined text is a token",
                clip(merge)
            ));
        }
        if left.contains(' ') || right.contains(' ') {
            return Err(format!("merge {rank} is {}, expected tokens without spaces", clip(merge)));
        }
        Ok(format!("{left} {right}").into_bytes())
    };
    list.iter().enumerate().map(pair).collect()
}

/// The files beside `tokenizer.json`; an empty object for one that is not there.
struct Settings<'f> {
    folder: &'f Path,
    tokenizer: Map<String, Value>,
    special: Map<String, Value>,
    generation: Map<String, Value>,
    model: Map<String, Value>,
}

impl<'f> Settings<'f> {
    fn read(folder: &'f Path) -> Result<Self, TextError> {
        let optional = |name: &str| {
            let path = folder.join(name);
            if !path.is_file() {
                return Ok(Map::new());
            }
            match document(&path)? {
                Value::Object(map) => Ok(map),
                other => Err(refuse(&path)(format!("{}, expected an object", clip(other)))),
            }
        };
        Ok(Self {
            folder,
            tokenizer: optional("tokenizer_config.json")?,
            special: optional("special_tokens_map.json")?,
            generation: optional("generation_config.json")?,
            model: optional("config.json")?,
        })
    }

    /// The token of each of [`ROLES`]: by its text, otherwise by its id.
    fn roles(&self, bpe: &Bpe) -> Result<[Option<u32>; 4], TextError> {
        let mut roles = [None; 4];
        for (role, (name, _)) in roles.iter_mut().zip(ROLES) {
            *role = match self.by_text(name, bpe)? {
                Some(id) => Some(id),
                None => self.by_id(name, bpe.tokens.len())?,
            };
        }
        Ok(roles)
    }

    fn by_text(&self, name: &str, bpe: &Bpe) -> Result<Option<u32>, TextError> {
        let key = format!("{name}_token");
        for (file, map) in
            [("tokenizer_config.json", &self.tokenizer), ("special_tokens_map.json", &self.special)]
        {
            let message = match map.get(&key) {
                None | Some(Value::Null) => continue,
                Some(value) => match value.as_str().or_else(|| value["content"].as_str()) {
                    Some(text) => match bpe.ids.get(text) {
                        Some(id) => return Ok(Some(*id)),
                        None => format!("`{key}` is `{}`, which is no token of tokenizer.json", clip(text)),
                    },
                    None => format!("`{key}` is {}, expected a token's text", clip(value)),
                },
            };
            return Err(refuse(&self.folder.join(file))(message));
        }
        Ok(None)
    }

    fn by_id(&self, name: &str, tokens: usize) -> Result<Option<u32>, TextError> {
        let key = format!("{name}_token_id");
        for (file, map) in [("generation_config.json", &self.generation), ("config.json", &self.model)] {
            let value = map.get(&key).unwrap_or(&Value::Null);
            let first = value.as_array().and_then(|list| list.first()).unwrap_or(value);
            // Old configurations say -1 where there is no such token.
            if first.is_null() || first.as_i64() == Some(-1) {
                continue;
            }
            return match first.as_u64().filter(|id| *id < tokens as u64) {
                Some(id) => Ok(Some(id as u32)),
                None => {
                    let message = format!("`{key}` is {}, expected an id below {tokens}", clip(first));
                    Err(refuse(&self.folder.join(file))(message))
                }
            };
        }
        Ok(None)
    }

    /// Whether BOS begins a text. `first` is what the file's post-processor puts before one, and names
    /// BOS where nothing else did; an explicit `add_bos_token` overrules it, as in `transformers`.
    fn adds_bos(&self, first: &[u32], roles: &mut [Option<u32>; 4], tokens: usize) -> Result<bool, String> {
        let bos = &mut roles[0];
        let found = match first {
            [] => false,
            [id] if bos.is_none_or(|bos| bos == *id) && (*id as usize) < tokens => {
                *bos = Some(*id);
                true
            }
            _ => {
                let bos = bos.map_or("no token".into(), |bos| bos.to_string());
                return Err(format!("`post_processor` puts {first:?} before a text, expected BOS ({bos})"));
            }
        };
        match self.tokenizer.get("add_bos_token").and_then(Value::as_bool) {
            Some(true) if bos.is_none() => {
                Err("`add_bos_token` in tokenizer_config.json is true, expected a `bos_token`".into())
            }
            Some(told) => Ok(told),
            None => Ok(found),
        }
    }
}

/// The chat template. A file of its own comes first, as in `transformers`.
fn chat_template(folder: &Path, settings: &Settings<'_>) -> Result<Option<String>, TextError> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        return fs::read_to_string(&path).map(Some).map_err(|source| TextError::Io { path, source });
    }
    let template = match settings.tokenizer.get("chat_template") {
        Some(Value::Array(list)) => {
            list.iter().find(|entry| entry["name"] == "default").map(|e| &e["template"])
        }
        other => other,
    };
    match template {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => {
            let message = format!("`chat_template` is {}, expected text", clip(other));
            Err(refuse(&folder.join("tokenizer_config.json"))(message))
        }
    }
}
