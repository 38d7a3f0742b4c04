//! Kernels on `f32` rows: dot, axpy, RMS norm, gates, soft cap, rope and the quantization of activations.
//!
//! A dot product has 16 running sums (element `i` goes to sum `i % 16`), which are added pairwise at the
//! end; a row whose length is not a multiple of 16 counts as padded with zeros.

use super::activations::{ActivationsMut, BLOCK, GROUP};
use super::exp::{exp_lanes, one_and_exp};
use super::simd::{Op, Simd};
use crate::format::{f16_to_f32, f32_to_f16};
use core::marker::PhantomData;
use core::slice::from_ref;
use edge_models::RopePairing;

/// An element of a stored row.
pub(crate) trait Element: Copy + Default {
    /// Eight elements as floats.
    fn load8<S: Simd>(s: S, x: &[Self; 8]) -> S::F;
    /// Sixteen elements as floats.
    #[inline(always)]
    fn load16<S: Simd>(s: S, x: &[Self; 16]) -> [S::F; 2] {
        let ([a, b], _) = x.as_chunks::<8>() else { return [s.splat(0.0); 2] };
        [Self::load8(s, a), Self::load8(s, b)]
    }
}

impl Element for f32 {
    #[inline(always)]
    fn load8<S: Simd>(s: S, x: &[f32; 8]) -> S::F {
        s.load(x)
    }

    #[inline(always)]
    fn load16<S: Simd>(s: S, x: &[f32; 16]) -> [S::F; 2] {
        s.load2(x)
    }
}

/// The bits of a half-precision number.
impl Element for u16 {
    #[inline(always)]
    fn load8<S: Simd>(s: S, x: &[u16; 8]) -> S::F {
        s.f16_bits(*x)
    }
}

/// The part of a row behind its last 16 elements, padded with zeros.
#[inline(always)]
fn padded<T: Element>(rest: &[T]) -> [T; 16] {
    let mut block = [T::default(); 16];
    for (to, from) in block.iter_mut().zip(rest) {
        *to = *from;
    }
    block
}

/// The two halves of 16 elements.
#[inline(always)]
pub(crate) fn load16<S: Simd, T: Element>(s: S, x: &[T; 16]) -> [S::F; 2] {
    T::load16(s, x)
}

/// Writes sixteen numbers.
#[inline(always)]
pub(crate) fn store16<S: Simd>(s: S, x: [S::F; 2], to: &mut [f32; 16]) {
    for (x, to) in x.into_iter().zip(to.as_chunks_mut().0) {
        s.store(x, to);
    }
}

/// The 16 sums of a dot product, folded to 8.
#[inline(always)]
pub(crate) fn dot_lanes<S: Simd, T: Element>(s: S, x: &[f32], y: &[T]) -> S::F {
    let len = x.len().min(y.len());
    let ((x, x_rest), (y, y_rest)) = (x[..len].as_chunks::<16>(), y[..len].as_chunks::<16>());
    let mut sums = [s.splat(0.0); 2];
    for (x, y) in x.iter().zip(y) {
        let (x, y) = (load16(s, x), load16(s, y));
        sums = [s.fma(x[0], y[0], sums[0]), s.fma(x[1], y[1], sums[1])];
    }
    if !x_rest.is_empty() {
        let (x, y) = (load16(s, &padded(x_rest)), load16(s, &padded(y_rest)));
        sums = [s.fma(x[0], y[0], sums[0]), s.fma(x[1], y[1], sums[1])];
    }
    s.add(sums[0], sums[1])
}

/// The dot product of two rows.
#[inline(always)]
pub(crate) fn dot<S: Simd, T: Element>(s: S, x: &[f32], y: &[T]) -> f32 {
    s.sum(dot_lanes(s, x, y))
}

/// `y += a * x`.
#[inline(always)]
pub(crate) fn axpy<S: Simd>(s: S, a: f32, x: &[f32], y: &mut [f32]) {
    let len = x.len().min(y.len());
    let (x, x_rest) = x[..len].as_chunks::<16>();
    let (y, y_rest) = y[..len].as_chunks_mut::<16>();
    for (x, y) in x.iter().zip(y) {
        let (x, sums) = (s.load2(x), s.load2(y));
        store16(s, [s.fma(s.splat(a), x[0], sums[0]), s.fma(s.splat(a), x[1], sums[1])], y);
    }
    for (x, y) in x_rest.iter().zip(y_rest) {
        *y = libm::fmaf(a, *x, *y);
    }
}

/// `out = x`, in half precision.
#[inline(always)]
pub(crate) fn to_half<S: Simd>(s: S, x: &[f32], out: &mut [u16]) {
    let len = x.len().min(out.len());
    let (x, x_rest) = x[..len].as_chunks::<16>();
    let (out, out_rest) = out[..len].as_chunks_mut::<16>();
    for (x, out) in x.iter().zip(out) {
        for (x, out) in s.load2(x).into_iter().zip(out.as_chunks_mut().0) {
            *out = s.to_f16(x);
        }
    }
    for (x, out) in x_rest.iter().zip(out_rest) {
        *out = f32_to_f16(*x);
    }
}

/// Rounds to half precision.
#[inline(always)]
pub(crate) fn round_to_half<S: Simd>(s: S, x: &mut [f32]) {
    let (x, rest) = x.as_chunks_mut::<16>();
    for x in x {
        store16(s, s.load2(x).map(|x| s.f16_bits(s.to_f16(x))), x);
    }
    for x in rest {
        *x = f16_to_f32(f32_to_f16(*x));
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    1.0 / libm::sqrtf(dot(s, x, x) / x.len() as f32 + eps)
}

/// `out = x * weight / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(crate) fn rms_norm<S: Simd>(s: S, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let len = x.len().min(weight.len()).min(out.len());
    let x = &x[..len];
    let scale = inverse_rms(s, x, eps);
    let (x, x_rest) = x.as_chunks::<16>();
    let (weight, weight_rest) = weight[..len].as_chunks::<16>();
    let (out, out_rest) = out[..len].as_chunks_mut::<16>();
    for ((x, w), out) in x.iter().zip(weight).zip(out) {
        let (x, w) = (s.load2(x), s.load2(w));
        let scaled = |i: usize| s.mul(s.mul(x[i], s.splat(scale)), w[i]);
        store16(s, [scaled(0), scaled(1)], out);
    }
    for ((x, w), out) in x_rest.iter().zip(weight_rest).zip(out_rest) {
        *out = x * scale * w;
    }
}

/// `x = x * weight / sqrt(mean(x^2) + eps)`.
#[inline(always)]
pub(crate) fn rms_norm_in_place<S: Simd>(s: S, x: &mut [f32], weight: &[f32], eps: f32) {
    let len = x.len().min(weight.len());
    let x = &mut x[..len];
    let scale = inverse_rms(s, x, eps);
    let (x, x_rest) = x.as_chunks_mut::<8>();
    let (weight, weight_rest) = weight[..len].as_chunks::<8>();
    for (x, w) in x.iter_mut().zip(weight) {
        s.store(s.mul(s.mul(s.load(x), s.splat(scale)), s.load(w)), x);
    }
    for (x, w) in x_rest.iter_mut().zip(weight_rest) {
        *x = *x * scale * w;
    }
}

/// `x / (1 + exp(-y))`, eight lanes; `x` is NaN where `y` is.
#[inline(always)]
fn times_sigmoid<S: Simd>(s: S, x: S::F, y: S::F) -> S::F {
    s.div(x, one_and_exp(s, s.sub(s.splat(0.0), y)))
}

/// How a gate and what it lets through become one. A trait, not a function that is handed on: shims of functions
/// are compiled without the features of the instruction set, and intrinsics are not inlined into them.
trait Gate {
    /// Eight results.
    fn lanes<S: Simd>(s: S, gate: S::F, up: S::F) -> S::F;
}

struct Swiglu;
struct Geglu;

impl Gate for Swiglu {
    /// `gate / (1 + exp(-gate)) * up`.
    #[inline(always)]
    fn lanes<S: Simd>(s: S, gate: S::F, up: S::F) -> S::F {
        s.mul(times_sigmoid(s, gate, gate), up)
    }
}

impl Gate for Geglu {
    /// `gate / (1 + exp(-2u)) * up` with `u = sqrt(2 / pi) * (gate + 0.044715 gate^3)`; that is
    /// `gate / 2 * (1 + tanh(u)) * up`.
    #[inline(always)]
    fn lanes<S: Simd>(s: S, gate: S::F, up: S::F) -> S::F {
        /// `2 sqrt(2 / pi)`.
        const SLOPE: f32 = 1.595_769_2;
        let square = s.mul(gate, gate);
        let inner = s.add(s.splat(1.0), s.mul(s.splat(0.044_715), square));
        let twice = s.mul(s.mul(s.splat(SLOPE), gate), inner);
        s.mul(times_sigmoid(s, gate, twice), up)
    }
}

/// `cap * tanh(x / cap)` as `cap - 2 cap / (1 + exp(2 x / cap))`, eight lanes.
#[inline(always)]
fn soft_cap_lanes<S: Simd>(s: S, x: S::F, cap: f32) -> S::F {
    let exp = exp_lanes(s, s.mul(x, s.splat(2.0 / cap)));
    s.sub(s.splat(cap), s.div(s.splat(2.0 * cap), s.add(s.splat(1.0), exp)))
}

/// `x = cap * tanh(x / cap)`, within `cap * 2^-22`.
#[inline(always)]
pub(crate) fn soft_cap<S: Simd>(s: S, x: &mut [f32], cap: f32) {
    let mut last = [0.0; 8];
    for x in x.chunks_mut(8) {
        let lanes = soft_cap_lanes(s, load_some(s, x, &mut last), cap);
        store_some(s, lanes, x, &mut last);
    }
}

/// `gate = gate * sigmoid(gate) * up`.
#[inline(always)]
pub(crate) fn swiglu<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    gated::<S, Swiglu>(s, gate, up);
}

/// `gate = gelu(gate) * up` with the approximation by tanh.
#[inline(always)]
pub(crate) fn geglu<S: Simd>(s: S, gate: &mut [f32], up: &[f32]) {
    gated::<S, Geglu>(s, gate, up);
}

/// `gate = lanes(gate, up)`.
#[inline(always)]
fn gated<S: Simd, G: Gate>(s: S, gate: &mut [f32], up: &[f32]) {
    let len = gate.len().min(up.len());
    let ((gate, last), (up, last_up)) = (gate[..len].as_chunks_mut(), up[..len].as_chunks());
    s.outline(Gated::<G> { gate, up, rule: PhantomData });
    if !last.is_empty() {
        let (mut gate, mut up) = ([0.0; 8], [0.0; 8]);
        gate[..last.len()].copy_from_slice(last);
        up[..last.len()].copy_from_slice(last_up);
        s.outline(Gated::<G> { gate: core::slice::from_mut(&mut gate), up: &[up], rule: PhantomData });
        last.copy_from_slice(&gate[..last.len()]);
    }
}

/// Whole eights of a gate, in a loop that calls nothing, so that constants stay in registers.
struct Gated<'x, G> {
    gate: &'x mut [[f32; 8]],
    up: &'x [[f32; 8]],
    rule: PhantomData<G>,
}

impl<S: Simd, G: Gate> Op<S> for Gated<'_, G> {
    #[inline(always)]
    fn run(self, s: S) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            s.store(G::lanes(s, s.load(gate), s.load(up)), gate);
        }
    }
}

/// At most eight numbers; `last` makes room for fewer. So a loop has one body, for the last ones as well.
#[inline(always)]
fn load_some<S: Simd>(s: S, x: &[f32], last: &mut [f32; 8]) -> S::F {
    match x.as_array() {
        Some(x) => s.load(x),
        None => {
            last[..x.len()].copy_from_slice(x);
            s.load(last)
        }
    }
}

/// Stores as many of `lanes` as `to` has room for.
#[inline(always)]
fn store_some<S: Simd>(s: S, lanes: S::F, to: &mut [f32], last: &mut [f32; 8]) {
    match to.as_mut_array() {
        Some(to) => s.store(lanes, to),
        None => {
            s.store(lanes, last);
            to.copy_from_slice(&last[..to.len()]);
        }
    }
}

/// Rotates each pair of a head by the angle whose cosine and sine are given.
#[inline(always)]
pub(crate) fn rope<S: Simd>(_: S, head: &mut [f32], cos: &[f32], sin: &[f32], pairing: RopePairing) {
    let rotate = |a: &mut f32, b: &mut f32, cos: f32, sin: f32| {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    };
    let angles = cos.iter().zip(sin);
    match pairing {
        RopePairing::Interleaved => {
            for ([a, b], (cos, sin)) in head.as_chunks_mut().0.iter_mut().zip(angles) {
                rotate(a, b, *cos, *sin);
            }
        }
        RopePairing::Halves => {
            let (first, second) = head.split_at_mut(head.len() / 2);
            for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                rotate(a, b, *cos, *sin);
            }
        }
    }
}

/// The largest magnitude that is too small to quantize (2^-100): such a block counts as zero.
pub(super) const TINY: f32 = f32::from_bits((127 - 100) << 23);

/// Fills the quantized twin of every row. A block with a value that is not finite gets the scale NaN, so
/// that whatever it is multiplied with becomes NaN too.
#[inline(always)]
pub(crate) fn quantize<S: Simd>(s: S, acts: &mut ActivationsMut) {
    let (tokens, cols) = (acts.tokens(), acts.cols());
    if tokens == 0 || acts.scales.is_empty() {
        return;
    }
    let padded = (cols / BLOCK).next_multiple_of(GROUP);
    acts.scales.fill(0.0);
    acts.sums.fill(0.0);
    for token in 0..tokens {
        let values = acts.values[token * cols..][..cols].as_chunks::<BLOCK>().0;
        let quants = acts.quants[token * padded * BLOCK..][..padded * BLOCK].as_chunks_mut::<64>().0;
        let scales = &mut acts.scales[token * padded..][..padded];
        let sums = &mut acts.sums[token * padded..][..padded];
        quants[values.len() / 2..].as_flattened_mut().fill(0);
        for (b, values) in values.iter().enumerate() {
            let (scale, inverse) = scale_of(s.peak(from_ref(values)));
            let halves = quantize_block(s, values, inverse);
            scales[b] = scale;
            sums[b] = (s.sum_i8(&halves[0]) + s.sum_i8(&halves[1])) as f32;
            let (even_or_odd, pair) = (b % 2 * 16, &mut quants[b / 2]);
            pair[even_or_odd..][..16].copy_from_slice(&halves[0]);
            pair[even_or_odd + 32..][..16].copy_from_slice(&halves[1]);
        }
    }
}

/// `x`, which is finite, to the 11 significant bits of a half-precision number, but without its narrow range.
///
/// ggml's blocks of activations keep their scale as such a number. Its rounding moves the logits of small
/// models enough to change close choices, so a file would not say here what it says there.
#[inline(always)]
fn round_to_half_precision(x: f32) -> f32 {
    const DROPPED: u32 = 23 - 10;
    let bits = x.to_bits();
    let to_even = (1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1);
    f32::from_bits((bits + to_even) >> DROPPED << DROPPED)
}

/// The values of a block in eights.
#[inline(always)]
fn load_block<S: Simd>(s: S, values: &[f32; BLOCK]) -> [S::F; 4] {
    let ([a, b], _) = values.as_chunks::<16>() else { return [s.splat(0.0); 4] };
    let ([a, b], [c, d]) = (load16(s, a), load16(s, b));
    [a, b, c, d]
}

/// The scale of blocks with that [`Simd::peak`], and what the values are multiplied by.
#[inline(always)]
pub(super) fn scale_of(peak: u32) -> (f32, f32) {
    let peak = f32::from_bits(peak);
    if !peak.is_finite() {
        (f32::NAN, 0.0)
    } else if peak <= TINY {
        (0.0, 0.0)
    } else {
        (round_to_half_precision(peak / 127.0), 127.0 / peak)
    }
}

/// The two halves of one block, with the second of [`scale_of`]'s numbers.
#[inline(always)]
fn quantize_block<S: Simd>(s: S, values: &[f32; BLOCK], inverse: f32) -> [[i8; 16]; 2] {
    if inverse == 0.0 {
        return [[0; 16]; 2];
    }
    let ([a, b, c, d], inverse) = (load_block(s, values), s.splat(inverse));
    [s.round_i8([s.mul(a, inverse), s.mul(b, inverse)]), s.round_i8([s.mul(c, inverse), s.mul(d, inverse)])]
}
