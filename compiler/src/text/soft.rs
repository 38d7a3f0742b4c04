//! Token probabilities that came with a text, as sparse soft targets over our own tokens.
//!
//! A server says of each token of its answer how likely it was and what the best alternatives were, as texts
//! from its own vocabulary. [`align`] finds the places where our tokenizer cuts the text as the server's did
//! and puts ids of ours in the place of its texts. It never guesses: where the two cut differently, where
//! bytes do not agree or the numbers contradict each other, there is no soft target, and the token itself is
//! learned.

use std::collections::HashMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{HostTokenizer, TextError};

/// What a server said of one token of its answer: an element of a row's `logprobs`.
///
/// Logarithms are natural ones, of the model's distribution at temperature 1 before any truncation (what
/// vLLM, SGLang, llama.cpp and OpenAI give unless they are told otherwise).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// The token.
    pub token: Piece,
    /// The logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens with theirs; the token itself may or may not be one of them.
    #[serde(default)]
    pub top: Vec<(Piece, f32)>,
}

/// The bytes of a token: a string in JSON, or a list of bytes where they are not whole characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Piece {
    /// Whole characters.
    Text(String),
    /// Anything else.
    Bytes(Vec<u8>),
}

impl Piece {
    /// The piece of some bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes).map_or_else(|error| Self::Bytes(error.into_bytes()), Self::Text)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// Sparse distributions over the vocabulary for some tokens of a stream.
///
/// The distribution at position `i` is the one that token `i` of the stream was drawn from: the target of the
/// prediction made after token `i - 1`. A position without one has its token as a hard target.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SoftTargets {
    positions: Vec<usize>,
    /// Where each position's entries end in the two lists below.
    ends: Vec<usize>,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
}

/// The known part of one distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftTarget<'a> {
    /// Tokens, each once.
    pub ids: &'a [u32],
    /// Natural logarithms of their probabilities, as many.
    pub logprobs: &'a [f32],
}

impl SoftTarget<'_> {
    /// The probability of all other tokens together, at least 0.
    pub fn tail(&self) -> f32 {
        let known: f64 = self.logprobs.iter().map(|&logprob| f64::from(logprob).exp()).sum();
        (1.0 - known).max(0.0) as f32
    }
}

impl SoftTargets {
    /// Number of positions that have a distribution.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// The distribution of the token at `position`, if it has one. O(log n).
    pub fn at(&self, position: usize) -> Option<SoftTarget<'_>> {
        self.positions.binary_search(&position).ok().map(|index| self.entry(index))
    }

    /// All of them with their positions, which rise.
    pub fn iter(&self) -> impl Iterator<Item = (usize, SoftTarget<'_>)> {
        self.positions.iter().enumerate().map(|(index, &position)| (position, self.entry(index)))
    }

    fn entry(&self, index: usize) -> SoftTarget<'_> {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        let range = start..self.ends[index];
        SoftTarget { ids: &self.ids[range.clone()], logprobs: &self.logprobs[range] }
    }

    /// Adds a distribution behind the others.
    pub(super) fn push(&mut self, position: usize, entries: &[(u32, f32)]) {
        debug_assert!(self.positions.last().is_none_or(|&last| last < position));
        self.positions.push(position);
        self.ids.extend(entries.iter().map(|entry| entry.0));
        self.logprobs.extend(entries.iter().map(|entry| entry.1));
        self.ends.push(self.ids.len());
    }

    /// Forgets the positions from `position` on.
    pub(super) fn truncate(&mut self, position: usize) {
        let count = self.positions.partition_point(|&known| known < position);
        self.positions.truncate(count);
        self.ends.truncate(count);
        let entries = self.ends.last().copied().unwrap_or(0);
        self.ids.truncate(entries);
        self.logprobs.truncate(entries);
    }
}

/// The tokens of a vocabulary by the bytes that they stand for.
pub struct Pieces<'a> {
    tokenizer: &'a HostTokenizer,
    ids: HashMap<Vec<u8>, u32>,
}

impl<'a> Pieces<'a> {
    /// Of two tokens that stand for the same bytes (SentencePiece has `A` and `<0x41>`) the one that is not
    /// made for a single byte is found, and no control token before any other.
    ///
    /// # Errors
    /// None that a vocabulary which was read can cause; a refusal of the tokenizer is passed on.
    pub fn new(tokenizer: &'a HostTokenizer) -> Result<Self, TextError> {
        let view = tokenizer.view();
        let mut pieces = Self { tokenizer, ids: HashMap::with_capacity(view.len()) };
        let mut rest = Vec::new();
        for id in 0..view.len() as u32 {
            let (bytes, plain) = pieces.spelled(id)?;
            if plain && view.raw_text(id).is_none_or(|raw| bytes.len() > 1 || !raw.starts_with(b"<0x")) {
                pieces.ids.entry(bytes).or_insert(id);
            } else {
                rest.push((bytes, id));
            }
        }
        for (bytes, id) in rest {
            pieces.ids.entry(bytes).or_insert(id);
        }
        Ok(pieces)
    }

    /// The token that stands for these bytes, or a control token of this name.
    pub fn find(&self, bytes: &[u8]) -> Option<u32> {
        self.ids.get(bytes).copied()
    }

    /// The bytes that a token stands for and true, or the name of one that stands for nothing and false.
    ///
    /// # Errors
    /// A token beyond the vocabulary.
    pub fn spelled(&self, id: u32) -> Result<(Vec<u8>, bool), TextError> {
        let view = self.tokenizer.view();
        let raw = view.raw_text(id).unwrap_or_default();
        let mut bytes = vec![0; raw.len()];
        let length = view.piece(id, &mut bytes).map_err(TextError::Tokenizer)?;
        bytes.truncate(length);
        Ok(if bytes.is_empty() { (raw.to_vec(), false) } else { (bytes, true) })
    }

    /// Where each token that begins within `said` does so in `text`, of which `ids` are the tokens: its
    /// index.
    fn starts(
        &self,
        ids: &[u32],
        text: &[u8],
        said: &Range<usize>,
    ) -> Result<HashMap<usize, usize>, TextError> {
        let mut starts = HashMap::new();
        let mut at = 0;
        for (index, &id) in ids.iter().enumerate() {
            let (bytes, plain) = self.spelled(id)?;
            let rest = &text[at..];
            if rest.starts_with(&bytes) {
                if plain && said.contains(&at) {
                    starts.insert(at, index);
                }
                at += bytes.len();
            } else if at == 0 && bytes.strip_prefix(b" ").is_some_and(|bytes| rest.starts_with(bytes)) {
                // The space that SentencePiece puts before a text.
                at += bytes.len() - 1;
            } else if plain {
                // A byte without a token was left out, or white space swallowed: nothing behind it is sure.
                break;
            }
        }
        Ok(starts)
    }
}

/// Tokens by their index, each with alternatives and the logarithms of their probabilities.
pub type Aligned = Vec<(usize, Vec<(u32, f32)>)>;

/// The distributions of those of `ids`, the tokens of `text`, at which the server's `tokens` of `text[said]`
/// begin and end too: index into `ids` with known tokens and their logarithms, in rising order.
///
/// The server's alternatives that are no token of ours are left to the tail.
///
/// # Errors
/// What is wrong with `tokens`: a logarithm that is no number or above 0, or probabilities of more than 1 in
/// sum.
pub fn align(
    pieces: &Pieces<'_>,
    ids: &[u32],
    text: &[u8],
    said: Range<usize>,
    tokens: &[TokenLogprobs],
) -> Result<Aligned, TextError> {
    let starts = pieces.starts(ids, text, &said)?;
    let mut aligned = Vec::new();
    let mut at = Some(said.start);
    for (number, token) in tokens.iter().enumerate() {
        let known = known(token)
            .map_err(|message| TextError::Logprobs(format!("`logprobs`: token {}: {message}", number + 1)))?;
        let bytes = token.token.bytes();
        // Behind bytes that are not those of the text, no place is sure.
        let Some(start) = at.filter(|&start| text[start..said.end].starts_with(bytes)) else {
            at = None;
            continue;
        };
        at = Some(start + bytes.len());
        if let (Some(known), Some(&index)) = (known, starts.get(&start))
            && pieces.spelled(ids[index])?.0 == bytes
        {
            aligned.push((index, own(pieces, &known, bytes, ids[index])));
        }
    }
    Ok(aligned)
}

/// Largest sum of probabilities that rounding excuses.
const MOST: f64 = 1.01;

/// Texts and the logarithms of their probabilities.
type Alternatives<'a> = Vec<(&'a [u8], f32)>;

/// The alternatives with the token itself. None if the token is likelier than the least of them and yet is
/// not one of them: llama.cpp gives characters of several tokens like that, with the alternatives of the last
/// one.
fn known(token: &TokenLogprobs) -> Result<Option<Alternatives<'_>>, String> {
    let mut known: Vec<_> = token.top.iter().map(|(piece, logprob)| (piece.bytes(), *logprob)).collect();
    let bytes = token.token.bytes();
    let mut consistent = true;
    if !known.iter().any(|entry| entry.0 == bytes) {
        let least = known.iter().map(|entry| entry.1).fold(f32::INFINITY, f32::min);
        consistent = known.is_empty() || token.logprob <= least;
        known.push((bytes, token.logprob));
    }
    if let Some((_, wrong)) = known.iter().find(|entry| entry.1.is_nan() || entry.1 > 1e-3) {
        return Err(format!("{wrong} is not the logarithm of a probability"));
    }
    let sum: f64 = known.iter().map(|entry| f64::from(entry.1).exp()).sum();
    if consistent && sum > MOST {
        return Err(format!("its probabilities sum to {sum:.3}"));
    }
    Ok(consistent.then_some(known))
}

/// Our tokens in the place of the server's. Those of the same text count together: `chosen` is the one of
/// `bytes`.
fn own(pieces: &Pieces<'_>, known: &[(&[u8], f32)], bytes: &[u8], chosen: u32) -> Vec<(u32, f32)> {
    let mut found: Vec<(u32, f32)> = Vec::with_capacity(known.len());
    for &(piece, logprob) in known.iter().filter(|entry| entry.1.is_finite()) {
        let id = if piece == bytes { Some(chosen) } else { pieces.find(piece) };
        match id.map(|id| (id, found.iter_mut().find(|entry| entry.0 == id))) {
            Some((_, Some(same))) => {
                same.1 = (f64::from(same.1).exp() + f64::from(logprob).exp()).ln().min(0.0) as f32;
            }
            Some((id, None)) => found.push((id, logprob.min(0.0))),
            None => {}
        }
    }
    found
}

#[cfg(test)]
mod tests;
