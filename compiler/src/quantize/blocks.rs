//! Blocks of 32 weights with half-precision scales: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.
//!
//! Without importance these are the plain formulas that ggml's reference quantizers define, equal to
//! theirs bit for bit; with importance the scale is searched, and the error that importance weighs is never
//! larger than theirs.

use edge_runtime::format::{DType, f16_to_f32, f32_to_f16};

use super::search::{affine, extreme, inverse, squared_error, symmetric, to_grid};

/// `scale = max |x| / 127`, `q = round(x / scale)`, ties away from zero.
pub(super) fn q8_0(x: &[f32; 32], _: Option<&[f32; 32]>) -> [u8; 34] {
    let scale = extreme(x).abs() / 127.0;
    let inverse = inverse(scale);
    let mut out = [0; 34];
    out[..2].copy_from_slice(&f32_to_f16(scale).to_le_bytes());
    for (o, v) in out[2..].iter_mut().zip(x) {
        *o = (v * inverse).round() as i8 as u8;
    }
    out
}

/// Integers `0..2 * levels` and the scale of `x ~ scale * (q - levels)`.
fn signed(x: &[f32; 32], w: Option<&[f32; 32]>, levels: f32) -> ([u8; 32], u16) {
    let top = 2.0 * levels - 1.0;
    let plain = extreme(x) / -levels;
    if let Some(w) = w {
        let candidates = [symmetric(x, w, levels), plain].map(|scale| (scale, 0.0));
        let (q, [half, _]) = best(x, w, candidates, -levels, levels - 1.0);
        return (q.map(|q| (q + levels) as u8), half);
    }
    let inverse = inverse(plain);
    let q = x.map(|v| (v * inverse + (levels + 0.5)).trunc().min(top) as u8);
    (q, f32_to_f16(plain))
}

/// Integers `0..=top`, the scale and the minimum of `x ~ scale * q + minimum`.
fn unsigned(x: &[f32; 32], w: Option<&[f32; 32]>, top: f32) -> ([u8; 32], [u16; 2]) {
    let min = x.iter().copied().fold(f32::MAX, f32::min);
    let max = x.iter().copied().fold(f32::MIN, f32::max);
    let plain = (max - min) / top;
    if let Some(w) = w {
        let (q, halves) = best(x, w, [affine(x, w, top, true), (plain, min)], 0.0, top);
        return (q.map(|q| q as u8), halves);
    }
    let inverse = inverse(plain);
    let q = x.map(|v| ((v - min) * inverse + 0.5).trunc().min(top) as u8);
    (q, [f32_to_f16(plain), f32_to_f16(min)])
}

/// The integers and half-precision `[scale, offset]` of the better of two candidates, the plain formula's
/// being the second: rounding to halves may cost more than a search has won.
fn best(
    x: &[f32; 32],
    w: &[f32; 32],
    candidates: [(f32, f32); 2],
    low: f32,
    high: f32,
) -> ([f32; 32], [u16; 2]) {
    let [searched, plain] = candidates.map(|(scale, offset)| {
        let halves = [f32_to_f16(scale), f32_to_f16(offset)];
        let [scale, offset] = halves.map(f16_to_f32);
        let q = to_grid(x, inverse(scale), offset, low, high);
        (squared_error(x, w, &q, scale, offset), q, halves)
    });
    let (_, q, halves) = if plain.0 < searched.0 { plain } else { searched };
    (q, halves)
}

/// Two integers a byte: element `i` in the low nibble, `i + 16` in the high one; fifth bits are dropped.
fn nibbles(q: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|i| q[i] & 15 | q[i + 16] << 4)
}

/// Bit `i` is the fifth bit of element `i`.
fn fifth_bits(q: &[u8; 32]) -> [u8; 4] {
    let bits = q.iter().enumerate().fold(0u32, |bits, (i, q)| bits | u32::from(q >> 4 & 1) << i);
    bits.to_le_bytes()
}

/// Replaces the integers of a block of Q4_0, Q4_1, Q5_0 or Q5_1, which end its bytes.
pub(super) fn store(dtype: DType, q: &[u8; 32], block: &mut [u8]) {
    let start = block.len() - 16;
    block[start..].copy_from_slice(&nibbles(q));
    if matches!(dtype, DType::Q5_0 | DType::Q5_1) {
        block[start - 4..start].copy_from_slice(&fifth_bits(q));
    }
}

/// The parts of a block, one after the other.
fn join<const BYTES: usize>(parts: &[&[u8]]) -> [u8; BYTES] {
    let mut out = [0; BYTES];
    let mut at = 0;
    for part in parts {
        out[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    out
}

pub(super) fn q4_0(x: &[f32; 32], w: Option<&[f32; 32]>) -> [u8; 18] {
    let (q, scale) = signed(x, w, 8.0);
    join(&[&scale.to_le_bytes(), &nibbles(&q)])
}

pub(super) fn q4_1(x: &[f32; 32], w: Option<&[f32; 32]>) -> [u8; 20] {
    let (q, [scale, min]) = unsigned(x, w, 15.0);
    join(&[&scale.to_le_bytes(), &min.to_le_bytes(), &nibbles(&q)])
}

pub(super) fn q5_0(x: &[f32; 32], w: Option<&[f32; 32]>) -> [u8; 22] {
    let (q, scale) = signed(x, w, 16.0);
    join(&[&scale.to_le_bytes(), &fifth_bits(&q), &nibbles(&q)])
}

pub(super) fn q5_1(x: &[f32; 32], w: Option<&[f32; 32]>) -> [u8; 24] {
    let (q, [scale, min]) = unsigned(x, w, 31.0);
    join(&[&scale.to_le_bytes(), &min.to_le_bytes(), &fifth_bits(&q), &nibbles(&q)])
}
