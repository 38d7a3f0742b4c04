//! The vocabulary: token texts, where the file has them, and the parts of the [index](super::index) that every
//! tokenizer model has.
//!
//! Look-ups probe at most [`MAX_PROBES`] slots. A vocabulary that collides more often is refused, so
//! that building and reading stay linear on a hostile file; at these loads an honest one stays far below.

use super::index::{EMPTY, Header, Word, damaged, read};
use super::{keys::Keys, special::MARKERS};
use crate::format::Array;
use crate::{Code, Error, Result};

/// No token, no rank, an empty slot.
pub(super) const NONE: u32 = u32::MAX;

/// Most tokens, and most merges: a slot of the text hash keeps a token in 24 bits.
const MAX_ENTRIES: usize = (1 << 24) - 1;

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
    offsets: &'a [Word],
    text_slots: &'a [Word],
    pub(super) markers: &'a [Word],
    pub(super) specials: &'a [Word],
}

/// Slots of the hash of that many texts.
const fn text_slots(tokens: usize) -> usize {
    2 * tokens + 1
}

/// Number of entries of a list of tokens or merges, which must be `least` or more.
pub(super) fn entries(list: &Array<'_>, name: &'static str, least: usize) -> Result<usize> {
    if !(least..=MAX_ENTRIES).contains(&list.len()) || list.bytes().len() >= NONE as usize {
        return Err(Error::new(Code::BadLength, name)
            .found(list.len() as u64, MAX_ENTRIES as u64)
            .hint("entries, of less than 4 GiB, and at least one token"));
    }
    Ok(list.len())
}

/// Words of index that the vocabulary never exceeds.
pub(super) fn most_words(keys: &Keys<'_>) -> Result<usize> {
    let tokens = entries(&keys.tokens, "tokenizer.ggml.tokens", 1)?;
    let kinds = keys.kinds.chunks_exact(4);
    let specials = kinds.filter(|kind| matches!(kind, [2..=4, 0, 0, 0])).count() + MARKERS.len();
    Ok(tokens + 1 + text_slots(tokens) + MARKERS.len() + specials)
}

impl<'a> Vocab<'a> {
    /// Builds the parts in `memory`, which is [`EMPTY`], and gives the rest back.
    pub(super) fn build(keys: &Keys<'a>, memory: &'a mut [Word]) -> Result<(Self, &'a mut [Word])> {
        let tokens = keys.tokens.len();
        let (offsets, memory) = memory.split_at_mut(tokens + 1);
        let (text_slots, memory) = memory.split_at_mut(text_slots(tokens));
        let (markers, memory) = memory.split_at_mut(MARKERS.len());
        let mut at = 0u32;
        for (offset, text) in offsets.iter_mut().zip(keys.tokens.texts()) {
            *offset = at.to_le_bytes();
            at += 8 + text.len() as u32;
        }
        offsets[tokens] = at.to_le_bytes();
        let mut vocab = Self {
            texts: keys.tokens.bytes(),
            kinds: keys.kinds,
            offsets,
            text_slots: &[],
            markers: &[],
            specials: &[],
        };
        for token in 0..tokens as u32 {
            vocab.insert_text(text_slots, token)?;
        }
        vocab.text_slots = text_slots;
        for (slot, (text, _)) in markers.iter_mut().zip(MARKERS) {
            *slot = vocab.find(text.as_bytes()).map_or(EMPTY, u32::to_le_bytes);
        }
        vocab.markers = markers;
        let count = vocab.sort_specials(memory)?;
        let (specials, memory) = memory.split_at_mut(count);
        vocab.specials = specials;
        Ok((vocab, memory))
    }

    /// The parts of `index` behind its header, and those of the tokenizer model.
    ///
    /// # Errors
    /// [`Code::BadLength`] if the index is not as long as the header says, or is that of other tokens.
    pub(super) fn open(keys: &Keys<'a>, index: &'a [u8]) -> Result<(Self, &'a [Word])> {
        let (header, mut rest) = Header::open(index)?;
        if header.tokens != keys.tokens.len() {
            return Err(damaged(header.tokens, keys.tokens.len()).hint("tokens"));
        }
        let parts =
            [header.tokens + 1, text_slots(header.tokens), MARKERS.len(), header.specials, header.model];
        let expected = parts.iter().fold(0, |sum: usize, words| sum.saturating_add(*words));
        if rest.len() != expected {
            return Err(damaged(rest.len(), expected));
        }
        // The parts together are all that there is.
        let [offsets, text_slots, markers, specials, model] = parts.map(|words| {
            let (part, behind) = rest.split_at(words);
            rest = behind;
            part
        });
        let (texts, kinds) = (keys.tokens.bytes(), keys.kinds);
        Ok((Self { texts, kinds, offsets, text_slots, markers, specials }, model))
    }

    /// Words of index that it has.
    pub(super) fn words(&self) -> usize {
        self.offsets.len() + self.text_slots.len() + self.markers.len() + self.specials.len()
    }

    fn insert_text(&self, slots: &mut [Word], token: u32) -> Result<()> {
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
            let slot = read(&slots[i]);
            if slot == NONE {
                slots[i] = (tag(hash) | token).to_le_bytes();
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
        self.offsets.len() - 1
    }

    /// The text of a token; empty beyond the vocabulary.
    pub(super) fn text(&self, token: u32) -> &'a [u8] {
        let Some([start, end, ..]) = self.offsets.get(token as usize..) else { return &[] };
        let (start, end) = (read(start) as usize, read(end) as usize);
        self.texts.get(start.wrapping_add(8)..end).unwrap_or(&[])
    }

    /// What a token is.
    pub(super) fn kind(&self, token: u32) -> Kind {
        if self.markers.contains(&token.to_le_bytes()) {
            return Kind::Control;
        }
        self.kind_in_file(token)
    }

    /// What the file says that a token is.
    pub(super) fn kind_in_file(&self, token: u32) -> Kind {
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
            let slot = read(&self.text_slots[i]);
            if slot == NONE {
                break;
            }
            let token = slot & !TAG;
            if slot & TAG == tag(hash) && (token as usize) < self.len() && matches(self.text(token)) {
                return Some(token);
            }
        }
        None
    }
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
