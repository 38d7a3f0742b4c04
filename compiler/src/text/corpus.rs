//! Training text from `.txt` and `.jsonl` files, as one stream of tokens.
//!
//! A `.txt` file is one document. Each line of a `.jsonl` file is one: `{"text"}`,
//! `{"prompt", "completion"}`, or `{"messages"}` rendered with the model's chat template. Documents are
//! separated by the vocabulary's EOS.
//!
//! Rows that `edgec synth` wrote may say more: `"finish_reason": "length"`, an answer that was cut, whose end
//! is not learned; and `"logprobs"`, what the server said of each of its tokens ([`super::soft`]).

use std::cell::OnceCell;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::soft::{self, Pieces, SoftTargets, TokenLogprobs};
use super::{ChatTemplate, HostTokenizer, Message, TextError};

/// A stream of tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Corpus {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Which of them are to be learned: with masking, prompts and other people's turns are not.
    pub scored: Vec<bool>,
    /// Distributions that a server gave for some of them.
    pub soft: SoftTargets,
}

/// A line of a `.jsonl` file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Row {
    Text { text: String },
    Pair { prompt: String, completion: String, finish_reason: Option<Value>, logprobs: Option<Value> },
    Chat { messages: Vec<Message>, finish_reason: Option<Value>, logprobs: Option<Value> },
}

/// What a row says of how its answer came about.
struct Said {
    /// It was cut: it does not end where its text does.
    cut: bool,
    tokens: Vec<TokenLogprobs>,
}

impl Said {
    fn read(finish_reason: Option<&Value>, logprobs: Option<Value>) -> Result<Self, TextError> {
        let tokens = match logprobs {
            None | Some(Value::Null) => Vec::new(),
            Some(tokens) => serde_json::from_value(tokens).map_err(|error| {
                TextError::Logprobs(format!(
                    "`logprobs`: {error}, expected a list of `token`, `logprob` and `top`"
                ))
            })?,
        };
        Ok(Self { cut: finish_reason.and_then(Value::as_str) == Some("length"), tokens })
    }
}

impl Corpus {
    /// Splits off the last `count` tokens.
    pub fn split(mut self, count: usize) -> (Self, Vec<u32>) {
        let at = self.ids.len().saturating_sub(count);
        let held_out = self.ids.split_off(at);
        self.scored.truncate(at);
        self.soft.truncate(at);
        (self, held_out)
    }

    fn push(&mut self, ids: &[u32], scored: bool) {
        self.ids.extend_from_slice(ids);
        self.scored.resize(self.ids.len(), scored);
    }

    fn end_document(&mut self, tokenizer: &HostTokenizer, scored: bool) {
        if let Some(eos) = tokenizer.eos() {
            self.push(&[eos], scored);
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
    let reader = Reader { tokenizer, template, mask, pieces: OnceCell::new() };
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
                    reader.add_row(&mut corpus, parsed).map_err(|error| match error {
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

/// `tokens` of a text in whole windows, at least one, from everywhere in it: a regression learns what it is
/// shown.
pub fn spread(ids: &[u32], tokens: usize, length: usize) -> Vec<u32> {
    let there = (ids.len() / length).max(1);
    let wanted = (tokens / length).clamp(1, there);
    (0..wanted)
        .flat_map(|window| ids.iter().skip(window * there / wanted * length).take(length))
        .copied()
        .collect()
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
    corpus.end_document(tokenizer, true);
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

/// How rows become tokens.
struct Reader<'a> {
    tokenizer: &'a HostTokenizer,
    template: Option<&'a ChatTemplate>,
    mask: bool,
    /// Made for the first row with probabilities.
    pieces: OnceCell<Pieces<'a>>,
}

impl Reader<'_> {
    fn add_row(&self, corpus: &mut Corpus, row: Row) -> Result<(), Refusal> {
        match row {
            Row::Text { text } => add_document(corpus, &text, self.tokenizer)?,
            Row::Pair { prompt, completion, finish_reason, logprobs } => {
                let said = Said::read(finish_reason.as_ref(), logprobs)?;
                corpus.push(&self.tokenizer.encode(&prompt, true, false)?, !self.mask);
                let start = corpus.ids.len();
                let ids = match prompt.is_empty() {
                    true => self.tokenizer.encode(&completion, false, false)?,
                    false => self.tokenizer.encode_behind(completion.as_bytes(), false)?,
                };
                corpus.push(&ids, true);
                self.add_soft(corpus, start, &completion, 0..completion.len(), &said.tokens)?;
                corpus.end_document(self.tokenizer, !said.cut);
            }
            Row::Chat { messages, finish_reason, logprobs } => {
                let template = self.template.ok_or(Refusal::NoTemplate)?;
                let said = Said::read(finish_reason.as_ref(), logprobs)?;
                self.add_chat(corpus, &messages, template, &said)?;
                corpus.end_document(self.tokenizer, !said.cut);
            }
        }
        Ok(())
    }

    /// A conversation. With a mask, and where the last answer was cut or has probabilities, an assistant's
    /// turn is what the template adds for it after the opening that it would give as a prompt.
    fn add_chat(
        &self,
        corpus: &mut Corpus,
        messages: &[Message],
        template: &ChatTemplate,
        said: &Said,
    ) -> Result<(), TextError> {
        let whole = template.render(messages, false)?;
        let mut done = 0;
        let mut push = |corpus: &mut Corpus, end: usize, scored: bool| -> Result<(), TextError> {
            if end > done {
                let ids = match done {
                    0 => self.tokenizer.encode(&whole[..end], true, true)?,
                    _ => self.tokenizer.encode_behind(&whole.as_bytes()[done..end], true)?,
                };
                corpus.push(&ids, scored);
                done = end;
            }
            Ok(())
        };
        let special = said.cut || !said.tokens.is_empty();
        for (index, message) in messages.iter().enumerate() {
            let last = special && index + 1 == messages.len();
            if message.role != "assistant" || !(self.mask || last) {
                continue;
            }
            let before = template.render(&messages[..index], true)?;
            let after = template.render(&messages[..=index], false)?;
            // A template that rewrites earlier turns has no such boundaries; then all is prompt.
            if !whole.starts_with(&after) || !after.starts_with(&before) {
                continue;
            }
            push(corpus, before.len(), !self.mask)?;
            let start = corpus.ids.len();
            let turn = &whole[before.len()..after.len()];
            if last && said.cut {
                // What closes the turn was not said. A template may have trimmed what was.
                let content = message.content.trim_end();
                let end = turn.find(content).map_or(0, |at| at + content.len());
                push(corpus, before.len() + end, true)?;
                push(corpus, after.len(), false)?;
            } else {
                push(corpus, after.len(), true)?;
            }
            if let Some(at) = turn.find(&message.content).filter(|_| last) {
                self.add_soft(corpus, start, turn, at..at + message.content.len(), &said.tokens)?;
            }
        }
        push(corpus, whole.len(), !self.mask)
    }

    /// Gives the tokens of `text` that begin at `start` the distributions that `tokens` says of `text[said]`.
    fn add_soft(
        &self,
        corpus: &mut Corpus,
        start: usize,
        text: &str,
        said: Range<usize>,
        tokens: &[TokenLogprobs],
    ) -> Result<(), TextError> {
        if tokens.is_empty() {
            return Ok(());
        }
        let pieces = match self.pieces.get() {
            Some(pieces) => pieces,
            None => {
                let made = Pieces::new(self.tokenizer)?;
                self.pieces.get_or_init(|| made)
            }
        };
        let aligned = soft::align(pieces, &corpus.ids[start..], text.as_bytes(), said, tokens);
        for (index, entries) in aligned? {
            corpus.soft.push(start + index, &entries);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::spread;

    #[test]
    fn windows_come_from_everywhere() {
        let ids: Vec<u32> = (0..103).collect();
        assert_eq!(spread(&ids, 30, 10), [0..10, 30..40, 60..70].into_iter().flatten().collect::<Vec<_>>());
        assert_eq!(spread(&ids, 1000, 10), (0..100).collect::<Vec<_>>());
        assert_eq!(spread(&ids, 5, 10), (0..10).collect::<Vec<_>>());
    }
}
