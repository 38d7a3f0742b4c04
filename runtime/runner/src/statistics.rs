//! Mean, deviation and percentiles of timed samples.

use serde::Serialize;

/// Mean and standard deviation of a few samples.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Arithmetic mean; 0 without samples.
    pub mean: f64,
    /// Standard deviation of a sample (divided by n - 1); 0 below two samples.
    pub deviation: f64,
}

impl Statistics {
    /// Of `samples`.
    pub fn of(samples: &[f64]) -> Self {
        let count = samples.len() as f64;
        if samples.is_empty() {
            return Self::default();
        }
        let mean = samples.iter().sum::<f64>() / count;
        let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
        let deviation = if samples.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 };
        Self { mean, deviation }
    }
}

/// How long the slow ones took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    /// Half of the samples took at most this long.
    pub p50_ns: u64,
    /// 95 of 100.
    pub p95_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
}

impl Percentiles {
    /// Of `samples`, each by the nearest rank: the smallest sample that so many do not exceed.
    pub fn of(samples: &[u64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable();
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
            sorted.get(rank).copied().unwrap_or(0)
        };
        Self { p50_ns: rank(50), p95_ns: rank(95), p99_ns: rank(99) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_is_that_of_a_sample() {
        let found = Statistics::of(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!(found.mean, 5.0);
        assert!((found.deviation - (32.0f64 / 7.0).sqrt()).abs() < 1e-12);
        assert_eq!(Statistics::of(&[3.0]), Statistics { mean: 3.0, deviation: 0.0 });
        assert_eq!(Statistics::of(&[]), Statistics::default());
    }

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(Percentiles::of(&samples), Percentiles { p50_ns: 50, p95_ns: 95, p99_ns: 99 });
        assert_eq!(Percentiles::of(&[7]), Percentiles { p50_ns: 7, p95_ns: 7, p99_ns: 7 });
        assert_eq!(Percentiles::of(&[]), Percentiles::default());
    }
}
