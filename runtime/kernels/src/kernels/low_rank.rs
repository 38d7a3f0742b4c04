//! The wide half of a low-rank update (Hu et al. 2021, arXiv 2106.09685): `y += B u` for a short `u`.
//!
//! An ordinary matrix kernel spends more on ending a row than on its few products, so `B` is kept in tiles:
//! as `f32` beside a float matrix, 8 rows whose results form together; beside a quantized one as 8-bit integers
//! with a scale for each row and 32 columns, 16 rows side by side as in [`super::tiles`]. Sums of integers are
//! exact, and all others are made in the same order by every instruction set.

use super::activations::BLOCK;
use super::integers::quantize;
use super::simd::Simd;
use super::tiles::Lanes;
use crate::format::TILE_ROWS;
use crate::{Code, Error, Result};

/// Largest rank.
pub const MAX_RANK: usize = 256;
/// Rows in a tile of floats.
const FLOAT_ROWS: usize = 8;
/// Columns of integers that are stored together: four times four.
const HALF: usize = BLOCK / 2;
/// Bytes of these.
const HALF_BYTES: usize = HALF * TILE_ROWS;
/// Bytes of the scales of a block.
const SCALES: usize = TILE_ROWS * size_of::<f32>();

/// How the numbers of an update are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// `f32`.
    Exact,
    /// 8-bit integers.
    Integers,
}

/// `B`, `[rows, rank]`, in tiles.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    precision: Precision,
    rank: usize,
    data: &'a [u8],
}

impl<'a> LowRank<'a> {
    /// Rows and bytes of one tile.
    const fn tile(precision: Precision, rank: usize) -> (usize, usize) {
        match precision {
            Precision::Exact => (FLOAT_ROWS, rank * FLOAT_ROWS * size_of::<f32>()),
            // The last block may lack its second half.
            Precision::Integers => {
                (TILE_ROWS, rank.div_ceil(BLOCK) * SCALES + rank.div_ceil(HALF) * HALF_BYTES)
            }
        }
    }

    /// Bytes of all tiles; `None` beyond the address space. `rank` must not exceed [`MAX_RANK`].
    pub fn bytes(precision: Precision, rows: usize, rank: usize) -> Option<usize> {
        let (tile_rows, bytes) = Self::tile(precision, rank);
        rows.div_ceil(tile_rows).checked_mul(bytes)
    }

    /// How the numbers are kept.
    pub(crate) fn precision(&self) -> Precision {
        self.precision
    }

    /// The tiles that [`LowRank::pack`] made.
    ///
    /// # Errors
    /// [`Code::WrongShape`] if `data` has not exactly the bytes of all tiles.
    pub fn new(precision: Precision, rows: usize, rank: usize, data: &'a [u8]) -> Result<Self> {
        match Self::bytes(precision, rows, rank) {
            Some(bytes) if bytes == data.len() && (1..=MAX_RANK).contains(&rank) => {
                Ok(Self { precision, rank, data })
            }
            bytes => Err(Error::new(Code::WrongShape, "low-rank update")
                .found(data.len() as u64, bytes.unwrap_or(usize::MAX) as u64)),
        }
    }

    /// Lays `rows` rows out in `out`; `row` writes one of them, `[rank]`.
    ///
    /// # Errors
    /// What `row` answers, and as [`LowRank::new`].
    pub fn pack(
        precision: Precision,
        [rows, rank]: [usize; 2],
        row: &mut dyn FnMut(usize, &mut [f32]) -> Result<()>,
        out: &mut [u8],
    ) -> Result<()> {
        LowRank::new(precision, rows, rank, out)?;
        out.fill(0);
        let (tile_rows, tile_bytes) = Self::tile(precision, rank);
        let mut values = [0.0; MAX_RANK];
        for index in 0..rows {
            row(index, &mut values[..rank])?;
            let tile = &mut out[index / tile_rows * tile_bytes..][..tile_bytes];
            let lane = index % tile_rows * 4;
            match precision {
                Precision::Exact => {
                    for (value, eight) in values[..rank].iter().zip(tile.chunks_exact_mut(FLOAT_ROWS * 4)) {
                        eight[lane..][..4].copy_from_slice(&value.to_le_bytes());
                    }
                }
                Precision::Integers => {
                    let blocks = tile.chunks_mut(SCALES + 2 * HALF_BYTES);
                    for (values, block) in values[..rank].chunks(BLOCK).zip(blocks) {
                        let (scale, quants) = quantize(values);
                        let (scales, vectors) = block.split_at_mut(SCALES);
                        scales[lane..][..4].copy_from_slice(&scale.to_le_bytes());
                        for (vector, quants) in vectors.chunks_exact_mut(64).zip(quants.as_chunks::<4>().0) {
                            vector[lane..][..4].copy_from_slice(&quants.map(|q| q as u8));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// `y += B u` of floats; as many rows as `y` has, and the tiles hold.
#[inline(always)]
pub(crate) fn add_floats<S: Simd>(s: S, b: &LowRank, u: &[f32], y: &mut [f32]) {
    let u = &u[..b.rank.min(u.len())];
    let tiles = b.data.chunks_exact(LowRank::tile(Precision::Exact, b.rank).1);
    for (tile, y) in tiles.zip(y.chunks_mut(FLOAT_ROWS)) {
        let mut sum = s.splat(0.0);
        for (u, weights) in u.iter().zip(tile.as_chunks::<32>().0) {
            sum = s.add(sum, s.mul(s.splat(*u), s.f32_bytes(weights)));
        }
        let mut lanes = [0.0; FLOAT_ROWS];
        lanes[..y.len()].copy_from_slice(y);
        s.store(s.add(s.load(&lanes), sum), &mut lanes);
        y.copy_from_slice(&lanes[..y.len()]);
    }
}

/// 32 columns of `u`: their scale, their sum and the integers.
type Block = (f32, i32, [i8; BLOCK]);

/// `y += B u` of integers; as many rows as `y` has, and the tiles hold.
#[inline(always)]
pub(crate) fn add_integers<S: Lanes>(s: S, b: &LowRank, u: &[f32], y: &mut [f32]) {
    let mut blocks: [Block; MAX_RANK / BLOCK] = [(0.0, 0, [0; BLOCK]); MAX_RANK / BLOCK];
    let count = b.rank.div_ceil(BLOCK);
    for ((scale, sum, quants), u) in blocks.iter_mut().zip(u[..b.rank.min(u.len())].chunks(BLOCK)) {
        (*scale, *quants) = quantize(u);
        *sum = quants.iter().map(|q| i32::from(*q)).sum();
    }
    let tiles = b.data.chunks_exact(LowRank::tile(Precision::Integers, b.rank).1);
    let mut last = [0.0; TILE_ROWS];
    for (tile, y) in tiles.zip(y.chunks_mut(TILE_ROWS)) {
        let whole = y.len() == TILE_ROWS;
        if !whole {
            last[..y.len()].copy_from_slice(y);
        }
        add_tile(s, tile, &blocks[..count], y.as_mut_array().unwrap_or(&mut last));
        if !whole {
            y.copy_from_slice(&last[..y.len()]);
        }
    }
}

/// Adds the products of a tile's rows.
#[inline(always)]
fn add_tile<S: Lanes>(s: S, tile: &[u8], blocks: &[Block], y: &mut [f32; TILE_ROWS]) {
    let mut out = s.load(y);
    for (block, (scale, sum, quants)) in tile.chunks(SCALES + 2 * HALF_BYTES).zip(blocks) {
        let Some((scales, vectors)) = block.split_first_chunk::<SCALES>() else { break };
        let start = -S::SIGNED_BIAS * sum;
        let mut p = s.start(start);
        for (four, a) in vectors.as_chunks::<64>().0.as_chunks::<4>().0.iter().zip(quants.as_chunks().0) {
            let a = s.activations(a);
            p = s.dot_wide::<0>(p, s.signed(s.bytes(&four[0])), a);
            p = s.dot_wide::<1>(p, s.signed(s.bytes(&four[1])), a);
            p = s.dot_wide::<2>(p, s.signed(s.bytes(&four[2])), a);
            p = s.dot_wide::<3>(p, s.signed(s.bytes(&four[3])), a);
        }
        let mut numbers = [0.0; TILE_ROWS];
        for (number, bytes) in numbers.iter_mut().zip(scales.as_chunks().0) {
            *number = f32::from_le_bytes(*bytes);
        }
        out = s.fma(s.finish_wide(p, start), s.mul(s.load(&numbers), s.splat(*scale)), out);
    }
    s.store(out, y);
}
