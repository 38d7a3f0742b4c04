//! Kernels on `f32` rows against formulas in double precision, and all tables against each other.

use super::*;
use crate::kernels::{LowRank, Precision, dequantize_row, exp, q8_0_block};
use edge_models::RopePairing;

/// Distance of two positive floats in units of the last place.
fn ulps(a: f32, b: f32) -> u32 {
    a.to_bits().abs_diff(b.to_bits())
}

#[test]
fn exp_is_within_two_ulps() {
    let mut worst = 0;
    for i in 0..2_000_000 {
        let x = -87.3 + i as f32 * (176.0 / 2e6);
        let exact = f64::from(x).exp() as f32;
        if exact.is_finite() {
            worst = worst.max(ulps(exp(x), exact));
        }
    }
    assert!(worst <= 2, "{worst} ulps");
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-87.4), 0.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(89.0), f32::INFINITY);
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    for bits in [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xffff_ffff, 0x7f80_0100] {
        assert!(exp(f32::from_bits(bits)).is_nan());
    }
}

/// A cache of halves.
fn half<'a>(keys: &'a [u16], values: &'a [u16]) -> KeyValues<'a> {
    KeyValues::Half { keys, values }
}

/// Bits of the nearest half-precision numbers.
fn halves(x: &[f32]) -> Vec<u16> {
    x.iter().map(|x| f32_to_f16(*x)).collect()
}

/// Scores that are only scaled.
fn scaled(scale: f32) -> Scores {
    Scores { scale, soft_cap: 0.0 }
}

/// Attention by its definition, in double precision.
fn exact_attention(
    q: &[f32],
    keys: &[u16],
    values: &[u16],
    stride: usize,
    len: usize,
    rule: Scores,
) -> Vec<f64> {
    let wide = |bits: u16| f64::from(f16_to_f32(bits));
    let score = |p: usize| {
        let key = &keys[p * stride..][..q.len()];
        q.iter().zip(key).map(|(a, b)| f64::from(*a) * wide(*b)).sum::<f64>() * f64::from(rule.scale)
    };
    let cap = f64::from(rule.soft_cap);
    let score = |p: usize| if cap > 0.0 { cap * (score(p) / cap).tanh() } else { score(p) };
    let scores: Vec<f64> = (0..len).map(score).collect();
    let peak = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
    let weights: Vec<f64> = scores.iter().map(|s| (s - peak).exp()).collect();
    let total: f64 = weights.iter().sum();
    let element = |i: usize| (0..len).map(|p| weights[p] * wide(values[p * stride + i])).sum::<f64>() / total;
    (0..q.len()).map(element).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows(len in 1..200usize, seed: u64) {
        let mut random = Random(seed);
        let (x, y) = (random.floats(len), random.floats(len));
        let exact: f64 = x.iter().zip(&y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        let magnitude: f64 = x.iter().zip(&y).map(|(x, y)| f64::from((x * y).abs())).sum();
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / len as f64 + 1e-5;
        let generic = Kernels::generic();
        for kernels in Kernels::available() {
            let name = kernels.name();
            let dot = kernels.dot(&x, &y);
            prop_assert!((f64::from(dot) - exact).abs() <= 1e-6 * magnitude);
            assert_same(&[dot], &[generic.dot(&x, &y)], name);

            let (mut found, mut expected) = (y.clone(), y.clone());
            kernels.axpy(0.3, &x, &mut found);
            generic.axpy(0.3, &x, &mut expected);
            assert_same(&found, &expected, name);
            for ((found, x), y) in found.iter().zip(&x).zip(&y) {
                prop_assert_eq!(*found, 0.3f32.mul_add(*x, *y));
            }

            kernels.rms_norm(&x, &y, 1e-5, &mut found);
            generic.rms_norm(&x, &y, 1e-5, &mut expected);
            assert_same(&found, &expected, name);
            for ((found, x), w) in found.iter().zip(&x).zip(&y) {
                let exact = f64::from(*x) / mean.sqrt() * f64::from(*w);
                prop_assert!((f64::from(*found) - exact).abs() <= 2e-6 * exact.abs());
            }

            let mut in_place = x.clone();
            kernels.rms_norm_in_place(&mut in_place, &y, 1e-5);
            assert_same(&in_place, &expected, name);

            let gate: Vec<f32> = x.iter().map(|x| x * 30.0).collect();
            let (mut found, mut expected) = (gate.clone(), gate.clone());
            kernels.swiglu(&mut found, &y);
            generic.swiglu(&mut expected, &y);
            assert_same(&found, &expected, name);
            for ((found, gate), up) in found.iter().zip(&gate).zip(&y) {
                let exact = f64::from(*gate) / (1.0 + (-f64::from(*gate)).exp()) * f64::from(*up);
                prop_assert!((f64::from(*found) - exact).abs() <= 1e-6 * exact.abs() + 1e-30);
            }

            let gate: Vec<f32> = x.iter().map(|x| x * 6.0).collect();
            let (mut found, mut expected) = (gate.clone(), gate.clone());
            kernels.geglu(&mut found, &y);
            generic.geglu(&mut expected, &y);
            assert_same(&found, &expected, name);
            for ((found, gate), up) in found.iter().zip(&gate).zip(&y) {
                let (x, up) = (f64::from(*gate), f64::from(*up));
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                let exact = 0.5 * x * (1.0 + u.tanh()) * up;
                // Far below zero a relative error of the exponent counts.
                prop_assert!((f64::from(*found) - exact).abs() <= 4e-6 * exact.abs() + 1e-12, "{} {}", found, exact);
            }

            let (mut found, mut expected) = (gate.clone(), gate.clone());
            kernels.soft_cap(&mut found, 2.5);
            generic.soft_cap(&mut expected, 2.5);
            assert_same(&found, &expected, name);
            for (found, x) in found.iter().zip(&gate) {
                let exact = 2.5 * (f64::from(*x) / 2.5).tanh();
                prop_assert!((f64::from(*found) - exact).abs() <= 2.5 * 2f64.powi(-22));
            }
        }
    }

    #[test]
    fn rope_rotates(half in 1..40usize, seed: u64) {
        let mut random = Random(seed);
        let head = random.floats(2 * half);
        let angles = random.floats(half);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        for kernels in Kernels::available() {
            for pairing in [RopePairing::Interleaved, RopePairing::Halves] {
                let mut found = head.clone();
                kernels.rope(&mut found, &cos, &sin, pairing);
                for i in 0..half {
                    let (a, b) = match pairing {
                        RopePairing::Interleaved => (2 * i, 2 * i + 1),
                        RopePairing::Halves => (i, i + half),
                    };
                    prop_assert_eq!(found[a], head[a] * cos[i] - head[b] * sin[i]);
                    prop_assert_eq!(found[b], head[a] * sin[i] + head[b] * cos[i]);
                }
            }
        }
    }

    #[test]
    fn attention_is_a_softmax(width in 1..100usize, len in 1..200usize, gap in 0..40usize, cap in 0..3u8, seed: u64) {
        let mut random = Random(seed);
        let stride = width + gap;
        let cached = (len - 1) * stride + width;
        let q = random.floats(width);
        let (keys, values) = (halves(&random.floats(cached)), halves(&random.floats(cached)));
        let scale = Scores { scale: 3.0 / (width as f32).sqrt(), soft_cap: f32::from(cap) };
        let exact = exact_attention(&q, &keys, &values, stride, len, scale);
        let mut expected = vec![f32::NAN; width];
        attend(Kernels::generic(), &q, half(&keys, &values), Span::new(stride, len), scale, &mut expected);
        for (found, exact) in expected.iter().zip(exact) {
            prop_assert!((f64::from(*found) - exact).abs() <= 3e-6, "{} {}", found, exact);
        }
        for kernels in Kernels::available() {
            let mut found = vec![f32::NAN; width];
            attend(kernels, &q, half(&keys, &values), Span::new(stride, len), scale, &mut found);
            assert_same(&found, &expected, kernels.name());
            // The same numbers at full precision give the same result.
            let full = [&keys, &values].map(|x| x.iter().map(|bits| f16_to_f32(*bits)).collect::<Vec<_>>());
            let cache = KeyValues::Full { keys: &full[0], values: &full[1] };
            attend(kernels, &q, cache, Span::new(stride, len), scale, &mut found);
            assert_same(&found, &expected, kernels.name());
        }
    }

    #[test]
    fn a_ring_is_the_same_as_a_row_of_rows(
        width in 1..80usize, len in 1..150usize, spare in 0..20usize, first in 0..300usize, seed: u64,
    ) {
        let mut random = Random(seed);
        let rows = len + spare;
        let q = random.floats(width);
        // Rows that nobody sees hold NaN.
        let mut straight = [vec![0x7e00; first * width], vec![0x7e00; first * width]];
        for rows in &mut straight {
            rows.extend(halves(&random.floats(len * width)));
        }
        let ring = straight.clone().map(|straight| {
            let mut ring = vec![0x7e00; rows * width];
            for (position, row) in straight.chunks(width).enumerate().skip(first) {
                ring[position % rows * width..][..width].copy_from_slice(row);
            }
            ring
        });
        let rule = Scores { scale: 0.7, soft_cap: 0.0 };
        for kernels in Kernels::available() {
            let (mut expected, mut found) = (vec![f32::NAN; width], vec![f32::NAN; width]);
            let span = Span { stride: width, rows: first + len, first, len };
            attend(kernels, &q, half(&straight[0], &straight[1]), span, rule, &mut expected);
            prop_assert!(expected.iter().all(|x| x.is_finite()));
            attend(kernels, &q, half(&ring[0], &ring[1]), Span { rows, ..span }, rule, &mut found);
            assert_same(&found, &expected, kernels.name());
        }
    }

    #[test]
    fn queries_together_are_the_same_as_alone(
        width in 1..80usize, count in 1..12usize, rows in 1..200usize, cap in 0..2u8, seed: u64,
    ) {
        let mut random = Random(seed);
        let (keys, values) = (halves(&random.floats(rows * width)), halves(&random.floats(rows * width)));
        let queries = random.floats(count * width);
        let lanes: Vec<Query> = (0..count).map(|i| {
            let first = random.next() as usize % rows;
            Query { at: (count - 1 - i) * width, first, end: first + 1 + random.next() as usize % (rows - first) }
        }).collect();
        let rule = Scores { scale: 2.0, soft_cap: f32::from(cap) };
        let ring = Ring { stride: width, rows };
        for kernels in Kernels::available() {
            let (mut found, mut expected) = (vec![f32::NAN; count * width], vec![f32::NAN; count * width]);
            kernels.attention(&queries, width, &lanes, half(&keys, &values), ring, rule, &mut found);
            for lane in &lanes {
                kernels.attention(&queries, width, &[*lane], half(&keys, &values), ring, rule, &mut expected);
            }
            assert_same(&found, &expected, kernels.name());
        }
    }

    #[test]
    fn blocks_are_attended_to(heads in 1..4usize, blocks in 1..5usize, len in 1..150usize, turn: usize, seed: u64) {
        let mut random = Random(seed);
        let (stride, first) = (heads * blocks, turn % len);
        let q = random.floats(blocks * 32);
        let cached = [random.floats(len * stride * 32), random.floats(len * stride * 32)].map(|values| {
            values.as_chunks().0.iter().map(q8_0_block).collect::<Vec<_>>()
        });
        let at = (heads - 1) * blocks;
        // What the blocks stand for, in the order of the positions.
        let plain = cached.clone().map(|cached| {
            let mut rows = vec![0.0; len * stride * 32];
            for (i, row) in rows.chunks_mut(stride * 32).enumerate() {
                let row_blocks = &cached[(first + i) % len * stride..][..stride];
                dequantize_row(DType::Q8_0, row_blocks.as_flattened(), row).unwrap();
            }
            halves(&rows[at * 32..])
        });
        let rule = Scores { scale: 1.0 / (q.len() as f32).sqrt(), soft_cap: 2.0 };
        let exact = exact_attention(&q, &plain[0], &plain[1], stride * 32, len, rule);
        let span = Span { stride, rows: len, first, len };
        let mut expected = vec![f32::NAN; q.len()];
        let blocks = KeyValues::Blocks { keys: &cached[0][at..], values: &cached[1][at..] };
        attend(Kernels::generic(), &q, blocks, span, rule, &mut expected);
        for (found, exact) in expected.iter().zip(exact) {
            // The query becomes integers too.
            prop_assert!((f64::from(*found) - exact).abs() <= 2e-2, "{} {}", found, exact);
        }
        for kernels in Kernels::available() {
            let mut found = vec![f32::NAN; q.len()];
            attend(kernels, &q, blocks, span, rule, &mut found);
            assert_same(&found, &expected, kernels.name());
        }
    }

    #[test]
    fn low_rank_updates(rows in 1..70usize, rank in 1..100usize, seed: u64) {
        let mut random = Random(seed);
        let (weights, u, before) = (random.floats(rows * rank), random.floats(rank), random.floats(rows));
        for precision in [Precision::Exact, Precision::Integers] {
            let mut data = vec![0xa5; LowRank::bytes(precision, rows, rank).unwrap()];
            let row = &mut |row: usize, out: &mut [f32]| {
                out.copy_from_slice(&weights[row * rank..][..rank]);
                Ok(())
            };
            LowRank::pack(precision, [rows, rank], row, &mut data).unwrap();
            let update = LowRank::new(precision, rows, rank, &data).unwrap();
            let mut expected = before.clone();
            Kernels::generic().add_low_rank(&update, &u, &mut expected);
            for (index, found) in expected.iter().enumerate() {
                let row = &weights[index * rank..][..rank];
                let products = || row.iter().zip(&u).map(|(w, u)| f64::from(*w) * f64::from(*u));
                let exact = f64::from(before[index]) + products().sum::<f64>();
                let largest = |x: &[f32]| x.iter().fold(0f64, |m, x| m.max(f64::from(x.abs())));
                let tolerance = match precision {
                    Precision::Exact => 1e-5 * (1.0 + products().map(f64::abs).sum::<f64>()),
                    // Half a step of either factor, for every product.
                    Precision::Integers => rank as f64 * largest(row) * largest(&u) / 126.0 + 1e-6,
                };
                prop_assert!((f64::from(*found) - exact).abs() <= tolerance, "{} {}", found, exact);
            }
            for kernels in Kernels::available() {
                let mut found = before.clone();
                kernels.add_low_rank(&update, &u, &mut found);
                assert_same(&found, &expected, kernels.name());
            }
            let mut poisoned = u.clone();
            poisoned[rank - 1] = f32::NAN;
            for kernels in Kernels::available() {
                let mut found = before.clone();
                kernels.add_low_rank(&update, &poisoned, &mut found);
                prop_assert!(found.iter().all(|y| y.is_nan()));
            }
            prop_assert!(LowRank::new(precision, rows, rank, &data[1..]).is_err());
        }
    }

    #[test]
    fn quantization_is_exact(tokens in 1..4usize, blocks in 1..20usize, power in -40..38i32, seed: u64) {
        let mut random = Random(seed);
        let cols = blocks * 32;
        let mut values: Vec<f32> = random.floats(tokens * cols).iter().map(|x| x * 10f32.powi(power)).collect();
        values[0] = 0.0;
        for kernels in Kernels::available() {
            let mut batch = Batch::new(tokens, cols, &values);
            let mut rows = batch.rows();
            let acts = kernels.quantize(&mut rows, Layout::Rows);
            for token in 0..tokens {
                let row = acts.quantized_row(token);
                let quants = row.quants.as_flattened();
                for (b, x) in values[token * cols..][..cols].chunks(32).enumerate() {
                    let peak = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                    let zero = peak <= 2f32.powi(-100);
                    let (scale, inverse) = if zero { (0.0, 0.0) } else { (peak / 127.0, 127.0 / peak) };
                    let found = row.scales.as_flattened()[b];
                    // Within half a unit of the eleventh bit, and in a half-precision number's range that number.
                    prop_assert!((found - scale).abs() <= scale * 2f32.powi(-11));
                    if (1e-4..1e4).contains(&scale) {
                        prop_assert_eq!(found, f16_to_f32(f32_to_f16(scale)));
                    }
                    let q: Vec<i8> = x.iter().map(|x| (x * inverse).round_ties_even() as i8).collect();
                    let at = b / 2 * 64 + b % 2 * 16;
                    prop_assert_eq!(&quants[at..at + 16], &q[..16]);
                    prop_assert_eq!(&quants[at + 32..at + 48], &q[16..]);
                    prop_assert_eq!(row.sums.as_flattened()[b], q.iter().map(|q| f32::from(*q)).sum::<f32>());
                }
                let padding = row.scales.as_flattened()[blocks..].iter().chain(&row.sums.as_flattened()[blocks..]);
                prop_assert!(padding.into_iter().all(|x| *x == 0.0));
            }
        }
    }
}

#[test]
fn attention_survives_huge_and_broken_scores() {
    for kernels in Kernels::available() {
        // One position wins by far: its value is the result.
        let keys = halves(&[0.0, 6e4, -6e4, 0.0]);
        let values = halves(&[1.0, 2.0, 3.0, 4.0]);
        let mut out = [f32::NAN];
        attend(kernels, &[1e35], half(&keys, &values), Span::new(1, 4), scaled(1.0), &mut out);
        assert!(out[0].is_nan() || out[0] == 2.0);
        attend(kernels, &[1.0], half(&keys, &values), Span::new(1, 4), scaled(1.0), &mut out);
        assert_eq!(out, [2.0]);
        attend(kernels, &[f32::NAN], half(&keys, &values), Span::new(1, 4), scaled(1.0), &mut out);
        assert!(out[0].is_nan());
        // The highest score comes in the last block.
        let mut keys = std::vec![0; 130];
        keys[129] = f32_to_f16(100.0);
        let values = halves(&(0..130).map(|i| i as f32).collect::<Vec<_>>());
        attend(kernels, &[1.0], half(&keys, &values), Span::new(1, 130), scaled(1.0), &mut out);
        assert_eq!(out, [129.0]);
    }
}

#[test]
fn gates_and_caps_have_limits() {
    for kernels in Kernels::available() {
        let mut gate = [1e30, -1e30, f32::INFINITY, 0.0, f32::NAN];
        kernels.geglu(&mut gate, &[1.0; 5]);
        assert_eq!(gate[..4], [1e30, 0.0, f32::INFINITY, 0.0]);
        assert!(gate[4].is_nan());
        let mut x = [1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY, 0.0, f32::NAN];
        kernels.soft_cap(&mut x, 30.0);
        assert_eq!(x[..5], [30.0, -30.0, 30.0, -30.0, 0.0]);
        assert!(x[5].is_nan());
    }
}

#[test]
fn values_that_are_not_finite_poison_their_block() {
    for kernels in Kernels::available() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0xff80_0001)] {
            let mut values = [1.0; 64];
            values[40] = bad;
            let mut batch = Batch::new(1, 64, &values);
            let mut rows = batch.rows();
            let row = kernels.quantize(&mut rows, Layout::Rows).quantized_row(0);
            assert_eq!(row.scales[0][0], f16_to_f32(f32_to_f16(1.0 / 127.0)));
            assert!(row.scales[0][1].is_nan());
        }
    }
}

#[test]
fn tables_have_names() {
    let names: Vec<&str> = Kernels::available().map(Kernels::name).collect();
    assert!(names.contains(&"generic"));
    assert!(names.iter().all(|name| Kernels::by_name(name).is_some_and(|k| k.name() == *name)));
    assert!(Kernels::by_name("avx1024").is_none());
    #[cfg(target_arch = "x86_64")]
    assert_eq!(Kernels::select(crate::kernels::Features::NONE).name(), "generic");
    #[cfg(target_arch = "x86_64")]
    assert_eq!(
        names.contains(&"avx2"),
        std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("f16c")
    );
    #[cfg(target_arch = "aarch64")]
    assert!(names.contains(&"neon"));
}
