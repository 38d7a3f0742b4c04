//! Blocks of 32 weights with half-precision scales: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.
//!
//! Without importance these are the plain formulas that ggml's reference quantizers define, equal to
//! theirs bit for bit; with importance the scale is searched.

use edge_runtime::format::{f16_to_f32, f32_to_f16};

use super::search::{affine, extreme, inverse, symmetric, to_grid};

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
    if let Some(w) = w {
        let half = f32_to_f16(symmetric(x, w, levels));
        let q = to_grid(x, inverse(f16_to_f32(half)), levels, 0.0, top);
        return (q.map(|q| q as u8), half);
    }
    let scale = extreme(x) / -levels;
    let inverse = inverse(scale);
    let q = x.map(|v| (v * inverse + (levels + 0.5)).trunc().min(top) as u8);
    (q, f32_to_f16(scale))
}

/// Integers `0..=top`, the scale and the minimum of `x ~ scale * q + minimum`.
fn unsigned(x: &[f32; 32], w: Option<&[f32; 32]>, top: f32) -> ([u8; 32], [u16; 2]) {
    if let Some(w) = w {
        let (scale, offset) = affine(x, w, top, true);
        let halves = [f32_to_f16(scale), f32_to_f16(offset)];
        let inverse = inverse(f16_to_f32(halves[0]));
        let q = to_grid(x, inverse, -f16_to_f32(halves[1]) * inverse, 0.0, top);
        return (q.map(|q| q as u8), halves);
    }
    let min = x.iter().copied().fold(f32::MAX, f32::min);
    let max = x.iter().copied().fold(f32::MIN, f32::max);
    let scale = (max - min) / top;
    let inverse = inverse(scale);
    let q = x.map(|v| ((v - min) * inverse + 0.5).trunc().min(top) as u8);
    (q, [f32_to_f16(scale), f32_to_f16(min)])
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
