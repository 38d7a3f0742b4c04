//! Quantized activations in the order in which tile kernels read them.
//!
//! Blocks of 32 as everywhere (see [`super::super::activations`]), but four tokens side by side: of each
//! eight columns the eight integers of the first token, then those of the second, and so on. A last group
//! with fewer tokens is filled with zeros; one token alone has its columns one after another.

use super::super::activations::{ActivationsMut, BLOCK};
use super::super::float::quantize_block;
use super::super::simd::Simd;

/// Tokens side by side.
pub(crate) const SIDE: usize = 4;

/// Tokens that a batch is filled up to.
pub(crate) const fn padded_tokens(tokens: usize) -> usize {
    match tokens.checked_next_multiple_of(SIDE) {
        Some(padded) if tokens > 1 => padded,
        _ => tokens,
    }
}

/// Quantized activations of a batch.
#[derive(Clone, Copy)]
pub(crate) struct TileActs<'a> {
    /// Number of tokens.
    pub tokens: usize,
    /// Blocks of a token.
    pub blocks: usize,
    /// Integers within ±127.
    pub quants: &'a [i8],
    /// A scale for each block of each token, tokens side by side.
    pub scales: &'a [f32],
    /// The sum of a block's integers, likewise; see [`integer`].
    pub sums: &'a [f32],
    /// The sum of a block's first 16 integers, likewise.
    pub halves: &'a [f32],
}

/// Sums share a buffer with scales: it holds their bits.
#[inline(always)]
pub(crate) fn integer(bits: f32) -> i32 {
    bits.to_bits() as i32
}

/// What [`integer`] reads.
#[inline(always)]
fn bits(integer: i32) -> f32 {
    f32::from_bits(integer as u32)
}

/// Some blocks of four tokens.
#[derive(Clone, Copy)]
pub(crate) struct Quad<'a> {
    /// Four times eight columns, four times a block.
    pub quants: &'a [[[i8; 32]; 4]],
    /// Scales of each block.
    pub scales: &'a [[f32; SIDE]],
    /// Sums of each block's integers, see [`integer`].
    pub sums: &'a [[f32; SIDE]],
    /// Sums of each block's first 16 integers.
    pub halves: &'a [[f32; SIDE]],
}

impl<'a> TileActs<'a> {
    /// Blocks `first..first + count` of the tokens from `4 * index` on.
    #[inline(always)]
    pub fn quad(&self, index: usize, first: usize, count: usize) -> Quad<'a> {
        let start = index * self.blocks + first;
        let range = start..start + count;
        let quants = self.quants.as_chunks::<32>().0.as_chunks::<4>().0;
        Quad {
            quants: &quants[range.clone()],
            scales: &self.scales.as_chunks().0[range.clone()],
            sums: &self.sums.as_chunks().0[range.clone()],
            halves: &self.halves.as_chunks().0[range],
        }
    }
}

/// Fills the twin that [`TileActs`] reads. A block with a value that is not finite gets the scale NaN.
#[inline(always)]
pub(crate) fn quantize<S: Simd>(s: S, acts: &mut ActivationsMut) {
    let (tokens, cols) = (acts.tokens(), acts.cols());
    let (blocks, padded) = (cols / BLOCK, padded_tokens(tokens));
    if tokens == 0 || acts.scales.is_empty() {
        return;
    }
    let side = if tokens == 1 { 1 } else { SIDE };
    let (sums, halves) = acts.sums.split_at_mut(acts.scales.len());
    for token in 0..padded {
        let group = token / side * side * blocks;
        let lane = token % side;
        let values = if token < tokens { &acts.values[token * cols..][..cols] } else { &[] };
        let values = values.as_chunks::<BLOCK>().0;
        for block in 0..blocks {
            let (scale, quants) = match values.get(block) {
                Some(values) => quantize_block(s, values),
                None => (0.0, [[0; 16]; 2]),
            };
            let at = group + block * side + lane;
            let (first, second) = (s.sum_i8(&quants[0]), s.sum_i8(&quants[1]));
            acts.scales[at] = scale;
            sums[at] = bits(first + second);
            halves[at] = bits(first);
            let to = &mut acts.quants[(group + block * side) * BLOCK..][..side * BLOCK];
            let to = to.as_chunks_mut::<8>().0;
            for (octet, from) in quants.as_flattened().as_chunks::<8>().0.iter().enumerate() {
                to[octet * side + lane] = *from;
            }
        }
    }
}
