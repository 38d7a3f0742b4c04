//! Super-blocks of 256 weights whose sub-blocks have integer scales: Q4_K, Q5_K, Q6_K.
//!
//! Each sub-block first gets its best real scale (and minimum); then the super-block's half-precision
//! scale is set from the largest of them, and each sub-block chooses its integer scale again among the
//! neighbors of the rounded one, because that rounding moved the optimum.

use edge_runtime::format::{DType, f16_to_f32, f32_to_f16};

use super::search::{affine, extreme, inverse, squared_error, symmetric, to_grid};

/// Largest 6-bit scale or minimum.
const TOP_6_BIT: f32 = 63.0;

/// A super-block of Q4_K or Q5_K before it is packed: `x ~ d * scale * q - dmin * min`.
struct Affine {
    d: u16,
    dmin: u16,
    /// `(scale, min)` of each sub-block of 32, 6 bits each.
    scales: [(u8, u8); 8],
    q: [u8; 256],
}

/// One sub-block with its weights for the search.
struct Group<'a, const N: usize> {
    x: &'a [f32; N],
    w: [f32; N],
}

/// The sub-blocks of a super-block. Without importance, elements weigh by magnitude, as in ggml: what is
/// large moves the output more.
fn groups<'a, const N: usize>(
    x: &'a [f32; 256],
    importance: Option<&'a [f32; 256]>,
) -> impl Iterator<Item = Group<'a, N>> {
    x.as_chunks::<N>().0.iter().enumerate().map(move |(j, x)| {
        let w = match importance {
            Some(importance) => std::array::from_fn(|i| importance[j * N + i]),
            None => {
                let rms = (x.iter().map(|v| v * v).sum::<f32>() / N as f32).sqrt();
                x.map(|v| rms + v.abs())
            }
        };
        Group { x, w }
    })
}

/// Quantizes to `q <= top`.
fn quantize_affine(x: &[f32; 256], importance: Option<&[f32; 256]>, top: f32) -> Affine {
    let mut ideal = [(0.0f32, 0.0f32); 8];
    for (group, ideal) in groups::<32>(x, importance).zip(&mut ideal) {
        let (scale, offset) = affine(group.x, &group.w, top, false);
        *ideal = (scale, -offset);
    }
    let largest = |pick: fn(&(f32, f32)) -> f32| ideal.iter().map(pick).fold(0.0, f32::max);
    let d = f32_to_f16(largest(|ideal| ideal.0) / TOP_6_BIT);
    let dmin = f32_to_f16(largest(|ideal| ideal.1) / TOP_6_BIT);
    let mut block = Affine { d, dmin, scales: [(0, 0); 8], q: [0; 256] };
    let (d, dmin) = (f16_to_f32(d), f16_to_f32(dmin));
    for (j, group) in groups::<32>(x, importance).enumerate() {
        let scales = neighbors(ideal[j].0 * inverse(d), 0.0, TOP_6_BIT);
        let mins = neighbors(ideal[j].1 * inverse(dmin), 0.0, TOP_6_BIT);
        let mut best = f32::INFINITY;
        for scale in scales {
            for min in mins {
                let (step, offset) = (d * scale, -dmin * min);
                let q = to_grid(group.x, inverse(step), offset, 0.0, top);
                let error = squared_error(group.x, &group.w, &q, step, offset);
                if error < best {
                    best = error;
                    block.scales[j] = (scale as u8, min as u8);
                    block.q[j * 32..][..32].copy_from_slice(&q.map(|q| q as u8));
                }
            }
        }
    }
    block
}

/// The integers in `low..=high` around `ideal`, the nearest one first.
fn neighbors(ideal: f32, low: f32, high: f32) -> [f32; 3] {
    let nearest = ideal.round().clamp(low, high);
    [nearest, (nearest - 1.0).max(low), (nearest + 1.0).min(high)]
}

impl Affine {
    /// The 12 bytes of scales and minimums: four whole scales, four whole minimums, then the low nibbles
    /// of the other four, whose upper two bits go to the upper bits of the first eight bytes.
    fn packed_scales(&self) -> [u8; 12] {
        let mut out = [0; 12];
        for (j, (scale, min)) in self.scales.into_iter().enumerate() {
            if j < 4 {
                out[j] |= scale;
                out[j + 4] |= min;
            } else {
                out[j + 4] = scale & 15 | min << 4;
                out[j - 4] |= scale >> 4 << 6;
                out[j] |= min >> 4 << 6;
            }
        }
        out
    }
}

/// The 6-bit scale and minimum of sub-block `j` in the 12 bytes of [`Affine::packed_scales`].
pub(super) fn scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        return (packed[j] & 63, packed[j + 4] & 63);
    }
    let low = packed[j + 4];
    (low & 15 | packed[j - 4] >> 6 << 4, low >> 4 | packed[j] >> 6 << 4)
}

/// Replaces the integers of a super-block of Q4_K or Q5_K.
pub(super) fn store_affine(dtype: DType, q: &[u8; 256], block: &mut [u8]) {
    let start = if dtype == DType::Q5K { 48 } else { 16 };
    // Two sub-blocks share 32 bytes: the even one in the low nibbles, the odd one in the high ones.
    for (i, byte) in block[start..].iter_mut().enumerate() {
        let first = i / 32 * 64 + i % 32;
        *byte = q[first] & 15 | q[first + 32] << 4;
    }
    // Bit `j` of byte `i` is the fifth bit of element `i` of sub-block `j`.
    for (i, byte) in block[16..start].iter_mut().enumerate() {
        *byte = (0..8).fold(0, |bits, j| bits | (q[j * 32 + i] >> 4 & 1) << j);
    }
}

/// Replaces the integers of a super-block of Q6_K.
pub(super) fn store_q6_k(q: &[u8; 256], block: &mut [u8]) {
    block[..192].fill(0);
    for (i, q) in q.iter().enumerate() {
        let (part, quarter, l) = (i / 128, i / 32 % 4, i % 32);
        block[part * 64 + quarter % 2 * 32 + l] |= (q & 15) << (quarter / 2 * 4);
        block[128 + part * 32 + l] |= (q >> 4) << (quarter * 2);
    }
}

/// A super-block of Q4_K or Q5_K.
fn affine_block<const BYTES: usize>(
    dtype: DType,
    x: &[f32; 256],
    importance: Option<&[f32; 256]>,
    top: f32,
) -> [u8; BYTES] {
    let block = quantize_affine(x, importance, top);
    let mut out = [0; BYTES];
    out[..2].copy_from_slice(&block.d.to_le_bytes());
    out[2..4].copy_from_slice(&block.dmin.to_le_bytes());
    out[4..16].copy_from_slice(&block.packed_scales());
    store_affine(dtype, &block.q, &mut out);
    out
}

pub(super) fn q4_k(x: &[f32; 256], importance: Option<&[f32; 256]>) -> [u8; 144] {
    affine_block(DType::Q4K, x, importance, 15.0)
}

pub(super) fn q5_k(x: &[f32; 256], importance: Option<&[f32; 256]>) -> [u8; 176] {
    affine_block(DType::Q5K, x, importance, 31.0)
}

/// `x ~ d * scale * (q - 32)` with an 8-bit scale for each 16 elements.
pub(super) fn q6_k(x: &[f32; 256], importance: Option<&[f32; 256]>) -> [u8; 210] {
    let mut ideal = [0.0f32; 16];
    for (group, ideal) in groups::<16>(x, importance).zip(&mut ideal) {
        *ideal = symmetric(group.x, &group.w, 32.0);
    }
    // The largest scale becomes -128: the longer side of the integer.
    let half = f32_to_f16(extreme(&ideal) / -128.0);
    let d = f16_to_f32(half);
    let mut q = [0u8; 256];
    let mut out = [0; 210];
    for (j, group) in groups::<16>(x, importance).enumerate() {
        let mut best = f32::INFINITY;
        for scale in neighbors(ideal[j] * inverse(d), -128.0, 127.0) {
            let candidate = to_grid(group.x, inverse(d * scale), 0.0, -32.0, 31.0);
            let error = squared_error(group.x, &group.w, &candidate, d * scale, 0.0);
            if error < best {
                best = error;
                out[192 + j] = scale as i8 as u8;
                q[j * 16..][..16].copy_from_slice(&candidate.map(|q| (q + 32.0) as u8));
            }
        }
    }
    store_q6_k(&q, &mut out);
    out[208..].copy_from_slice(&half.to_le_bytes());
    out
}
