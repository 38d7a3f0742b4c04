//! Quantized activations in the order in which tile kernels read them.
//!
//! Blocks of 32 as everywhere (see [`super::super::activations`]), but four tokens side by side: of each
//! eight columns the eight integers of the first token, then those of the second, and so on. A last group
//! with fewer tokens is filled with zeros; one token alone has its columns one after another.
//!
//! Where an instruction set gains by it, large batches are quantized wide: [`RUN`] blocks of a token share the largest
//! of their scales.

use super::super::activations::{ActivationsMut, BLOCK};
use super::super::float::{peak, quantize_block, scale_of};
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
    match acts.tokens() {
        _ if acts.scales.is_empty() => {}
        1 => quantize_in_fours::<S, 1>(s, acts, run),
        _ => quantize_in_fours::<S, SIDE>(s, acts, run),
    }
}

/// [`quantize`] of `N` tokens side by side.
#[inline(always)]
fn quantize_in_fours<S: Simd, const N: usize>(s: S, acts: &mut ActivationsMut, run: usize) {
    let (tokens, cols) = (acts.tokens(), acts.cols());
    let blocks = cols / BLOCK;
    let (sums, halves) = acts.sums.split_at_mut(acts.scales.len());
    let (sums, halves) = (sums.as_chunks_mut::<N>().0, halves.as_chunks_mut::<N>().0);
    let scales = acts.scales.as_chunks_mut::<N>().0;
    let quants = acts.quants.as_chunks_mut::<8>().0.as_chunks_mut::<N>().0.as_chunks_mut::<4>().0;
    // Behind the last token come zeros.
    let whole = tokens / N * blocks;
    scales[whole..].fill([0.0; N]);
    sums[whole..].fill([0.0; N]);
    halves[whole..].fill([0.0; N]);
    quants[whole..].as_flattened_mut().as_flattened_mut().fill([0; 8]);
    for token in 0..tokens {
        let (mut number, lane) = (token / N * blocks, token % N);
        let values = acts.values[token * cols..][..cols].as_chunks::<BLOCK>().0;
        let (quants, scales) = (&mut quants[number..][..blocks], &mut scales[number..][..blocks]);
        let runs = values.chunks(run).zip(quants.chunks_mut(run)).zip(scales.chunks_mut(run));
        for ((values, quants), scales) in runs {
            // What is not finite has the highest bits.
            let highest = values.iter().map(|values| peak(s, values).to_bits()).max();
            let (scale, inverse) = scale_of(f32::from_bits(highest.unwrap_or(0)));
            for ((values, quants), scales) in values.iter().zip(quants).zip(scales) {
                let found = quantize_block(s, values, inverse);
                for (to, found) in quants.iter_mut().zip(found.as_flattened().as_chunks().0) {
                    to[lane] = *found;
                }
                scales[lane] = scale;
                if run == 1 {
                    let (first, second) = (s.sum_i8(&found[0]), s.sum_i8(&found[1]));
                    (sums[number][lane], halves[number][lane]) = (bits(first + second), bits(first));
                    number += 1;
                }
            }
        }
    }
}
