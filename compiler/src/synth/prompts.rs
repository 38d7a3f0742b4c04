//! What is asked: lines of files, or passages cut from a text.

use std::fs;
use std::path::{Path, PathBuf};

use minijinja::{Environment, UndefinedBehavior, context};
use serde::Deserialize;

use super::{Endpoint, Error};
use crate::text::Message;
use crate::train::random::SplitMix64;

/// A prompt and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// File and line, for messages.
    pub origin: String,
    /// What is asked.
    pub said: Said,
}

/// What is asked, as it is sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// A text to continue.
    Text(String),
    /// A conversation to which the assistant answers.
    Messages(Vec<Message>),
}

/// What is made of a text before it is asked.
pub struct Form {
    /// What is asked.
    pub endpoint: Endpoint,
    /// A system message, for conversations that do not begin with one.
    pub system: Option<String>,
    /// Where it is from, and a Jinja template with the text as `text`.
    pub template: Option<(PathBuf, String)>,
}

/// Asks a chat model to go on with a passage.
const CONTINUE: &str =
    "Continue the following text in its own style. Answer with the continuation alone.\n\n{{ text }}";

/// A line of a `.jsonl` file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Messages { messages: Vec<Message> },
    Prompt { prompt: String },
}

impl Form {
    /// Prompts of `.txt` files, one to a line, and `.jsonl` files, with a `prompt` or `messages` on each. The
    /// template is for texts alone; empty lines are passed over.
    ///
    /// # Errors
    /// A file cannot be read, is not UTF-8, of an unknown kind or without a prompt; a line is of neither
    /// form.
    pub fn read(&self, paths: &[PathBuf]) -> Result<Vec<Prompt>, Error> {
        let mut prompts = Vec::new();
        for path in paths {
            let before = prompts.len();
            let json = match path.extension().and_then(|extension| extension.to_str()) {
                Some("txt") => false,
                Some("jsonl") => true,
                _ => return Err(file(path, "unknown kind of prompts, expected .txt or .jsonl")),
            };
            for (index, line) in read(path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
                let said = if json { self.row(line) } else { self.text(line).map_err(Refusal::Template) };
                let said = said.map_err(|refusal| match refusal {
                    Refusal::Template(error) => error,
                    Refusal::Line(message) => Error::Line { path: path.clone(), line: index + 1, message },
                })?;
                prompts.push(Prompt { origin: format!("{}: line {}", path.display(), index + 1), said });
            }
            if prompts.len() == before {
                return Err(file(path, "no prompt in it"));
            }
        }
        Ok(prompts)
    }

    /// Asks to go on with passages of about `size` bytes of a text, in an order that the seed decides.
    ///
    /// # Errors
    /// The file cannot be read, is not UTF-8 or empty; the template does not render.
    pub fn passages(&self, path: &Path, size: usize, seed: u64) -> Result<Vec<Prompt>, Error> {
        let text = read(path)?;
        let mut passages = cut(&text, size);
        if passages.is_empty() {
            return Err(file(path, "no text in it"));
        }
        SplitMix64::new(seed, 0).shuffle(&mut passages);
        let continued = |(at, passage): (usize, &str)| {
            let said = match (self.endpoint, &self.template) {
                (Endpoint::Chat, None) => {
                    let form = (PathBuf::from("(continue)"), CONTINUE.to_owned());
                    self.chat(render(&form, passage)?)
                }
                _ => self.text(passage)?,
            };
            Ok(Prompt { origin: format!("{}: byte {at}", path.display()), said })
        };
        passages.into_iter().map(continued).collect()
    }

    fn text(&self, text: &str) -> Result<Said, Error> {
        let text = match &self.template {
            Some(template) => render(template, text)?,
            None => text.to_owned(),
        };
        Ok(match self.endpoint {
            Endpoint::Completions => Said::Text(text),
            Endpoint::Chat => self.chat(text),
        })
    }

    fn chat(&self, text: String) -> Said {
        Said::Messages(self.with_system(vec![Message { role: "user".into(), content: text }]))
    }

    fn with_system(&self, mut messages: Vec<Message>) -> Vec<Message> {
        if let Some(system) = &self.system
            && messages.first().is_none_or(|first| first.role != "system")
        {
            messages.insert(0, Message::new("system", system));
        }
        messages
    }

    fn row(&self, line: &str) -> Result<Said, Refusal> {
        let refusal = |message: &str| Err(Refusal::Line(message.to_owned()));
        match serde_json::from_str(line) {
            Ok(Line::Prompt { prompt }) => self.text(&prompt).map_err(Refusal::Template),
            Ok(Line::Messages { messages }) => match (self.endpoint, messages.last()) {
                (Endpoint::Completions, _) => refusal("`messages`, but plain completions take a `prompt`"),
                (_, None) => refusal("`messages` is empty"),
                (_, Some(last)) if last.role == "assistant" => {
                    refusal("the last message is the assistant's: there is nothing to answer")
                }
                _ => Ok(Said::Messages(self.with_system(messages))),
            },
            Err(error) if error.is_data() => {
                refusal("expected an object with a text `prompt`, or `messages` of `role` and `content`")
            }
            Err(error) => refusal(&format!("not JSON: {error}")),
        }
    }
}

enum Refusal {
    Template(Error),
    Line(String),
}

fn file(path: &Path, message: &str) -> Error {
    Error::File { path: path.into(), message: message.into() }
}

fn read(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
    String::from_utf8(bytes)
        .map_err(|error| file(path, &format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to())))
}

fn render((path, source): &(PathBuf, String), text: &str) -> Result<String, Error> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment
        .render_str(source, context! { text })
        .map_err(|source| Error::Template { path: path.clone(), source })
}

/// Passages of at most `size` bytes (a character at least) with their places. A passage ends behind a
/// sentence or a line if there is an end in its second half, else between words, else between characters.
fn cut(text: &str, size: usize) -> Vec<(usize, &str)> {
    let mut passages = Vec::new();
    let mut start = 0;
    while start < text.len() {
        let end = start + end_of_first(&text[start..], size);
        let passage = text[start..end].trim();
        if !passage.is_empty() {
            passages.push((start, passage));
        }
        start = end;
    }
    passages
}

fn end_of_first(text: &str, size: usize) -> usize {
    if text.len() <= size {
        return text.len();
    }
    let most = (0..=size).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    if most == 0 {
        return text.chars().next().map_or(text.len(), char::len_utf8);
    }
    let bytes = text.as_bytes();
    let half = most / 2..most;
    let sentence = |&at: &usize| {
        bytes[at] == b'\n' || (matches!(bytes[at], b'.' | b'!' | b'?') && bytes[at + 1].is_ascii_whitespace())
    };
    let space = |&at: &usize| bytes[at].is_ascii_whitespace();
    half.clone().rev().find(sentence).or_else(|| half.rev().find(space)).map_or(most, |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_end_where_a_reader_would_stop() {
        let text = "One two. Three four five.\nSix seven eight nine ten eleven. Ää Öö";
        let found: Vec<_> = cut(text, 20).into_iter().map(|passage| passage.1).collect();
        assert_eq!(found, ["One two. Three four", "five.\nSix seven", "eight nine ten", "eleven. Ää Öö"]);
        assert_eq!(cut(text, 30)[0].1, "One two. Three four five.");
        for size in 1..40 {
            let cuts = cut(text, size);
            assert!(cuts.iter().all(|(at, passage)| text[*at..].trim_start().starts_with(passage)));
            let joined: String = cuts.iter().flat_map(|cut| cut.1.split_whitespace()).collect();
            assert_eq!(joined, text.split_whitespace().collect::<String>(), "{size}");
            assert!(cuts.iter().all(|cut| cut.1.len() <= size.max(2)), "{size}");
        }
    }

    #[test]
    fn lines_become_conversations_or_texts() {
        let template = Some(("t".into(), "Say {{ text }}!".to_owned()));
        let chat = Form { endpoint: Endpoint::Chat, system: Some("Be kind".into()), template };
        let said = |messages: &[(&str, &str)]| {
            Said::Messages(messages.iter().map(|(role, content)| Message::new(role, content)).collect())
        };
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str, text: &str| {
            fs::write(folder.path().join(name), text).unwrap();
            folder.path().join(name)
        };
        let (lines, rows) = (
            at("a.txt", "hi\n\n"),
            "{\"prompt\": \"ho\"}\n{\"messages\": [{\"role\": \"system\", \
            \"content\": \"x\"}, {\"role\": \"user\", \"content\": \"y\"}]}\n",
        );
        let found = chat.read(&[lines, at("b.jsonl", rows)]).unwrap();
        let found: Vec<_> = found.into_iter().map(|prompt| prompt.said).collect();
        let wanted = [
            said(&[("system", "Be kind"), ("user", "Say hi!")]),
            said(&[("system", "Be kind"), ("user", "Say ho!")]),
            said(&[("system", "x"), ("user", "y")]),
        ];
        assert_eq!(found, wanted);

        let refused =
            |form: &Form, name: &str, text: &str| form.read(&[at(name, text)]).unwrap_err().to_string();
        let plain = Form { endpoint: Endpoint::Completions, system: None, template: None };
        for (form, name, text, part) in [
            (&plain, "c.jsonl", rows, "line 2: `messages`, but plain"),
            (&chat, "d.jsonl", "{\"prompt\": 1}", "line 1: expected an object with a text `prompt`"),
            (&chat, "e.jsonl", "{\"prompt\": ", "line 1: not JSON"),
            (&chat, "f.jsonl", "{\"messages\": []}", "`messages` is empty"),
            (&chat, "g.txt", "\n \n", "no prompt in it"),
            (&chat, "h.csv", "x", "unknown kind of prompts"),
        ] {
            let message = refused(form, name, text);
            assert!(message.contains(name) && message.contains(part), "{message}");
        }
        let misspelled = Form { template: Some(("t".into(), "{{ txt }}".into())), ..plain };
        assert!(refused(&misspelled, "i.txt", "x").starts_with("t: "));
    }
}
