//! How each quantized type comes out of its tiles.

use super::lanes::Lanes;
use crate::format::{DType, Factors, Geometry, TILE_ROWS as ROWS};

/// A share of a tile, of the size and shape that its type has (see [`Geometry`]).
#[repr(C)]
pub(crate) struct Share<const FACTORS: usize, const VECTORS: usize, const BLOCKS: usize> {
    factors: [u8; FACTORS],
    quants: [[[u8; 64]; VECTORS]; BLOCKS],
}

/// A share of any type.
///
/// # Safety
/// Implementors consist of bytes alone and may lie at any address.
pub(crate) unsafe trait AnyShare: Sized {
    /// Blocks in it.
    const BLOCKS: usize;
    /// Its factors.
    fn factors(&self) -> &[u8];
    /// The vectors of a block.
    fn quants(&self, block: usize) -> &[[u8; 64]];
}

// SAFETY: arrays of bytes one after another; `repr(C)` adds no padding between fields of alignment 1.
unsafe impl<const FACTORS: usize, const VECTORS: usize, const BLOCKS: usize> AnyShare
    for Share<FACTORS, VECTORS, BLOCKS>
{
    const BLOCKS: usize = BLOCKS;

    #[inline(always)]
    fn factors(&self) -> &[u8] {
        &self.factors
    }

    #[inline(always)]
    fn quants(&self, block: usize) -> &[[u8; 64]] {
        &self.quants[block]
    }
}

/// The shares that `bytes` consist of.
#[inline(always)]
pub(crate) fn shares<W: Format>(bytes: &[u8]) -> &[W::Share] {
    const { assert!(size_of::<W::Share>() == W::GEOMETRY.share_bytes() && align_of::<W::Share>() == 1) }
    // SAFETY: `AnyShare` promises bytes alone and any address; as many shares as whole ones fit into `bytes`,
    // which is borrowed for as long as the result.
    unsafe { core::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<W::Share>()) }
}

/// A quantized type, laid out in tiles.
pub(crate) trait Format {
    /// A share of its tiles.
    type Share: AnyShare;
    /// The type.
    const DTYPE: DType;
    /// Where things are.
    const GEOMETRY: Geometry = match Geometry::of(Self::DTYPE) {
        Some(geometry) => geometry,
        None => panic!("not a quantized type"),
    };
    /// A weight is `scale * (q - BIAS)`, plus the minimum.
    const BIAS: i32 = Self::GEOMETRY.bias;
    /// Whether weights do not fit `0..64`.
    const WIDE: bool = Self::GEOMETRY.vectors == 8;
    /// Segments of a block, each with a scale of its own.
    const SEGMENTS: usize = if matches!(Self::GEOMETRY.factors, Factors::SuperHalves) { 2 } else { 1 };
    /// Whether there are minimums.
    const MINS: bool = matches!(Self::GEOMETRY.factors, Factors::ScaleMin | Factors::Super);

    /// The weights of columns `4 * G..4 * G + 4` of the block whose vectors are `quants`.
    fn group<S: Lanes, const G: usize>(s: S, quants: &[[u8; 64]]) -> S::W;
}

/// What is taken off a weight of type `W` as [`Format::group`] gives it.
pub(crate) const fn bias<S: Lanes, W: Format>() -> i32 {
    if W::WIDE { W::BIAS + S::SIGNED_BIAS } else { W::BIAS }
}

/// The vector at `index`.
#[inline(always)]
fn vector<S: Lanes>(s: S, quants: &[[u8; 64]], index: usize) -> S::W {
    s.bytes(&quants[index])
}

/// Nibbles of column group `G`.
#[inline(always)]
fn nibbles<S: Lanes, const G: usize>(s: S, quants: &[[u8; 64]]) -> S::W {
    if G < 4 { s.low(vector(s, quants, G)) } else { s.high(vector(s, quants, G - 4)) }
}

/// Nibbles of column group `G` and their fifth bits.
#[inline(always)]
fn five_bits<S: Lanes, const G: usize>(s: S, quants: &[[u8; 64]]) -> S::W {
    let (w, bits) = (nibbles::<S, G>(s, quants), vector(s, quants, 4));
    // Bit G becomes bit 4.
    match G {
        0 => s.insert::<4, 0>(w, bits, 16),
        1 => s.insert::<3, 0>(w, bits, 16),
        2 => s.insert::<2, 0>(w, bits, 16),
        3 => s.insert::<1, 0>(w, bits, 16),
        4 => s.insert::<0, 0>(w, bits, 16),
        5 => s.insert::<0, 1>(w, bits, 16),
        6 => s.insert::<0, 2>(w, bits, 16),
        _ => s.insert::<0, 3>(w, bits, 16),
    }
}

/// Nibbles of column group `G` and their upper two bits.
#[inline(always)]
fn six_bits<S: Lanes, const G: usize>(s: S, quants: &[[u8; 64]]) -> S::W {
    let (w, bits) = (nibbles::<S, G>(s, quants), vector(s, quants, 4 + G / 4));
    // Bits 2 * (G % 4) and the next become bits 4 and 5.
    match G % 4 {
        0 => s.insert::<4, 0>(w, bits, 48),
        1 => s.insert::<2, 0>(w, bits, 48),
        2 => s.insert::<0, 0>(w, bits, 48),
        _ => s.insert::<0, 2>(w, bits, 48),
    }
}

/// Implements [`Format`].
macro_rules! format {
    ($name:ident, $dtype:ident, $share:ty, $group:ident) => {
        #[doc = concat!("Tiles of ", stringify!($name), ".")]
        pub(crate) struct $name;

        impl Format for $name {
            type Share = $share;
            const DTYPE: DType = DType::$dtype;

            #[inline(always)]
            fn group<S: Lanes, const G: usize>(s: S, quants: &[[u8; 64]]) -> S::W {
                $group::<S, G>(s, quants)
            }
        }
    };
}

/// Bytes of column group `G`.
#[inline(always)]
fn whole_bytes<S: Lanes, const G: usize>(s: S, quants: &[[u8; 64]]) -> S::W {
    s.signed(vector(s, quants, G))
}

format!(Q8_0, Q8_0, Share<64, 8, 2>, whole_bytes);
format!(Q4_0, Q4_0, Share<64, 4, 2>, nibbles);
format!(Q4_1, Q4_1, Share<128, 4, 2>, nibbles);
format!(Q5_0, Q5_0, Share<64, 5, 2>, five_bits);
format!(Q5_1, Q5_1, Share<128, 5, 2>, five_bits);
format!(Q4K, Q4K, Share<320, 4, 8>, nibbles);
format!(Q5K, Q5K, Share<320, 5, 8>, five_bits);
format!(Q6K, Q6K, Share<320, 6, 8>, six_bits);

/// The sixteen numbers of `N / 16` bytes each at `at`.
#[inline(always)]
fn part<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..][..N].as_array().unwrap_or(&[0; N])
}

/// Scales and minimums of segment `segment` of block `block` of a share, from its factors. Minimums are those to
/// be added, 0 if there are none.
#[inline(always)]
pub(crate) fn scales<S: Lanes, W: Format>(
    s: S,
    factors: &[u8],
    block: usize,
    segment: usize,
) -> (S::F, S::F) {
    let halves = |at| s.halves(part(factors, at));
    match W::GEOMETRY.factors {
        Factors::Scale => (halves(block * 2 * ROWS), s.splat(0.0)),
        Factors::ScaleMin => (halves(block * 4 * ROWS), halves(block * 4 * ROWS + 2 * ROWS)),
        Factors::Super => {
            let bytes = 4 * ROWS + block * 2 * ROWS;
            let scale = s.mul(halves(0), s.unsigned_bytes(part(factors, bytes)));
            let min = s.mul(halves(2 * ROWS), s.unsigned_bytes(part(factors, bytes + ROWS)));
            (scale, s.mul(min, s.splat(-1.0)))
        }
        Factors::SuperHalves => {
            let bytes = 2 * ROWS + block * 2 * ROWS + segment * ROWS;
            (s.mul(halves(0), s.signed_bytes(part(factors, bytes))), s.splat(0.0))
        }
    }
}
