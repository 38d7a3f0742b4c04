//! The vocabulary: token texts, where the file has them, and the index that finds them.
//!
//! The index is plain words in the caller's memory, holds no pointers, and is built in one pass over the
//! tokens. This part of it every tokenizer model has; each puts its own behind it:
//!
//! | part | words |
//! |---|---|
//! | offset of each token's text in the file's array | tokens |
//! | texts: open-addressed hash of token texts, tag and token in one word | 2 x tokens + 1 |
//! | markers: tokens that are special by their text | as many as are known |
//! | specials: tokens that are matched in a text, sorted by their text | those of such a type, and markers |
//! | user-defined: those of them that are matched always | those of that type |
//!
//! Look-ups probe at most [`MAX_PROBES`] slots. A vocabulary that collides more often is refused, so
//! that building and reading stay linear on a hostile file; at these loads an honest one stays far below.

use super::{keys::Keys, special::MARKERS};
use crate::{Code, Error, Result};

/// No token, no rank, an empty slot.
pub(super) const NONE: u32 = u32::MAX;

/// Most tokens, and most merges: a slot of the text hash keeps a token in 24 bits.
pub(super) const MAX_ENTRIES: usize = (1 << 24) - 1;

/// Most slots that a look-up reads.
const MAX_PROBES: usize = 1024;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    /// It stands for the byte that its text, `<0x0A>`, names.
    Byte,
    /// Unused, or of an unknown kind: it has no piece.
    Other,
}

/// A read-only view of the vocabulary and its index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vocab<'a> {
    /// The array of token texts as the file has it: each an 8-byte length and its bytes.
    texts: &'a [u8],
    /// The token types, 4 bytes each; empty where the file has none.
    kinds: &'a [u8],
    offsets: &'a [u32],
    text_slots: &'a [u32],
    pub(super) markers: &'a [u32],
    pub(super) specials: &'a [u32],
    pub(super) user_defined: &'a [u32],
}

/// Sizes of the parts of the index.
struct Layout {
    tokens: usize,
    text_slots: usize,
    specials: usize,
    user_defined: usize,
}

impl Layout {
    fn new(keys: &Keys<'_>) -> Result<Self> {
        let tokens = keys.tokens.len();
        if tokens > MAX_ENTRIES {
            return Err(
                Error::new(Code::BadLength, "tokenizer.ggml.tokens").found(tokens as u64, MAX_ENTRIES as u64)
            );
        }
        let texts = keys.tokens.bytes().len();
        if tokens == 0 || texts >= NONE as usize {
            return Err(Error::new(Code::BadLength, "tokenizer.ggml.tokens")
                .found(texts as u64, u64::from(NONE - 1))
                .hint("bytes of token texts, at least one token"));
        }
        let kinds = || keys.kinds.chunks_exact(4);
        Ok(Self {
            tokens,
            text_slots: 2 * tokens + 1,
            specials: kinds().filter(|kind| matches!(kind, [2..=4, 0, 0, 0])).count() + MARKERS.len(),
            user_defined: kinds().filter(|kind| matches!(kind, [4, 0, 0, 0])).count(),
        })
    }

    fn words(&self) -> usize {
        self.tokens + self.text_slots + MARKERS.len() + self.specials + self.user_defined
    }
}

/// Words of index that the vocabulary needs.
pub(super) fn index_words(keys: &Keys<'_>) -> Result<usize> {
    Ok(Layout::new(keys)?.words())
}

impl<'a> Vocab<'a> {
    /// Builds the index in the first [`index_words`] of `index` and gives the rest back.
    pub(super) fn build(keys: &Keys<'a>, index: &'a mut [u32]) -> Result<(Self, &'a mut [u32])> {
        let layout = Layout::new(keys)?;
        if index.len() < layout.words() {
            return Err(too_small(index.len(), layout.words()));
        }
        index[..layout.words()].fill(NONE);
        let (offsets, rest) = index.split_at_mut(layout.tokens);
        let (text_slots, rest) = rest.split_at_mut(layout.text_slots);
        let (markers, rest) = rest.split_at_mut(MARKERS.len());
        let (specials, rest) = rest.split_at_mut(layout.specials);
        let (user_defined, rest) = rest.split_at_mut(layout.user_defined);

        let mut at = 0;
        for (offset, text) in offsets.iter_mut().zip(keys.tokens.strings().into_iter().flatten()) {
            *offset = at as u32;
            at += 8 + text.len();
        }
        let mut vocab = Self {
            texts: keys.tokens.bytes(),
            kinds: keys.kinds,
            offsets,
            text_slots: &[],
            markers: &[],
            specials: &[],
            user_defined: &[],
        };
        for token in 0..layout.tokens as u32 {
            vocab.insert_text(text_slots, token)?;
        }
        vocab.text_slots = text_slots;
        vocab.markers = vocab.find_markers(markers);
        let special = |kind| matches!(kind, Kind::Unknown | Kind::Control | Kind::UserDefined);
        vocab.specials = vocab.sort_specials(specials, special)?;
        vocab.user_defined = vocab.sort_specials(user_defined, |kind| kind == Kind::UserDefined)?;
        Ok((vocab, rest))
    }

    fn insert_text(&self, slots: &mut [u32], token: u32) -> Result<()> {
        let text = self.text(token);
        // llama.cpp gives empty texts a name of its own; they can never be met in a text.
        if text.is_empty() {
            return Ok(());
        }
        let error = |hint| {
            Error::new(Code::BadVocabulary, "tokenizer.ggml.tokens").found(u64::from(token), 0).hint(hint)
        };
        let hash = Hash::of(text).finish();
        for i in probes(hash, slots.len()) {
            let slot = slots[i];
            if slot == NONE {
                slots[i] = tag(hash) | token;
                return Ok(());
            }
            if slot & TAG == tag(hash) && self.text(slot & !TAG) == text {
                return Err(error("a text that an earlier token has"));
            }
        }
        Err(error("texts made to collide"))
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        self.offsets.len()
    }

    /// The text of a token that is in the vocabulary.
    pub(super) fn text(&self, token: u32) -> &'a [u8] {
        let start = self.offsets[token as usize] as usize + 8;
        let mut len = [0; 8];
        len.copy_from_slice(&self.texts[start - 8..start]);
        &self.texts[start..start + u64::from_le_bytes(len) as usize]
    }

    /// What a token that is in the vocabulary is.
    pub(super) fn kind(&self, token: u32) -> Kind {
        if self.markers.contains(&token) {
            return Kind::Control;
        }
        match self.kinds.get(4 * token as usize..) {
            None | Some([] | [1, 0, 0, 0, ..]) => Kind::Normal,
            Some([2, 0, 0, 0, ..]) => Kind::Unknown,
            Some([3, 0, 0, 0, ..]) => Kind::Control,
            Some([4, 0, 0, 0, ..]) => Kind::UserDefined,
            Some([6, 0, 0, 0, ..]) => Kind::Byte,
            Some(_) => Kind::Other,
        }
    }

    /// The token whose text is `text`.
    pub(super) fn find(&self, text: &[u8]) -> Option<u32> {
        self.probe(Hash::of(text), |found| found == text)
    }

    /// The token whose text has this hash and satisfies `matches`.
    pub(super) fn probe(&self, hash: Hash, matches: impl Fn(&[u8]) -> bool) -> Option<u32> {
        let hash = hash.finish();
        for i in probes(hash, self.text_slots.len()) {
            let slot = self.text_slots[i];
            if slot == NONE {
                break;
            }
            if slot & TAG == tag(hash) && matches(self.text(slot & !TAG)) {
                return Some(slot & !TAG);
            }
        }
        None
    }
}

/// The refusal of an index of `found` words where `expected` are needed.
pub(super) fn too_small(found: usize, expected: usize) -> Error {
    Error::new(Code::BufferTooSmall, "tokenizer index").found(found as u64, expected as u64).hint("words")
}

/// The part of a slot of the text hash that is not the token: the top bits of the text's hash.
const TAG: u32 = 0xFF << 24;

/// The tag of a hash. 0xFF would make the last token an empty slot.
fn tag(hash: u32) -> u32 {
    (hash << 24).min(0xFE << 24)
}

/// The slots to look at, in order, of a table of `slots`.
pub(super) fn probes(hash: u32, slots: usize) -> impl Iterator<Item = usize> {
    // The hash as a fraction of the table (Lemire, arXiv 1805.10941); both factors are below 2^32.
    let start = ((u64::from(hash) * slots as u64) >> 32) as usize;
    (start..slots).chain(0..start).take(MAX_PROBES)
}

/// Hash of a text: its bytes, each plus 1, as digits of a number to an odd base modulo 2^32 (Karp and Rabin
/// 1987). The hash of two joined texts follows from theirs, whatever their length.
#[derive(Clone, Copy)]
pub(super) struct Hash {
    pub(super) value: u32,
    /// The base to the power of the text's length.
    pub(super) power: u32,
}

impl Hash {
    const BASE: u32 = 0x2C1B_3C6D;

    pub(super) const EMPTY: Self = Self { value: 0, power: 1 };

    pub(super) fn of(text: &[u8]) -> Self {
        Self::EMPTY.with(text)
    }

    /// The hash of this text with `text` behind it.
    pub(super) fn with(self, text: &[u8]) -> Self {
        text.iter().fold(self, |hash, &byte| Self {
            value: hash.value.wrapping_mul(Self::BASE).wrapping_add(u32::from(byte) + 1),
            power: hash.power.wrapping_mul(Self::BASE),
        })
    }

    /// The hash of this text joined with the one behind it.
    pub(super) fn then(self, tail: Self) -> Self {
        Self {
            value: self.value.wrapping_mul(tail.power).wrapping_add(tail.value),
            power: self.power.wrapping_mul(tail.power),
        }
    }

    /// Spread as MurmurHash3 does, so that all bits are used.
    pub(super) fn finish(self) -> u32 {
        let mut hash = self.value;
        hash = (hash ^ hash >> 16).wrapping_mul(0x85EB_CA6B);
        hash = (hash ^ hash >> 13).wrapping_mul(0xC2B2_AE35);
        hash ^ hash >> 16
    }
}
