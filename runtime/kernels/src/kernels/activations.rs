//! A batch of activation rows and their quantized twin, in buffers that the session hands in.
//!
//! There is one quantized form for all weight types: blocks of 32 values, each with a scale `max|x| / 127`
//! and the integers `q = round(x / scale)` within ±127. The sum of a block's integers is kept too, because
//! a weight `d * q + m` needs it. Only the order depends on how the weights lie.
//!
//! For weights in rows, activations are padded with zero blocks to a whole number of 8 blocks (the vector
//! width of all kernels), and blocks are stored in pairs, first halves before second halves:
//! `[even 0..16, odd 0..16, even 16..32, odd 16..32]`, the order in which nibbles come out of the weights. For
//! weights in tiles, see [`super::tiles`].

use super::tiles::{TileActs, padded_tokens};
use crate::format::Layout;
use crate::{Code, Error, Result};

/// Values in a block.
pub(crate) const BLOCK: usize = 32;
/// Blocks in a group, and lanes of a vector.
pub(crate) const GROUP: usize = 8;
/// Values in a group.
pub(crate) const GROUP_LEN: usize = BLOCK * GROUP;

/// Blocks of a row with their padding; 0 for a width that is not a multiple of 32, which is never quantized.
const fn padded_blocks(cols: usize) -> usize {
    if cols.is_multiple_of(BLOCK) { (cols / BLOCK).next_multiple_of(GROUP) } else { 0 }
}

/// Rows of activations to write; [`super::Kernels::quantize`] turns them into [`Activations`].
#[derive(Debug)]
pub struct ActivationsMut<'a> {
    tokens: usize,
    cols: usize,
    pub(super) values: &'a mut [f32],
    pub(super) quants: &'a mut [i8],
    pub(super) scales: &'a mut [f32],
    pub(super) sums: &'a mut [f32],
}

/// Rows of activations to multiply with, with or without their quantized twin.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    tokens: usize,
    cols: usize,
    values: &'a [f32],
    quants: &'a [i8],
    scales: &'a [f32],
    sums: &'a [f32],
    /// The weights that the quantized twin is ordered for; `None` without one.
    order: Option<Layout>,
    /// Whether blocks of a run share a scale, see [`super::tiles`].
    wide: bool,
}

/// The quantized twin of one row, in groups of 8 blocks.
#[derive(Clone, Copy)]
pub(crate) struct QuantizedRow<'a> {
    /// Integers within ±127.
    pub quants: &'a [[i8; GROUP_LEN]],
    /// One scale a block.
    pub scales: &'a [[f32; GROUP]],
    /// The sum of a block's integers.
    pub sums: &'a [[f32; GROUP]],
}

impl<'a> ActivationsMut<'a> {
    /// `f32` elements that one row of `cols` values needs.
    pub const fn floats_per_token(cols: usize) -> usize {
        cols.saturating_add(3 * padded_blocks(cols))
    }

    /// `i8` elements that one row of `cols` values needs.
    pub const fn quants_per_token(cols: usize) -> usize {
        padded_blocks(cols).saturating_mul(BLOCK)
    }

    /// Rows that a batch of `tokens` needs room for: quantized twins may have tokens side by side.
    pub const fn padded_tokens(tokens: usize) -> usize {
        padded_tokens(tokens)
    }

    /// `tokens` rows of `cols` values in the front of the two buffers. What the buffers hold stays: the values
    /// are the first `tokens * cols` floats, row after row.
    ///
    /// # Errors
    /// [`Code::BufferTooSmall`] if a buffer holds less than [`Self::padded_tokens`] times what one token
    /// needs.
    pub fn new(tokens: usize, cols: usize, floats: &'a mut [f32], quants: &'a mut [i8]) -> Result<Self> {
        let (blocks, rows) = (padded_blocks(cols), padded_tokens(tokens));
        let check = |what, held: usize, per_token: usize| match per_token.checked_mul(rows) {
            Some(needed) if needed <= held => Ok(()),
            needed => Err(Error::new(Code::BufferTooSmall, what)
                .found(held as u64, needed.unwrap_or(usize::MAX) as u64)),
        };
        check("activations", floats.len(), Self::floats_per_token(cols))?;
        check("quantized activations", quants.len(), Self::quants_per_token(cols))?;
        let (values, rest) = floats.split_at_mut(tokens * cols);
        let (scales, rest) = rest.split_at_mut(rows * blocks);
        let sums = &mut rest[..2 * rows * blocks];
        let quants = &mut quants[..rows * blocks * BLOCK];
        Ok(Self { tokens, cols, values, quants, scales, sums })
    }

    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, `[tokens, cols]`.
    pub fn values(&self) -> &[f32] {
        self.values
    }

    /// All values, `[tokens, cols]`, to write.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.values
    }

    /// One row to write; empty beyond the last.
    pub fn row_mut(&mut self, token: usize) -> &mut [f32] {
        if token < self.tokens { &mut self.values[token * self.cols..][..self.cols] } else { &mut [] }
    }

    /// The rows without a quantized twin: enough for float weights, refused by quantized ones.
    pub fn unquantized(&self) -> Activations<'_> {
        let (tokens, cols) = (self.tokens, self.cols);
        Activations {
            tokens,
            cols,
            values: self.values,
            quants: &[],
            scales: &[],
            sums: &[],
            order: None,
            wide: false,
        }
    }

    /// The rows and their twin, once a kernel has filled it for weights that lie as `layout` says.
    pub(super) fn quantized(&self, layout: Layout) -> Activations<'_> {
        // A width that is not a multiple of 32 has no twin.
        let order = (self.tokens == 0 || !self.quants.is_empty()).then_some(layout);
        Activations { quants: self.quants, scales: self.scales, sums: self.sums, order, ..self.unquantized() }
    }

    /// As [`Self::quantized`] for tiles, once blocks of a run share a scale.
    pub(super) fn quantized_wide(&self) -> Activations<'_> {
        Activations { wide: true, ..self.quantized(Layout::Tiles) }
    }
}

impl<'a> Activations<'a> {
    /// Number of rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, `[tokens, cols]`.
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// How quantized weights must lie that can be multiplied with these rows; `None` if none can.
    pub fn quantized_for(&self) -> Option<Layout> {
        self.order
    }

    /// Whether blocks of a run share a scale.
    pub(crate) fn wide(&self) -> bool {
        self.wide
    }

    /// The same numbers for kernels that know nothing of runs.
    #[cfg(test)]
    pub(crate) fn narrow(self) -> Self {
        Self { wide: false, ..self }
    }

    /// The values of one row.
    #[inline]
    pub(crate) fn row(&self, token: usize) -> &'a [f32] {
        &self.values[token * self.cols..][..self.cols]
    }

    /// The quantized twin of one row.
    #[inline]
    pub(crate) fn quantized_row(&self, token: usize) -> QuantizedRow<'a> {
        let groups = padded_blocks(self.cols) / GROUP;
        let range = token * groups..(token + 1) * groups;
        QuantizedRow {
            quants: &self.quants.as_chunks().0[range.clone()],
            scales: &self.scales.as_chunks().0[range.clone()],
            sums: &self.sums.as_chunks().0[range],
        }
    }

    /// The quantized twin for weights in tiles.
    pub(crate) fn tile_acts(&self) -> TileActs<'a> {
        let blocks = self.cols / BLOCK;
        let len = padded_tokens(self.tokens) * blocks;
        // `tiles::quantize` puts half sums behind as many sums as there are scales.
        let (sums, halves) = self.sums.split_at(self.scales.len());
        TileActs {
            tokens: self.tokens,
            blocks,
            quants: &self.quants[..len * BLOCK],
            scales: &self.scales[..len],
            sums: &sums[..len],
            halves: &halves[..len],
        }
    }
}
