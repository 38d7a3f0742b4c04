//! Filters against sets worked out by hand, draws against the probabilities they must have.

extern crate std;

use super::*;
use std::collections::BTreeSet;
use std::vec;
use std::vec::Vec;

/// Warm, all filters off.
const OPEN: SamplerConfig = SamplerConfig {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repeat_penalty: 1.0,
    repeat_window: 0,
    seed: 7,
};

fn ln(probabilities: &[f64]) -> Vec<f32> {
    // A shift changes no distribution.
    probabilities.iter().map(|p| (p.ln() + 3.0) as f32).collect()
}

fn draws(config: SamplerConfig, logits: &[f32], count: usize) -> Vec<u32> {
    let mut sampler = Sampler::new(config).unwrap();
    let mut scratch = vec![9; logits.len()];
    (0..count).map(|_| sampler.sample(&mut logits.to_vec(), &[], &mut scratch).unwrap()).collect()
}

fn support(config: SamplerConfig, logits: &[f32]) -> Vec<u32> {
    draws(config, logits, 4000).into_iter().collect::<BTreeSet<_>>().into_iter().collect()
}

/// Pearson's chi-square of draws against probabilities.
fn chi_square(draws: &[u32], probabilities: &[f64]) -> f64 {
    let mut counts = vec![0.0; probabilities.len()];
    draws.iter().for_each(|token| counts[*token as usize] += 1.0);
    let expected = probabilities.iter().map(|p| p * draws.len() as f64);
    counts.iter().zip(expected).map(|(count, expected)| (count - expected).powi(2) / expected).sum()
}

const P: [f64; 5] = [0.05, 0.4, 0.2, 0.3, 0.05];

#[test]
fn draws_follow_the_distribution_and_the_temperature() {
    // 4 degrees of freedom: 18.5 is exceeded once in a thousand times.
    for seed in 0..8 {
        let config = SamplerConfig { seed, ..OPEN };
        let x = chi_square(&draws(config, &ln(&P), 20_000), &P);
        assert!(x < 18.5, "seed {seed}: {x}");
        // At temperature 1/2 probabilities are squared.
        let squared: f64 = P.iter().map(|p| p * p).sum();
        let cold = P.map(|p| p * p / squared);
        let x = chi_square(&draws(SamplerConfig { temperature: 0.5, ..config }, &ln(&P), 20_000), &cold);
        assert!(x < 18.5, "seed {seed}, cold: {x}");
        assert!(chi_square(&draws(config, &ln(&P), 20_000), &cold) > 100.0, "the check can fail");
    }
}

#[test]
fn what_is_left_keeps_its_proportions() {
    let config = SamplerConfig { top_k: 3, ..OPEN };
    let kept: Vec<u32> = draws(config, &ln(&P), 20_000).iter().map(|token| token - 1).collect();
    // 2 degrees of freedom: 13.8 is exceeded once in a thousand times.
    assert!(chi_square(&kept, &[0.4 / 0.9, 0.2 / 0.9, 0.3 / 0.9]) < 13.8);
}

#[test]
fn filters_keep_exactly_their_sets() {
    let logits = ln(&P);
    let top_k = |top_k| support(SamplerConfig { top_k, ..OPEN }, &logits);
    assert_eq!(top_k(1), [1]);
    assert_eq!(top_k(2), [1, 3]);
    assert_eq!(top_k(3), [1, 2, 3]);
    // Of equals the first.
    assert_eq!(top_k(4), [0, 1, 2, 3]);
    assert_eq!(top_k(99), [0, 1, 2, 3, 4]);
    let top_p = |top_p| support(SamplerConfig { top_p, ..OPEN }, &logits);
    assert_eq!(top_p(0.01), [1]);
    assert_eq!(top_p(0.39), [1]);
    assert_eq!(top_p(0.41), [1, 3]);
    assert_eq!(top_p(0.69), [1, 3]);
    assert_eq!(top_p(0.71), [1, 2, 3]);
    assert_eq!(top_p(0.93), [0, 1, 2, 3]);
    let min_p = |min_p| support(SamplerConfig { min_p, ..OPEN }, &logits);
    assert_eq!(min_p(1.0), [1]);
    assert_eq!(min_p(0.76), [1]);
    assert_eq!(min_p(0.74), [1, 3]);
    assert_eq!(min_p(0.49), [1, 2, 3]);
    assert_eq!(min_p(0.124), [0, 1, 2, 3, 4]);
}

#[test]
fn filters_work_one_after_another() {
    // Top-p counts only what top-k left: 0.4 of 0.7 is 0.571.
    let both = |top_p| support(SamplerConfig { top_k: 2, top_p, ..OPEN }, &ln(&P));
    assert_eq!(both(0.56), [1]);
    assert_eq!(both(0.58), [1, 3]);
    // The temperature comes last: a hot one changes no set.
    let hot = SamplerConfig { temperature: 50.0, top_p: 0.71, min_p: 0.6, ..OPEN };
    assert_eq!(support(hot, &ln(&P)), [1, 3]);
}

#[test]
fn a_wide_nucleus_is_found_too() {
    // 1000 equal tokens: 70 % of them is more than the first two guesses sort.
    let config = SamplerConfig { top_p: 0.7, ..OPEN };
    let sampler = Sampler::new(config).unwrap();
    let mut candidates = vec![0; 1000];
    assert_eq!(sampler.keep(&[2.5; 1000], &mut candidates), 700);
    assert_eq!(candidates[..700], (0..700).collect::<Vec<u32>>());
}

#[test]
fn zero_temperature_takes_the_first_of_the_likeliest() {
    let config = SamplerConfig { temperature: 0.0, ..OPEN };
    assert_eq!(draws(config, &[1.0, 3.0, 3.0, -1.0], 3), [1; 3]);
    assert_eq!(argmax(&[]), 0);
    assert_eq!(argmax(&[f32::NAN, -5.0, f32::NAN]), 1);
}

#[test]
fn the_penalty_counts_each_recent_token_once() {
    let config = SamplerConfig { temperature: 0.0, repeat_penalty: 2.0, repeat_window: 4, ..OPEN };
    let mut sampler = Sampler::new(config).unwrap();
    let mut logits = [4.0, 3.0, 2.5, -1.0];
    let mut scratch = [1; 4];
    // Token 1 lies outside the window.
    let token = sampler.sample(&mut logits, &[1, 0, 0, 3, 0], &mut scratch).unwrap();
    assert_eq!((token, logits), (1, [2.0, 3.0, 2.5, -2.0]));
    let error = sampler.sample(&mut logits, &[4], &mut scratch).unwrap_err();
    assert_eq!((error.code, error.found), (Code::BadToken, 4));
}

#[test]
fn the_seed_decides() {
    let logits = ln(&P);
    assert_eq!(draws(OPEN, &logits, 200), draws(OPEN, &logits, 200));
    assert_ne!(draws(OPEN, &logits, 200), draws(SamplerConfig { seed: 8, ..OPEN }, &logits, 200));
    // Worked out from the generator and the cumulated probabilities alone; the same on every machine.
    assert_eq!(draws(OPEN, &logits, 12), [1, 0, 3, 2, 2, 1, 2, 1, 1, 1, 1, 4]);
    // The first outputs of SplitMix64 for the seed 1234567, as its authors' code gives them.
    let mut state = 1_234_567;
    let high = |x: u64| (x >> 11) as f64 / (1u64 << 53) as f64;
    assert_eq!(unit(&mut state), high(6_457_827_717_110_365_317));
    assert_eq!(unit(&mut state), high(3_203_168_211_198_807_973));
}

#[test]
fn impossible_tokens_are_never_drawn() {
    let impossible = f32::NEG_INFINITY;
    assert_eq!(support(OPEN, &[impossible, 0.0, impossible, 0.0]), [1, 3]);
    assert_eq!(support(SamplerConfig { top_p: 0.999, ..OPEN }, &[impossible, 0.0, impossible]), [1]);
    assert_eq!(support(SamplerConfig { temperature: 1e-30, ..OPEN }, &[0.0, 1.0]), [1]);
}

#[test]
fn refuses_what_is_no_distribution() {
    let mut sampler = Sampler::new(OPEN).unwrap();
    let mut sample =
        |mut logits: Vec<f32>, scratch: usize| sampler.sample(&mut logits, &[], &mut vec![0; scratch]);
    for logits in [vec![0.0, f32::NAN], vec![f32::INFINITY, 0.0], vec![f32::NEG_INFINITY; 2], Vec::new()] {
        assert_eq!(sample(logits, 2).unwrap_err().code, Code::BadArgument);
    }
    assert_eq!(sample(vec![0.0; 3], 2).unwrap_err().code, Code::BufferTooSmall);
    for (name, config) in [
        ("temperature", SamplerConfig { temperature: f32::NAN, ..OPEN }),
        ("temperature", SamplerConfig { temperature: -0.5, ..OPEN }),
        ("top_p", SamplerConfig { top_p: 0.0, ..OPEN }),
        ("top_p", SamplerConfig { top_p: 1.5, ..OPEN }),
        ("min_p", SamplerConfig { min_p: -0.1, ..OPEN }),
        ("repeat_penalty", SamplerConfig { repeat_penalty: 0.0, ..OPEN }),
    ] {
        let error = Sampler::new(config).unwrap_err();
        assert_eq!((error.code, error.name.as_str()), (Code::BadArgument, name));
    }
}

/// Whatever the draft believes, tokens that were drafted and judged are distributed as the target wants.
#[test]
fn judged_drafts_follow_the_target() {
    let cases: [([f64; 5], &str); 4] = [
        ([0.2; 5], "even"),
        ([0.3, 0.05, 0.3, 0.05, 0.3], "opposite"),
        (P, "the same"),
        ([0.9, 0.025, 0.025, 0.025, 0.025], "sure of the wrong token"),
    ];
    for (q, what) in cases {
        for temperature in [1.0, 0.5] {
            let config = SamplerConfig { temperature, seed: 11, ..OPEN };
            let mut sampler = Sampler::new(config).unwrap();
            let mut scratch = [0; 5];
            let mut distribution = |probabilities: &[f64]| {
                let mut logits = ln(probabilities);
                sampler.distribution(&mut logits, &[], &mut scratch).unwrap();
                logits
            };
            let (p, q) = (distribution(&P), distribution(&q));
            let mut judged = || {
                let drafted = sampler.pick(&q);
                sampler.judge(&mut p.clone(), &q, drafted).unwrap_or(drafted)
            };
            let found: Vec<u32> = (0..20_000).map(|_| judged()).collect();
            let wanted: Vec<f64> = p.iter().map(|p| f64::from(*p)).collect();
            // 4 degrees of freedom: 18.5 is exceeded once in a thousand times.
            let x = chi_square(&found, &wanted);
            assert!(x < 18.5, "{what} at {temperature}: {x}");
        }
    }
}

#[test]
fn a_distribution_has_what_sampling_would_choose() {
    let mut scratch = [0; 5];
    for config in [
        OPEN,
        SamplerConfig { top_k: 2, ..OPEN },
        SamplerConfig { top_p: 0.65, ..OPEN },
        SamplerConfig { min_p: 0.3, temperature: 0.7, ..OPEN },
        SamplerConfig { temperature: 0.0, ..OPEN },
    ] {
        let mut probabilities = ln(&P);
        Sampler::new(config).unwrap().distribution(&mut probabilities, &[], &mut scratch).unwrap();
        let total: f32 = probabilities.iter().sum();
        assert!((total - 1.0).abs() < 1e-6, "{config:?}: {total}");
        let possible: Vec<u32> = (0..5).filter(|token| probabilities[*token as usize] > 0.0).collect();
        assert_eq!(possible, support(config, &ln(&P)), "{config:?}");
    }
}
