//! Quantized activations in the order in which tile kernels read them.
//!
//! Blocks of 32 as everywhere (see [`super::super::activations`]), but four tokens side by side: of each
//! eight columns the eight integers of the first token, then those of the second, and so on. A last group
//! with fewer tokens is filled with zeros; one token alone has its columns one after another.
//!
//! Where an instruction set gains by it, large batches are quantized wide: [`RUN`] blocks of a token share the largest
//! of their scales.

use super::super::activations::{ActivationsMut, BLOCK};
use super::super::float::scale_of;
use super::super::simd::Simd;
use core::ops::Range;

/// Tokens side by side.
pub(crate) const SIDE: usize = 4;

/// Blocks of a run, which share a scale in wide activations; the last run of a row may be shorter.
pub(crate) const RUN: usize = 3;

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

/// Some blocks of several times four tokens, wide, whose sums nobody asks for.
#[derive(Clone, Copy)]
pub(crate) struct Quads<'a> {
    /// All blocks of these tokens.
    quants: &'a [[[i8; 32]; 4]],
    scales: &'a [[f32; SIDE]],
    /// Blocks of a token.
    blocks: usize,
    first: usize,
    count: usize,
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

    /// Blocks `first..first + count` of the fours of tokens `index`, without sums.
    #[inline(always)]
    pub fn quads(&self, index: Range<usize>, first: usize, count: usize) -> Quads<'a> {
        let range = index.start * self.blocks..index.end * self.blocks;
        Quads {
            quants: &self.quants.as_chunks::<32>().0.as_chunks().0[range.clone()],
            scales: &self.scales.as_chunks().0[range],
            blocks: self.blocks,
            first,
            count,
        }
    }
}

impl<'a> Quads<'a> {
    /// One four after the other.
    #[cfg_attr(not(target_arch = "aarch64"), expect(dead_code, reason = "for FEAT_I8MM"))]
    #[inline(always)]
    pub fn iter(&self) -> impl Iterator<Item = Quad<'a>> {
        let (range, blocks) = (self.first..self.first + self.count, self.blocks.max(1));
        let scales = self.scales.chunks_exact(blocks);
        self.quants.chunks_exact(blocks).zip(scales).map(move |(quants, scales)| Quad {
            quants: &quants[range.clone()],
            scales: &scales[range.clone()],
            sums: &[],
            halves: &[],
        })
    }
}

/// Fills the twin that [`TileActs`] reads; each `run` blocks of a row, at least one, share a scale, which all of them
/// have. A run with a value that is not finite gets the scale NaN. Sums are left out where runs are longer than a block:
/// no type with one scale a block needs them once its bias is off a panel.
#[inline(always)]
pub(crate) fn quantize<S: Simd>(s: S, acts: &mut ActivationsMut, run: usize) {
    let (tokens, cols) = (acts.tokens(), acts.cols());
    if acts.scales.is_empty() {
        return;
    }
    let (blocks, side) = (cols / BLOCK, if tokens == 1 { 1 } else { SIDE });
    let (sums, halves) = acts.sums.split_at_mut(acts.scales.len());
    let octets = acts.quants.as_chunks_mut::<8>().0;
    // Behind the last token come zeros.
    let whole = tokens / side * side * blocks;
    acts.scales[whole..].fill(0.0);
    sums[whole..].fill(0.0);
    halves[whole..].fill(0.0);
    octets[whole * (BLOCK / 8)..].fill([0; 8]);
    for token in 0..tokens {
        let values = acts.values[token * cols..][..cols].as_chunks::<BLOCK>().0;
        // Where the token's next block and its next eight integers are.
        let (first, lane) = (token / side * side * blocks, token % side);
        let (mut number, mut octet) = (first + lane, first * (BLOCK / 8) + lane);
        for values in values.chunks(run) {
            // What is not finite has the highest bits.
            let (scale, inverse) = scale_of(s.peak(values));
            let octets = &mut octets[octet..][..(values.len() * (BLOCK / 8) - 1) * side + 1];
            if inverse == 0.0 {
                octets.iter_mut().step_by(side).for_each(|to| *to = [0; 8]);
            } else {
                s.round_blocks(values, inverse, side, octets);
            }
            for index in 0..values.len() {
                acts.scales[number] = scale;
                if run == 1 {
                    let from = &octets[index * (BLOCK / 8) * side..];
                    let half = |i: usize| {
                        let mut both = [0; 16];
                        both[..8].copy_from_slice(&from[i * side]);
                        both[8..].copy_from_slice(&from[(i + 1) * side]);
                        s.sum_i8(&both)
                    };
                    let (first, second) = (half(0), half(2));
                    (sums[number], halves[number]) = (bits(first + second), bits(first));
                }
                number += side;
            }
            octet += values.len() * (BLOCK / 8) * side;
        }
    }
}
