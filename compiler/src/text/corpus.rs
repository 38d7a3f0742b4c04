//! Training text from `.txt` and `.jsonl` files, as one stream of tokens.
//!
//! A `.txt` file is one document. Each line of a `.jsonl` file is one: `{"text"}`,
//! `{"prompt", "completion"}`, or `{"messages"}` rendered with the model's chat template. Documents are
//! separated by the vocabulary's EOS.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{ChatTemplate, HostTokenizer, Message, TextError};

/// A stream of tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Corpus {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Which of them are to be learned: with masking, prompts and other people's turns are not.
    pub scored: Vec<bool>,
}

/// A line of a `.jsonl` file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Row {
    Text { text: String },
    Pair { prompt: String, completion: String },
    Chat { messages: Vec<Message> },
}

impl Corpus {
    /// Splits off the last `count` tokens.
    pub fn split(mut self, count: usize) -> (Self, Vec<u32>) {
        let at = self.ids.len().saturating_sub(count);
        let held_out = self.ids.split_off(at);
        self.scored.truncate(at);
        (self, held_out)
    }

    fn push(&mut self, ids: &[u32], scored: bool) {
        self.ids.extend_from_slice(ids);
        self.scored.resize(self.ids.len(), scored);
    }

    fn end_document(&mut self, tokenizer: &HostTokenizer) {
        if let Some(eos) = tokenizer.eos() {
            self.push(&[eos], true);
        }
    }
}

/// Reads files in the order given. With `mask`, only completions and the assistant's turns are learned.
///
/// # Errors
/// A file is empty, not UTF-8, or of an unknown kind; a line is not one of the three forms, or needs a
/// chat template that the model lacks. The message names the file and the line.
pub fn load(
    paths: &[PathBuf],
    tokenizer: &HostTokenizer,
    template: Option<&ChatTemplate>,
    mask: bool,
) -> Result<Corpus, TextError> {
    let mut corpus = Corpus::default();
    for path in paths {
        let text = read(path)?;
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("txt") => add_document(&mut corpus, &text, tokenizer)?,
            Some("jsonl") => {
                for (index, line) in text.lines().enumerate() {
                    if line.trim().is_empty() {
                        continue;
                    }
                    let row = |message| TextError::Row { path: path.clone(), line: index + 1, message };
                    let parsed: Row =
                        serde_json::from_str(line).map_err(|error| row(explain(line, &error)))?;
                    add_row(&mut corpus, parsed, tokenizer, template, mask).map_err(|error| match error {
                        Refusal::Text(error) => row(error.to_string()),
                        Refusal::NoTemplate => row("`messages`, but the model has no chat template".into()),
                    })?;
                }
            }
            _ => return Err(TextError::UnknownKind { path: path.clone() }),
        }
    }
    Ok(corpus)
}

/// One document from memory.
///
/// # Errors
/// A refusal of the tokenizer is passed on.
pub fn from_text(text: &str, tokenizer: &HostTokenizer) -> Result<Corpus, TextError> {
    let mut corpus = Corpus::default();
    add_document(&mut corpus, text, tokenizer)?;
    Ok(corpus)
}

fn read(path: &Path) -> Result<String, TextError> {
    let bytes = fs::read(path).map_err(|source| TextError::Io { path: path.into(), source })?;
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(TextError::Empty { path: path.into() });
    }
    String::from_utf8(bytes)
        .map_err(|error| TextError::NotUtf8 { path: path.into(), at: error.utf8_error().valid_up_to() })
}

/// Why a line is none of the three forms: an untagged enum alone cannot tell.
fn explain(line: &str, error: &serde_json::Error) -> String {
    match serde_json::from_str::<serde_json::Value>(line) {
        Err(error) => format!("not JSON: {error}"),
        Ok(serde_json::Value::Object(fields)) => {
            let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
            format!(
                "keys {}, expected `text`, `prompt` and `completion`, or `messages` of `role` and `content`",
                keys.join(", ")
            )
        }
        Ok(_) => format!("expected an object ({error})"),
    }
}

fn add_document(corpus: &mut Corpus, text: &str, tokenizer: &HostTokenizer) -> Result<(), TextError> {
    corpus.push(&tokenizer.encode(text, true, false)?, true);
    corpus.end_document(tokenizer);
    Ok(())
}

enum Refusal {
    Text(TextError),
    NoTemplate,
}

impl From<TextError> for Refusal {
    fn from(error: TextError) -> Self {
        Self::Text(error)
    }
}

fn add_row(
    corpus: &mut Corpus,
    row: Row,
    tokenizer: &HostTokenizer,
    template: Option<&ChatTemplate>,
    mask: bool,
) -> Result<(), Refusal> {
    match row {
        Row::Text { text } => add_document(corpus, &text, tokenizer)?,
        Row::Pair { prompt, completion } => {
            corpus.push(&tokenizer.encode(&prompt, true, false)?, !mask);
            corpus.push(&tokenizer.encode(&completion, false, false)?, true);
            corpus.end_document(tokenizer);
        }
        Row::Chat { messages } => {
            let template = template.ok_or(Refusal::NoTemplate)?;
            add_chat(corpus, &messages, tokenizer, template, mask)?;
            corpus.end_document(tokenizer);
        }
    }
    Ok(())
}

/// A conversation. With `mask`, an assistant's turn is what the template adds for it after the opening
/// that it would give as a prompt.
fn add_chat(
    corpus: &mut Corpus,
    messages: &[Message],
    tokenizer: &HostTokenizer,
    template: &ChatTemplate,
    mask: bool,
) -> Result<(), TextError> {
    let whole = template.render(messages, false)?;
    let mut done = 0;
    let mut push = |end: usize, scored: bool| -> Result<(), TextError> {
        if end > done {
            corpus.push(&tokenizer.encode(&whole[done..end], done == 0, true)?, scored);
            done = end;
        }
        Ok(())
    };
    if mask {
        for (index, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let before = template.render(&messages[..index], true)?;
            let after = template.render(&messages[..=index], false)?;
            // A template that rewrites earlier turns has no such boundaries; then all is prompt.
            if whole.starts_with(&after) && after.starts_with(&before) {
                push(before.len(), false)?;
                push(after.len(), true)?;
            }
        }
    }
    push(whole.len(), !mask)
}
