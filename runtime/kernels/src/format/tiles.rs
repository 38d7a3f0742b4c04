//! Matrices in tiles of sixteen rows, the layout of weights in a pack.
//!
//! A matrix is its tiles one after another; a last tile that has fewer rows is filled with rows of zeros.
//! A tile is read from its first byte to its last: shares of 2 blocks of 32 columns (of 8, for types with
//! super-blocks of 256), each a multiple of 64 bytes. A last share that has fewer blocks is filled with
//! zeros. A share has two parts:
//!
//! 1. **Factors**, row beside row. For each block sixteen half-precision scales and, where the type has them,
//!    sixteen minimums. For super-blocks sixteen half-precision `d` (and sixteen `dmin`), then for each of the
//!    8 blocks sixteen scales of a byte (and sixteen minimums); two times sixteen scales for Q6_K. Padded to
//!    64 bytes.
//! 2. **Quants**: for each block, vectors of 64 bytes in which byte `4 * row + j` belongs to that row. With eight
//!    bits, vector `g` holds columns `4 * g + j`. With fewer, vector `g` of four holds columns `4 * g + j` in
//!    its low nibbles and `16 + 4 * g + j` in its high ones; a fifth bit of column group `g` is bit `g` of
//!    one more vector; the upper two bits of Q6_K's groups `4 * p + i` are bits `2 * i` of vector `p` of two
//!    more.
//!
//! Quants are as in the file: `q` of `d * (q - bias)`, unsigned, or signed for Q8_0.

use super::DType;

/// How a matrix lies in its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row after row, as in GGUF.
    Rows,
    /// Tiles of sixteen rows, as in a pack.
    Tiles,
}

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
const ROWS: usize = TILE_ROWS;
/// Columns of a block.
const BLOCK: usize = 32;
/// Shares and their quants start at multiples of this.
const ALIGN: usize = 64;

/// How the factors of a type are stored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Factors {
    /// A half-precision scale a block.
    Scale,
    /// A half-precision scale and a minimum a block.
    ScaleMin,
    /// Super-blocks: `d`, `dmin`, and a byte of each for every block.
    Super,
    /// Super-blocks: `d` and two signed bytes a block.
    SuperHalves,
}

impl Factors {
    /// Blocks of a share.
    pub const fn blocks(self) -> usize {
        match self {
            Self::Scale | Self::ScaleMin => 2,
            Self::Super | Self::SuperHalves => 8,
        }
    }

    /// Bytes of the factors of a share.
    pub const fn bytes(self) -> usize {
        let bytes = match self {
            Self::Scale => 2 * 2 * ROWS,
            Self::ScaleMin => 2 * 4 * ROWS,
            Self::Super => 4 * ROWS + 8 * 2 * ROWS,
            Self::SuperHalves => 2 * ROWS + 8 * 2 * ROWS,
        };
        bytes.next_multiple_of(ALIGN)
    }
}

/// The shape of a type's tiles.
#[derive(Clone, Copy)]
pub(crate) struct Geometry {
    /// How factors are stored.
    pub factors: Factors,
    /// Vectors of 64 bytes that hold the quants of a block.
    pub vectors: usize,
    /// What is taken off a quant before its scale applies.
    pub bias: i32,
}

impl Geometry {
    /// `None` for types that stay rows: floating-point numbers, and those of the feature `low-bit`.
    pub const fn of(dtype: DType) -> Option<Self> {
        let (factors, vectors, bias) = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return None,
            DType::Q8_0 => (Factors::Scale, 8, 0),
            DType::Q4_0 => (Factors::Scale, 4, 8),
            DType::Q4_1 => (Factors::ScaleMin, 4, 0),
            DType::Q5_0 => (Factors::Scale, 5, 16),
            DType::Q5_1 => (Factors::ScaleMin, 5, 0),
            DType::Q4K => (Factors::Super, 4, 0),
            DType::Q5K => (Factors::Super, 5, 0),
            DType::Q6K => (Factors::SuperHalves, 6, 32),
            #[cfg(feature = "low-bit")]
            DType::Q2K | DType::Q3K | DType::IQ4NL => return None,
        };
        Some(Self { factors, vectors, bias })
    }

    /// Bytes of a share.
    pub const fn share_bytes(self) -> usize {
        self.factors.bytes() + self.factors.blocks() * self.vectors * 64
    }

    /// Bytes of a tile; `None` if `cols` is not a whole number of (super-)blocks or beyond the address space.
    pub fn tile_bytes(self, cols: usize) -> Option<usize> {
        let whole = match self.factors {
            Factors::Scale | Factors::ScaleMin => BLOCK,
            Factors::Super | Factors::SuperHalves => BLOCK * self.factors.blocks(),
        };
        if !cols.is_multiple_of(whole) {
            return None;
        }
        (cols / BLOCK).div_ceil(self.factors.blocks()).checked_mul(self.share_bytes())
    }
}

/// Bytes of a matrix in tiles; `None` for a type that is not tiled, a row that is not a whole number of blocks,
/// or a size beyond the address space.
pub fn tiled_bytes(dtype: DType, rows: usize, cols: usize) -> Option<usize> {
    Geometry::of(dtype)?.tile_bytes(cols)?.checked_mul(rows.div_ceil(ROWS))
}
