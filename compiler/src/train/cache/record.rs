//! One position of the cache as bytes: always as many for the same vocabulary and form.
//!
//! Tokens are sorted and coded after Elias (1974) and Fano (1971): of `n` tokens below `v`, the lowest
//! `l = log2(v / n)` bits as they are, the rest in unary, in `n (l + 2)` bits or a little more, which is within
//! half a bit a token of what a set costs at best. Draws may name a token twice, so their counts need nothing
//! more. Probabilities are kept as fourth roots beside the largest one, which is finer where they are large.

use edge_runtime::format::{f16_to_f32, f32_to_f16};

use crate::train::loss::{SparseRow, Sparsity};

/// Bytes of a position that probabilities may fill up.
const BUDGET: usize = 118;

/// How the bytes of a position are used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layout {
    sparsity: Sparsity,
    vocab: usize,
    /// Bits of a token that are kept as they are.
    low: u32,
    /// Bits of a probability; 0 for draws.
    level: u32,
}

impl Layout {
    pub fn new(sparsity: Sparsity, vocab: usize) -> Self {
        let n = sparsity.tokens();
        let low = (vocab / n).max(1).ilog2();
        let layout = Self { sparsity, vocab, low, level: 0 };
        match sparsity {
            Sparsity::Sampled(_) => layout,
            Sparsity::TopK(_) => {
                let room = BUDGET.saturating_sub(layout.tokens_bytes() + 4) * 8 / n;
                Self { level: room.clamp(4, 8) as u32, ..layout }
            }
        }
    }

    /// Bytes of a position.
    pub fn bytes(&self) -> usize {
        let n = self.sparsity.tokens();
        match self.sparsity {
            Sparsity::TopK(_) => self.tokens_bytes() + 4 + (n * self.level as usize).div_ceil(8),
            Sparsity::Sampled(_) => self.tokens_bytes() + 2,
        }
    }

    fn tokens_bytes(&self) -> usize {
        (self.sparsity.tokens() * self.low as usize + self.unary_bits()).div_ceil(8)
    }

    /// Bits of the unary part: a one for each token, a zero for each step of the upper bits.
    fn unary_bits(&self) -> usize {
        self.sparsity.tokens() + ((self.vocab - 1) >> self.low)
    }

    /// The bytes of `row`, which must be what the layout's form keeps of a distribution.
    pub fn encode(&self, row: &SparseRow) -> Vec<u8> {
        let mut bytes = vec![0; self.bytes()];
        let n = self.sparsity.tokens();
        let draws = |p: f32| match self.sparsity {
            Sparsity::TopK(_) => 1,
            Sparsity::Sampled(n) => (p * n as f32).round() as usize,
        };
        let tokens =
            row.ids.iter().zip(&row.probabilities).flat_map(|(id, p)| std::iter::repeat_n(*id, draws(*p)));
        let unary = n * self.low as usize;
        for (index, id) in tokens.take(n).enumerate() {
            put(&mut bytes, index * self.low as usize, id, self.low);
            put(&mut bytes, unary + (id as usize >> self.low) + index, 1, 1);
        }
        let rest = &mut bytes[self.tokens_bytes()..];
        match self.sparsity {
            Sparsity::Sampled(_) => rest.copy_from_slice(&f32_to_f16(row.rest).to_le_bytes()),
            Sparsity::TopK(_) => {
                let largest = row.probabilities.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
                let logarithm = |p: f32| f32_to_f16(p.max(f32::MIN_POSITIVE).ln()).to_le_bytes();
                rest[..2].copy_from_slice(&logarithm(largest));
                rest[2..4].copy_from_slice(&logarithm(row.rest));
                for (index, p) in row.probabilities.iter().enumerate() {
                    let level = (p / largest).powf(0.25) * self.levels();
                    // Never 0: what was among the likeliest is not impossible.
                    let level = (level.round() as u32).max(1);
                    put(&mut rest[4..], index * self.level as usize, level, self.level);
                }
            }
        }
        bytes
    }

    fn levels(&self) -> f32 {
        ((1u32 << self.level) - 1) as f32
    }

    /// The row of these bytes; `None` if no row has them.
    pub fn decode(&self, bytes: &[u8]) -> Option<SparseRow> {
        let ids = self.tokens(bytes)?;
        let rest = &bytes[self.tokens_bytes()..];
        let half = |at: usize| f16_to_f32(u16::from_le_bytes([rest[at], rest[at + 1]]));
        let row = match self.sparsity {
            Sparsity::Sampled(n) => {
                let mut row = SparseRow { rest: half(0), ..SparseRow::default() };
                for draws in ids.chunk_by(|a, b| a == b) {
                    row.ids.push(draws[0]);
                    row.probabilities.push(draws.len() as f32 / n as f32);
                }
                row
            }
            Sparsity::TopK(_) => {
                let level = |index| get(&rest[4..], index * self.level as usize, self.level) as f32;
                let shares: Vec<f32> =
                    (0..ids.len()).map(|index| (level(index) / self.levels()).powi(4)).collect();
                let (largest, bucket) = (half(0).exp(), half(2).exp());
                let total = largest * shares.iter().sum::<f32>() + bucket;
                let probabilities = shares.into_iter().map(|share| share * largest / total).collect();
                SparseRow { ids, probabilities, rest: bucket / total }
            }
        };
        let numbers = row.probabilities.iter().chain([&row.rest]).all(|x| x.is_finite() && *x >= 0.0);
        numbers.then_some(row)
    }

    /// Exactly as many tokens of the vocabulary as there should be, in order.
    fn tokens(&self, bytes: &[u8]) -> Option<Vec<u32>> {
        let n = self.sparsity.tokens();
        let unary = n * self.low as usize;
        let mut ids = Vec::with_capacity(n);
        for bit in (0..self.unary_bits()).filter(|bit| get(bytes, unary + bit, 1) == 1) {
            let index = ids.len();
            if index == n {
                return None;
            }
            let id = (((bit - index) as u32) << self.low) | get(bytes, index * self.low as usize, self.low);
            ids.push(id);
        }
        let ordered = |pair: &[u32]| match self.sparsity {
            Sparsity::TopK(_) => pair[0] < pair[1],
            Sparsity::Sampled(_) => pair[0] <= pair[1],
        };
        let inside = ids.last().is_some_and(|id| (*id as usize) < self.vocab);
        (ids.len() == n && inside && ids.windows(2).all(ordered)).then_some(ids)
    }
}

/// Sets `bits` bits from bit `at` on, lowest first, where all are 0.
fn put(bytes: &mut [u8], at: usize, value: u32, bits: u32) {
    for bit in 0..bits as usize {
        let one = ((value >> bit) & 1) as u8;
        bytes[(at + bit) / 8] |= one << ((at + bit) % 8);
    }
}

fn get(bytes: &[u8], at: usize, bits: u32) -> u32 {
    (0..bits as usize)
        .map(|bit| u32::from((bytes[(at + bit) / 8] >> ((at + bit) % 8)) & 1) << bit)
        .fold(0, |value, bit| value | bit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::loss::{Head, SparseTargets};
    use crate::train::ops::check;

    fn rows(sparsity: Sparsity, vocab: usize) -> Vec<SparseRow> {
        let head = Head { weight: (check::matrix(2, vocab, 8) * 4.0).unwrap(), tiles: None, soft_cap: 0.0 };
        SparseTargets::of(&check::matrix(1, 9, 8), &head, sparsity, 1.0, 3, 0, &[0; 9]).unwrap().rows
    }

    #[test]
    fn fifty_tokens_fit_into_120_bytes_whatever_the_vocabulary() {
        for vocab in [50, 32_000, 49_152, 128_256, 151_936, 262_144] {
            for sparsity in [Sparsity::TopK(50), Sparsity::Sampled(50)] {
                // Beside its checksum and its number in a window of 64 tokens or more.
                let bytes = Layout::new(sparsity, vocab).bytes();
                assert!(bytes as f64 + 24.0 / 64.0 <= 120.0, "{sparsity} of {vocab}: {bytes} bytes");
            }
        }
    }

    #[test]
    fn draws_come_back_and_probabilities_nearly() {
        for (vocab, n) in [(700, 50), (64, 50), (50, 50), (3000, 1)] {
            let layout = Layout::new(Sparsity::Sampled(n), vocab);
            for row in rows(Sparsity::Sampled(n), vocab) {
                let found = layout.decode(&layout.encode(&row)).unwrap();
                assert_eq!((&found.ids, &found.probabilities), (&row.ids, &row.probabilities));
                assert!((found.rest - row.rest).abs() < 1e-3 * row.rest, "{} {}", found.rest, row.rest);
            }
            let layout = Layout::new(Sparsity::TopK(n), vocab);
            for row in rows(Sparsity::TopK(n), vocab) {
                let found = layout.decode(&layout.encode(&row)).unwrap();
                assert_eq!(found.ids, row.ids);
                let total = found.probabilities.iter().sum::<f32>() + found.rest;
                assert!((total - 1.0).abs() < 1e-5, "{total}");
                let outcomes = |row: &SparseRow| {
                    let all: Vec<f64> =
                        row.probabilities.iter().chain([&row.rest]).map(|p| f64::from(*p)).collect();
                    all
                };
                let kl: f64 = outcomes(&row)
                    .into_iter()
                    .zip(outcomes(&found))
                    .filter(|(p, _)| *p > 1e-30)
                    .map(|(p, q)| p * (p / q).ln())
                    .sum();
                assert!(kl.abs() < 2e-3, "{vocab} {n}: KL {kl}");
            }
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        for sparsity in [Sparsity::TopK(7), Sparsity::Sampled(7)] {
            let layout = Layout::new(sparsity, 300);
            for seed in 0..2000 {
                let noise = check::noise(seed, layout.bytes());
                let bytes: Vec<u8> = noise.iter().map(|x| (x * 128.0) as i8 as u8).collect();
                if let Some(row) = layout.decode(&bytes) {
                    assert!(row.ids.iter().all(|id| *id < 300));
                }
            }
            assert!(layout.decode(&vec![0; layout.bytes()]).is_none());
            assert!(layout.decode(&vec![255; layout.bytes()]).is_none());
        }
    }
}
