//! A small random generator whose whole state is one number.
//!
//! Data order and initial weights must come out the same on every machine and after every resume, so
//! they do not depend on a library's idea of a default generator. Never used for secrets.

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
/// a Weyl sequence through a bijective mixer. Passes BigCrush; period 2^64.
#[derive(Clone, Debug)]
pub struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    /// The stream number `stream` of `seed`; different pairs give unrelated sequences.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut root = Self { state: seed };
        let offset = root.next_u64();
        Self { state: offset ^ Self { state: stream }.next_u64() }
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound` (0 for an empty range); the bias is below `bound / 2^64`.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next_u64()) * bound as u128) >> 64) as usize
    }

    /// Uniform in `(0, 1]`, 53 bits.
    pub fn unit(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Fills `out` with normal deviates of mean 0 and the given standard deviation (Box and Muller, 1958).
    pub fn fill_normal(&mut self, out: &mut [f32], deviation: f64) {
        for pair in out.chunks_mut(2) {
            let radius = deviation * (-2.0 * self.unit().ln()).sqrt();
            let (sin, cos) = (2.0 * core::f64::consts::PI * self.unit()).sin_cos();
            for (slot, value) in pair.iter_mut().zip([radius * cos, radius * sin]) {
                *slot = value as f32;
            }
        }
    }

    /// Puts `items` into a uniformly random order (Fisher and Yates, Durstenfeld's variant).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_sequence() {
        // First outputs of the reference implementation (prng.di.unimi.it/splitmix64.c) for state
        // 1234567.
        let mut random = SplitMix64 { state: 1_234_567 };
        let expected = [
            6_457_827_717_110_365_317u64,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ];
        assert_eq!(expected, core::array::from_fn(|_| random.next_u64()));
    }

    #[test]
    fn normal_moments() {
        let mut values = vec![0f32; 200_001];
        SplitMix64::new(7, 0).fill_normal(&mut values, 0.02);
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        let tail = values.iter().filter(|x| x.abs() > 0.04).count() as f64 / n;
        assert!(mean.abs() < 2e-4, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 2e-4, "{variance}");
        assert!((tail - 0.0455).abs() < 2e-3, "{tail}");
    }

    #[test]
    fn shuffle_is_a_permutation_and_depends_on_the_stream() {
        let order = |stream| {
            let mut items: Vec<usize> = (0..100).collect();
            SplitMix64::new(3, stream).shuffle(&mut items);
            items
        };
        let mut sorted = order(0);
        assert_ne!(sorted, order(1));
        assert_eq!(sorted, order(0));
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }
}
