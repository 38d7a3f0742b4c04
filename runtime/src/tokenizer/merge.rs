//! Byte-pair merging of one word: the adjacent pair of lowest rank is merged, the leftmost of equals
//! first, until no pair has a rank (Sennrich et al. 2016, arXiv 1508.07909).
//!
//! Short words scan for the lowest rank; long ones keep the pairs in a heap, so that a word of n bytes
//! costs O(n log n) look-ups whatever its bytes are. No recursion.

use super::vocab::{NONE, Vocab};

/// Words up to this many bytes are merged on the stack, by scanning.
pub(super) const SHORT: usize = 32;

/// Words of scratch for each byte of a longer one: four of [`Symbols`], and a heap of at most two
/// entries of two words (each merge takes one entry out and puts at most two in).
pub(super) const SCRATCH_PER_BYTE: usize = 8;

/// Hands the tokens of `word` to `push`, [`NONE`] for a byte that has none.
///
/// `scratch` holds [`SCRATCH_PER_BYTE`] words for each byte if the word is longer than [`SHORT`].
pub(super) fn merge(vocab: &Vocab<'_>, word: &[u8], scratch: &mut [u32], push: impl FnMut(u32)) {
    if word.len() <= SHORT { merge_short(vocab, word, push) } else { merge_long(vocab, word, scratch, push) }
}

fn merge_short(vocab: &Vocab<'_>, word: &[u8], push: impl FnMut(u32)) {
    let mut tokens = [NONE; SHORT];
    let mut pairs = [(NONE, NONE); SHORT];
    let mut len = word.len().min(SHORT);
    for (token, &byte) in tokens.iter_mut().zip(word) {
        *token = vocab.byte(byte);
    }
    for i in 1..len {
        pairs[i - 1] = vocab.merge(tokens[i - 1], tokens[i]);
    }
    while len > 1 {
        let (mut best, mut lowest) = (0, NONE);
        for (i, &(rank, _)) in pairs[..len - 1].iter().enumerate() {
            if rank < lowest {
                (best, lowest) = (i, rank);
            }
        }
        if lowest == NONE {
            break;
        }
        tokens[best] = pairs[best].1;
        tokens.copy_within(best + 2..len, best + 1);
        pairs.copy_within(best + 1..len - 1, best);
        len -= 1;
        if best + 1 < len {
            pairs[best] = vocab.merge(tokens[best], tokens[best + 1]);
        }
        if best > 0 {
            pairs[best - 1] = vocab.merge(tokens[best - 1], tokens[best]);
        }
    }
    tokens[..len].iter().copied().for_each(push);
}

/// The symbols of a word as a linked list over its byte positions.
struct Symbols<'s> {
    token: &'s mut [u32],
    previous: &'s mut [u32],
    next: &'s mut [u32],
    /// Rank of the pair that the symbol makes with the next one; `NONE` where there is none, or where
    /// the symbol was merged into the one before. An entry of the heap with another rank is outdated:
    /// tokens only grow, so the same rank never comes back at the same place.
    rank: &'s mut [u32],
}

fn merge_long(vocab: &Vocab<'_>, word: &[u8], scratch: &mut [u32], mut push: impl FnMut(u32)) {
    let len = word.len();
    let (token, rest) = scratch.split_at_mut(len);
    let (previous, rest) = rest.split_at_mut(len);
    let (next, rest) = rest.split_at_mut(len);
    let (rank, heap) = rest.split_at_mut(len);
    let mut symbols = Symbols { token, previous, next, rank };
    let mut heap = Heap { entries: heap, len: 0 };
    for (i, &byte) in word.iter().enumerate() {
        symbols.token[i] = vocab.byte(byte);
        symbols.previous[i] = (i as u32).wrapping_sub(1);
        symbols.next[i] = if i + 1 < len { i as u32 + 1 } else { NONE };
    }
    for i in 0..len {
        symbols.pair(vocab, i, &mut heap);
    }
    while let Some((rank, place)) = heap.pop() {
        let place = place as usize;
        if symbols.rank[place] == rank {
            symbols.merge_with_next(vocab, place, &mut heap);
        }
    }
    let mut place = 0;
    while place != NONE {
        push(symbols.token[place as usize]);
        place = symbols.next[place as usize];
    }
}

impl Symbols<'_> {
    /// Looks up the pair that the symbol at `place` makes with the next one.
    fn pair(&mut self, vocab: &Vocab<'_>, place: usize, heap: &mut Heap<'_>) {
        let next = self.next[place];
        let rank = match next {
            NONE => NONE,
            next => vocab.merge(self.token[place], self.token[next as usize]).0,
        };
        self.rank[place] = rank;
        if rank != NONE {
            heap.push((rank, place as u32));
        }
    }

    fn merge_with_next(&mut self, vocab: &Vocab<'_>, place: usize, heap: &mut Heap<'_>) {
        let gone = self.next[place] as usize;
        self.token[place] = vocab.merge(self.token[place], self.token[gone]).1;
        self.rank[gone] = NONE;
        self.next[place] = self.next[gone];
        if self.next[gone] != NONE {
            self.previous[self.next[gone] as usize] = place as u32;
        }
        self.pair(vocab, place, heap);
        if self.previous[place] != NONE {
            self.pair(vocab, self.previous[place] as usize, heap);
        }
    }
}

/// A binary min-heap of (rank, place) in borrowed words.
struct Heap<'s> {
    entries: &'s mut [u32],
    len: usize,
}

impl Heap<'_> {
    fn get(&self, i: usize) -> (u32, u32) {
        (self.entries[2 * i], self.entries[2 * i + 1])
    }

    fn set(&mut self, i: usize, entry: (u32, u32)) {
        (self.entries[2 * i], self.entries[2 * i + 1]) = entry;
    }

    fn push(&mut self, entry: (u32, u32)) {
        let mut i = self.len;
        self.len += 1;
        while i > 0 && entry < self.get((i - 1) / 2) {
            self.set(i, self.get((i - 1) / 2));
            i = (i - 1) / 2;
        }
        self.set(i, entry);
    }

    fn pop(&mut self) -> Option<(u32, u32)> {
        self.len = self.len.checked_sub(1)?;
        let top = self.get(0);
        let last = self.get(self.len);
        let mut i = 0;
        loop {
            let mut child = 2 * i + 1;
            if child >= self.len {
                break;
            }
            if child + 1 < self.len && self.get(child + 1) < self.get(child) {
                child += 1;
            }
            if last <= self.get(child) {
                break;
            }
            self.set(i, self.get(child));
            i = child;
        }
        if self.len > 0 {
            self.set(i, last);
        }
        Some(top)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::tokenizer::tests::vocabulary;
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    #[test]
    fn both_ways_agree() {
        let tokenizer = vocabulary("gpt-2", None);
        let letters = prop_oneof![
            any::<u8>(),
            prop::sample::select(b"aehinorst ".to_vec()),
            prop::sample::select(b"a=- ".to_vec())
        ];
        proptest!(ProptestConfig::with_cases(2000), |(word in prop::collection::vec(letters, 1..=SHORT))| {
            let (mut short, mut long) = (Vec::new(), Vec::new());
            merge_short(&tokenizer.vocab, &word, |token| short.push(token));
            let mut scratch = vec![0x77; SCRATCH_PER_BYTE * word.len()];
            merge_long(&tokenizer.vocab, &word, &mut scratch, |token| long.push(token));
            prop_assert_eq!(short, long);
        });
    }

    #[test]
    fn the_heap_sorts() {
        proptest!(|(entries in prop::collection::vec((0..50u32, 0..50u32), 0..99))| {
            let mut words = vec![0; 2 * entries.len()];
            let mut heap = Heap { entries: &mut words, len: 0 };
            entries.iter().for_each(|&entry| heap.push(entry));
            let popped: Vec<_> = core::iter::from_fn(|| heap.pop()).collect();
            let mut sorted = entries;
            sorted.sort_unstable();
            prop_assert_eq!(popped, sorted);
        });
    }
}
