//! What is sent, and the name by which its answer is known: a hash of all that decides it.

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::prompts::{Prompt, Said};

/// Which of OpenAI's two interfaces is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `chat/completions`: messages, to which the server applies the chat template.
    Chat,
    /// `completions`: a text to continue.
    Completions,
}

impl Endpoint {
    /// Its path below the interface's root.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "chat/completions",
            Self::Completions => "completions",
        }
    }
}

/// What is asked of the model beside the prompt; what is not given is the server's to choose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Name of the model.
    pub model: String,
    /// Longest answer.
    pub max_tokens: Option<u32>,
    /// Temperature, from 0.
    pub temperature: Option<f64>,
    /// Share of the probability that is sampled from.
    pub top_p: Option<f64>,
    /// Alternatives of each token whose probabilities are wanted.
    pub top_logprobs: Option<u32>,
    /// The server's seed for the first answer to a prompt; the next has the next.
    pub seed: Option<u64>,
    /// Further fields, which take the place of those above.
    pub extra: Map<String, Value>,
}

/// One request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The first half of the SHA-256 of endpoint, body and number, in hexadecimal.
    pub id: String,
    /// What is asked.
    pub prompt: Said,
    /// For messages: where the prompt came from.
    pub origin: String,
    /// The JSON document that is sent.
    pub body: String,
}

impl Request {
    /// The request for answer number `answer`, from 0, to a prompt.
    pub fn new(prompt: &Prompt, endpoint: Endpoint, sampling: &Sampling, answer: usize) -> Self {
        let mut body = Map::new();
        body.insert("model".into(), json!(sampling.model));
        match &prompt.said {
            Said::Text(text) => body.insert("prompt".into(), json!(text)),
            Said::Messages(messages) => body.insert("messages".into(), json!(messages)),
        };
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                body.insert(key.into(), value);
            }
        };
        put("max_tokens", sampling.max_tokens.map(Value::from));
        put("temperature", sampling.temperature.map(Value::from));
        put("top_p", sampling.top_p.map(Value::from));
        put("seed", sampling.seed.map(|seed| seed.wrapping_add(answer as u64).into()));
        match (endpoint, sampling.top_logprobs) {
            (Endpoint::Chat, Some(count)) => {
                put("logprobs", Some(true.into()));
                put("top_logprobs", Some(count.into()));
            }
            (Endpoint::Completions, Some(count)) => put("logprobs", Some(count.into())),
            (_, None) => {}
        }
        body.extend(sampling.extra.clone());
        let body = Value::Object(body).to_string();
        let hash = Sha256::digest(format!("{}\n{answer}\n{body}", endpoint.path()));
        let id = hash[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { id, prompt: prompt.said.clone(), origin: prompt.origin.clone(), body }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Message;

    #[test]
    fn an_id_is_that_of_the_request() {
        let text = Prompt { origin: "a".into(), said: Said::Text("Hi".into()) };
        let messages = Said::Messages(vec![Message::new("user", "Hi")]);
        let chat = Prompt { origin: "b".into(), said: messages };
        let plain = Sampling { model: "m".into(), ..Sampling::default() };
        let full = Sampling {
            max_tokens: Some(5),
            temperature: Some(0.5),
            top_p: Some(0.9),
            top_logprobs: Some(3),
            seed: Some(7),
            extra: serde_json::from_str(r#"{"top_k": 20, "top_p": 1}"#).unwrap(),
            ..plain.clone()
        };
        let body = |prompt: &Prompt, endpoint, sampling: &Sampling, answer| {
            Request::new(prompt, endpoint, sampling, answer).body
        };
        assert_eq!(
            body(&chat, Endpoint::Chat, &plain, 0),
            r#"{"model":"m","messages":[{"role":"user","content":"Hi"}]}"#
        );
        assert_eq!(
            body(&chat, Endpoint::Chat, &full, 1),
            r#"{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":5,"temperature":0.5,"top_p":1,"#
                .to_owned()
                + r#""seed":8,"logprobs":true,"top_logprobs":3,"top_k":20}"#
        );
        assert_eq!(
            body(&text, Endpoint::Completions, &full, 0),
            r#"{"model":"m","prompt":"Hi","max_tokens":5,"temperature":0.5,"top_p":1,"seed":7,"logprobs":3,"top_k":20}"#
        );
        let id = |prompt: &Prompt, sampling: &Sampling, answer| {
            Request::new(prompt, Endpoint::Completions, sampling, answer).id
        };
        let moved = Prompt { origin: "elsewhere".into(), ..text.clone() };
        assert_eq!(id(&text, &plain, 0), id(&moved, &plain, 0));
        let ids = [id(&text, &plain, 0), id(&text, &plain, 1), id(&text, &full, 0), id(&text, &full, 1)];
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), 4);
        assert!(ids.iter().all(|id| id.len() == 32));
        // Files of rows outlive the program that wrote them.
        assert_eq!(ids[0], "cdb89a5582fbe29d45e77ab8af0c6f6b");
    }
}
