//! A conversation as text, without a template engine.
//!
//! A model's chat template is a program in Jinja's language. Most of these programs only put fixed texts
//! between what is said, and a device needs no more than those: [`ChatPieces`]. `edgec bundle` finds them,
//! proves that they say what the template says, and writes them as `chat.json` beside the model.

use serde::{Deserialize, Serialize};

/// The fixed texts of a chat template, and what it does to what is said.
///
/// They may name special tokens, BOS among them: the text of a conversation is tokenized with special tokens
/// on and without another BOS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatPieces {
    /// Before the user's first message, if there is no system message.
    pub begin: String,
    /// Before and behind a system message, in place of `begin`; `None` if the template takes none.
    pub system: Option<[String; 2]>,
    /// Behind the user's last message: the model goes on from here.
    pub answer: String,
    /// Between an earlier message of the user and its answer; mostly the same as `answer`.
    pub answered: String,
    /// Behind an answer, before the user's next message. The token with which the model ended its answer is
    /// in here.
    pub next: String,
    /// White space at both ends of a system message is left out.
    pub trims_system: bool,
    /// White space at both ends of a user's message is left out.
    pub trims_user: bool,
    /// White space at both ends of an answer is left out.
    pub trims_answer: bool,
    /// Of an answer only what is behind its last `</think>`, and the line breaks there, is kept.
    pub forgets_thinking: bool,
}

impl ChatPieces {
    /// The text of a conversation up to where the model goes on: `turns` are the earlier messages of the user
    /// with their answers, `user` is the message to be answered.
    ///
    /// # Errors
    /// There is a system message, and the template takes none.
    pub fn render(
        &self,
        system: Option<&str>,
        turns: &[(&str, &str)],
        user: &str,
    ) -> Result<String, NoSystemMessage> {
        let mut text = match (system, &self.system) {
            (None, _) => self.begin.clone(),
            (Some(said), Some([before, behind])) => [before, trim(said, self.trims_system), behind].concat(),
            (Some(_), None) => return Err(NoSystemMessage),
        };
        for (user, answer) in turns {
            let kept = match answer.rsplit_once("</think>") {
                Some((_, behind)) if self.forgets_thinking => behind.trim_start_matches('\n'),
                _ => answer,
            };
            text += trim(user, self.trims_user);
            text += &self.answered;
            text += trim(kept, self.trims_answer);
            text += &self.next;
        }
        Ok(text + trim(user, self.trims_user) + &self.answer)
    }
}

fn trim(text: &str, trims: bool) -> &str {
    if trims { text.trim() } else { text }
}

/// A system message for a chat template that takes none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model's chat template takes no system message")]
pub struct NoSystemMessage;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_is_pieces_and_what_is_said() {
        let pieces = ChatPieces {
            begin: "<s>[".into(),
            system: Some(["<s>[{".into(), "}".into()]),
            answer: "]".into(),
            answered: "] ".into(),
            next: "</s>[".into(),
            trims_user: true,
            forgets_thinking: true,
            ..ChatPieces::default()
        };
        assert_eq!(pieces.render(None, &[], " Hi\n").unwrap(), "<s>[Hi]");
        let said = pieces.render(Some(" be kind "), &[("a ", "<think>x</think>\n b ")], "c").unwrap();
        assert_eq!(said, "<s>[{ be kind }a]  b </s>[c]");
        let without = ChatPieces { system: None, ..pieces.clone() };
        assert_eq!(without.render(Some("x"), &[], "y"), Err(NoSystemMessage));
        let written = serde_json::to_string(&pieces).unwrap();
        assert_eq!(serde_json::from_str::<ChatPieces>(&written).unwrap(), pieces);
        assert!(serde_json::from_str::<ChatPieces>(&written.replace("answer", "anser")).is_err());
    }
}
