//! A session as bytes: its tokens, the cached rows that later tokens will look at, and the last logits.
//!
//! Numbers are little-endian. In front stand a magic, a version, the type of the cache, a fingerprint of the
//! model, the number of tokens and whether logits follow; at the end a checksum of everything before. All of it is
//! checked before a session is changed, so that bytes of strangers can make a session say nonsense, but
//! nothing else. What limits the session had does not matter, as long as the new one has room.

use super::cache::{CacheType, layer_rows};
use super::{Limits, Session};
use crate::{Code, Error, Result};
use edge_models::DecoderSpec;

const MAGIC: [u8; 8] = *b"EDGESAVE";
const VERSION: u64 = 1;
/// Words of the header, the magic being the first.
const HEADER: usize = 6;
const WORD: usize = 8;

/// A hash of 64 bits (FNV-1a over words instead of bytes, with a rotation so that high bits count too).
#[derive(Clone, Copy)]
pub(super) struct Hash(u64);

impl Hash {
    pub(super) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<WORD>();
        words.iter().for_each(|word| self.word(u64::from_le_bytes(*word)));
        rest.iter().for_each(|byte| self.word(u64::from(*byte)));
        self.word(bytes.len() as u64);
    }
}

/// The positions whose rows of `layer` tokens from `position` on will look at.
fn kept(spec: &DecoderSpec, layer: usize, position: usize) -> core::ops::Range<usize> {
    match spec.window_of(layer) {
        0 => 0..position,
        window => (position + 1).saturating_sub(window)..position,
    }
}

/// Bytes of a saved session; `None` beyond the address space.
fn bytes_of(spec: &DecoderSpec, kind: CacheType, position: usize, logits: usize) -> Option<usize> {
    let (values, bytes) = kind.element();
    let row = spec.kv_width() / values * bytes;
    let rows: usize = (0..spec.layers).map(|layer| kept(spec, layer, position).len()).sum();
    let numbers = position.checked_add(logits)?.checked_mul(4)?;
    rows.checked_mul(2)?.checked_mul(row)?.checked_add(numbers)?.checked_add((HEADER + 1) * WORD)
}

/// The number by which a file knows a type of cache.
fn number(kind: CacheType) -> u64 {
    match kind {
        CacheType::Auto | CacheType::F16 => 1,
        CacheType::F32 => 0,
        CacheType::Q8_0 => 8,
    }
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let word = bytes.as_chunks::<WORD>().0.get(index);
    word.map_or(0, |word| u64::from_le_bytes(*word))
}

impl Session<'_> {
    /// Bytes that [`Session::save`] writes now.
    pub fn saved_bytes(&self) -> usize {
        // Cannot overflow: it is less than the arena and the header.
        bytes_of(&self.spec, self.cache.kind(), self.position, self.logits().len()).unwrap_or(usize::MAX)
    }

    /// Writes the session into the front of `out`; answers how many bytes it took. Adapters are not part of it,
    /// what they did to the cache is.
    ///
    /// # Errors
    /// [`Code::BufferTooSmall`] with [`Session::saved_bytes`].
    pub fn save(&mut self, out: &mut [u8]) -> Result<usize> {
        let (needed, len) = (self.saved_bytes(), out.len());
        let Some(out) = out.get_mut(..needed) else {
            return Err(Error::new(Code::BufferTooSmall, "session").found(len as u64, needed as u64));
        };
        let kind = self.cache.kind();
        let header = [
            u64::from_le_bytes(MAGIC),
            VERSION,
            number(kind),
            self.fingerprint(),
            self.position as u64,
            u64::from(self.last_row.is_some()),
        ];
        let (body, checksum) = out.split_at_mut(needed - WORD);
        let (front, mut rest) = body.split_at_mut(HEADER * WORD);
        let words = front.as_chunks_mut::<WORD>().0.iter_mut();
        words.zip(header).for_each(|(out, word)| *out = word.to_le_bytes());
        let mut take = |bytes: usize| {
            let (taken, left) = core::mem::take(&mut rest).split_at_mut(bytes);
            rest = left;
            taken
        };
        let tokens = take(self.position * 4).as_chunks_mut().0.iter_mut();
        tokens.zip(self.history.iter()).for_each(|(out, token)| *out = token.to_le_bytes());
        let (values, bytes) = kind.element();
        let row = self.spec.kv_width() / values * bytes;
        for layer in 0..self.spec.layers {
            let cache = self.cache.layer(&self.spec, &self.limits, layer);
            for part in 0..2 {
                for position in kept(&self.spec, layer, self.position) {
                    cache.save(part, position, take(row));
                }
            }
        }
        let logits = self.logits();
        let out = take(logits.len() * 4).as_chunks_mut().0.iter_mut();
        out.zip(logits).for_each(|(out, logit)| *out = logit.to_le_bytes());
        let mut hash = Hash::new();
        hash.bytes(body);
        checksum.copy_from_slice(&hash.0.to_le_bytes());
        Ok(needed)
    }

    /// Puts the session that [`Session::save`] wrote in place of this one. More bytes than it wrote may follow.
    ///
    /// # Errors
    /// [`Code::Truncated`]; [`Code::ForeignSession`] for another kind of bytes (at byte 0), version (8), type of
    /// cache (16) or model (24); [`Code::ContextFull`] for more tokens than fit;
    /// [`Code::BadChecksum`]; [`Code::BadToken`]. Then this session is what it was.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        let error = |code, at: usize, found: u64, expected: u64| {
            Err(Error::new(code, "saved session").at(at * WORD).found(found, expected))
        };
        let header = HEADER * WORD;
        if bytes.len() < header {
            return error(Code::Truncated, 0, bytes.len() as u64, header as u64);
        }
        let kind = self.cache.kind();
        let expected = [u64::from_le_bytes(MAGIC), VERSION, number(kind), self.fingerprint()];
        for (index, expected) in expected.into_iter().enumerate() {
            if word(bytes, index) != expected {
                return error(Code::ForeignSession, index, word(bytes, index), expected);
            }
        }
        let (position, has_logits) = (word(bytes, 4), word(bytes, 5));
        if position > self.limits.context as u64 {
            return error(Code::ContextFull, 4, position, self.limits.context as u64);
        }
        if has_logits > 1 || (has_logits == 1 && position == 0) {
            return error(Code::OutOfRange, 5, has_logits, position.min(1));
        }
        let position = position as usize;
        let logits = if has_logits == 1 { self.spec.vocab } else { 0 };
        let needed = bytes_of(&self.spec, kind, position, logits).unwrap_or(usize::MAX);
        let Some((body, rest)) = bytes.split_at_checked(needed.saturating_sub(WORD)) else {
            return error(Code::Truncated, HEADER, bytes.len() as u64, needed as u64);
        };
        let Some(checksum) = rest.first_chunk::<WORD>() else {
            return error(Code::Truncated, HEADER, bytes.len() as u64, needed as u64);
        };
        let mut hash = Hash::new();
        hash.bytes(body);
        if hash.0 != u64::from_le_bytes(*checksum) {
            return error(Code::BadChecksum, body.len() / WORD, hash.0, u64::from_le_bytes(*checksum));
        }
        let (tokens, mut rest) = body[header..].split_at(position * 4);
        let tokens = tokens.as_chunks::<4>().0.iter().map(|token| u32::from_le_bytes(*token));
        if let Some(token) = tokens.clone().find(|token| *token as usize >= self.spec.vocab) {
            return error(Code::BadToken, HEADER, u64::from(token), self.spec.vocab as u64);
        }
        self.history.iter_mut().zip(tokens).for_each(|(to, token)| *to = token);
        let (values, element) = kind.element();
        let row = self.spec.kv_width() / values * element;
        for layer in 0..self.spec.layers {
            let mut cache = self.cache.layer(&self.spec, &self.limits, layer);
            for part in 0..2 {
                for position in kept(&self.spec, layer, position) {
                    let (saved, left) = rest.split_at(row);
                    cache.restore(part, position, saved);
                    rest = left;
                }
            }
        }
        let saved = rest.as_chunks::<4>().0.iter();
        self.logits.iter_mut().zip(saved).for_each(|(to, logit)| *to = f32::from_le_bytes(*logit));
        self.last_row = (has_logits == 1).then_some(0);
        self.position = position;
        self.highest = position;
        self.lowest =
            (0..self.spec.layers).map(|layer| kept(&self.spec, layer, position).start).max().unwrap_or(0);
        Ok(())
    }

    /// Tells models from one another: what a cache depends on, and samples of the weights.
    fn fingerprint(&self) -> u64 {
        let (spec, mut hash) = (&self.spec, Hash::new());
        hash.bytes(spec.family.name.as_bytes());
        for number in [
            spec.layers,
            spec.hidden,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.rope_dims,
            spec.window,
            spec.vocab,
        ] {
            hash.word(number as u64);
        }
        hash.bytes(self.model.embedding.row(spec.vocab / 2).unwrap_or(&[]));
        for layer in self.model.layers {
            for matrix in layer.matrices() {
                hash.word(matrix.dtype() as u64);
                hash.bytes(matrix.row(0).unwrap_or(&[]));
            }
            for norm in [layer.attn_norm, layer.ffn_norm] {
                norm.iter().for_each(|weight| hash.word(u64::from(weight.to_bits())));
            }
        }
        hash.0
    }
}

/// Whether a session that has come to `highest` and whose rows begin at `lowest` still has all rows that a
/// token at `position` looks at.
pub(super) fn has_rows(
    spec: &DecoderSpec,
    limits: &Limits,
    position: usize,
    [lowest, highest]: [usize; 2],
) -> bool {
    (0..spec.layers).all(|layer| {
        let (needed, rows) = (kept(spec, layer, position), layer_rows(spec, limits, layer));
        needed.is_empty()
            || spec.window_of(layer) == 0
            || needed.start >= lowest.max(highest.saturating_sub(rows))
    })
}
