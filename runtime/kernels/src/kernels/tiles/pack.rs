//! From rows to tiles, and one row back to numbers: what a host does ahead of time, and embedding look-ups.

use crate::format::{DType, Factors, Geometry, TILE_ROWS as ROWS, f16_to_f32, tiled_bytes};
use crate::kernels::activations::BLOCK;
use crate::kernels::generic::{fifth_bit, nibble, scale_min};
use crate::{Code, Error, Result};

/// The largest block of any type.
const LARGEST: usize = 256;

/// Lays a matrix of `rows` rows of `cols` elements of `dtype`, row after row as GGUF has it, out in tiles.
///
/// # Errors
/// [`Code::UnsupportedType`] for a type that stays rows; [`Code::WrongShape`] if `from` or `to` has not exactly
/// the bytes of all rows ([`tiled_bytes`]), or a row is not a whole number of blocks.
pub fn pack_tiles(dtype: DType, rows: usize, cols: usize, from: &[u8], to: &mut [u8]) -> Result<()> {
    let geometry = Geometry::of(dtype).ok_or_else(|| Error::new(Code::UnsupportedType, dtype.name()))?;
    let row_bytes = dtype.row_bytes(cols).filter(|bytes| *bytes > 0);
    let expected = row_bytes.and_then(|bytes| bytes.checked_mul(rows));
    let (Some(row_bytes), Some(tiled)) = (row_bytes, tiled_bytes(dtype, rows, cols)) else {
        return Err(Error::new(Code::WrongShape, dtype.name()).found(cols as u64, dtype.block_len() as u64));
    };
    for (held, expected) in [(from.len(), expected), (to.len(), Some(tiled))] {
        if Some(held) != expected {
            return Err(Error::new(Code::WrongShape, dtype.name())
                .found(held as u64, expected.unwrap_or(usize::MAX) as u64)
                .hint("bytes of a weight matrix"));
        }
    }
    to.fill(0);
    let Some(tile_bytes) = geometry.tile_bytes(cols) else {
        return Err(Error::new(Code::WrongShape, dtype.name()));
    };
    let (kind, vectors, blocks) = (geometry.factors, geometry.vectors * 64, dtype.block_len() / BLOCK);
    for (row, bytes) in from.chunks_exact(row_bytes).enumerate() {
        let tile = &mut to[row / ROWS * tile_bytes..][..tile_bytes];
        let lane = row % ROWS;
        for (index, block) in bytes.chunks_exact(dtype.block_bytes()).enumerate() {
            let parts = Parts::read(dtype, block);
            let first = index * blocks;
            let share = &mut tile[first / kind.blocks() * geometry.share_bytes()..][..geometry.share_bytes()];
            let (factors, quants) = share.split_at_mut(kind.bytes());
            parts.write_factors(kind, factors, first % kind.blocks(), lane);
            for (i, q) in parts.quants[..blocks * BLOCK].as_chunks::<BLOCK>().0.iter().enumerate() {
                let to = &mut quants[(first % kind.blocks() + i) * vectors..][..vectors];
                write_quants(geometry.vectors, to, lane, q);
            }
        }
    }
    Ok(())
}

/// A block taken apart.
struct Parts {
    /// `d`, and the minimum or `dmin`, as the bytes that they are stored in.
    halves: [[u8; 2]; 2],
    /// Scales and minimums of the 8 blocks of a super-block, or the two scales of each.
    bytes: [[u8; 2]; 8],
    /// `q`, unsigned or, for Q8_0, signed.
    quants: [u8; LARGEST],
}

/// Weight `i` of 256 in nibbles from byte `at`: of each 64, the low ones first.
fn super_nibble(block: &[u8], at: usize, i: usize) -> u8 {
    block[at + i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15
}

impl Parts {
    fn read(dtype: DType, b: &[u8]) -> Self {
        let at = |at: usize| [b[at], b[at + 1]];
        let mut parts = Self { halves: [[0; 2]; 2], bytes: [[0; 2]; 8], quants: [0; LARGEST] };
        let quant: &dyn Fn(usize) -> u8 = match dtype {
            // `pack_tiles` has no geometry for these.
            DType::F32 | DType::F16 | DType::BF16 => return parts,
            #[cfg(feature = "low-bit")]
            DType::Q2K | DType::Q3K | DType::IQ4NL => return parts,
            DType::Q8_0 => &|i| b[2 + i],
            DType::Q4_0 => &|i| nibble(&b[2..], i),
            DType::Q4_1 => &|i| nibble(&b[4..], i),
            DType::Q5_0 => &|i| nibble(&b[6..], i) | fifth_bit(&b[2..6], i),
            DType::Q5_1 => &|i| nibble(&b[8..], i) | fifth_bit(&b[4..8], i),
            DType::Q4K => &|i| super_nibble(b, 16, i),
            DType::Q5K => &|i| super_nibble(b, 48, i) | (b[16 + i % 32] >> (i / 32) & 1) << 4,
            DType::Q6K => &|i| {
                let (half, quarter, j) = (i / 128, i % 128 / 32, i % 32);
                let low = b[half * 64 + quarter % 2 * 32 + j] >> (quarter / 2 * 4) & 15;
                low | (b[128 + half * 32 + j] >> (2 * quarter) & 3) << 4
            },
        };
        for (i, q) in parts.quants[..dtype.block_len()].iter_mut().enumerate() {
            *q = quant(i);
        }
        match dtype {
            DType::Q6K => {
                parts.halves[0] = at(208);
                for (i, scales) in parts.bytes.iter_mut().enumerate() {
                    *scales = at(192 + 2 * i);
                }
            }
            DType::Q4K | DType::Q5K => {
                parts.halves = [at(0), at(2)];
                for (i, factors) in parts.bytes.iter_mut().enumerate() {
                    *factors = scale_min(&b[4..16], i).into();
                }
            }
            DType::Q4_1 | DType::Q5_1 => parts.halves = [at(0), at(2)],
            _ => parts.halves[0] = at(0),
        }
        parts
    }

    /// Writes the factors of one row, from block `block` of the share on, into those of sixteen.
    fn write_factors(&self, kind: Factors, to: &mut [u8], block: usize, lane: usize) {
        let halves = if matches!(kind, Factors::ScaleMin | Factors::Super) { 2 } else { 1 };
        for (i, half) in self.halves[..halves].iter().enumerate() {
            to[((block * halves + i) * ROWS + lane) * 2..][..2].copy_from_slice(half);
        }
        if matches!(kind, Factors::Super | Factors::SuperHalves) {
            for (i, byte) in self.bytes.as_flattened().iter().enumerate() {
                to[halves * 2 * ROWS + i * ROWS + lane] = *byte;
            }
        }
    }
}

/// Writes a block of one row into the vectors of sixteen.
fn write_quants(vectors: usize, to: &mut [u8], lane: usize, q: &[u8; BLOCK]) {
    for (column, q) in q.iter().enumerate() {
        let (group, byte) = (column / 4, lane * 4 + column % 4);
        if vectors == 8 {
            to[group * 64 + byte] = *q;
            continue;
        }
        to[group % 4 * 64 + byte] |= (q & 15) << (group / 4 * 4);
        match vectors {
            5 => to[4 * 64 + byte] |= (q >> 4) << group,
            6 => to[(4 + group / 4) * 64 + byte] |= (q >> 4) << (group % 4 * 2),
            _ => {}
        }
    }
}

/// Puts block `block` of row `row` into a matrix of type Q8_0 and `cols` columns in tiles. Nothing happens if it is not
/// in there.
pub fn put_q8_0(tiles: &mut [u8], cols: usize, row: usize, block: usize, bytes: &[u8; 34]) {
    let Some(geometry) = Geometry::of(DType::Q8_0) else { return };
    let (kind, vectors, lane) = (geometry.factors, geometry.vectors * 64, row % ROWS);
    let start = geometry
        .tile_bytes(cols)
        .map(|bytes| row / ROWS * bytes + block / kind.blocks() * geometry.share_bytes());
    let share = start.and_then(|start| tiles.get_mut(start..)?.get_mut(..geometry.share_bytes()));
    if let (Some(share), Some((scale, quants))) = (share, bytes.split_first_chunk::<2>()) {
        let (factors, room) = share.split_at_mut(kind.bytes());
        let block = block % kind.blocks();
        factors[(block * ROWS + lane) * 2..][..2].copy_from_slice(scale);
        let room = &mut room[block * vectors..][..vectors];
        for (vector, quants) in room.as_chunks_mut::<64>().0.iter_mut().zip(quants.as_chunks::<4>().0) {
            vector[lane * 4..][..4].copy_from_slice(quants);
        }
    }
}

/// The `out.len()` values of row `row` of the matrix in `tiles`, whose rows are as long.
///
/// # Errors
/// [`Code::UnsupportedType`] for a type that stays rows, [`Code::WrongShape`] if the row is not a whole number
/// of blocks or `tiles` does not hold it.
pub fn dequantize_tile_row(dtype: DType, tiles: &[u8], row: usize, out: &mut [f32]) -> Result<()> {
    let geometry = Geometry::of(dtype).ok_or_else(|| Error::new(Code::UnsupportedType, dtype.name()))?;
    let wrong = || Error::new(Code::WrongShape, dtype.name()).found(row as u64, tiles.len() as u64);
    let Some(bytes) = geometry.tile_bytes(out.len()) else { return Err(wrong()) };
    let tile = tiles.chunks_exact(bytes.max(1)).nth(row / ROWS).ok_or_else(wrong)?;
    let (lane, kind, vectors) = (row % ROWS, geometry.factors, geometry.vectors * 64);
    let bias = geometry.bias as f32;
    for (index, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let share = &tile[index / kind.blocks() * geometry.share_bytes()..][..geometry.share_bytes()];
        let (factors, quants) = share.split_at(kind.bytes());
        let block = index % kind.blocks();
        let quants = &quants[block * vectors..][..vectors];
        let half = |at: usize| {
            let at = (at * ROWS + lane) * 2;
            f16_to_f32(u16::from_le_bytes([factors[at], factors[at + 1]]))
        };
        let byte = |halves: usize, at: usize| factors[(2 * halves + block * 2 + at) * ROWS + lane];
        let [first, second, min] = match kind {
            Factors::Scale => [half(block), half(block), 0.0],
            Factors::ScaleMin => [half(2 * block), half(2 * block), half(2 * block + 1)],
            Factors::Super => {
                let scale = half(0) * f32::from(byte(2, 0));
                [scale, scale, -(half(1) * f32::from(byte(2, 1)))]
            }
            Factors::SuperHalves => {
                let scale = |at| half(0) * f32::from(byte(1, at) as i8);
                [scale(0), scale(1), 0.0]
            }
        };
        for (column, out) in out.iter_mut().enumerate() {
            let (group, byte) = (column / 4, lane * 4 + column % 4);
            let at = |vector: usize| quants[vector * 64 + byte];
            let q = match geometry.vectors {
                8 => f32::from(at(group) as i8),
                vectors => {
                    let low = at(group % 4) >> (group / 4 * 4) & 15;
                    let high = match vectors {
                        5 => at(4) >> group & 1,
                        6 => at(4 + group / 4) >> (group % 4 * 2) & 3,
                        _ => 0,
                    };
                    f32::from(low | high << 4)
                }
            };
            *out = if column < 16 { first } else { second } * (q - bias) + min;
        }
    }
    Ok(())
}
