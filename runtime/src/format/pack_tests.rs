//! Headers of packs that lie, and every byte of a small pack changed.

extern crate std;

use std::vec::Vec;

use super::edgepack::PACK_HEADER_BYTES;
use super::{DType, Gguf, Layout, pack_header, tiled_bytes, tiled_type_id};
use crate::{Code, Error};

const SOURCE: [u8; 32] = [0xAB; 32];
const ALIGNMENT: usize = 64;
const ROWS: u64 = 20;
const COLS: u64 = 64;
/// Where the entry of the tiled tensor has its columns, behind its name and number of axes.
const AT_COLS: usize = 4;
const AT_TYPE: usize = AT_COLS + 16;
const AT_OFFSET: usize = AT_TYPE + 4;

fn text(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

/// A GGUF file with the matrix `tiles` of 20 rows of 64 in Q4_0 tiles and the vector `ones`.
fn body() -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(2u64.to_le_bytes());
    file.extend(2u64.to_le_bytes());
    text(&mut file, "general.alignment");
    file.extend([4u32, ALIGNMENT as u32].map(u32::to_le_bytes).as_flattened());
    text(&mut file, "general.architecture");
    file.extend(8u32.to_le_bytes());
    text(&mut file, "llama");
    let tiles = tiled_bytes(DType::Q4_0, ROWS as usize, COLS as usize).unwrap();
    text(&mut file, "tiles");
    file.extend(2u32.to_le_bytes());
    file.extend([COLS, ROWS].map(u64::to_le_bytes).as_flattened());
    file.extend(tiled_type_id(DType::Q4_0).to_le_bytes());
    file.extend(0u64.to_le_bytes());
    text(&mut file, "ones");
    file.extend(1u32.to_le_bytes());
    file.extend(COLS.to_le_bytes());
    file.extend((DType::F32 as u32).to_le_bytes());
    file.extend((tiles.next_multiple_of(ALIGNMENT) as u64).to_le_bytes());
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file.extend((0..tiles).map(|i| i as u8));
    file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
    file.extend((0..COLS).flat_map(|_| 1f32.to_le_bytes()));
    file
}

/// What stands for a tokenizer's index, whose words are the tokenizer's affair.
const INDEX: [u8; 20] = [0x5A; 20];

fn pack() -> Vec<u8> {
    let body = body();
    [&pack_header(&SOURCE, body.len() as u64, INDEX.len() as u32)[..], &body, &INDEX].concat()
}

/// The refusal of a pack after `damage`.
fn refused(damage: impl FnOnce(&mut Vec<u8>)) -> Error {
    let mut bytes = pack();
    damage(&mut bytes);
    Gguf::parse(&bytes).unwrap_err()
}

/// Where the entry of the tiled tensor goes on behind its name.
fn tiles_entry(bytes: &[u8]) -> usize {
    let name = b"\x05\0\0\0\0\0\0\0tiles";
    bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[test]
fn a_pack_is_a_gguf_file_behind_a_header() {
    let bytes = pack();
    let file = Gguf::parse(&bytes).unwrap();
    assert_eq!(file.packed_from(), Some(&SOURCE));
    assert_eq!(file.bytes(), body());
    assert_eq!(file.tokenizer_index(), Some(&INDEX[..]));
    let without = [&pack_header(&SOURCE, body().len() as u64, 0)[..], &body()].concat();
    assert_eq!(Gguf::parse(&without).unwrap().tokenizer_index(), None);
    let tiles = file.tensor("tiles").unwrap();
    assert_eq!((tiles.dtype, tiles.weights()), (None, Some((DType::Q4_0, Layout::Tiles))));
    // Two tiles, the second one filled up, of one share: 2 blocks of 16 scales, padded, and of 4 vectors.
    assert_eq!(tiles.data.len(), 2 * (64 + 2 * 4 * 64));
    assert!(tiles.data.iter().enumerate().all(|(i, byte)| *byte == i as u8));
    assert_eq!(file.tensor("ones").unwrap().weights(), Some((DType::F32, Layout::Rows)));
}

#[test]
fn headers_that_lie_are_refused() {
    for length in b"EDGEPACK".len()..PACK_HEADER_BYTES {
        let error = refused(|bytes| bytes.truncate(length));
        assert_eq!((error.code, error.found), (Code::Truncated, length as u64));
    }
    for length in 0..b"EDGEPACK".len() {
        let code = refused(|bytes| bytes.truncate(length)).code;
        assert_eq!(code, if length < 4 { Code::Truncated } else { Code::BadMagic }, "{length}");
    }
    for old_or_new in [0, 1, 3] {
        let version = refused(|bytes| bytes[8] = old_or_new);
        let found = (version.code, version.at, version.found);
        assert_eq!(found, (Code::UnsupportedVersion, Some(8), u64::from(old_or_new)));
        assert!(version.hint.contains("again"), "{version}");
    }
    let layout = refused(|bytes| put(bytes, 24, b"tile16x8"));
    assert_eq!((layout.code, layout.at), (Code::Unsupported, Some(24)));
    let index = INDEX.len() as u64;
    let whole = body().len() as u64 + index;
    for body in [0, whole - index - 1, whole, u64::MAX] {
        let error = refused(|bytes| put(bytes, 16, &body.to_le_bytes()));
        let announced = body.saturating_add(index);
        assert_eq!((error.code, error.found, error.expected), (Code::BadLength, whole, announced));
    }
    for announced in [0, index - 1, index + 1, u64::from(u32::MAX)] {
        let error = refused(|bytes| put(bytes, 12, &announced.to_le_bytes()[..4]));
        assert_eq!((error.code, error.found), (Code::BadLength, whole));
        assert_eq!(error.expected, whole - index + announced);
    }
    for cut in 1..=INDEX.len() {
        assert_eq!(refused(|bytes| bytes.truncate(bytes.len() - cut)).code, Code::BadLength);
    }
    let cut = refused(|bytes| bytes.truncate(bytes.len() - 1));
    assert_eq!((cut.code, cut.found, cut.expected), (Code::BadLength, whole - 1, whole));
    // A place in the body counts from the start of the pack.
    let magic = refused(|bytes| bytes[PACK_HEADER_BYTES] = b'X');
    assert_eq!((magic.code, magic.at), (Code::BadMagic, Some(PACK_HEADER_BYTES as u64)));
    let nested = refused(|bytes| {
        let inner = bytes.clone();
        bytes.splice(PACK_HEADER_BYTES.., inner);
        let body = (bytes.len() - PACK_HEADER_BYTES - INDEX.len()) as u64;
        put(bytes, 16, &body.to_le_bytes());
    });
    assert_eq!(nested.code, Code::BadMagic);
}

#[test]
fn tiles_that_are_not_there_are_refused() {
    type Damage = fn(&mut [u8], usize);
    let cases: [(&str, Code, Damage); 5] = [
        ("more rows", Code::TensorOutOfBounds, |bytes, at| put(bytes, at + AT_COLS + 8, &[100])),
        ("another place", Code::TensorOutOfBounds, |bytes, at| put(bytes, at + AT_OFFSET, &[0, 64])),
        ("within a line", Code::BadAlignment, |bytes, at| put(bytes, at + AT_OFFSET, &[32])),
        ("half a block", Code::BadShape, |bytes, at| put(bytes, at + AT_COLS, &[48])),
        ("no end", Code::BadShape, |bytes, at| put(bytes, at + AT_COLS, &[0xFF; 16])),
    ];
    for (case, code, damage) in cases {
        let error = refused(|bytes| {
            let at = tiles_entry(bytes);
            damage(bytes, at);
        });
        assert_eq!((error.code, error.name.as_str()), (code, "tiles"), "{case}");
    }
}

#[test]
fn tiles_are_none_in_a_plain_file_and_of_no_floating_point_type() {
    let bytes = body();
    let file = Gguf::parse(&bytes).unwrap();
    assert_eq!(file.packed_from(), None);
    let tiles = file.tensor("tiles").unwrap();
    assert_eq!((tiles.weights(), tiles.data.len()), (None, 0));
    let float = refused(|bytes| {
        let at = tiles_entry(bytes);
        put(bytes, at + AT_TYPE, &tiled_type_id(DType::F16).to_le_bytes());
    });
    assert_eq!((float.code, float.name.as_str()), (Code::BadShape, "tiles"));
}

#[test]
fn no_changed_byte_makes_a_reader_panic() {
    let good = pack();
    let mut refused = 0;
    for at in 0..good.len() {
        for change in [1, 0x10, 0x80, 0xFF] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            match Gguf::parse(&bytes) {
                Ok(file) => {
                    let found: usize = file.tensors().map(|tensor| tensor.data.len()).sum();
                    assert!(found <= good.len() && file.metadata().count() == 2, "byte {at} ^ {change:#x}");
                }
                Err(_) => refused += 1,
            }
        }
    }
    // All bytes of the header but 32 of the hash, and most of the entries.
    assert!(refused > 4 * (PACK_HEADER_BYTES - 32), "{refused}");
}
