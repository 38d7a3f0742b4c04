//! [`LayerSet`]: some of a model's layers.

use crate::DecoderSpec;
use core::fmt;

/// Bits of one word.
const WORD: usize = 64;

/// Some of a model's layers, by number.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerSet {
    words: [u64; DecoderSpec::MAX_LAYERS / WORD],
}

impl LayerSet {
    /// No layer.
    pub const EMPTY: Self = Self { words: [0; DecoderSpec::MAX_LAYERS / WORD] };

    /// Those of the first `layers` layers that `member` picks; numbers that no model has are left out.
    pub fn new(layers: usize, member: impl Fn(usize) -> bool) -> Self {
        let mut set = Self::EMPTY;
        for layer in (0..layers.min(DecoderSpec::MAX_LAYERS)).filter(|layer| member(*layer)) {
            set.words[layer / WORD] |= 1 << (layer % WORD);
        }
        set
    }

    /// All of `layers` layers but each `period`-th, which is what files mean by a pattern of `period`; a
    /// period of 0 is all of them.
    pub fn periodic(layers: usize, period: usize) -> Self {
        Self::new(layers, |layer| period == 0 || layer % period < period - 1)
    }

    /// Whether `layer` is one of them.
    pub fn contains(&self, layer: usize) -> bool {
        self.words.get(layer / WORD).is_some_and(|word| word >> (layer % WORD) & 1 == 1)
    }

    /// There is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// The smallest period with which [`LayerSet::periodic`] makes this set of `layers` layers.
    pub fn period(&self, layers: usize) -> Option<usize> {
        (0..=layers).find(|period| *self == Self::periodic(layers, *period))
    }

    /// The set after only the layers `keep` are left, renumbered from 0.
    pub fn select(&self, keep: &[usize]) -> Self {
        Self::new(keep.len(), |layer| keep.get(layer).is_some_and(|old| self.contains(*old)))
    }
}

impl fmt::Debug for LayerSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries((0..DecoderSpec::MAX_LAYERS).filter(|layer| self.contains(*layer))).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_files() {
        let gemma3 = LayerSet::periodic(14, 6);
        let global = |set: &LayerSet, layer| !set.contains(layer);
        assert!((0..14).all(|layer| global(&gemma3, layer) == (layer % 6 == 5)));
        assert!((0..9).all(|layer| global(&LayerSet::periodic(9, 2), layer) == (layer % 2 == 1)));
        assert!(LayerSet::periodic(512, 1).is_empty());
        assert!((0..512).all(|layer| LayerSet::periodic(512, 0).contains(layer)));
        assert!(!gemma3.contains(14) && !gemma3.contains(usize::MAX));
        for period in 0..=7 {
            assert_eq!(LayerSet::periodic(20, period).period(20), Some(period));
        }
        assert_eq!(LayerSet::new(5, |layer| layer == 3).period(5), None);
    }

    #[test]
    fn a_selection_is_renumbered() {
        let set = LayerSet::periodic(12, 6).select(&[1, 5, 6, 11]);
        assert_eq!(set, LayerSet::new(4, |layer| layer == 0 || layer == 2));
        assert!(set.select(&[]).is_empty());
    }
}
