//! The wide half of a low-rank update (Hu et al. 2021, arXiv 2106.09685): `y += B u` for a short `u`.
//!
//! An ordinary matrix kernel spends more on ending a row than on its few products, so `B` is kept in tiles
//! of 8 rows whose 8 results form together: as `f32` beside a float matrix, as 8-bit integers with a scale
//! for each row and 32 columns beside a quantized one. Sums of integers are exact, and all others are made
//! in the same order by every instruction set.

use super::activations::BLOCK;
use super::integers::quantize;
use super::simd::Simd;
use crate::{Code, Error, Result};

/// Largest rank.
pub const MAX_RANK: usize = 256;
/// Rows in a tile.
const TILE: usize = 8;
/// Columns that are stored together.
const HALF: usize = BLOCK / 2;

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
    /// Bytes of one tile.
    const fn tile_bytes(precision: Precision, rank: usize) -> usize {
        match precision {
            Precision::Exact => rank * TILE * size_of::<f32>(),
            Precision::Integers => {
                rank.div_ceil(BLOCK) * TILE * size_of::<f32>() + rank.div_ceil(HALF) * TILE * HALF
            }
        }
    }

    /// Bytes of all tiles; `None` beyond the address space. `rank` must not exceed [`MAX_RANK`].
    pub fn bytes(precision: Precision, rows: usize, rank: usize) -> Option<usize> {
        rows.div_ceil(TILE).checked_mul(Self::tile_bytes(precision, rank))
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
        let tile_bytes = Self::tile_bytes(precision, rank);
        let mut values = [0.0; MAX_RANK];
        for index in 0..rows {
            row(index, &mut values[..rank])?;
            let tile = &mut out[index / TILE * tile_bytes..][..tile_bytes];
            let lane = index % TILE;
            match precision {
                Precision::Exact => {
                    for (value, eight) in values[..rank].iter().zip(tile.chunks_exact_mut(TILE * 4)) {
                        eight[lane * 4..][..4].copy_from_slice(&value.to_le_bytes());
                    }
                }
                Precision::Integers => {
                    for (values, block) in values[..rank].chunks(BLOCK).zip(blocks_mut(tile)) {
                        let (scale, quants) = quantize(values);
                        block[lane * 4..][..4].copy_from_slice(&scale.to_le_bytes());
                        let halves = block[TILE * 4..].chunks_exact_mut(TILE * HALF);
                        for (half, quants) in halves.zip(quants.as_chunks::<HALF>().0) {
                            half[lane * HALF..][..HALF].copy_from_slice(&quants.map(|q| q as u8));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Bytes of a whole block of a tile: 8 scales, 8 first halves of rows, 8 second halves. The last block may
/// lack the second halves.
const BLOCK_BYTES: usize = TILE * 4 + TILE * BLOCK;

fn blocks_mut(tile: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    tile.chunks_mut(BLOCK_BYTES)
}

/// `y += B u`; as many rows as `y` has, and the tiles hold.
#[inline(always)]
pub(crate) fn add_low_rank<S: Simd>(s: S, b: &LowRank, u: &[f32], y: &mut [f32]) {
    let u = &u[..b.rank.min(u.len())];
    match b.precision {
        Precision::Exact => for_tiles(s, b, y, |tile| {
            let mut sum = s.splat(0.0);
            for (u, weights) in u.iter().zip(tile.as_chunks::<32>().0) {
                sum = s.add(sum, s.mul(s.splat(*u), s.f32_bytes(weights)));
            }
            sum
        }),
        Precision::Integers => {
            let mut blocks = [(0.0, [0i8; 64]); MAX_RANK / BLOCK];
            for (block, u) in blocks.iter_mut().zip(u.chunks(BLOCK)) {
                let (scale, quants) = quantize(u);
                block.0 = scale;
                // Both rows of a pair meet the same integers.
                for (i, quant) in quants.into_iter().enumerate() {
                    let at = i / HALF * 32 + i % HALF;
                    block.1[at] = quant;
                    block.1[at + HALF] = quant;
                }
            }
            for_tiles(s, b, y, |tile| {
                let mut sum = s.splat(0.0);
                for (block, (scale, a)) in tile.chunks(BLOCK_BYTES).zip(&blocks) {
                    let Some((scales, rows)) = block.split_first_chunk::<32>() else { break };
                    let (first, second) = rows.split_at(TILE * HALF);
                    let mut products = [s.no_products(); 4];
                    for (i, product) in products.iter_mut().enumerate() {
                        *product = s.dot_signed([pair(s, first, i), pair(s, second, i)], a);
                    }
                    let scales = s.mul(s.f32_bytes(scales), s.splat(*scale));
                    sum = s.add(sum, s.mul(s.totals(products), scales));
                }
                sum
            });
        }
    }
}

/// Halves of the rows `2 i` and `2 i + 1`; zeros where there are none.
#[inline(always)]
fn pair<S: Simd>(s: S, halves: &[u8], i: usize) -> S::B {
    match halves.as_chunks::<HALF>().0.get(2 * i..2 * i + 2) {
        Some([even, odd]) => s.pair(even, odd),
        _ => s.both(&[0; 16]),
    }
}

/// `y += sums(tile)`, 8 rows at a time.
#[inline(always)]
fn for_tiles<S: Simd>(s: S, b: &LowRank, y: &mut [f32], sums: impl Fn(&[u8]) -> S::F) {
    let tiles = b.data.chunks_exact(LowRank::tile_bytes(b.precision, b.rank));
    for (tile, y) in tiles.zip(y.chunks_mut(TILE)) {
        let sum = sums(tile);
        if let Some(y) = y.as_chunks_mut::<TILE>().0.first_mut() {
            s.store(s.add(s.load(y), sum), y);
            continue;
        }
        let mut lanes = [0.0; TILE];
        s.store(sum, &mut lanes);
        for (y, lane) in y.iter_mut().zip(lanes) {
            *y += lane;
        }
    }
}
