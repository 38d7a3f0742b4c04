//! Every loss against finite differences and its definition.

use std::sync::Arc;

use candle_core::{DType, Device, Var};

use super::*;
use crate::train::ops::{Tiles, check};

const TARGETS: [u32; 6] = [3, IGNORE, 0, 16, 5, 16];

fn head(weight: &Tensor, soft_cap: f32) -> Head {
    Head { weight: weight.clone(), tiles: None, soft_cap }
}

fn objective(alpha: f64, temperature: f64) -> Objective {
    Objective { alpha, temperature, ..Objective::default() }
}

/// Settings of the soft loss under which every smooth formula is met; total variation has edges that finite
/// differences in f32 stumble over, and is judged beside the others by
/// [`gradients_are_slopes_of_the_definition`].
fn soft_losses() -> Vec<Objective> {
    let of = |soft: &str, beta, skew| Objective {
        soft: soft.parse().unwrap(),
        beta,
        skew,
        ..Objective::default()
    };
    vec![
        of("fkl", 0.5, 0.1),
        of("rkl", 0.5, 0.1),
        of("jsd", 0.5, 0.1),
        of("jsd", 0.1, 0.1),
        of("jsd", 1.0, 0.1),
        of("skl", 0.5, 0.1),
        of("srkl", 0.5, 0.3),
        of("fkl=0.5,rkl=0.25,jsd=2,skl=0.3", 0.9, 0.2),
    ]
}

#[test]
fn gradients_of_every_mix() {
    let (hidden, weight) = (check::matrix(1, 6, 8), check::matrix(2, 17, 8));
    let (teacher_hidden, teacher_weight) = (check::matrix(3, 6, 5), check::matrix(4, 17, 5));
    for soft in soft_losses() {
        for (alpha, temperature) in [(1.0, 1.0), (0.7, 1.0), (1.0, 2.0), (0.4, 3.0), (0.0, 1.0)] {
            for cap in [0.0, 1.5] {
                let objective = Objective { alpha, temperature, ..soft };
                let teacher_head = head(&teacher_weight, 2.0 * cap);
                check::gradients(&[hidden.clone(), weight.clone()], |x| {
                    let teacher = Target::Teacher(&teacher_hidden, &teacher_head);
                    Ok(loss(&x[0], &head(&x[1], cap), teacher, &TARGETS, &objective, 10.0)?.0)
                });
            }
        }
    }
    check::gradients(&[hidden, weight], |x| {
        Ok(loss(&x[0], &head(&x[1], 0.0), Target::Text, &TARGETS, &objective(1.0, 1.0), 10.0)?.0)
    });
}

#[test]
fn gradients_of_sparse_targets() {
    let (hidden, weight) = (check::matrix(1, 6, 8), check::matrix(2, 17, 8));
    let teacher = (check::matrix(3, 6, 5), head(&check::matrix(4, 17, 5), 0.0));
    for (alpha, temperature) in [(1.0, 1.0), (0.6, 1.0), (1.0, 2.0), (0.4, 3.0)] {
        let targets = |sparsity| {
            Arc::new(
                SparseTargets::of(&teacher.0, &teacher.1, sparsity, temperature, 7, 0, &TARGETS).unwrap(),
            )
        };
        let check = |kept: Arc<SparseTargets>, objective: Objective| {
            check::gradients(&[hidden.clone(), weight.clone()], |x| {
                Ok(loss(&x[0], &head(&x[1], 1.5), Target::Sparse(&kept), &TARGETS, &objective, 10.0)?.0)
            });
        };
        for soft in soft_losses() {
            check(targets(Sparsity::TopK(5)), Objective { alpha, temperature, ..soft });
        }
        check(targets(Sparsity::Sampled(4)), objective(alpha, temperature));
    }
}

/// The hidden states get the same gradient beside a head that is frozen, and that head none.
#[test]
fn a_frozen_head_gets_no_gradient() {
    let hidden = candle_core::Var::from_tensor(&check::matrix(1, 6, 8)).unwrap();
    let weight = candle_core::Var::from_tensor(&check::matrix(2, 17, 8)).unwrap();
    let gradients = |weight: &Tensor| {
        let value =
            loss(&hidden, &head(weight, 1.5), Target::Text, &TARGETS, &objective(0.0, 1.0), 1.0).unwrap().0;
        let store = value.backward().unwrap();
        (store.get(&hidden).unwrap().to_vec2::<f32>().unwrap(), store.get(weight).is_some())
    };
    let (trained, frozen) = (gradients(&weight), gradients(&weight.as_tensor().detach()));
    assert_eq!(trained.0, frozen.0);
    assert!(trained.1 && !frozen.1);
}

/// Eight bits would round them away: those of rare tokens are a thousandth of the likely one's in their block.
#[test]
fn gradients_of_rare_tokens_pass_a_head_in_int8() {
    // Token 0 is likely; of the other 31 in its block, which alone point along the second axis, each is rare.
    let (vocab, width) = (64, 32);
    let mut weight = vec![0f32; vocab * width];
    weight[0] = 8.0;
    (1..32).for_each(|token| weight[token * width + 1] = 1.0);
    let weight = Tensor::from_vec(weight, (vocab, width), &Device::Cpu).unwrap();
    let hidden = Tensor::eye(width, DType::F32, &Device::Cpu).unwrap().narrow(0, 0, 1).unwrap();
    let slope = |tiles| {
        let hidden = Var::from_tensor(&hidden.contiguous().unwrap()).unwrap();
        let head = Head { tiles, ..head(&weight, 0.0) };
        let objective = Objective { alpha: 0.0, ..Objective::default() };
        let (loss, _) = loss(&hidden, &head, Target::Text, &[40], &objective, 1.0).unwrap();
        let grads = loss.backward().unwrap();
        grads.get(hidden.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[1]
    };
    let (exact, found) = (slope(None), slope(Some(Tiles::round_both_ways(&weight).unwrap())));
    let expected = 31.0 / (8f32.exp() + 63.0);
    assert!(
        (exact / expected - 1.0).abs() < 1e-4 && (found / expected - 1.0).abs() < 0.02,
        "{exact} {found}"
    );
}

/// `ln softmax(logits / T)` in f64, from the definition.
fn log_softmax(hidden: &Tensor, head: &Head, temperature: f64) -> Vec<Vec<f64>> {
    let logits = head.logits(hidden).unwrap().to_vec2::<f32>().unwrap();
    logits
        .iter()
        .map(|row| {
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x) / temperature).collect();
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x - sum.ln()).collect()
        })
        .collect()
}

#[test]
fn parts_agree_with_the_definition_over_many_chunks() {
    let rows = 2 * CHUNK + 3;
    let (hidden, student_head) = (check::matrix(1, rows, 8), head(&check::matrix(2, 50, 8), 0.9));
    let (teacher_hidden, teacher_head) = (check::matrix(3, rows, 8), head(&check::matrix(4, 50, 8), 0.0));
    let targets: Vec<u32> = (0..rows as u32).map(|i| if i % 7 == 0 { IGNORE } else { i * 13 % 50 }).collect();
    let scored: Vec<usize> = (0..rows).filter(|i| i % 7 != 0).collect();
    let mean = |f: &dyn Fn(usize) -> f64| scored.iter().map(|&i| f(i)).sum::<f64>() / scored.len() as f64;
    for temperature in [1.0, 2.5] {
        let (p, q) = (
            log_softmax(&teacher_hidden, &teacher_head, temperature),
            log_softmax(&hidden, &student_head, temperature),
        );
        let q_one = log_softmax(&hidden, &student_head, 1.0);
        let kl = mean(&|i| p[i].iter().zip(&q[i]).map(|(p, q)| p.exp() * (p - q)).sum());
        let ce = mean(&|i| -q_one[i][targets[i] as usize]);
        let teacher = Target::Teacher(&teacher_hidden, &teacher_head);
        let (value, parts) =
            loss(&hidden, &student_head, teacher, &targets, &objective(0.3, temperature), 2.0).unwrap();
        assert!((parts.kl - kl).abs() < 1e-5, "{} {kl}", parts.kl);
        assert!((parts.cross_entropy - ce).abs() < 1e-5, "{} {ce}", parts.cross_entropy);
        let expected = 0.3 * temperature * temperature * kl + 0.7 * ce;
        assert!((parts.loss - expected).abs() < 1e-5);
        assert!((f64::from(value.to_scalar::<f32>().unwrap()) - 2.0 * expected).abs() < 1e-4);
        assert_eq!(parts.tokens, scored.len());
    }
    let found = divergence(&hidden, &student_head, &teacher_hidden, &teacher_head, &targets).unwrap();
    let p = log_softmax(&teacher_hidden, &teacher_head, 1.0);
    let q = log_softmax(&hidden, &student_head, 1.0);
    let kl = mean(&|i| p[i].iter().zip(&q[i]).map(|(p, q)| p.exp() * (p - q)).sum());
    assert!((found.kl - kl).abs() < 1e-5);
    assert!((found.teacher_cross_entropy - mean(&|i| -p[i][targets[i] as usize])).abs() < 1e-5);
    let same = divergence(&hidden, &student_head, &hidden, &student_head, &targets).unwrap();
    assert!(same.kl.abs() < 1e-6 && same.top1_agreement == 1.0);
}

#[test]
fn bad_shapes_and_targets_are_refused() {
    let (hidden, student) = (check::matrix(1, 2, 8), head(&check::matrix(2, 17, 8), 0.0));
    let plain = objective(0.0, 1.0);
    assert!(loss(&hidden, &student, Target::Text, &[1], &plain, 1.0).is_err());
    assert!(loss(&hidden, &student, Target::Text, &[1, 17], &plain, 1.0).is_err());
    let other = head(&check::matrix(3, 16, 8), 0.0);
    assert!(loss(&hidden, &student, Target::Teacher(&hidden, &other), &[1, 2], &plain, 1.0).is_err());
}

/// Each divergence of two distributions from its definition, in f64.
fn defined(kind: Kind, p: &[f64], q: &[f64], beta: f64, skew: f64) -> f64 {
    let kl = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * (a / b).ln()).sum() };
    let mix =
        |share: f64| -> Vec<f64> { p.iter().zip(q).map(|(p, q)| share * p + (1.0 - share) * q).collect() };
    match kind {
        Kind::Forward => kl(p, q),
        Kind::Reverse => kl(q, p),
        Kind::JensenShannon => beta * kl(p, &mix(beta)) + (1.0 - beta) * kl(q, &mix(beta)),
        Kind::Skewed => kl(p, &mix(skew)),
        Kind::SkewedReverse => kl(q, &mix(1.0 - skew)),
        Kind::TotalVariation => p.iter().zip(q).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0,
    }
}

/// The loss of one position whose logits are given, beside all of the teacher's distribution or what is kept of
/// it: the hidden state is 1 and the head has one column.
fn of_logits(s: &[f32], t: &[f32], objective: &Objective, kept: Option<Sparsity>) -> (f64, Vec<f32>) {
    let column = |logits: &[f32]| {
        Tensor::from_vec(logits.to_vec(), (logits.len(), 1), &candle_core::Device::Cpu).unwrap()
    };
    let one = Tensor::ones((1, 1), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    let student = candle_core::Var::from_tensor(&column(s)).unwrap();
    let teacher = head(&column(t), 0.0);
    let kept = kept.map(|sparsity| {
        let temperature = objective.temperature;
        Arc::new(SparseTargets::of(&one, &teacher, sparsity, temperature, 0, 0, &[0]).unwrap())
    });
    let target = kept.as_ref().map_or(Target::Teacher(&one, &teacher), Target::Sparse);
    let (value, parts) = loss(&one, &head(&student, 0.0), target, &[0], objective, 1.0).unwrap();
    let gradient = value.backward().unwrap().get(&student).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    (parts.loss, gradient)
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|x| x.exp()).sum();
    logits.iter().map(|x| x.exp() / sum).collect()
}

/// Every divergence, over the whole vocabulary and with a bucket, beside slopes of its definition in f64.
#[test]
fn gradients_are_slopes_of_the_definition() {
    let (s, t) = (check::noise(5, 40), check::noise(6, 40));
    let (s, t): (Vec<f32>, Vec<f32>) =
        (s.iter().map(|x| 3.0 * x).collect(), t.iter().map(|x| 3.0 * x).collect());
    let wide = |logits: &[f32]| -> Vec<f64> { logits.iter().map(|x| f64::from(*x)).collect() };
    let p = softmax(&wide(&t));
    let mut order: Vec<usize> = (0..40).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
    // The likeliest tokens, then one outcome for all others.
    let coarse = |p: &[f64], k: usize| -> Vec<f64> {
        let mut outcomes: Vec<f64> = order[..k].iter().map(|token| p[*token]).collect();
        outcomes.extend((k < 40).then(|| order[k..].iter().map(|token| p[*token]).sum::<f64>()));
        outcomes
    };
    for kind in Kind::ALL {
        for k in [6, 40] {
            let objective = Objective { soft: Mixture::of(kind), beta: 0.3, ..Objective::default() };
            let kept = (k < 40).then_some(Sparsity::TopK(k));
            let (value, gradient) = of_logits(&s, &t, &objective, kept);
            let at = |token: usize, step: f64| {
                let mut logits = wide(&s);
                logits[token] += step;
                defined(kind, &coarse(&p, k), &coarse(&softmax(&logits), k), 0.3, 0.1)
            };
            assert!((value - at(0, 0.0)).abs() < 2e-6, "{kind:?} {k}: {value}");
            for (token, found) in gradient.into_iter().enumerate() {
                let slope = (at(token, 1e-6) - at(token, -1e-6)) / 2e-6;
                assert!(
                    (f64::from(found) - slope).abs() < 2e-6,
                    "{kind:?} {k}, {token}: {found}, slope {slope}"
                );
            }
        }
    }
}

#[test]
fn divergences_are_those_of_their_definition_and_limits() {
    let (s, t) = (check::noise(5, 40), check::noise(6, 40));
    let (s, t): (Vec<f32>, Vec<f32>) =
        (s.iter().map(|x| 3.0 * x).collect(), t.iter().map(|x| 3.0 * x).collect());
    let wide = |logits: &[f32]| -> Vec<f64> { logits.iter().map(|x| f64::from(*x)).collect() };
    let (p, q) = (softmax(&wide(&t)), softmax(&wide(&s)));
    let value = |kind, beta, skew| {
        let objective = Objective { soft: Mixture::of(kind), beta, skew, ..Objective::default() };
        of_logits(&s, &t, &objective, None).0
    };
    for kind in Kind::ALL {
        let (found, expected) = (value(kind, 0.3, 0.1), defined(kind, &p, &q, 0.3, 0.1));
        assert!(
            (found - expected).abs() < 2e-6 * expected.max(1.0),
            "{kind:?}: {found}, expected {expected}"
        );
    }
    let (fkl, rkl) = (value(Kind::Forward, 0.5, 0.1), value(Kind::Reverse, 0.5, 0.1));
    assert!((fkl - rkl).abs() > 0.05, "{fkl} {rkl}");
    let close = |found: f64, expected: f64, within: f64| {
        assert!((found - expected).abs() < within * expected, "{found}, expected {expected}");
    };
    close(value(Kind::JensenShannon, 0.0, 0.1), fkl, 1e-6);
    close(value(Kind::JensenShannon, 1.0, 0.1), rkl, 1e-6);
    close(value(Kind::JensenShannon, 0.01, 0.1) / 0.01, fkl, 0.1);
    close(value(Kind::JensenShannon, 0.99, 0.1) / 0.01, rkl, 0.1);
    close(value(Kind::Skewed, 0.5, 0.0), fkl, 1e-6);
    close(value(Kind::SkewedReverse, 0.5, 0.0), rkl, 1e-6);
    close(value(Kind::Skewed, 0.5, 1e-4), fkl, 1e-2);
    close(value(Kind::SkewedReverse, 0.5, 1e-4), rkl, 1e-2);
}

/// Distributions that are all on one token, the same one or another.
#[test]
fn peaks_give_numbers() {
    let peak =
        |at: usize, height: f32| -> Vec<f32> { (0..9).map(|i| if i == at { height } else { 0.0 }).collect() };
    let tvd = Objective { soft: Mixture::of(Kind::TotalVariation), ..Objective::default() };
    for soft in soft_losses().into_iter().chain([tvd]) {
        for temperature in [1.0, 4.0] {
            for alpha in [1.0, 0.5] {
                for (s, t) in [(1, 1), (1, 2), (2, 1)] {
                    for height in [40.0, 300.0, 1e4] {
                        let objective = Objective { alpha, temperature, ..soft };
                        for kept in [None, Some(Sparsity::TopK(3))] {
                            let (s, t) = (peak(s, height), peak(t, height));
                            let (value, gradient) = of_logits(&s, &t, &objective, kept);
                            assert!(value.is_finite() && value > -1e-3, "{objective:?} {height}: {value}");
                            assert!(gradient.iter().all(|x| x.is_finite()), "{objective:?}: {gradient:?}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_bucket_is_a_coarser_distribution_and_everything_is_the_whole() {
    let (hidden, student) = (check::matrix(1, 6, 8), head(&check::matrix(2, 17, 8), 0.0));
    let (teacher_hidden, teacher) = (check::matrix(3, 6, 5), head(&check::matrix(4, 17, 5), 0.0));
    for soft in soft_losses() {
        let objective = Objective { temperature: 2.0, alpha: 0.8, ..soft };
        let of = |target: Target<'_>| loss(&hidden, &student, target, &TARGETS, &objective, 1.0).unwrap().1;
        let whole = of(Target::Teacher(&teacher_hidden, &teacher));
        let kept = |k| {
            let kept =
                SparseTargets::of(&teacher_hidden, &teacher, Sparsity::TopK(k), 2.0, 0, 0, &TARGETS).unwrap();
            of(Target::Sparse(&Arc::new(kept)))
        };
        let (all, five) = (kept(17), kept(5));
        for (found, expected) in
            [(all.loss, whole.loss), (all.kl, whole.kl), (five.cross_entropy, whole.cross_entropy)]
        {
            assert!((found - expected).abs() < 1e-5, "{objective:?}: {found}, expected {expected}");
        }
        assert!(five.kl < whole.kl && five.loss < whole.loss && five.kl > 0.0, "{five:?} {whole:?}");
    }
}

/// The mean over many draws is the distribution, the gradient and the divergence of the whole.
#[test]
fn draws_are_unbiased() {
    let (hidden, weight) = (check::matrix(1, 1, 8), check::matrix(2, 17, 8));
    let (teacher_hidden, teacher) = (check::matrix(3, 1, 5), head(&check::matrix(4, 17, 5), 0.0));
    let objective = objective(1.0, 1.5);
    let of = |target: Target<'_>| {
        let weight = candle_core::Var::from_tensor(&weight).unwrap();
        let (value, parts) = loss(&hidden, &head(&weight, 0.0), target, &[3], &objective, 1.0).unwrap();
        let gradient = value.backward().unwrap().get(&weight).unwrap().flatten_all().unwrap();
        (parts.kl, gradient.to_vec1::<f32>().unwrap())
    };
    let (kl, gradient) = of(Target::Teacher(&teacher_hidden, &teacher));
    let draws = 400;
    let (mut mean_kl, mut mean) = (0.0, vec![0f64; gradient.len()]);
    for seed in 0..draws {
        let kept =
            SparseTargets::of(&teacher_hidden, &teacher, Sparsity::Sampled(50), 1.5, seed, 0, &[3]).unwrap();
        assert!((kept.rows[0].probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let (kl, gradient) = of(Target::Sparse(&Arc::new(kept)));
        mean_kl += kl / draws as f64;
        mean.iter_mut().zip(gradient).for_each(|(mean, g)| *mean += f64::from(g) / draws as f64);
    }
    // 20,000 draws: a standard error of at most 0.0035 a probability.
    assert!((mean_kl - kl).abs() < 0.015, "{mean_kl} {kl}");
    for (found, expected) in mean.iter().zip(gradient) {
        assert!((found - f64::from(expected)).abs() < 0.015, "{found} {expected}");
    }
}

#[test]
fn sparse_targets_that_do_not_fit_are_refused() {
    let (hidden, student) = (check::matrix(1, 2, 8), head(&check::matrix(2, 17, 8), 0.0));
    assert!(SparseTargets::of(&hidden, &student, Sparsity::TopK(18), 1.0, 0, 0, &[1, 2]).is_err());
    let good = SparseTargets::of(&hidden, &student, Sparsity::TopK(3), 1.0, 0, 0, &[1, 2]).unwrap();
    let refused = |change: &dyn Fn(&mut SparseTargets)| {
        let mut bad = good.clone();
        change(&mut bad);
        let target = Target::Sparse(&Arc::new(bad));
        assert!(loss(&hidden, &student, target, &[1, 2], &objective(1.0, 1.0), 1.0).is_err());
    };
    refused(&|bad| bad.rows[1].ids[2] = 17);
    refused(&|bad| bad.rows[1].ids.swap(0, 1));
    refused(&|bad| bad.rows[0].probabilities.truncate(2));
    refused(&|bad| bad.rows.truncate(1));
}
