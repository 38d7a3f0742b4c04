//! Weight blocks back to `f32`, one value at a time: for embedding look-ups, the host and the tests.
//!
//! Layouts and formulas are those of ggml's block types (the GGUF specification names them; gguf-py's
//! `quants.py` is the independent source that the tests compare with).

use crate::format::{DType, bf16_to_f32, f16_to_f32};
use crate::{Code, Error, Result};

/// The `out.len()` values of one row of `dtype`.
///
/// # Errors
/// [`Code::WrongShape`] if `out` is not a whole number of blocks or `row` has not exactly their bytes.
pub fn dequantize_row(dtype: DType, row: &[u8], out: &mut [f32]) -> Result<()> {
    if dtype.row_bytes(out.len()) != Some(row.len()) {
        let expected = dtype.row_bytes(out.len()).unwrap_or(0) as u64;
        return Err(Error::new(Code::WrongShape, dtype.name()).found(row.len() as u64, expected));
    }
    match dtype {
        DType::F32 => blocks(row, out, |b: &[u8; 4], o: &mut [f32; 1]| o[0] = f32::from_le_bytes(*b)),
        DType::F16 => {
            blocks(row, out, |b: &[u8; 2], o: &mut [f32; 1]| o[0] = f16_to_f32(u16::from_le_bytes(*b)));
        }
        DType::BF16 => {
            blocks(row, out, |b: &[u8; 2], o: &mut [f32; 1]| o[0] = bf16_to_f32(u16::from_le_bytes(*b)));
        }
        DType::Q8_0 => blocks(row, out, q8_0),
        DType::Q4_0 => blocks(row, out, q4_0),
        DType::Q4_1 => blocks(row, out, q4_1),
        DType::Q5_0 => blocks(row, out, q5_0),
        DType::Q5_1 => blocks(row, out, q5_1),
        DType::Q4K => blocks(row, out, q4_k),
        DType::Q5K => blocks(row, out, q5_k),
        DType::Q6K => blocks(row, out, q6_k),
        #[cfg(feature = "low-bit")]
        DType::Q2K => blocks(row, out, q2_k),
        #[cfg(feature = "low-bit")]
        DType::Q3K => blocks(row, out, q3_k),
        #[cfg(feature = "low-bit")]
        DType::IQ4NL => blocks(row, out, iq4_nl),
    }
    Ok(())
}

/// Calls `decode` for every block of `BYTES` bytes and `LEN` values.
fn blocks<const BYTES: usize, const LEN: usize>(
    row: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in row.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        decode(block, out);
    }
}

/// The half-precision number at byte `at`: once for all types, a block has one or two.
#[inline(never)]
fn half(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

fn q8_0(b: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (o, q) in out.iter_mut().zip(&b[2..]) {
        *o = d * f32::from(*q as i8);
    }
}

/// Element `i` of 32 in nibbles: the low ones first, then the high ones.
pub(crate) fn nibble(qs: &[u8], i: usize) -> u8 {
    if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }
}

/// The fifth bit of element `i`, in its place.
pub(crate) fn fifth_bit(qh: &[u8], i: usize) -> u8 {
    (qh[i / 8] >> (i % 8) & 1) << 4
}

fn q4_0(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * (f32::from(nibble(&b[2..], i)) - 8.0);
    }
}

fn q4_1(b: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * f32::from(nibble(&b[4..], i)) + m;
    }
}

fn q5_0(b: &[u8; 22], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * (f32::from(nibble(&b[6..], i) | fifth_bit(&b[2..6], i)) - 16.0);
    }
}

fn q5_1(b: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * f32::from(nibble(&b[8..], i) | fifth_bit(&b[4..8], i)) + m;
    }
}

/// The 6-bit scale and minimum of sub-block `j` (of 8) in the 12 packed bytes of Q4_K and Q5_K: four whole
/// scales, four whole minimums, then the low nibbles of the other four, whose upper two bits sit in the
/// upper bits of the first eight bytes.
pub(crate) fn scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let low = packed[j + 4];
        (low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4)
    }
}

fn q4_k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for (i, o) in out.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], i / 32);
        let q = b[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        *o = d * f32::from(scale) * f32::from(q) - dmin * f32::from(min);
    }
}

fn q5_k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    for (i, o) in out.iter_mut().enumerate() {
        let (scale, min) = scale_min(&b[4..16], i / 32);
        let low = b[48 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
        let high = b[16 + i % 32] >> (i / 32) & 1;
        *o = d * f32::from(scale) * f32::from(low | high << 4) - dmin * f32::from(min);
    }
}

fn q6_k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = half(b, 208);
    for (i, o) in out.iter_mut().enumerate() {
        let (part, quarter, l) = (i / 128, i / 32 % 4, i % 32);
        let low = b[part * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
        let high = b[128 + part * 32 + l] >> (quarter * 2) & 3;
        let scale = b[192 + i / 16] as i8;
        *o = d * f32::from(scale) * (f32::from(low | high << 4) - 32.0);
    }
}

/// Two bits of weight `i` of 256 in 64 bytes: of each 128, 32 in the lowest bits, then 32 in the next.
#[cfg(feature = "low-bit")]
fn two_bits(qs: &[u8], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3
}

#[cfg(feature = "low-bit")]
fn q2_k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (d, dmin) = (half(b, 80), half(b, 82));
    for (i, o) in out.iter_mut().enumerate() {
        let (scale, min) = (b[i / 16] & 15, b[i / 16] >> 4);
        *o = d * f32::from(scale) * f32::from(two_bits(&b[16..], i)) - dmin * f32::from(min);
    }
}

/// The 6-bit scale of sub-block `j` (of 16) of a super-block of Q3_K, less 32, in 12 packed bytes: low nibbles of eight,
/// high nibbles of the other eight, and in each of four more bytes the upper two bits of every fourth.
#[cfg(feature = "low-bit")]
pub fn q3_k_scale(block: &[u8; 110], j: usize) -> i8 {
    let low = block[96 + j % 8] >> (j / 8 * 4) & 15;
    let high = block[104 + j % 4] >> (j / 4 * 2) & 3;
    (low | high << 4) as i8 - 32
}

#[cfg(feature = "low-bit")]
fn q3_k(b: &[u8; 110], out: &mut [f32; 256]) {
    let d = half(b, 108);
    for (i, o) in out.iter_mut().enumerate() {
        let q = two_bits(&b[32..], i) | (b[i % 32] >> (i / 32) & 1) << 2;
        *o = d * f32::from(q3_k_scale(b, i / 16)) * (f32::from(q) - 4.0);
    }
}

/// What the 16 integers of IQ4_NL stand for (ggml's `kvalues_iq4nl`): close together around zero, where most weights are.
#[cfg(feature = "low-bit")]
pub const IQ4_NL_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

#[cfg(feature = "low-bit")]
fn iq4_nl(b: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(b, 0);
    for (i, o) in out.iter_mut().enumerate() {
        *o = d * f32::from(IQ4_NL_VALUES[usize::from(nibble(&b[2..], i))]);
    }
}
