//! SentencePiece's BPE (`tokenizer.ggml.model` = `llama`): Llama 2, TinyLlama, Mistral, Phi-3, Gemma.
//!
//! A text's characters are its first symbols. Two neighbours may merge where their joined text is a token,
//! of any type; the pair whose token has the highest score goes first, the leftmost of equals (Kudo and
//! Richardson 2018, arXiv 1808.06226; ids are those of llama.cpp's `llm_tokenizer_spm`). There is no
//! pre-tokenizer: spaces are characters like others, spelled U+2581. A character that is left without a
//! token becomes the tokens of its bytes, `<0xE2>`, or the unknown token.
//!
//! A whole text would be one word. It is cut before spaces all the same, wherever no token of the vocabulary
//! has what stands before that space followed by a space: no merge can reach across, so the ids are the
//! same, and words are short.
//!
//! Its part of the index:
//!
//! | part | words |
//! |---|---|
//! | token of each byte | 256 |
//! | bytes that stand before a space within a token, a bit each | 8 |
//! | hash of each token's text: two words | 2 x tokens |

use super::Ids;
use super::index::{EMPTY, Word, read};
use super::merge::{self, Pairs};
use super::unicode::character;
use super::vocab::{Hash, NONE, Vocab};
use crate::{Code, Error, Result};

/// How a space is spelled: U+2581.
const SPACE: &[u8] = "\u{2581}".as_bytes();

/// A symbol that is no token has this bit and is a code point, or with [`BYTE`] a byte of malformed UTF-8.
const CHARACTER: u32 = 1 << 31;
const BYTE: u32 = 1 << 30;

/// Scores and what characters without a token become.
#[derive(Clone, Copy, Debug)]
pub(super) struct SentencePiece<'a> {
    /// An f32 in 4 bytes for each token.
    scores: &'a [u8],
    bytes: &'a [Word; 256],
    before_space: &'a [Word; 8],
    hashes: &'a [[Word; 2]],
    unknown: Option<u32>,
    /// A text, and what follows a special token, begins with a space that is not there.
    pub(super) add_space_prefix: bool,
    /// White space behind a special token belongs to it, as Phi-3 has it.
    pub(super) strips_behind_specials: bool,
}

/// Words of index for that many tokens.
pub(super) fn index_words(tokens: usize) -> usize {
    256 + 8 + 2 * tokens
}

/// Builds the part of the index in the front of `memory` and returns the words that it has.
pub(super) fn build(scores: &[u8], vocab: &Vocab<'_>, memory: &mut [Word]) -> Result<usize> {
    let words = index_words(vocab.len());
    let (bytes, rest) = memory[..words].split_at_mut(256);
    let (before, hashes) = rest.split_at_mut(8);
    for (byte, slot) in (0..=255).zip(bytes) {
        let token = vocab.find(&byte_name(byte)).or_else(|| vocab.find(&[byte]));
        *slot = token.map_or(EMPTY, u32::to_le_bytes);
    }
    let mut before_space = [0u32; 8];
    for (token, slot) in (0..).zip(hashes.as_chunks_mut().0) {
        let text = vocab.text(token);
        let Hash { value, power } = Hash::of(text);
        *slot = [value, power].map(u32::to_le_bytes);
        for (at, _) in text.windows(4).enumerate().filter(|(_, window)| &window[1..] == SPACE) {
            if !text[..=at].ends_with(SPACE) {
                before_space[usize::from(text[at] >> 5)] |= 1 << (text[at] & 31);
            }
        }
    }
    before.copy_from_slice(&before_space.map(u32::to_le_bytes));
    if vocab.find(SPACE).is_none() {
        return Err(Error::new(Code::BadVocabulary, "tokenizer.ggml.tokens")
            .hint("no token for a space, which is spelled U+2581"));
    }
    match scores.as_chunks().0.iter().position(|score| f32::from_le_bytes(*score).is_nan()) {
        Some(token) => Err(Error::new(Code::BadVocabulary, "tokenizer.ggml.scores")
            .found(token as u64, 0)
            .hint("a score that is not a number")),
        None => Ok(words),
    }
}

impl<'a> SentencePiece<'a> {
    /// The part of an index of that many tokens, which may say anything; `None` if it is not as long as theirs.
    pub(super) fn open(
        scores: &'a [u8],
        unknown: Option<u32>,
        add_space_prefix: bool,
        strips_behind_specials: bool,
        tokens: usize,
        index: &'a [Word],
    ) -> Option<Self> {
        if index.len() != index_words(tokens) {
            return None;
        }
        let (bytes, rest) = index.split_first_chunk()?;
        let (before_space, hashes) = rest.split_first_chunk()?;
        let hashes = hashes.as_chunks().0;
        Some(Self { scores, bytes, before_space, hashes, unknown, add_space_prefix, strips_behind_specials })
    }

    /// The token of a byte, [`NONE`] if it has none.
    pub(super) fn byte(&self, byte: u8) -> u32 {
        read(&self.bytes[usize::from(byte)])
    }

    /// Appends the tokens of a text without special tokens; `begins` says that it stands at the beginning or behind
    /// a special token, where a space is put before it.
    pub(super) fn encode(
        &self,
        vocab: &Vocab<'_>,
        text: &[u8],
        begins: bool,
        scratch: &mut [u32],
        ids: &mut Ids<'_>,
    ) -> Result<()> {
        let pieces = Pieces { model: self, vocab };
        let mut prefix = self.add_space_prefix && begins;
        let mut rest = text;
        while !rest.is_empty() {
            let (word, tail) = rest.split_at(self.word(rest));
            let space = core::mem::take(&mut prefix).then_some(&b" "[..]);
            let characters = space.into_iter().chain(Characters(word));
            let symbols = characters.clone().map(|text| pieces.symbol(text));
            merge::merge(&pieces, symbols, characters.count(), scratch, |symbol| pieces.write(symbol, ids))?;
            rest = tail;
        }
        Ok(())
    }

    /// What of `text`, which stands behind the special token `token`, is left to encode.
    pub(super) fn behind_special<'t>(&self, token: &[u8], text: &'t [u8]) -> &'t [u8] {
        // Those three as in llama.cpp, from Phi-3's tokenizer.json.
        if !self.strips_behind_specials || matches!(token, b"<unk>" | b"<s>" | b"<|endoftext|>") {
            return text;
        }
        let end = text.iter().position(|byte| !matches!(byte, b' ' | b'\t'..=b'\r'));
        &text[end.unwrap_or(text.len())..]
    }

    /// Bytes of the first word of `text`, which is not empty.
    fn word(&self, text: &[u8]) -> usize {
        let space = |at: usize| text[at] == b' ' || text[at..].starts_with(SPACE);
        let after_space = |at: usize| text[at - 1] == b' ' || text[..at].ends_with(SPACE);
        let cut =
            (1..text.len()).find(|&at| space(at) && !after_space(at) && !self.joins_space(text[at - 1]));
        cut.unwrap_or(text.len())
    }

    /// A token may have a space behind this byte.
    fn joins_space(&self, byte: u8) -> bool {
        read(&self.before_space[usize::from(byte >> 5)]) >> (byte & 31) & 1 == 1
    }

    fn score(&self, token: u32) -> f32 {
        match self.scores.get(4 * token as usize..) {
            Some(&[a, b, c, d, ..]) => f32::from_le_bytes([a, b, c, d]),
            _ => 0.0,
        }
    }

    /// A number that is the smaller, the higher the token's score is; never [`NONE`].
    fn key(&self, token: u32) -> u32 {
        // The sum turns -0.0, whose bits differ, into 0.0.
        let bits = (self.score(token) + 0.0).to_bits();
        if bits >> 31 == 0 { !(bits | 1 << 31) } else { bits }
    }
}

/// Symbols and their pairs.
struct Pieces<'v> {
    model: &'v SentencePiece<'v>,
    vocab: &'v Vocab<'v>,
}

impl Pieces<'_> {
    /// The symbol of one character, or of one byte of malformed UTF-8.
    fn symbol(&self, text: &[u8]) -> u32 {
        let text = if text == b" " { SPACE } else { text };
        let without_token = || match (character(text), text) {
            (Some((point, _)), _) => CHARACTER | point,
            (None, [byte, ..]) => CHARACTER | BYTE | u32::from(*byte),
            (None, []) => NONE,
        };
        self.vocab.find(text).unwrap_or_else(without_token)
    }

    /// The text of a symbol; that of a character is spelled in `buffer`.
    fn text<'t>(&'t self, symbol: u32, buffer: &'t mut [u8; 4]) -> &'t [u8] {
        if symbol & CHARACTER == 0 {
            return self.vocab.text(symbol);
        }
        match char::from_u32(symbol & !CHARACTER) {
            Some(char) => char.encode_utf8(buffer).as_bytes(),
            None => {
                buffer[0] = symbol as u8;
                &buffer[..1]
            }
        }
    }

    fn hash(&self, symbol: u32) -> Hash {
        if symbol & CHARACTER == 0 {
            let [value, power] = self.model.hashes[symbol as usize].map(u32::from_le_bytes);
            return Hash { value, power };
        }
        Hash::of(self.text(symbol, &mut [0; 4]))
    }

    /// Appends what becomes of a symbol that nothing merges with any more.
    fn write(&self, symbol: u32, ids: &mut Ids<'_>) {
        if symbol & CHARACTER == 0 {
            ids.push(symbol);
            return;
        }
        let mut buffer = [0; 4];
        let bytes = self.text(symbol, &mut buffer).iter().map(|&byte| self.model.byte(byte));
        if bytes.clone().all(|token| token != NONE) {
            bytes.for_each(|token| ids.push(token));
        } else {
            ids.push(self.model.unknown.unwrap_or(NONE));
        }
    }
}

impl Pairs for Pieces<'_> {
    /// The token of the joined text, and a number that orders pairs by its score.
    fn pair(&self, left: u32, right: u32) -> (u32, u32) {
        let merged = self.vocab.probe(self.hash(left).then(self.hash(right)), |text| {
            let (mut first, mut second) = ([0; 4], [0; 4]);
            text.strip_prefix(self.text(left, &mut first)) == Some(self.text(right, &mut second))
        });
        merged.map_or((NONE, NONE), |token| (self.model.key(token), token))
    }
}

/// The characters of a text, each byte of malformed UTF-8 alone.
#[derive(Clone)]
struct Characters<'t>(&'t [u8]);

impl<'t> Iterator for Characters<'t> {
    type Item = &'t [u8];

    fn next(&mut self) -> Option<&'t [u8]> {
        if self.0.is_empty() {
            return None;
        }
        let len = character(self.0).map_or(1, |(_, len)| len);
        let (char, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(char)
    }
}

/// The text of the token that stands for a byte.
fn byte_name(byte: u8) -> [u8; 6] {
    let digit = |value: u8| b"0123456789ABCDEF"[usize::from(value & 15)];
    [b'<', b'0', b'x', digit(byte >> 4), digit(byte), b'>']
}

/// The byte that a token of that type stands for, if its text names one.
pub(super) fn named_byte(text: &[u8]) -> Option<u8> {
    let [b'<', b'0', b'x', high, low, b'>'] = text else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()
}

/// The bytes that a token's text stands for, handed to `write` run by run.
pub(super) fn decode(mut text: &[u8], mut write: impl FnMut(&[u8])) {
    while let Some(at) = text.windows(SPACE.len()).position(|window| window == SPACE) {
        write(&text[..at]);
        write(b" ");
        text = &text[at + SPACE.len()..];
    }
    write(text);
}
