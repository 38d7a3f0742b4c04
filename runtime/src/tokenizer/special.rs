//! Tokens that stand for themselves in a text, such as `<|im_end|>`, and those that end a generation.
//!
//! Control and unknown tokens are matched only where the caller asks for it; user-defined ones always,
//! before any pre-tokenizer. The leftmost match wins, the longest of those that start together.

use super::index::{EMPTY, Word, read};
use super::vocab::{Kind, Vocab};
use crate::{Code, Error, Result, sort};

/// Texts that make a token a control token whatever type the file gives it, and whether it ends a
/// generation. As in llama.cpp (`src/llama-vocab.cpp`), because many files get the types wrong.
pub(super) const MARKERS: [(&str, bool); 44] = [
    ("<|eot_id|>", true),
    ("<|im_end|>", true),
    ("<|end|>", true),
    ("<end_of_turn>", true),
    ("<|endoftext|>", true),
    ("</s>", true),
    ("<|eom_id|>", true),
    ("<EOT>", true),
    ("_<EOT>", true),
    ("[EOT]", true),
    ("[EOS]", true),
    ("<|end_of_text|>", true),
    ("<end_of_utterance>", true),
    ("<eos>", true),
    ("<｜end▁of▁sentence｜>", true),
    ("<|fim_pad|>", true),
    ("<fim-pad>", true),
    ("<fim_pad>", true),
    ("<PAD>", true),
    ("[PAD]", true),
    ("<|fim_repo|>", true),
    ("<|repo_name|>", true),
    ("<fim-repo>", true),
    ("<REPO>", true),
    ("<reponame>", true),
    ("<|file_sep|>", true),
    ("<|fim_prefix|>", false),
    ("<fim-prefix>", false),
    ("<fim_prefix>", false),
    ("<PRE>", false),
    ("▁<PRE>", false),
    ("<|fim_suffix|>", false),
    ("<fim-suffix>", false),
    ("<fim_suffix>", false),
    ("<SUF>", false),
    ("▁<SUF>", false),
    ("<|fim_middle|>", false),
    ("<fim-middle>", false),
    ("<fim_middle>", false),
    ("<MID>", false),
    ("▁<MID>", false),
    ("<|prefix|>", false),
    ("<|suffix|>", false),
    ("<|middle|>", false),
];

/// Most bytes of a special token, so that looking for them stays linear in the text.
const MAX_BYTES: usize = 1024;

/// A special token in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) token: u32,
}

impl Vocab<'_> {
    /// The token is a marker that ends a generation.
    pub(super) fn ends_generation(&self, token: u32) -> bool {
        self.markers.iter().zip(MARKERS).any(|(marker, (_, ends))| ends && read(marker) == token)
    }

    /// Puts the tokens that texts may name into the front of `slots`, sorted by their text, and returns how many they
    /// are.
    pub(super) fn sort_specials(&self, slots: &mut [Word]) -> Result<usize> {
        let special = |token: &Word| {
            matches!(self.kind_in_file(read(token)), Kind::Unknown | Kind::Control | Kind::UserDefined)
        };
        let typed = (0..self.len() as u32).map(u32::to_le_bytes).filter(special);
        let markers = self.markers.iter().copied().filter(|token| *token != EMPTY && !special(token));
        let mut count = 0;
        for token in typed.chain(markers) {
            let len = self.text(read(&token)).len();
            if len > MAX_BYTES {
                return Err(Error::new(Code::BadVocabulary, "tokenizer.ggml.tokens")
                    .found(u64::from(read(&token)), 0)
                    .hint("a special token of more than 1024 bytes"));
            }
            if len > 0 {
                slots[count] = token;
                count += 1;
            }
        }
        sort::sort(&mut slots[..count], |a, b| self.text(read(&a)) < self.text(read(&b)));
        Ok(count)
    }
}

/// Finds special tokens in texts.
pub(super) struct Finder<'v> {
    vocab: &'v Vocab<'v>,
    /// Control and unknown tokens are found too.
    control: bool,
    /// The first bytes of the texts of tokens to find.
    starts: [bool; 256],
}

impl<'v> Finder<'v> {
    /// A finder of user-defined tokens, and of control and unknown ones too if `control`.
    pub(super) fn new(vocab: &'v Vocab<'v>, control: bool) -> Self {
        let mut starts = [false; 256];
        for token in vocab.specials.iter().map(read) {
            if let Some(first) = vocab.text(token).first()
                && (control || vocab.kind_in_file(token) == Kind::UserDefined)
            {
                starts[usize::from(*first)] = true;
            }
        }
        Self { vocab, control, starts }
    }

    /// The first special token in `text`.
    pub(super) fn find(&self, text: &[u8]) -> Option<Match> {
        (0..text.len()).filter(|&start| self.starts[usize::from(text[start])]).find_map(|start| {
            let (len, token) = self.longest_at(&text[start..])?;
            Some(Match { start, len, token })
        })
    }

    /// The longest special token at the start of `text`: narrows the sorted list byte by byte.
    fn longest_at(&self, text: &[u8]) -> Option<(usize, u32)> {
        let mut range = self.vocab.specials;
        let mut longest = None;
        for (depth, &byte) in text.iter().take(MAX_BYTES).enumerate() {
            let at = |token: &Word| self.vocab.text(read(token)).get(depth).copied();
            range = &range[range.partition_point(|token| at(token) < Some(byte))..];
            range = &range[..range.partition_point(|token| at(token) == Some(byte))];
            // Texts are unique and the shortest sorts first.
            match range.first() {
                None => break,
                Some(token) => {
                    let token = read(token);
                    if self.vocab.text(token).len() == depth + 1
                        && (self.control || self.vocab.kind(token) == Kind::UserDefined)
                    {
                        longest = Some((depth + 1, token));
                    }
                }
            }
        }
        longest
    }
}
