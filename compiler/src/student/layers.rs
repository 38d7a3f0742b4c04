//! Which layers of the teacher a shallower student keeps: decided by measurement, not by position.
//!
//! Again and again the layer is dropped whose absence raises KL(teacher || student) on calibration text
//! least. Nothing is trained. Measuring a candidate costs only the layers after it, because the hidden
//! state before it is already known, and one product with the output head, because of an identity:
//!
//! With logits `z = W h` and `p = softmax(W h)` of the teacher and `h'` the student's final hidden state
//! under the same head `W`, KL(p || softmax(W h')) = lse(W h') - lse(W h) - (h' - h) . (W^T p), where
//! `lse` is the log of the sum of exponentials (the Bregman divergence of `lse`; Banerjee et al.,
//! "Clustering with Bregman divergences", 2005, section 4). `W^T p` has the width of a hidden state, so
//! the teacher's distribution over the whole vocabulary never has to be kept. (Where logits have a soft
//! cap the identity does not hold, and both distributions are computed each time.)

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::StudentError;
use crate::model::Model;
use crate::train::graph::Decoder;
use crate::train::loss::{self, Head};
use crate::train::ops::{exp, linear, with_values};

/// Rows of the output head's product that are in memory at a time.
const CHUNK: usize = 128;

/// One position in this many is scored when all candidates are compared.
const SCREEN_STRIDE: usize = 4;

/// Candidates that go on from the comparison to the measurement on every position.
const FINALISTS: usize = 3;

/// Tokens that are enough to choose layers by, in windows of [`CALIBRATION_LENGTH`].
pub const CALIBRATION_TOKENS: usize = 512;

/// Length of a window for [`CALIBRATION_TOKENS`].
pub const CALIBRATION_LENGTH: usize = 256;

/// The layers that were chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Layers to keep, ascending.
    pub kept: Vec<usize>,
    /// Layers dropped, in that order, each with the divergence (nats per token) after it was gone.
    pub removed: Vec<(usize, f64)>,
    /// Divergence of the cut student from its teacher before any training, nats per token.
    pub kl: f64,
}

/// Chooses the `keep` layers of `teacher` with which it diverges least from itself on the tokens
/// `calibration`, cut into windows of `length`; what does not fill a window is left out.
///
/// `progress` is told how many of how many measurements are done and the divergence so far.
///
/// # Errors
/// `keep` is 0 or more than the teacher has, or the calibration text is too short or not the teacher's.
pub fn choose_layers(
    teacher: &Model,
    keep: usize,
    calibration: &[u32],
    length: usize,
    progress: &mut dyn FnMut(usize, usize, f64),
) -> Result<Choice, StudentError> {
    let layers = teacher.spec.layers;
    if keep == 0 || keep > layers {
        return Err(StudentError::Layers { found: keep, layers });
    }
    let mut kept: Vec<usize> = (0..layers).collect();
    let (mut removed, mut kl) = (Vec::new(), 0.0);
    if keep == layers {
        return Ok(Choice { kept, removed, kl });
    }
    let search = Search::new(teacher, calibration, length)?;
    let total = (keep + 1..=layers).map(|round| round + FINALISTS.min(round)).sum();
    let mut done = 0;
    let mut states = vec![search.embedded.clone()];
    while kept.len() > keep {
        search.walk(&kept, &mut states)?;
        let mut tick = || {
            done += 1;
            progress(done, total, kl);
        };
        let mut screened = Vec::new();
        for position in 0..kept.len() {
            screened.push((search.screen(&kept, &states, position)?, position));
            tick();
        }
        screened.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut best = (f64::INFINITY, screened[0].1);
        for &(_, position) in screened.iter().take(FINALISTS) {
            let measured = search.measure(&kept, &states, position)?;
            tick();
            if measured < best.0 {
                best = (measured, position);
            }
        }
        let (divergence, position) = best;
        if !divergence.is_finite() {
            return Err(StudentError::NotFinite);
        }
        let layer = kept.remove(position);
        // What comes before the dropped layer has not changed.
        states.truncate(position + 1);
        kl = divergence;
        removed.push((layer, kl));
        progress(done, total, kl);
    }
    Ok(Choice { kept, removed, kl })
}

/// The teacher on the calibration text.
struct Search {
    decoder: Decoder,
    /// `[windows * length, hidden]`, the state before the first layer.
    embedded: Tensor,
    windows: usize,
    length: usize,
    /// Every position.
    full: Reference,
    /// Some positions of some windows.
    screen: Reference,
    screen_windows: usize,
}

impl Search {
    fn new(teacher: &Model, ids: &[u32], length: usize) -> Result<Self, StudentError> {
        let ids = super::calibration_windows(&teacher.spec, ids, length)?;
        let windows = ids.len() / length;
        let decoder = Decoder::new(&teacher.spec, &teacher.weights)?;
        let embedded = decoder.embed(ids)?;
        let hidden = decoder.hidden(ids, windows, length)?;
        let full = Reference::new(&hidden, &decoder.head()?, (0..hidden.dim(0)?).collect())?;
        let screen_windows = windows.div_ceil(2);
        let rows = (0..screen_windows * length).skip(SCREEN_STRIDE - 1).step_by(SCREEN_STRIDE).collect();
        let screen = full.subset(rows)?;
        Ok(Self { decoder, embedded, windows, length, full, screen, screen_windows })
    }

    /// Extends `states`, of which `states[i]` is the state before layer `kept[i]`, to all kept layers.
    fn walk(&self, kept: &[usize], states: &mut Vec<Tensor>) -> Result<(), StudentError> {
        for position in states.len()..kept.len() {
            let state =
                self.decoder.block(kept[position - 1], &states[position - 1], self.windows, self.length)?;
            states.push(state);
        }
        Ok(())
    }

    /// Divergence without `kept[position]` on a sample of the positions.
    fn screen(&self, kept: &[usize], states: &[Tensor], position: usize) -> Result<f64, StudentError> {
        let rows = self.screen_windows * self.length;
        let state = states[position].narrow(0, 0, rows)?.contiguous()?;
        self.without(kept, position, state, self.screen_windows, &self.screen)
    }

    /// Divergence without `kept[position]` on every position.
    fn measure(&self, kept: &[usize], states: &[Tensor], position: usize) -> Result<f64, StudentError> {
        self.without(kept, position, states[position].clone(), self.windows, &self.full)
    }

    fn without(
        &self,
        kept: &[usize],
        position: usize,
        mut state: Tensor,
        windows: usize,
        reference: &Reference,
    ) -> Result<f64, StudentError> {
        for &layer in &kept[position + 1..] {
            state = self.decoder.block(layer, &state, windows, self.length)?;
        }
        reference.divergence(&self.decoder.final_norm(&state)?, &self.decoder.head()?)
    }
}

/// What is known of the teacher at some positions; see the module's documentation for the names.
pub(crate) struct Reference {
    /// Positions, as rows of a hidden state.
    rows: Vec<usize>,
    /// `h`, `[rows, hidden]`.
    hidden: Tensor,
    /// What the identity needs of the teacher, if it holds.
    sums: Option<Sums>,
}

/// The teacher's part of the identity.
struct Sums {
    /// `W^T p`, `[rows, hidden]`.
    expected: Tensor,
    /// `lse(W h)`.
    log_sums: Vec<f64>,
}

impl Reference {
    /// `hidden` `[n, hidden]` under `head`; `rows` are all of its rows, in order.
    pub(crate) fn new(hidden: &Tensor, head: &Head, rows: Vec<usize>) -> Result<Self, StudentError> {
        if head.soft_cap > 0.0 {
            return Ok(Self { rows, hidden: hidden.clone(), sums: None });
        }
        let head = &head.weight;
        let mut log_sums = Vec::new();
        let mut expected = Vec::new();
        for start in (0..rows.len()).step_by(CHUNK) {
            let chunk = hidden.narrow(0, start, CHUNK.min(rows.len() - start))?;
            let logits = linear(&chunk, head)?;
            let sums = log_sum_exp(&logits)?;
            let shift: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
            let shift = Tensor::from_vec(shift, (sums.len(), 1), &Device::Cpu)?;
            expected.push(logits.broadcast_sub(&shift)?.exp()?.matmul(head)?);
            log_sums.extend(sums);
        }
        if log_sums.iter().any(|sum| !sum.is_finite()) {
            return Err(StudentError::NotFinite);
        }
        let sums = Sums { expected: Tensor::cat(&expected, 0)?, log_sums };
        Ok(Self { rows, hidden: hidden.clone(), sums: Some(sums) })
    }

    /// The same at fewer positions.
    pub(crate) fn subset(&self, rows: Vec<usize>) -> Result<Self, StudentError> {
        let index = row_index(&rows)?;
        let subset = |sums: &Sums| -> candle_core::Result<Sums> {
            Ok(Sums {
                expected: sums.expected.index_select(&index, 0)?,
                log_sums: rows.iter().map(|&row| sums.log_sums[row]).collect(),
            })
        };
        let sums = self.sums.as_ref().map(subset).transpose()?;
        Ok(Self { hidden: self.hidden.index_select(&index, 0)?, sums, rows })
    }

    /// Mean KL(teacher || student) in nats of a student with the final hidden states `student`
    /// (of which only [`Self::rows`] are looked at) under `head`; NaN if it computes nonsense.
    pub(crate) fn divergence(&self, student: &Tensor, head: &Head) -> Result<f64, StudentError> {
        let student = student.index_select(&row_index(&self.rows)?, 0)?;
        let Some(Sums { expected, log_sums }) = &self.sums else {
            let targets = vec![0; self.rows.len()];
            return Ok(loss::divergence(&student, head, &self.hidden, head, &targets)?.kl);
        };
        let slopes = ((&student - &self.hidden)? * expected)?;
        let slopes = slopes.to_dtype(DType::F64)?.sum(1)?.to_vec1::<f64>()?;
        let mut total = 0.0;
        for start in (0..self.rows.len()).step_by(CHUNK) {
            let chunk = student.narrow(0, start, CHUNK.min(self.rows.len() - start))?;
            let sums = log_sum_exp(&linear(&chunk, &head.weight)?)?;
            for (offset, sum) in sums.iter().enumerate() {
                total += sum - log_sums[start + offset] - slopes[start + offset];
            }
        }
        Ok(total / self.rows.len() as f64)
    }
}

fn row_index(rows: &[usize]) -> candle_core::Result<Tensor> {
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Tensor::new(rows, &Device::Cpu)
}

/// Log of the sum of exponentials of each row of `[rows, n]`.
fn log_sum_exp(logits: &Tensor) -> candle_core::Result<Vec<f64>> {
    let width = logits.dim(1)?;
    with_values(logits, |values| Ok(values.par_chunks(width).map(row_log_sum_exp).collect()))
}

/// Eight independent lanes, so that both loops vectorize; NaN if any element is.
fn row_log_sum_exp(row: &[f32]) -> f64 {
    let (blocks, tail) = row.as_chunks::<8>();
    let mut lanes = [f32::NEG_INFINITY; 8];
    for block in blocks {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    let max = lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum: f64 = tail.iter().map(|&x| f64::from(exp(x - max))).sum();
    for run in blocks.chunks(64) {
        let mut lanes = [0f32; 8];
        for block in run {
            for (lane, &x) in lanes.iter_mut().zip(block) {
                *lane += exp(x - max);
            }
        }
        sum += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    f64::from(max) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::student::cut;
    use crate::train::fixture::{text, tiny};
    use edge_models::Role;

    /// KL between two whole models, straight from its definition.
    fn divergence(teacher: &Model, student: &Model, ids: &[u32], length: usize) -> f64 {
        let logits = |model: &Model| {
            let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
            let hidden = decoder.hidden(ids, ids.len() / length, length).unwrap();
            let logits = decoder.head().unwrap().logits(&hidden).unwrap();
            logits.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap()
        };
        let log_softmax = |row: &[f64]| {
            let sum = row.iter().map(|x| x.exp()).sum::<f64>().ln();
            row.iter().map(|x| x - sum).collect::<Vec<_>>()
        };
        let rows = logits(teacher).into_iter().zip(logits(student));
        let per_row = rows.map(|(p, q)| {
            let (p, q) = (log_softmax(&p), log_softmax(&q));
            p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
        });
        per_row.sum::<f64>() / ids.len() as f64
    }

    #[test]
    fn the_reported_divergence_is_that_of_the_cut_model() {
        let teacher = tiny(6, 21);
        let ids = text(150);
        let choice = choose_layers(&teacher, 3, &ids, 16, &mut |_, _, _| {}).unwrap();
        assert_eq!((choice.kept.len(), choice.removed.len()), (3, 3));
        let student = cut(&teacher, &choice.kept).unwrap();
        let expected = divergence(&teacher, &student, &ids[..144], 16);
        assert!(expected > 1e-2, "{expected}");
        assert!((choice.kl - expected).abs() < 1e-4 * expected.max(1.0), "{} {expected}", choice.kl);
        // The first removal is the best of all six.
        let without = |layer| {
            let keep: Vec<usize> = (0..6).filter(|&l| l != layer).collect();
            divergence(&teacher, &cut(&teacher, &keep).unwrap(), &ids[..144], 16)
        };
        let (layer, kl) = choice.removed[0];
        assert!((without(layer) - kl).abs() < 1e-4);
        assert!((0..6).all(|other| without(other) > kl - 1e-4));
    }

    #[test]
    fn layers_that_do_nothing_go_first() {
        let mut teacher = tiny(7, 4);
        for layer in [2, 5] {
            for role in [Role::AttnOut, Role::FfnDown] {
                let zeros = teacher.weights.get(role, layer).unwrap().zeros_like().unwrap();
                teacher.weights.insert(role, layer, zeros);
            }
        }
        let mut last = (0, 0);
        let choice = choose_layers(&teacher, 5, &text(64), 32, &mut |done, total, _| {
            assert!(done >= last.0 && done <= total);
            last = (done, total);
        })
        .unwrap();
        assert_eq!(choice.kept, [0, 1, 3, 4, 6]);
        assert!(choice.kl.abs() < 1e-5, "{}", choice.kl);
        // Seven and six candidates, three finalists each.
        assert_eq!(last, (19, 19));
    }

    #[test]
    fn bad_requests_are_refused() {
        let teacher = tiny(3, 1);
        let fails = |keep, ids: &[u32], length| {
            choose_layers(&teacher, keep, ids, length, &mut |_, _, _| {}).unwrap_err()
        };
        assert!(matches!(fails(0, &text(64), 32), StudentError::Layers { found: 0, layers: 3 }));
        assert!(matches!(fails(4, &text(64), 32), StudentError::Layers { found: 4, layers: 3 }));
        assert!(matches!(fails(2, &text(31), 32), StudentError::Calibration { found: 31, length: 32 }));
        assert!(matches!(fails(2, &text(31), 0), StudentError::Calibration { .. }));
        assert!(matches!(fails(2, &[61; 32], 32), StudentError::Token { token: 61, vocab: 61 }));
        assert_eq!(choose_layers(&teacher, 3, &[], 32, &mut |_, _, _| {}).unwrap().kept, [0, 1, 2]);
    }
}
