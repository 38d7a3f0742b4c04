//! Chat templates, rendered as the Transformers library does.

use minijinja::{Environment, Error, ErrorKind, context};
use serde::{Deserialize, Serialize};

use super::{HostTokenizer, TextError};

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, ...
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// A model's chat template and the special tokens that it names.
pub struct ChatTemplate {
    pub(super) source: String,
    pub(super) bos: String,
    pub(super) eos: String,
}

impl ChatTemplate {
    /// The template of a model, if it has one.
    pub fn of(tokenizer: &HostTokenizer) -> Option<Self> {
        let view = tokenizer.view();
        let text = |token: Option<u32>| {
            let bytes = token.and_then(|token| view.raw_text(token)).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        Some(Self {
            source: tokenizer.chat_template()?.to_owned(),
            bos: text(view.bos()),
            eos: text(view.eos()),
        })
    }

    /// The text of a conversation; `prompt` asks for the opening of the assistant's next turn.
    ///
    /// # Errors
    /// The template is malformed, or it refuses the conversation.
    pub fn render(&self, messages: &[Message], prompt: bool) -> Result<String, TextError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template("chat", &self.source)?;
        Ok(environment.get_template("chat")?.render(context! {
            messages,
            add_generation_prompt => prompt,
            bos_token => self.bos,
            eos_token => self.eos,
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate { source: source.into(), bos: "<s>".into(), eos: "</s>".into() }
    }

    #[test]
    fn chatml_with_a_default_system_turn() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
            {{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' \
            + message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let text = template(source).render(&[Message::new("user", " Hi ")], true).unwrap();
        let expected = "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n\
            <|im_start|>assistant\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn refusals_and_faults_are_errors() {
        let refusing = template("{{ bos_token }}{{ raise_exception('system is not supported') }}");
        let message = refusing.render(&[], false).unwrap_err().to_string();
        assert!(message.contains("system is not supported"), "{message}");
        assert!(template("{% for").render(&[], false).is_err());
    }
}
