//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`): GPT-2, Llama 3, Qwen2, SmolLM2.
//!
//! A pre-tokenizer cuts the text into words; a word's bytes are its first symbols, and merges join them in
//! the order of their rank. Each byte is stored as one printable character (see [`bytes`]).
//!
//! Its part of the index:
//!
//! | part | words |
//! |---|---|
//! | token of each byte | 256 |
//! | merges: open-addressed hash of pairs: left, right, rank, merged | 4 x (1.5 x merges + 1) |

use super::index::{EMPTY, Word, read};
use super::merge::{self, Pairs};
use super::pretokenize::PreTokenizer;
use super::vocab::{Hash, NONE, Vocab, entries, probes};
use super::{Ids, bytes};
use crate::format::Array;
use crate::{Code, Error, Result};

/// Pre-tokenizer and merges.
#[derive(Clone, Copy, Debug)]
pub(super) struct ByteLevel<'a> {
    pub(super) pre: &'static PreTokenizer,
    bytes: &'a [Word; 256],
    merges: Merges<'a>,
}

/// Left, right, rank, merged.
type Slot = [Word; 4];

/// A hash table of merges.
#[derive(Clone, Copy, Debug)]
struct Merges<'a>(&'a [Slot]);

/// Words of index for that many merges.
pub(super) fn index_words(merges: Array<'_>) -> Result<usize> {
    let count = entries(&merges, "tokenizer.ggml.merges", 0)?;
    Ok(256 + 4 * (count + count / 2 + 1))
}

/// Builds the part of the index in the front of `memory`, which is [`EMPTY`], and returns the words that it has.
pub(super) fn build(merges: Array<'_>, vocab: &Vocab<'_>, memory: &mut [Word]) -> Result<usize> {
    let words = index_words(merges)?;
    let (bytes, slots) = memory[..words].split_at_mut(256);
    for (byte, slot) in (0..=255).zip(bytes) {
        let (text, len) = bytes::encode(byte);
        *slot = vocab.find(&text[..len]).map_or(EMPTY, u32::to_le_bytes);
    }
    let slots = slots.as_chunks_mut().0;
    for (rank, text) in (0..).zip(merges.texts()) {
        insert(slots, vocab, rank, text)?;
    }
    Ok(words)
}

impl<'a> ByteLevel<'a> {
    /// The part of an index, which may say anything; `None` if it is too short.
    pub(super) fn open(pre: &'static PreTokenizer, index: &'a [Word]) -> Option<Self> {
        let (bytes, slots) = index.split_first_chunk()?;
        Some(Self { pre, bytes, merges: Merges(slots.as_chunks().0) })
    }

    /// The token of a byte, [`NONE`] if it has none.
    pub(super) fn byte(&self, byte: u8) -> u32 {
        read(&self.bytes[usize::from(byte)])
    }

    /// Appends the tokens of a text without special tokens; a byte that has none is left out.
    pub(super) fn encode(
        &self,
        vocab: &Vocab<'_>,
        text: &[u8],
        scratch: &mut [u32],
        ids: &mut Ids<'_>,
    ) -> Result<()> {
        for word in self.pre.words(text) {
            if let [byte] = word {
                ids.push(self.byte(*byte));
                continue;
            }
            if self.pre.ignore_merges
                && let Some(token) = find_word(vocab, word)
            {
                ids.push(token);
                continue;
            }
            let symbols = word.iter().map(|&byte| self.byte(byte));
            merge::merge(&self.merges, symbols, word.len(), scratch, |token| ids.push(token))?;
        }
        Ok(())
    }
}

impl Pairs for Merges<'_> {
    /// Rank and result of merging two tokens.
    fn pair(&self, left: u32, right: u32) -> (u32, u32) {
        if left != NONE {
            for i in probes(hash_pair(left, right), self.0.len()) {
                match self.0[i].map(u32::from_le_bytes) {
                    [l, r, rank, merged] if l == left && r == right => return (rank, merged),
                    [NONE, ..] => break,
                    _ => {}
                }
            }
        }
        (NONE, NONE)
    }
}

fn insert(slots: &mut [Slot], vocab: &Vocab<'_>, rank: u32, text: &[u8]) -> Result<()> {
    let error =
        |hint| Error::new(Code::BadVocabulary, "tokenizer.ggml.merges").found(u64::from(rank), 0).hint(hint);
    // The space may be the left part itself, as in llama.cpp.
    let cut = text.iter().skip(1).position(|&byte| byte == b' ').map(|at| at + 1);
    let parts = cut.map(|cut| (&text[..cut], &text[cut + 1..]));
    let ids = parts.and_then(|(left, right)| {
        let joined = Hash::of(left).with(right);
        let merged = vocab.probe(joined, |text| text.strip_prefix(left) == Some(right));
        Some((vocab.find(left)?, vocab.find(right)?, merged?))
    });
    let (left, right, merged) =
        ids.ok_or_else(|| error("expected two tokens whose joined text is a token"))?;
    for i in probes(hash_pair(left, right), slots.len()) {
        let slot = &mut slots[i];
        if slot[0] == EMPTY {
            *slot = [left, right, rank, merged].map(u32::to_le_bytes);
            return Ok(());
        }
        if slot[..2] == [left, right].map(u32::to_le_bytes) {
            // A repeated merge keeps its first rank, as in llama.cpp.
            return Ok(());
        }
    }
    Err(error("pairs made to collide"))
}

fn hash_pair(left: u32, right: u32) -> u32 {
    let pair = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((pair ^ pair >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 32) as u32
}

/// The token that stands for these bytes, by the byte-level alphabet.
fn find_word(vocab: &Vocab<'_>, word: &[u8]) -> Option<u32> {
    let hash = word.iter().fold(Hash::EMPTY, |hash, &byte| {
        let (text, len) = bytes::encode(byte);
        hash.with(&text[..len])
    });
    vocab.probe(hash, |mut text| {
        for &byte in word {
            let (char, len) = bytes::encode(byte);
            match text.strip_prefix(&char[..len]) {
                Some(rest) => text = rest,
                None => return false,
            }
        }
        text.is_empty()
    })
}
