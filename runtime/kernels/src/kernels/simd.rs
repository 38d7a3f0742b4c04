//! The few vector operations that all kernels are made of.
//!
//! Every algorithm is written once over [`Simd`] and instantiated for each instruction set, and every
//! operation here has one exact result: integers wrap nowhere, floating-point operations are single IEEE
//! operations in a fixed order, fused only where it says so. Therefore all instantiations agree with
//! [`generic::Scalar`](super::generic::Scalar) bit for bit (only the payload and sign of a NaN may
//! differ), and a model says the same on every machine. A later kernel that gives this up for speed has
//! to state its tolerance.
//!
//! Nothing here knows a weight type or a model.

/// Work that an instruction set can do in a function of its own.
pub(crate) trait Op<S> {
    /// Does it; to be inlined.
    fn run(self, s: S);
}

/// A token of an instruction set: holding one proves that the CPU has it.
pub(crate) trait Simd: Copy {
    /// Eight `f32`.
    type F: Copy;
    /// 32 bytes: 16 of the even block of a pair, then 16 of the odd block.
    type B: Copy;
    /// Partial integer sums of a pair of blocks.
    type P: Copy;
    /// Four 8-bit factors of a pair of blocks, one for each half of a block.
    type K: Copy;

    /// Runs `op` in a function of its own, compiled for the instruction set: a loop that needs all registers has them.
    fn outline<O: Op<Self>>(self, op: O);

    /// `x` in all lanes.
    fn splat(self, x: f32) -> Self::F;
    /// Each of five numbers in all lanes, where they are four times in a row, the last one in two rows. For constants
    /// that something is added to once.
    #[inline(always)]
    fn summands(self, x: &[[f32; 4]; 6]) -> [Self::F; 5] {
        [
            self.splat(x[0][0]),
            self.splat(x[1][0]),
            self.splat(x[2][0]),
            self.splat(x[3][0]),
            self.splat(x[4][0]),
        ]
    }
    /// Eight floats.
    fn load(self, x: &[f32; 8]) -> Self::F;
    /// Sixteen floats.
    #[inline(always)]
    fn load2(self, x: &[f32; 16]) -> [Self::F; 2] {
        let ([a, b], _) = x.as_chunks() else { return [self.splat(0.0); 2] };
        [self.load(a), self.load(b)]
    }
    /// Writes eight floats.
    fn store(self, x: Self::F, to: &mut [f32; 8]);
    /// Eight little-endian floats at any address.
    fn f32_bytes(self, bytes: &[u8; 32]) -> Self::F;
    /// Eight half-precision numbers at any address, widened.
    fn f16_bytes(self, bytes: &[u8; 16]) -> Self::F;
    /// Eight bfloat16 numbers at any address, widened.
    fn bf16_bytes(self, bytes: &[u8; 16]) -> Self::F;
    /// Eight half-precision numbers given by their bits, widened.
    fn f16_bits(self, bits: [u16; 8]) -> Self::F;
    /// Eight floats narrowed to half precision, to nearest even.
    fn to_f16(self, x: Self::F) -> [u16; 8];
    /// Eight small integers, converted.
    fn f32_from_u8(self, x: [u8; 8]) -> Self::F;

    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `sums[l][p] += w[l][r] * x[p][r]` for one `r` after the other, each rounded once; all have as many of them.
    #[inline(always)]
    fn add_products<const N: usize, const P: usize>(
        self,
        w: [&[f32]; N],
        x: [&[[f32; 16]]; P],
        sums: &mut [[[Self::F; 2]; P]; N],
    ) {
        add_products(self, w, x, sums);
    }
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { yes } else { no }`.
    fn select_less(self, a: Self::F, b: Self::F, yes: Self::F, no: Self::F) -> Self::F;
    /// `if a < x { x } else { a }` where `a` is a number; of two zeros either.
    fn higher(self, a: Self::F, x: Self::F) -> Self::F;
    /// The highest of eight numbers; of two zeros either.
    #[inline(always)]
    fn highest(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; 8];
        self.store(x, &mut lanes);
        lanes.into_iter().fold(f32::NEG_INFINITY, |a, x| if a < x { x } else { a })
    }
    /// Adds the low 9 bits of `n`'s representation to the exponent of `x`: `x * 2^n` where `n` was rounded
    /// to an integer by adding `1.5 * 2^23`, and nothing overflows.
    fn add_exponent(self, x: Self::F, n: Self::F) -> Self::F;
    /// The sum of all lanes as the balanced tree `((0+1)+(2+3))+((4+5)+(6+7))`.
    fn sum(self, x: Self::F) -> f32;
    /// [`Simd::sum`] of eight vectors.
    fn sums(self, x: [Self::F; 8]) -> Self::F;

    /// Lane `j` of vector `i` as lane `i` of vector `j`.
    #[inline(always)]
    fn transpose(self, x: [Self::F; 8]) -> [Self::F; 8] {
        let mut rows = [[0.0; 8]; 8];
        for (row, x) in rows.iter_mut().zip(x) {
            self.store(x, row);
        }
        core::array::from_fn(|j| self.load(&rows.map(|row| row[j])))
    }

    /// The largest bit pattern of `|x|` over blocks of 32 floats; at least `0x7f80_0000` if one is not finite.
    fn peak(self, x: &[[f32; 32]]) -> u32;
    /// 16 floats within ±127.5, rounded to nearest, ties to even.
    fn round_i8(self, x: [Self::F; 2]) -> [i8; 16];
    /// [`Simd::round_i8`] of `x * factor` in eights, each of which goes `side` behind the one before.
    #[inline(always)]
    fn round_blocks(self, x: &[[f32; 32]], factor: f32, side: usize, to: &mut [[i8; 8]]) {
        let mut to = to.iter_mut().step_by(side);
        for x in x.as_flattened().as_chunks().0 {
            let [a, b] = self.load2(x);
            let quants = self.round_i8([self.mul(a, self.splat(factor)), self.mul(b, self.splat(factor))]);
            for (from, to) in quants.as_chunks().0.iter().zip(&mut to) {
                *to = *from;
            }
        }
    }
    /// The sum of 16 integers.
    fn sum_i8(self, x: &[i8; 16]) -> i32;

    /// 16 bytes of the even and of the odd block.
    fn pair(self, even: &[u8; 16], odd: &[u8; 16]) -> Self::B;
    /// The same 16 bytes for both blocks.
    fn both(self, x: &[u8; 16]) -> Self::B;
    /// `x >> EVEN & mask` in the even block's bytes, `x >> ODD & mask` in the odd block's.
    /// `mask` must clear the bits that come from a neighbouring byte: `mask <= 0xff >> EVEN.max(ODD)`.
    fn bits<const EVEN: i32, const ODD: i32>(self, x: Self::B, mask: u8) -> Self::B;
    /// `x << 4` of bytes below 16.
    fn shl4(self, x: Self::B) -> Self::B;
    /// `a | b`.
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// `x - y` in each byte, as `i8`.
    fn sub_i8(self, x: Self::B, y: i8) -> Self::B;
    /// The number of `from` that each byte, below 16, stands for.
    #[cfg(feature = "low-bit")]
    fn choose(self, x: Self::B, from: &[i8; 16]) -> Self::B;
    /// Byte `i` of each block is 16 where bit `i` is set, else 0.
    fn spread(self, even: u16, odd: u16) -> Self::B;
    /// The factors of both halves of the even and the odd block.
    fn factors(self, even: [i8; 2], odd: [i8; 2]) -> Self::K;

    /// Products of a pair of blocks, `w[0]` the first halves and `w[1]` the second, weights within `0..=31`;
    /// `a` as [`super::Activations`] stores a pair, within ±127.
    fn dot_small(self, w: [Self::B; 2], a: &[i8; 64]) -> Self::P;
    /// As [`Simd::dot_small`] for any signed weights.
    fn dot_signed(self, w: [Self::B; 2], a: &[i8; 64]) -> Self::P;
    /// As [`Simd::dot_signed`] for weights within ±32, each half multiplied by its factor.
    fn dot_factors(self, w: [Self::B; 2], k: Self::K, a: &[i8; 64]) -> Self::P;
    /// No products.
    fn no_products(self) -> Self::P;
    /// The exact sums of eight blocks (four pairs), each below 2^24.
    fn totals(self, p: [Self::P; 4]) -> Self::F;
}

/// [`Simd::add_products`], as the fused multiplications and additions that it is made of.
#[inline(always)]
pub(crate) fn add_products<S: Simd, const N: usize, const P: usize>(
    s: S,
    w: [&[f32]; N],
    x: [&[[f32; 16]]; P],
    sums: &mut [[[S::F; 2]; P]; N],
) {
    let Some(rows) = x.first().map(|x| x.len()) else { return };
    let (w, x) = (w.map(|w| &w[..rows]), x.map(|x| &x[..rows]));
    for r in 0..rows {
        for p in 0..P {
            let x = s.load2(&x[p][r]);
            for l in 0..N {
                let w = s.splat(w[l][r]);
                sums[l][p] = [s.fma(w, x[0], sums[l][p][0]), s.fma(w, x[1], sums[l][p][1])];
            }
        }
    }
}
