//! Takes a chat template apart into the fixed texts between what is said, for devices.
//!
//! The template is rendered with messages that occur nowhere else; what stands between them are the pieces.
//! Then it has to prove them: conversations of every shape, with texts that templates are known to treat
//! specially, must come out of the pieces as out of the template. A template that does more than put texts
//! between messages fails that, and is refused with what was found and what was expected.

use edge_run::ChatPieces;

use super::{ChatTemplate, Message, TextError};

/// Messages that no template mentions.
const SYSTEM: &str = "Qsystemq";
const USER: [&str; 2] = ["Quserq", "Qagainq"];
const ANSWER: &str = "Qanswerq";
/// An answer as models give it that think first.
const THINKING: &str = "<think>\nWell.\n</think>\n\nYes.";

/// Texts with which pieces have to prove themselves.
const TEXTS: [&str; 6] = [
    "What is 2 + 2?",
    "Two lines:\nand {{ braces }}, {% tags %}.",
    "\"Quotes\", 'single ones', <angles> & a \\ backslash\t.",
    "Grüße, 你好 😀",
    "[INST] <|im_end|> </s>",
    "x",
];

impl ChatTemplate {
    /// The template's pieces.
    ///
    /// # Errors
    /// The template is malformed, or it does more than put fixed texts between messages: how the first such
    /// conversation begins to differ.
    pub fn pieces(&self) -> Result<ChatPieces, TextError> {
        let one = self.render(&messages(None, &[], USER[0]), true)?;
        let (begin, answer) = around(&one, USER[0])?;
        let two = self.render(&messages(None, &[(USER[0], ANSWER)], USER[1]), true)?;
        let (answered, rest) = around(around(&two, USER[0])?.1, ANSWER)?;
        let (next, _) = around(rest, USER[1])?;
        // A template without system messages raises an exception or leaves them out.
        let system = match self.render(&messages(Some(SYSTEM), &[], USER[0]), true) {
            Ok(text) if text.contains(SYSTEM) => {
                let (before, rest) = around(&text, SYSTEM)?;
                let (behind, _) = around(rest, USER[0])?;
                Some([before.to_owned(), behind.to_owned()])
            }
            _ => None,
        };
        let pieces = ChatPieces {
            begin: begin.to_owned(),
            system,
            answer: answer.to_owned(),
            answered: answered.to_owned(),
            next: next.to_owned(),
            trims_system: self.changes(Some(&padded(SYSTEM)), &[], USER[0], &padded(SYSTEM)),
            trims_user: self.changes(None, &[], &padded(USER[0]), &padded(USER[0])),
            trims_answer: self.changes(None, &[(USER[0], &padded(ANSWER))], USER[1], &padded(ANSWER)),
            forgets_thinking: self.changes(None, &[(USER[0], THINKING)], USER[1], THINKING),
        };
        self.prove(&pieces)?;
        Ok(pieces)
    }

    /// Whether `said`, which is in this conversation, is not in its text as it is.
    fn changes(&self, system: Option<&str>, turns: &[(&str, &str)], user: &str, said: &str) -> bool {
        self.render(&messages(system, turns, user), true).is_ok_and(|text| !text.contains(said))
    }

    fn prove(&self, pieces: &ChatPieces) -> Result<(), TextError> {
        let padded = TEXTS.map(padded);
        let systems = [None, Some(TEXTS[1]), Some(padded[0].as_str())];
        for system in systems.into_iter().filter(|system| system.is_none() || pieces.system.is_some()) {
            for count in 0..TEXTS.len() {
                let plain: Vec<_> = TEXTS[..count].iter().map(|text| (*text, TEXTS[count])).collect();
                self.compare(pieces, system, &plain, TEXTS[count])?;
                let padded: Vec<_> =
                    padded[..count].iter().map(|text| (text.as_str(), text.as_str())).collect();
                self.compare(pieces, system, &padded, "\n \nx\n")?;
            }
            self.compare(pieces, system, &[(TEXTS[0], THINKING), (THINKING, ANSWER)], THINKING)?;
        }
        Ok(())
    }

    fn compare(
        &self,
        pieces: &ChatPieces,
        system: Option<&str>,
        turns: &[(&str, &str)],
        user: &str,
    ) -> Result<(), TextError> {
        let wanted = self.render(&messages(system, turns, user), true)?;
        let found =
            pieces.render(system, turns, user).map_err(|error| TextError::Pieces(error.to_string()))?;
        if found == wanted {
            return Ok(());
        }
        let at = found.bytes().zip(wanted.bytes()).take_while(|(found, wanted)| found == wanted).count();
        let at = (0..=at).rev().find(|at| wanted.is_char_boundary(*at) && found.is_char_boundary(*at));
        let part = |text: &str| -> String { text[at.unwrap_or(0)..].chars().take(24).collect() };
        Err(TextError::Pieces(format!(
            "after {} turns it writes {:?} where fixed texts give {:?}",
            turns.len(),
            part(&wanted),
            part(&found)
        )))
    }
}

/// A message with white space at both ends.
fn padded(text: &str) -> String {
    format!("\n  {text} \n")
}

fn messages(system: Option<&str>, turns: &[(&str, &str)], user: &str) -> Vec<Message> {
    let system = system.map(|said| Message::new("system", said));
    let turns = turns
        .iter()
        .flat_map(|(user, answer)| [Message::new("user", user), Message::new("assistant", answer)]);
    system.into_iter().chain(turns).chain([Message::new("user", user)]).collect()
}

/// What stands before and behind a message.
fn around<'t>(text: &'t str, message: &str) -> Result<(&'t str, &'t str), TextError> {
    let missing = || TextError::Pieces("it leaves out a message, or changes their order".into());
    text.split_once(message).ok_or_else(missing)
}

#[cfg(test)]
mod tests;
