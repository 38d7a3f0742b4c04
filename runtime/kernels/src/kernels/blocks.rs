//! How each quantized weight type unpacks into vectors: groups of 8 blocks of 32 weights.
//!
//! A weight of block `b` is `scale[b] * (q - BIAS) + min[b]`. The layouts are ggml's; the scalar twin of
//! everything here is [`dequantize_row`](super::dequantize_row).

use super::activations::GROUP;
#[cfg(feature = "low-bit")]
use super::generic::{IQ4_NL_VALUES, q3_k_scale};
use super::simd::Simd;

/// Eight blocks of weights; those beyond a row's end have scale and minimum 0.
pub(crate) struct Group<S: Simd, W: Format> {
    /// Integer weights, two blocks each.
    pub pairs: [W::Pair<S>; 4],
    /// Factor of each block.
    pub scale: S::F,
    /// Offset of each block, or its factor with [`Format::HAS_HALF_MINS`]; otherwise 0.
    pub min: S::F,
}

/// A quantized weight type.
pub(crate) trait Format: Sized {
    /// Subtracted from every integer weight.
    const BIAS: f32;
    /// Whether weights have an offset.
    const HAS_MIN: bool;
    /// Whether every 16 weights have an integer that, times [`Group::min`], is their offset.
    #[cfg(feature = "low-bit")]
    const HAS_HALF_MINS: bool = false;
    /// The integer weights of two blocks.
    type Pair<S: Simd>: Copy;

    /// Bytes of a group.
    const GROUP_BYTES: usize;

    /// The group that has these bytes.
    fn group<S: Simd>(s: S, group: &[u8]) -> Group<S, Self>;

    /// The products of a pair with its activations.
    fn dot<S: Simd>(s: S, pair: Self::Pair<S>, a: &[i8; 64]) -> S::P;

    /// The products of the integers of [`Format::HAS_HALF_MINS`] with a pair's activations.
    #[cfg(feature = "low-bit")]
    #[inline(always)]
    fn mins<S: Simd>(s: S, _: Self::Pair<S>, _: &[i8; 64]) -> S::P {
        s.no_products()
    }
}

/// 16 bytes of a block. The callers' constants are within their blocks.
#[inline(always)]
fn bytes16<const N: usize>(block: &[u8; N], at: usize) -> &[u8; 16] {
    block[at..at + 16].as_array().unwrap_or(&[0; 16])
}

/// The little-endian 16 bits at byte `at`.
#[inline(always)]
fn bits16<const N: usize>(block: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// The little-endian 32 bits at byte `at`.
#[inline(always)]
fn bits32<const N: usize>(block: &[u8; N], at: usize) -> u32 {
    u32::from(bits16(block, at)) | u32::from(bits16(block, at + 2)) << 16
}

/// Nibbles of two blocks of 32 whose 16 bytes start at byte `at`: low nibbles are the first halves.
#[inline(always)]
fn nibbles<S: Simd, const N: usize>(s: S, even: &[u8; N], odd: &[u8; N], at: usize) -> [S::B; 2] {
    let bytes = s.pair(bytes16(even, at), bytes16(odd, at));
    [s.bits::<0, 0>(bytes, 15), s.bits::<4, 4>(bytes, 15)]
}

/// [`nibbles`] with a fifth bit for each weight from the 32 bits at byte `high`.
#[inline(always)]
fn five_bits<S: Simd, const N: usize>(
    s: S,
    even: &[u8; N],
    odd: &[u8; N],
    high: usize,
    at: usize,
) -> [S::B; 2] {
    let [first, second] = nibbles(s, even, odd, at);
    [
        s.or(first, s.spread(bits16(even, high), bits16(odd, high))),
        s.or(second, s.spread(bits16(even, high + 2), bits16(odd, high + 2))),
    ]
}

/// Implements [`Format`] for a type with blocks of 32.
macro_rules! small_blocks {
    ($name:ident, $bytes:literal, bias $bias:literal, min $min:expr, $dot:ident,
     |$s:ident, $even:ident, $odd:ident| $pair:expr) => {
        #[doc = concat!("Blocks of ", $bytes, " bytes.")]
        pub(crate) struct $name;

        impl Format for $name {
            const BIAS: f32 = $bias;
            const HAS_MIN: bool = Option::<usize>::is_some(&$min);
            const GROUP_BYTES: usize = GROUP * $bytes;
            type Pair<S: Simd> = [S::B; 2];

            #[inline(always)]
            fn group<S: Simd>(s: S, group: &[u8]) -> Group<S, Self> {
                #[inline(always)]
                fn pair<S: Simd>($s: S, $even: &[u8; $bytes], $odd: &[u8; $bytes]) -> [S::B; 2] {
                    $pair
                }
                let b: &[[u8; $bytes]; GROUP] =
                    group.as_chunks().0.first_chunk().unwrap_or(&[[0; $bytes]; GROUP]);
                Group {
                    pairs: [
                        pair(s, &b[0], &b[1]),
                        pair(s, &b[2], &b[3]),
                        pair(s, &b[4], &b[5]),
                        pair(s, &b[6], &b[7]),
                    ],
                    scale: s.f16_bits(halves(b, 0)),
                    min: match $min {
                        Some(at) => s.f16_bits(halves(b, at)),
                        None => s.splat(0.0),
                    },
                }
            }

            #[inline(always)]
            fn dot<S: Simd>(s: S, pair: [S::B; 2], a: &[i8; 64]) -> S::P {
                s.$dot(pair, a)
            }
        }
    };
}

/// The 16 bits at byte `at` of eight blocks.
#[inline(always)]
fn halves<const N: usize>(b: &[[u8; N]; 8], at: usize) -> [u16; 8] {
    [
        bits16(&b[0], at),
        bits16(&b[1], at),
        bits16(&b[2], at),
        bits16(&b[3], at),
        bits16(&b[4], at),
        bits16(&b[5], at),
        bits16(&b[6], at),
        bits16(&b[7], at),
    ]
}

small_blocks!(Q4_0, 18, bias 8.0, min None, dot_small, |s, even, odd| nibbles(s, even, odd, 2));
small_blocks!(Q4_1, 20, bias 0.0, min Some(2), dot_small, |s, even, odd| nibbles(s, even, odd, 4));
small_blocks!(Q5_0, 22, bias 16.0, min None, dot_small, |s, even, odd| five_bits(s, even, odd, 2, 6));
small_blocks!(Q5_1, 24, bias 0.0, min Some(2), dot_small, |s, even, odd| five_bits(s, even, odd, 4, 8));
small_blocks!(Q8_0, 34, bias 0.0, min None, dot_signed, |s, even, odd| [
    s.pair(bytes16(even, 2), bytes16(odd, 2)),
    s.pair(bytes16(even, 18), bytes16(odd, 18)),
]);

/// The super-block of 256 weights that a group is.
#[inline(always)]
fn super_block<const N: usize>(group: &[u8]) -> &[u8; N] {
    group.first_chunk().unwrap_or(&[0; N])
}

/// The scales and minimums of the 8 blocks of a Q4_K or Q5_K super-block, whose first 16 bytes are two
/// half-precision factors and 12 bytes of packed 6-bit numbers: four bytes each of low scales, of low
/// minimums, and of nibbles for the high ones, whose upper bits are in the upper bits of the first two.
#[inline(always)]
fn scales_and_mins<S: Simd, const N: usize>(s: S, block: &[u8; N]) -> (S::F, S::F) {
    let (low_scales, low_mins, high) = (bits32(block, 4), bits32(block, 8), bits32(block, 12));
    let join = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).to_le_bytes();
    let upper = |x: u32| x >> 2 & 0x3030_3030;
    let scales = join(low_scales & 0x3f3f_3f3f, high & 0x0f0f_0f0f | upper(low_scales));
    let mins = join(low_mins & 0x3f3f_3f3f, high >> 4 & 0x0f0f_0f0f | upper(low_mins));
    let factors = s.f16_bits([bits16(block, 0), bits16(block, 2), 0, 0, 0, 0, 0, 0]);
    let mut factor = [0.0; 8];
    s.store(factors, &mut factor);
    (s.mul(s.splat(factor[0]), s.f32_from_u8(scales)), s.mul(s.splat(-factor[1]), s.f32_from_u8(mins)))
}

/// Nibbles of a Q4_K or Q5_K super-block from byte `at`: the even block low, the odd block high.
#[inline(always)]
fn split_nibbles<S: Simd, const N: usize>(s: S, block: &[u8; N], at: usize) -> [S::B; 2] {
    [s.bits::<0, 4>(s.both(bytes16(block, at)), 15), s.bits::<0, 4>(s.both(bytes16(block, at + 16)), 15)]
}

/// Super-blocks of 144 bytes.
pub(crate) struct Q4K;

impl Format for Q4K {
    const BIAS: f32 = 0.0;
    const HAS_MIN: bool = true;
    const GROUP_BYTES: usize = 144;
    type Pair<S: Simd> = [S::B; 2];

    #[inline(always)]
    fn group<S: Simd>(s: S, group: &[u8]) -> Group<S, Self> {
        let block: &[u8; 144] = super_block(group);
        let (scale, min) = scales_and_mins(s, block);
        let pairs = [
            split_nibbles(s, block, 16),
            split_nibbles(s, block, 48),
            split_nibbles(s, block, 80),
            split_nibbles(s, block, 112),
        ];
        Group { pairs, scale, min }
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, pair: [S::B; 2], a: &[i8; 64]) -> S::P {
        s.dot_small(pair, a)
    }
}

/// Super-blocks of 176 bytes.
pub(crate) struct Q5K;

/// Pair of a Q5_K super-block whose fifth bits are bits `EVEN` and `ODD` of bytes 16 to 48.
#[inline(always)]
fn q5k_pair<S: Simd, const EVEN: i32, const ODD: i32>(s: S, block: &[u8; 176], at: usize) -> [S::B; 2] {
    let [first, second] = split_nibbles(s, block, at);
    let fifth = |at: usize| s.shl4(s.bits::<EVEN, ODD>(s.both(bytes16(block, at)), 1));
    [s.or(first, fifth(16)), s.or(second, fifth(32))]
}

impl Format for Q5K {
    const BIAS: f32 = 0.0;
    const HAS_MIN: bool = true;
    const GROUP_BYTES: usize = 176;
    type Pair<S: Simd> = [S::B; 2];

    #[inline(always)]
    fn group<S: Simd>(s: S, group: &[u8]) -> Group<S, Self> {
        let block: &[u8; 176] = super_block(group);
        let (scale, min) = scales_and_mins(s, block);
        let pairs = [
            q5k_pair::<S, 0, 1>(s, block, 48),
            q5k_pair::<S, 2, 3>(s, block, 80),
            q5k_pair::<S, 4, 5>(s, block, 112),
            q5k_pair::<S, 6, 7>(s, block, 144),
        ];
        Group { pairs, scale, min }
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, pair: [S::B; 2], a: &[i8; 64]) -> S::P {
        s.dot_small(pair, a)
    }
}

/// Super-blocks of 210 bytes, with an integer factor for every 16 weights.
pub(crate) struct Q6K;

/// Halves (16 weights, from `at`) of pair 0 (`LOW` 0, `EVEN` 0, `ODD` 2) or pair 1 (4, 4, 6) of the 128
/// weights whose low nibbles start at byte `low` and whose upper bits start at byte `high`.
#[inline(always)]
fn q6k_half<S: Simd, const LOW: i32, const EVEN: i32, const ODD: i32>(
    s: S,
    block: &[u8; 210],
    low: usize,
    high: usize,
) -> S::B {
    let nibbles = s.bits::<LOW, LOW>(s.pair(bytes16(block, low), bytes16(block, low + 32)), 15);
    let upper = s.shl4(s.bits::<EVEN, ODD>(s.both(bytes16(block, high)), 3));
    s.sub_i8(s.or(nibbles, upper), 32)
}

/// A pair of blocks of 32 of one half (`part`) of a super-block, and their factors.
#[inline(always)]
fn q6k_pair<S: Simd, const LOW: i32, const EVEN: i32, const ODD: i32>(
    s: S,
    block: &[u8; 210],
    part: usize,
) -> ([S::B; 2], S::K) {
    let (low, high, factors) = (part * 64, 128 + part * 32, 192 + part * 8 + LOW as usize);
    let weights = [
        q6k_half::<S, LOW, EVEN, ODD>(s, block, low, high),
        q6k_half::<S, LOW, EVEN, ODD>(s, block, low + 16, high + 16),
    ];
    let even = [block[factors] as i8, block[factors + 1] as i8];
    let odd = [block[factors + 2] as i8, block[factors + 3] as i8];
    (weights, s.factors(even, odd))
}

impl Format for Q6K {
    const BIAS: f32 = 0.0;
    const HAS_MIN: bool = false;
    const GROUP_BYTES: usize = 210;
    type Pair<S: Simd> = ([S::B; 2], S::K);

    #[inline(always)]
    fn group<S: Simd>(s: S, group: &[u8]) -> Group<S, Self> {
        let block: &[u8; 210] = super_block(group);
        let d = s.f16_bits([bits16(block, 208); 8]);
        let pairs = [
            q6k_pair::<S, 0, 0, 2>(s, block, 0),
            q6k_pair::<S, 4, 4, 6>(s, block, 0),
            q6k_pair::<S, 0, 0, 2>(s, block, 1),
            q6k_pair::<S, 4, 4, 6>(s, block, 1),
        ];
        Group { pairs, scale: d, min: s.splat(0.0) }
    }

    #[inline(always)]
    fn dot<S: Simd>(s: S, pair: ([S::B; 2], S::K), a: &[i8; 64]) -> S::P {
        s.dot_factors(pair.0, pair.1, a)
    }
}

#[cfg(feature = "low-bit")]
pub(crate) use low_bit::{IQ4NL, Q2K, Q3K};

/// Types that a device without such files does not need.
#[cfg(feature = "low-bit")]
mod low_bit {
    use super::*;

    /// 16 two-bit weights of both blocks of a pair, which share bytes: bits `EVEN` and `ODD` and the next ones.
    #[inline(always)]
    fn two_bits<S: Simd, const EVEN: i32, const ODD: i32>(s: S, bytes: &[u8; 16]) -> S::B {
        s.bits::<EVEN, ODD>(s.both(bytes), 3)
    }

    /// The factors of both halves of two blocks, from `first` of the 16 of a super-block.
    #[inline(always)]
    fn factors<S: Simd>(s: S, all: [i8; 16], first: usize) -> S::K {
        s.factors([all[first], all[first + 1]], [all[first + 2], all[first + 3]])
    }

    /// Super-blocks of 84 bytes, with an integer factor and an integer minimum for every 16 weights.
    pub(crate) struct Q2K;

    impl Format for Q2K {
        const BIAS: f32 = 0.0;
        const HAS_MIN: bool = false;
        const HAS_HALF_MINS: bool = true;
        const GROUP_BYTES: usize = 84;
        /// Weights, factors, minimums.
        type Pair<S: Simd> = ([S::B; 2], S::K, S::K);

        #[inline(always)]
        fn group<S: Simd>(s: S, group: &[u8]) -> Group<S, Self> {
            let block: &[u8; 84] = super_block(group);
            let packed = bytes16(block, 0);
            let (scales, mins) = (packed.map(|byte| (byte & 15) as i8), packed.map(|byte| (byte >> 4) as i8));
            let pair =
                |weights: [S::B; 2], first| (weights, factors(s, scales, first), factors(s, mins, first));
            let bytes = |at| bytes16(block, at);
            let pairs = [
                pair([two_bits::<S, 0, 2>(s, bytes(16)), two_bits::<S, 0, 2>(s, bytes(32))], 0),
                pair([two_bits::<S, 4, 6>(s, bytes(16)), two_bits::<S, 4, 6>(s, bytes(32))], 4),
                pair([two_bits::<S, 0, 2>(s, bytes(48)), two_bits::<S, 0, 2>(s, bytes(64))], 8),
                pair([two_bits::<S, 4, 6>(s, bytes(48)), two_bits::<S, 4, 6>(s, bytes(64))], 12),
            ];
            let min = s.sub(s.splat(0.0), s.f16_bits([bits16(block, 82); 8]));
            Group { pairs, scale: s.f16_bits([bits16(block, 80); 8]), min }
        }

        #[inline(always)]
        fn dot<S: Simd>(s: S, (weights, scales, _): Self::Pair<S>, a: &[i8; 64]) -> S::P {
            s.dot_factors(weights, scales, a)
        }

        #[inline(always)]
        fn mins<S: Simd>(s: S, (_, _, mins): Self::Pair<S>, a: &[i8; 64]) -> S::P {
            s.dot_factors([s.both(&[1; 16]); 2], mins, a)
        }
    }

    /// Super-blocks of 110 bytes, with an integer factor for every 16 weights.
    pub(crate) struct Q3K;

    /// 16 weights of both blocks of a pair: two low bits as [`two_bits`] has them, and the third from bits `HIGH_EVEN`
    /// and `HIGH_ODD` of `high`; less 4.
    #[inline(always)]
    fn three_bits<S: Simd, const EVEN: i32, const ODD: i32, const HIGH_EVEN: i32, const HIGH_ODD: i32>(
        s: S,
        low: &[u8; 16],
        high: &[u8; 16],
    ) -> S::B {
        let third = s.shl4(s.bits::<HIGH_EVEN, HIGH_ODD>(s.both(high), 1));
        s.sub_i8(s.or(two_bits::<S, EVEN, ODD>(s, low), s.bits::<2, 2>(third, 4)), 4)
    }

    impl Format for Q3K {
        const BIAS: f32 = 0.0;
        const HAS_MIN: bool = false;
        const GROUP_BYTES: usize = 110;
        type Pair<S: Simd> = ([S::B; 2], S::K);

        #[inline(always)]
        fn group<S: Simd>(s: S, group: &[u8]) -> Group<S, Self> {
            let block: &[u8; 110] = super_block(group);
            let scales: [i8; 16] = core::array::from_fn(|i| q3_k_scale(block, i));
            let bytes = |at| bytes16(block, at);
            let (first, second) = (bytes(0), bytes(16));
            let pairs = [
                (
                    [
                        three_bits::<S, 0, 2, 0, 1>(s, bytes(32), first),
                        three_bits::<S, 0, 2, 0, 1>(s, bytes(48), second),
                    ],
                    0,
                ),
                (
                    [
                        three_bits::<S, 4, 6, 2, 3>(s, bytes(32), first),
                        three_bits::<S, 4, 6, 2, 3>(s, bytes(48), second),
                    ],
                    4,
                ),
                (
                    [
                        three_bits::<S, 0, 2, 4, 5>(s, bytes(64), first),
                        three_bits::<S, 0, 2, 4, 5>(s, bytes(80), second),
                    ],
                    8,
                ),
                (
                    [
                        three_bits::<S, 4, 6, 6, 7>(s, bytes(64), first),
                        three_bits::<S, 4, 6, 6, 7>(s, bytes(80), second),
                    ],
                    12,
                ),
            ];
            let pairs = pairs.map(|(weights, first)| (weights, factors(s, scales, first)));
            Group { pairs, scale: s.f16_bits([bits16(block, 108); 8]), min: s.splat(0.0) }
        }

        #[inline(always)]
        fn dot<S: Simd>(s: S, (weights, scales): Self::Pair<S>, a: &[i8; 64]) -> S::P {
            s.dot_factors(weights, scales, a)
        }
    }

    /// Nibbles of two blocks that choose from 16 numbers.
    #[inline(always)]
    fn chosen<S: Simd>(s: S, even: &[u8; 18], odd: &[u8; 18]) -> [S::B; 2] {
        nibbles(s, even, odd, 2).map(|nibbles| s.choose(nibbles, &IQ4_NL_VALUES))
    }

    small_blocks!(IQ4NL, 18, bias 0.0, min None, dot_signed, |s, even, odd| chosen(s, even, odd));
}
