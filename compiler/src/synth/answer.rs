//! Reads what a server answered: OpenAI's form of it, and what llama.cpp, vLLM and SGLang make of that.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::Endpoint;
use crate::text::soft::{Piece, TokenLogprobs};

/// One usable answer.
#[derive(Debug, PartialEq)]
pub struct Answer {
    pub text: String,
    /// Why the server ended it, in its words: `stop`, `length`, ...
    pub finish_reason: Option<String>,
    pub tokens: Vec<TokenLogprobs>,
    pub usage: Usage,
}

impl Answer {
    /// The token limit ended it.
    pub fn truncated(&self) -> bool {
        self.finish_reason.as_deref() == Some("length")
    }
}

/// What is wrong with an answer.
#[derive(Debug, PartialEq)]
pub enum Unusable {
    /// The server did not say what it meant to; it may well do next time.
    Damaged(String),
    /// It did, and that is no training text.
    Refused(String),
}

#[derive(Debug, Default, PartialEq, Deserialize)]
pub struct Usage {
    #[serde(default)]
    pub prompt_tokens: u64,
    #[serde(default)]
    pub completion_tokens: u64,
}

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
}

#[derive(Deserialize)]
struct Choice {
    message: Option<Said>,
    text: Option<String>,
    finish_reason: Option<String>,
    logprobs: Option<Logprobs>,
}

#[derive(Deserialize)]
struct Said {
    content: Option<String>,
}

/// Texts and logarithms of their probabilities; minus infinity is null in JSON.
type Alternatives = BTreeMap<String, Option<f32>>;

/// A list of `content` in chats, and in llama.cpp's completions; parallel lists in OpenAI's completions.
#[derive(Default, Deserialize)]
struct Logprobs {
    content: Option<Vec<Token>>,
    tokens: Option<Vec<String>>,
    token_logprobs: Option<Vec<Option<f32>>>,
    top_logprobs: Option<Vec<Option<Alternatives>>>,
}

#[derive(Deserialize)]
struct Token {
    token: String,
    bytes: Option<Vec<u8>>,
    /// Minus infinity is null in JSON.
    logprob: Option<f32>,
    #[serde(default)]
    top_logprobs: Vec<Token>,
}

impl Token {
    /// Texts cannot hold a part of a character: where the bytes are given, they count.
    fn piece(&mut self) -> Piece {
        self.bytes.take().map_or_else(|| Piece::Text(std::mem::take(&mut self.token)), Piece::new)
    }
}

/// Reads the body of a successful answer.
///
/// # Errors
/// Why there is no answer in it that a model could be trained on.
pub fn parse(body: &[u8], endpoint: Endpoint) -> Result<Answer, Unusable> {
    let damaged = |message: String| Err(Unusable::Damaged(message));
    let document: Document = match serde_json::from_slice(body) {
        Ok(document) => document,
        Err(error) if error.is_data() => return damaged(format!("not the form of an answer: {error}")),
        Err(error) => return damaged(format!("truncated or invalid JSON: {error}")),
    };
    let Some(choice) = document.choices.into_iter().next() else {
        return damaged(match message(body) {
            Some(message) => format!("no `choices`: {message}"),
            None => "no `choices`".into(),
        });
    };
    let text = match endpoint {
        Endpoint::Chat => choice.message.map(|said| said.content.unwrap_or_default()),
        Endpoint::Completions => choice.text,
    };
    let Some(text) = text else {
        return damaged("no text in `choices`".into());
    };
    let reason = choice.finish_reason;
    match reason.as_deref() {
        Some(reason @ ("content_filter" | "tool_calls" | "function_call" | "error" | "abort")) => {
            return Err(Unusable::Refused(format!("no whole answer: finish_reason {reason}")));
        }
        reason if text.trim().is_empty() => {
            let reason = reason.unwrap_or("none");
            return Err(Unusable::Refused(format!("an empty answer: finish_reason {reason}")));
        }
        _ => {}
    }
    let tokens = choice.logprobs.map(tokens).unwrap_or_default();
    Ok(Answer { text, finish_reason: reason, tokens, usage: document.usage.unwrap_or_default() })
}

/// One form of both. A token of probability 0, which was not drawn, and what no list has a partner for are
/// left out.
fn tokens(logprobs: Logprobs) -> Vec<TokenLogprobs> {
    if let Some(content) = logprobs.content {
        let token = |mut token: Token| {
            let top = std::mem::take(&mut token.top_logprobs);
            let top = top.into_iter().filter_map(|mut token| Some((token.piece(), token.logprob?))).collect();
            // A token without a number keeps its place in the text, and says nothing.
            TokenLogprobs { logprob: token.logprob.unwrap_or(f32::NEG_INFINITY), token: token.piece(), top }
        };
        return finite(content.into_iter().map(token).collect());
    }
    let (Some(texts), Some(values)) = (logprobs.tokens, logprobs.token_logprobs) else {
        return Vec::new();
    };
    let mut top = logprobs.top_logprobs.unwrap_or_default().into_iter();
    let list = texts.into_iter().zip(values).map(|(text, value)| {
        let top = top.next().flatten().unwrap_or_default();
        TokenLogprobs {
            token: Piece::Text(text),
            logprob: value.unwrap_or(f32::NEG_INFINITY),
            top: top.into_iter().filter_map(|(text, value)| Some((Piece::Text(text), value?))).collect(),
        }
    });
    finite(list.collect())
}

/// The logarithm that stands for probability 0: JSON has no infinity. OpenAI does the same.
const NOTHING: f32 = -9999.0;

fn finite(mut tokens: Vec<TokenLogprobs>) -> Vec<TokenLogprobs> {
    for token in &mut tokens {
        token.logprob = token.logprob.max(NOTHING);
        // OpenAI's completions list alternatives by name: the likeliest first is of use to readers.
        token.top.sort_by(|a, b| b.1.total_cmp(&a.1));
    }
    tokens
}

/// What a server says that went wrong, in any of the forms in use; a page of something else is cut short.
pub fn message(body: &[u8]) -> Option<String> {
    const MOST: usize = 300;
    let text = String::from_utf8_lossy(body);
    let found = serde_json::from_slice::<Value>(body).ok().and_then(|document| {
        let error = document.get("error").filter(|error| !error.is_null());
        let places = [
            error.and_then(|error| error.get("message")),
            error,
            document.get("message"),
            document.get("detail"),
        ];
        let place = places.into_iter().flatten().next()?;
        Some(place.as_str().map_or_else(|| place.to_string(), str::to_owned))
    });
    let text = found.unwrap_or_else(|| text.into_owned());
    let mut words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let mut line = words.next()?.to_owned();
    for word in words {
        line.push(' ');
        line.push_str(word);
    }
    if let Some((end, _)) = line.char_indices().nth(MOST) {
        line.truncate(end);
        line.push_str("...");
    }
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: &str) -> Result<Answer, Unusable> {
        parse(body.as_bytes(), Endpoint::Chat)
    }

    #[test]
    fn chats_give_bytes_where_texts_cannot() {
        let found = chat(
            r#"{"choices": [{"message": {"content": "Hi é"}, "finish_reason": "stop", "logprobs": {"content": [
            {"id": 5, "token": "Hi", "bytes": [72, 105], "logprob": -0.5, "top_logprobs": [
                {"token": "Ho", "bytes": null, "logprob": -1.5}, {"token": "Hi", "logprob": -0.5}]},
            {"token": "\ufffd", "bytes": [195], "logprob": null, "top_logprobs": [{"token": "x", "logprob": null}]}
            ]}}], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}"#,
        )
        .unwrap();
        let text = |text: &str| Piece::Text(text.into());
        let hi = TokenLogprobs {
            token: text("Hi"),
            logprob: -0.5,
            top: vec![(text("Hi"), -0.5), (text("Ho"), -1.5)],
        };
        let part = TokenLogprobs { token: Piece::Bytes(vec![195]), logprob: NOTHING, top: vec![] };
        assert_eq!(found.tokens, [hi, part]);
        assert_eq!(found.text, "Hi é");
        assert_eq!(found.usage, Usage { prompt_tokens: 7, completion_tokens: 3 });
        assert!(!found.truncated());
    }

    #[test]
    fn completions_have_lists_side_by_side() {
        let body = r#"{"choices": [{"text": " a b", "finish_reason": "length", "logprobs": {
            "tokens": [" a", " b"],
            "token_logprobs": [null, -0.25], "top_logprobs": [null, {" c": -2.0, " b": -0.25}],
            "text_offset": [0, 2]}}]}"#;
        let found = parse(body.as_bytes(), Endpoint::Completions).unwrap();
        assert!(found.truncated());
        assert_eq!(found.tokens[0].logprob, NOTHING);
        assert_eq!(
            found.tokens[1].top,
            [(Piece::Text(" b".into()), -0.25), (Piece::Text(" c".into()), -2.0)]
        );
    }

    #[test]
    fn what_is_no_answer_is_said() {
        let said = |body: &str| match chat(body).unwrap_err() {
            Unusable::Damaged(message) => format!("damaged: {message}"),
            Unusable::Refused(message) => format!("refused: {message}"),
        };
        for (body, wanted) in [
            (r#"{"choices": [{"message": {"cont"#, "damaged: truncated or invalid JSON: EOF"),
            ("<html>busy</html>", "damaged: truncated or invalid JSON"),
            ("[]", "damaged: "),
            (r#"{"choices": []}"#, "damaged: no `choices`"),
            (r#"{"error": {"message": "over\n loaded"}}"#, "damaged: no `choices`: over loaded"),
            (r#"{"choices": [{"text": "x"}]}"#, "damaged: no text in `choices`"),
            (r#"{"choices": [{"message": {"content": 5}}]}"#, "damaged: not the form of an answer"),
            (
                r#"{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}"#,
                "refused: an empty answer: finish_reason length",
            ),
            (
                r#"{"choices": [{"message": {"content": "x"}, "finish_reason": "content_filter"}]}"#,
                "refused: no whole answer: finish_reason content_filter",
            ),
        ] {
            assert!(said(body).starts_with(wanted), "{}", said(body));
        }
        let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(said(&nested).starts_with("damaged: "));
    }

    #[test]
    fn messages_of_servers_are_one_short_line() {
        for body in [
            r#"{"error": {"message": "no such model", "code": 404}}"#,
            r#"{"object": "error", "message": "no such model"}"#,
            r#"{"detail": "no such model"}"#,
            r#"{"error": "no such model"}"#,
            "no\x1b such\r\nmodel",
        ] {
            assert_eq!(message(body.as_bytes()).as_deref(), Some("no such model"), "{body}");
        }
        assert_eq!(message(b" \n"), None);
        assert_eq!(message("é".repeat(1000).as_bytes()).unwrap().chars().count(), 303);
    }
}
