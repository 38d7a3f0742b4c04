//! Byte-pair merging of one word: of the adjacent pairs that may be merged the one of lowest key is, the
//! leftmost of equals first, until there is none (Sennrich et al. 2016, arXiv 1508.07909). What symbols are
//! and what orders pairs is the tokenizer model's affair, [`Pairs`].
//!
//! Short words scan for the lowest key; long ones keep the pairs in a heap, so that a word of n symbols
//! costs O(n log n) look-ups whatever they are. No recursion.

use super::vocab::NONE;
use crate::{Code, Error, Result};

/// Words of up to this many symbols are merged on the stack, by scanning.
pub(super) const SHORT: usize = 32;

/// Words of scratch for each symbol of a longer one: four of [`Symbols`], and a heap of at most two
/// entries of two words (each merge takes one entry out and puts at most two in).
pub(super) const SCRATCH_PER_SYMBOL: usize = 8;

/// What a tokenizer model knows of two neighbours.
pub(super) trait Pairs {
    /// The key of the pair, lower is earlier, and the symbol that it becomes; [`NONE`] twice where the two
    /// stay apart. Only what they are counts, never where they stand.
    fn pair(&self, left: u32, right: u32) -> (u32, u32);
}

/// Words of scratch that a word of that many symbols needs.
pub(super) const fn scratch_words(symbols: usize) -> usize {
    if symbols <= SHORT { 0 } else { symbols.saturating_mul(SCRATCH_PER_SYMBOL) }
}

/// Merges a word of `len` symbols and hands what they become to `push`.
pub(super) fn merge(
    pairs: &impl Pairs,
    symbols: impl Iterator<Item = u32>,
    len: usize,
    scratch: &mut [u32],
    push: impl FnMut(u32),
) -> Result<()> {
    if len <= SHORT {
        merge_short(pairs, symbols, push);
        return Ok(());
    }
    let needed = scratch_words(len);
    if scratch.len() < needed || len >= NONE as usize {
        return Err(Error::new(Code::BufferTooSmall, "tokenizer scratch")
            .found(scratch.len() as u64, needed as u64)
            .hint("words"));
    }
    merge_long(pairs, symbols, len, scratch, push);
    Ok(())
}

fn merge_short(pairs: &impl Pairs, word: impl Iterator<Item = u32>, push: impl FnMut(u32)) {
    let mut symbols = [NONE; SHORT];
    let mut found = [(NONE, NONE); SHORT];
    let mut len = 0;
    for (slot, symbol) in symbols.iter_mut().zip(word) {
        *slot = symbol;
        len += 1;
    }
    for i in 1..len {
        found[i - 1] = pairs.pair(symbols[i - 1], symbols[i]);
    }
    while len > 1 {
        let (mut best, mut lowest) = (0, NONE);
        for (i, &(key, _)) in found[..len - 1].iter().enumerate() {
            if key < lowest {
                (best, lowest) = (i, key);
            }
        }
        if lowest == NONE {
            break;
        }
        symbols[best] = found[best].1;
        symbols.copy_within(best + 2..len, best + 1);
        found.copy_within(best + 1..len - 1, best);
        len -= 1;
        if best + 1 < len {
            found[best] = pairs.pair(symbols[best], symbols[best + 1]);
        }
        if best > 0 {
            found[best - 1] = pairs.pair(symbols[best - 1], symbols[best]);
        }
    }
    symbols[..len].iter().copied().for_each(push);
}

/// The symbols of a word as a linked list over their first positions.
struct Symbols<'s> {
    symbol: &'s mut [u32],
    previous: &'s mut [u32],
    next: &'s mut [u32],
    /// Key of the pair that the symbol makes with the next one; `NONE` where there is none, or where the
    /// symbol was merged into the one before. An entry of the heap with another key is outdated; those of
    /// one place and key are interchangeable, whichever pair they were made for.
    key: &'s mut [u32],
}

fn merge_long(
    pairs: &impl Pairs,
    word: impl Iterator<Item = u32>,
    len: usize,
    scratch: &mut [u32],
    mut push: impl FnMut(u32),
) {
    let (symbol, rest) = scratch.split_at_mut(len);
    let (previous, rest) = rest.split_at_mut(len);
    let (next, rest) = rest.split_at_mut(len);
    let (key, heap) = rest.split_at_mut(len);
    let mut symbols = Symbols { symbol, previous, next, key };
    let mut heap = Heap { entries: heap, len: 0 };
    for (i, first) in (0..len).zip(word) {
        symbols.symbol[i] = first;
        symbols.previous[i] = (i as u32).wrapping_sub(1);
        symbols.next[i] = if i + 1 < len { i as u32 + 1 } else { NONE };
    }
    for i in 0..len {
        symbols.pair(pairs, i, &mut heap);
    }
    while let Some((key, place)) = heap.pop() {
        let place = place as usize;
        if symbols.key[place] == key {
            symbols.merge_with_next(pairs, place, &mut heap);
        }
    }
    let mut place = 0;
    while place != NONE {
        push(symbols.symbol[place as usize]);
        place = symbols.next[place as usize];
    }
}

impl Symbols<'_> {
    /// Looks up the pair that the symbol at `place` makes with the next one.
    fn pair(&mut self, pairs: &impl Pairs, place: usize, heap: &mut Heap<'_>) {
        let next = self.next[place];
        let key = match next {
            NONE => NONE,
            next => pairs.pair(self.symbol[place], self.symbol[next as usize]).0,
        };
        self.key[place] = key;
        if key != NONE {
            heap.push((key, place as u32));
        }
    }

    fn merge_with_next(&mut self, pairs: &impl Pairs, place: usize, heap: &mut Heap<'_>) {
        let gone = self.next[place] as usize;
        self.symbol[place] = pairs.pair(self.symbol[place], self.symbol[gone]).1;
        self.key[gone] = NONE;
        self.next[place] = self.next[gone];
        if self.next[gone] != NONE {
            self.previous[self.next[gone] as usize] = place as u32;
        }
        self.pair(pairs, place, heap);
        if self.previous[place] != NONE {
            self.pair(pairs, self.previous[place] as usize, heap);
        }
    }
}

/// A binary min-heap of (key, place) in borrowed words.
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
    use proptest::prelude::*;
    use std::{vec, vec::Vec};

    /// Merges by a rule that nothing real has: symbols are numbers, and many pairs share a key.
    struct Numbers;

    impl Pairs for Numbers {
        fn pair(&self, left: u32, right: u32) -> (u32, u32) {
            let sum = left + right;
            if sum.is_multiple_of(3) || sum > 40 { (NONE, NONE) } else { (sum * 7 % 5, sum) }
        }
    }

    #[test]
    fn both_ways_agree() {
        let words = prop::collection::vec(1..9u32, 1..=SHORT);
        proptest!(ProptestConfig::with_cases(4000), |(word in words)| {
            let (mut short, mut long) = (Vec::new(), Vec::new());
            merge_short(&Numbers, word.iter().copied(), |symbol| short.push(symbol));
            let mut scratch = vec![0x77; SCRATCH_PER_SYMBOL * word.len()];
            merge_long(&Numbers, word.iter().copied(), word.len(), &mut scratch, |symbol| long.push(symbol));
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
