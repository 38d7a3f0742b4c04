//! The tokenizer's index: what finds tokens and merges, made once from a file's vocabulary.
//!
//! It is plain little-endian words at any address and holds no pointers, so that a pack keeps it as it is. It is
//! built in time linear in the vocabulary, and refused there if anything is wrong with that. An index that comes with
//! a pack is believed: only its lengths are checked when it is opened, and every look-up tolerates any words. One that
//! lies gives wrong tokens, never a panic or an endless search.
//!
//! | part | words |
//! |---|---|
//! | [`Header`] | 4 |
//! | where each token's text starts in the file's array, its 8-byte length included, and where the last ends | tokens + 1 |
//! | texts: open-addressed hash of token texts, tag and token in one word | 2 x tokens + 1 |
//! | markers: tokens that are special by their text | as many as are known |
//! | specials: tokens that are matched in a text, sorted by their text | as the header says |
//! | what the tokenizer model needs besides | as the header says |

use super::keys::{self, Keys};
use super::vocab::{self, NONE, Vocab};
use super::{byte_level, sentence_piece};
use crate::{Code, Error, Result};

/// A word of the index, little-endian.
pub(super) type Word = [u8; 4];

/// [`NONE`] as a word.
pub(super) const EMPTY: Word = NONE.to_le_bytes();

/// What a word says.
pub(super) fn read(word: &Word) -> u32 {
    u32::from_le_bytes(*word)
}

/// Numbers in front of an index.
pub(super) struct Header {
    pub(super) tokens: usize,
    pub(super) specials: usize,
    /// Words of the last part.
    pub(super) model: usize,
    /// Bytes of the longest text of a token.
    pub(super) longest: usize,
}

impl Header {
    const WORDS: usize = 4;

    /// The header of an index, and what follows it.
    ///
    /// # Errors
    /// [`Code::BadLength`].
    pub(super) fn open(index: &[u8]) -> Result<(Self, &[Word])> {
        let words = index.as_chunks().0;
        let Some((header, rest)) = words.split_first_chunk::<{ Self::WORDS }>() else {
            return Err(damaged(words.len(), Self::WORDS));
        };
        let [tokens, specials, model, longest] = header.map(|word| read(&word) as usize);
        Ok((Self { tokens, specials, model, longest }, rest))
    }

    fn write(&self, out: &mut [Word]) {
        let numbers = [self.tokens, self.specials, self.model, self.longest];
        for (word, number) in out.iter_mut().zip(numbers) {
            *word = (number as u32).to_le_bytes();
        }
    }
}

/// The refusal of an index that is not what its header or its file says.
pub(super) fn damaged(found: usize, expected: usize) -> Error {
    Error::new(Code::BadLength, "tokenizer index").found(found as u64, expected as u64).hint("words")
}

/// Words that the index never exceeds.
pub(super) fn most_words(keys: &Keys<'_>) -> Result<usize> {
    let model = match &keys.model {
        keys::Model::ByteLevel { .. } => byte_level::index_words(keys.merges()?)?,
        keys::Model::SentencePiece { .. } => sentence_piece::index_words(keys.tokens.len()),
    };
    Ok(Header::WORDS + vocab::most_words(keys)? + model)
}

/// Builds the index in `memory` and returns the words that it has.
pub(super) fn build(keys: &Keys<'_>, memory: &mut [Word]) -> Result<usize> {
    let (found, needed) = (memory.len(), most_words(keys)?);
    let Some(memory) = memory.get_mut(..needed) else {
        return Err(Error::new(Code::BufferTooSmall, "tokenizer index")
            .found(found as u64, needed as u64)
            .hint("words"));
    };
    memory.fill(EMPTY);
    let (header, memory) = memory.split_at_mut(Header::WORDS);
    let (vocab, memory) = Vocab::build(keys, memory)?;
    let model = match &keys.model {
        keys::Model::ByteLevel { .. } => byte_level::build(keys.merges()?, &vocab, memory)?,
        keys::Model::SentencePiece { scores, .. } => sentence_piece::build(scores, &vocab, memory)?,
    };
    let numbers =
        Header { tokens: vocab.len(), specials: vocab.specials.len(), model, longest: keys.longest_text() };
    numbers.write(header);
    Ok(Header::WORDS + vocab.words() + model)
}
