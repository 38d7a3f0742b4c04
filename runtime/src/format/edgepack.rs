//! The pack: a GGUF file whose quantized matrices lie as kernels read them.
//!
//! A header of 64 bytes, then a GGUF file (little-endian, aligned to 64 bytes) in which tensors of type
//! [`tiled_type_id`] are in [tiles](Layout::Tiles), then the index of its [tokenizer](crate::tokenizer), which has the
//! merges in it, so that the file has none. Mapped into memory it runs as it is: nothing is laid out anew or indexed
//! on the device. A pack is private to this project; the GGUF file that it was made from is the one to hand
//! around, and the pack names it by its hash.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | `EDGEPACK` |
//! | 8..12 | version, 2 |
//! | 12..16 | bytes of the tokenizer's index at the end, 0 without a vocabulary |
//! | 16..24 | bytes of the GGUF file that follows, with zeros behind it a multiple of 64 |
//! | 24..32 | name of the layout, padded with zeros |
//! | 32..64 | SHA-256 of the file that the pack was made from |

use super::DType;
use crate::{Code, Error, Result};

const MAGIC: &[u8; 8] = b"EDGEPACK";
const VERSION: u32 = 2;
/// Tiles of sixteen rows and four columns.
const LAYOUT: &[u8; 8] = b"tile16x4";
/// Bytes in front of the GGUF file.
pub const PACK_HEADER_BYTES: usize = 64;
/// Set in the type of a tensor that is in tiles.
const TILED: u32 = 1 << 28;

/// The number that a pack has for tiles of `dtype`.
pub const fn tiled_type_id(dtype: DType) -> u32 {
    TILED | dtype as u32
}

/// The type of the tiles that a pack numbers `id`.
pub(super) fn tiled_type(id: u32) -> Option<DType> {
    if id & TILED == 0 { None } else { DType::from_gguf(id ^ TILED) }
}

/// The header of a pack made from a file with the hash `source`, in front of `body_bytes` bytes of GGUF and
/// `index_bytes` of index.
pub fn pack_header(source: &[u8; 32], body_bytes: u64, index_bytes: u32) -> [u8; PACK_HEADER_BYTES] {
    let mut header = [0; PACK_HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&index_bytes.to_le_bytes());
    header[16..24].copy_from_slice(&body_bytes.to_le_bytes());
    header[24..32].copy_from_slice(LAYOUT);
    header[32..].copy_from_slice(source);
    header
}

/// A pack, taken apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pack<'a> {
    /// SHA-256 of the file that it was made from.
    pub(super) source: &'a [u8; 32],
    /// The GGUF file.
    pub(super) body: &'a [u8],
    /// The tokenizer's index; empty without a vocabulary.
    pub(super) index: &'a [u8],
}

/// The parts of a pack; `None` if `bytes` are none.
///
/// # Errors
/// [`Code::Truncated`], [`Code::UnsupportedVersion`], [`Code::Unsupported`] for another layout,
/// [`Code::BadLength`] if the file is not as long as the header says.
pub(super) fn open(bytes: &[u8]) -> Result<Option<Pack<'_>>> {
    if !bytes.starts_with(MAGIC) {
        return Ok(None);
    }
    let Some((header, rest)) = bytes.split_first_chunk::<PACK_HEADER_BYTES>() else {
        return Err(Error::new(Code::Truncated, "pack header")
            .at(0)
            .found(bytes.len() as u64, PACK_HEADER_BYTES as u64));
    };
    let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    if version != VERSION {
        return Err(Error::new(Code::UnsupportedVersion, "pack")
            .at(8)
            .found(u64::from(version), u64::from(VERSION))
            .hint("pack the GGUF file again"));
    }
    if &header[24..32] != LAYOUT {
        return Err(Error::new(Code::Unsupported, "pack").at(24).hint("a layout that no kernel here reads"));
    }
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
    let (index_bytes, body_bytes) = (number(&header[12..16]), number(&header[16..24]));
    let announced = body_bytes.saturating_add(index_bytes);
    if announced != rest.len() as u64 {
        return Err(Error::new(Code::BadLength, "pack").at(16).found(rest.len() as u64, announced));
    }
    let (body, index) = rest.split_at(body_bytes as usize);
    Ok(header[32..].as_array().map(|source| Pack { source, body, index }))
}
