//! The vocabulary: token texts, where the file has them, and the index that finds them.
//!
//! The index is plain words in the caller's memory, holds no pointers, and is built in one pass over
//! tokens and merges:
//!
//! | part | words |
//! |---|---|
//! | offset of each token's text in the file's array | tokens |
//! | token of each byte | 256 |
//! | texts: open-addressed hash of token texts, tag and token in one word | 2 x tokens + 1 |
//! | merges: open-addressed hash of pairs: left, right, rank, merged | 4 x (1.5 x merges + 1) |
//! | markers: tokens that are special by their text | as many as are known |
//! | specials: tokens that are matched in a text, sorted by their text | those of such a type, and markers |
//! | user-defined: those of them that are matched always | those of that type |
//!
//! Look-ups probe at most [`MAX_PROBES`] slots. A vocabulary that collides more often is refused, so
//! that building and reading stay linear on a hostile file; at these loads an honest one stays far below.

use super::{bytes, keys::Keys, special::MARKERS};
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
    /// Unused, or of a kind that byte-level BPE does not have: it is never matched and has no piece.
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
    bytes: &'a [u32],
    text_slots: &'a [u32],
    merge_slots: &'a [u32],
    pub(super) markers: &'a [u32],
    pub(super) specials: &'a [u32],
    pub(super) user_defined: &'a [u32],
}

/// Sizes of the parts of the index.
struct Layout {
    tokens: usize,
    text_slots: usize,
    merge_slots: usize,
    specials: usize,
    user_defined: usize,
}

impl Layout {
    fn new(keys: &Keys<'_>) -> Result<Self> {
        let (tokens, merges) = (keys.tokens.len(), keys.merges.len());
        for (name, count) in [("tokenizer.ggml.tokens", tokens), ("tokenizer.ggml.merges", merges)] {
            if count > MAX_ENTRIES {
                return Err(Error::new(Code::BadLength, name).found(count as u64, MAX_ENTRIES as u64));
            }
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
            merge_slots: merges + merges / 2 + 1,
            specials: kinds().filter(|kind| matches!(kind, [2..=4, 0, 0, 0])).count() + MARKERS.len(),
            user_defined: kinds().filter(|kind| matches!(kind, [4, 0, 0, 0])).count(),
        })
    }

    fn words(&self) -> usize {
        let tables = self.text_slots + 4 * self.merge_slots;
        self.tokens + 256 + tables + MARKERS.len() + self.specials + self.user_defined
    }
}

/// Words of index that the vocabulary needs.
pub(super) fn index_words(keys: &Keys<'_>) -> Result<usize> {
    Ok(Layout::new(keys)?.words())
}

impl<'a> Vocab<'a> {
    /// Builds the index.
    pub(super) fn build(keys: &Keys<'a>, index: &'a mut [u32]) -> Result<Self> {
        let layout = Layout::new(keys)?;
        if index.len() < layout.words() {
            return Err(Error::new(Code::BufferTooSmall, "tokenizer index")
                .found(index.len() as u64, layout.words() as u64)
                .hint("words"));
        }
        index[..layout.words()].fill(NONE);
        let (offsets, rest) = index.split_at_mut(layout.tokens);
        let (bytes, rest) = rest.split_at_mut(256);
        let (text_slots, rest) = rest.split_at_mut(layout.text_slots);
        let (merge_slots, rest) = rest.split_at_mut(4 * layout.merge_slots);
        let (markers, rest) = rest.split_at_mut(MARKERS.len());
        let (specials, rest) = rest.split_at_mut(layout.specials);
        let user_defined = &mut rest[..layout.user_defined];

        let mut at = 0;
        for (offset, text) in offsets.iter_mut().zip(keys.tokens.strings().into_iter().flatten()) {
            *offset = at as u32;
            at += 8 + text.len();
        }
        let mut vocab = Self {
            texts: keys.tokens.bytes(),
            kinds: keys.kinds,
            offsets,
            bytes: &[],
            text_slots: &[],
            merge_slots: &[],
            markers: &[],
            specials: &[],
            user_defined: &[],
        };
        for token in 0..layout.tokens as u32 {
            vocab.insert_text(text_slots, token)?;
        }
        vocab.text_slots = text_slots;
        for (byte, slot) in (0..=255).zip(&mut *bytes) {
            let (text, len) = bytes::encode(byte);
            *slot = vocab.find(&text[..len], &[]).unwrap_or(NONE);
        }
        vocab.bytes = bytes;
        for (rank, text) in (0..).zip(keys.merges.strings().into_iter().flatten()) {
            vocab.insert_merge(merge_slots, rank, text)?;
        }
        vocab.merge_slots = merge_slots;
        vocab.markers = vocab.find_markers(markers);
        let special = |kind| matches!(kind, Kind::Unknown | Kind::Control | Kind::UserDefined);
        vocab.specials = vocab.sort_specials(specials, special)?;
        vocab.user_defined = vocab.sort_specials(user_defined, |kind| kind == Kind::UserDefined)?;
        Ok(vocab)
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
        let hash = hash_text(text, &[]);
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

    fn insert_merge(&self, slots: &mut [u32], rank: u32, text: &[u8]) -> Result<()> {
        let error = |hint| {
            Error::new(Code::BadVocabulary, "tokenizer.ggml.merges").found(u64::from(rank), 0).hint(hint)
        };
        // The space may be the left part itself, as in llama.cpp.
        let cut = text.iter().skip(1).position(|&byte| byte == b' ').map(|at| at + 1);
        let parts = cut.map(|cut| (&text[..cut], &text[cut + 1..]));
        let ids = parts.and_then(|(left, right)| {
            Some((self.find(left, &[])?, self.find(right, &[])?, self.find(left, right)?))
        });
        let (left, right, merged) =
            ids.ok_or_else(|| error("expected two tokens whose joined text is a token"))?;
        for i in probes(hash_pair(left, right), slots.len() / 4) {
            let slot = &mut slots[4 * i..4 * i + 4];
            if slot[0] == NONE {
                slot.copy_from_slice(&[left, right, rank, merged]);
                return Ok(());
            }
            if slot[0] == left && slot[1] == right {
                // A repeated merge keeps its first rank, as in llama.cpp.
                return Ok(());
            }
        }
        Err(error("pairs made to collide"))
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
            Some(_) => Kind::Other,
        }
    }

    /// The token of a byte, [`NONE`] if it has none.
    pub(super) fn byte(&self, byte: u8) -> u32 {
        self.bytes[usize::from(byte)]
    }

    /// The token whose text is `head` followed by `tail`.
    pub(super) fn find(&self, head: &[u8], tail: &[u8]) -> Option<u32> {
        let hash = hash_text(head, tail);
        let matches = |text: &[u8]| text.strip_prefix(head) == Some(tail);
        self.probe(hash, matches)
    }

    /// The token that stands for these bytes, by the byte-level alphabet.
    pub(super) fn find_word(&self, word: &[u8]) -> Option<u32> {
        let mut hash = Hash::default();
        for &byte in word {
            let (text, len) = bytes::encode(byte);
            hash.add(&text[..len]);
        }
        self.probe(hash.finish(), |mut text| {
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

    fn probe(&self, hash: u32, matches: impl Fn(&[u8]) -> bool) -> Option<u32> {
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

    /// Rank and result of merging two tokens, both [`NONE`] where no merge does.
    pub(super) fn merge(&self, left: u32, right: u32) -> (u32, u32) {
        if left != NONE {
            for i in probes(hash_pair(left, right), self.merge_slots.len() / 4) {
                match self.merge_slots[4 * i..4 * i + 4] {
                    [l, r, rank, merged] if l == left && r == right => return (rank, merged),
                    [NONE, ..] => break,
                    _ => {}
                }
            }
        }
        (NONE, NONE)
    }
}

/// The part of a slot of the text hash that is not the token: the top bits of the text's hash.
const TAG: u32 = 0xFF << 24;

/// The tag of a hash. 0xFF would make the last token an empty slot.
fn tag(hash: u32) -> u32 {
    (hash << 24).min(0xFE << 24)
}

/// The slots to look at, in order, of a table of `slots`.
fn probes(hash: u32, slots: usize) -> impl Iterator<Item = usize> {
    // The hash as a fraction of the table (Lemire, arXiv 1805.10941); both factors are below 2^32.
    let start = ((u64::from(hash) * slots as u64) >> 32) as usize;
    (start..slots).chain(0..start).take(MAX_PROBES)
}

/// FNV-1a of 32 bits, finished as MurmurHash3 does so that all bits of the result are used.
struct Hash(u32);

impl Default for Hash {
    fn default() -> Self {
        Self(0x811C_9DC5)
    }
}

impl Hash {
    fn add(&mut self, text: &[u8]) {
        for &byte in text {
            self.0 = (self.0 ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    }

    fn finish(self) -> u32 {
        let mut hash = self.0;
        hash = (hash ^ hash >> 16).wrapping_mul(0x85EB_CA6B);
        hash = (hash ^ hash >> 13).wrapping_mul(0xC2B2_AE35);
        hash ^ hash >> 16
    }
}

pub(super) fn hash_text(head: &[u8], tail: &[u8]) -> u32 {
    let mut hash = Hash::default();
    hash.add(head);
    hash.add(tail);
    hash.finish()
}

fn hash_pair(left: u32, right: u32) -> u32 {
    let pair = (u64::from(left) << 32 | u64::from(right)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((pair ^ pair >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 32) as u32
}
