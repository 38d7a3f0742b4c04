//! How far hidden states inside a student are from those inside its teacher.
//!
//! Both terms are free of scale, so that a layer whose states are large weighs no more than another: the mean
//! square error is divided by the mean square of the teacher's state (per position), and the cosine distance
//! looks at directions alone. The gradient is made in the forward pass and scaled in the backward pass.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use edge_models::{DecoderSpec, LayerSet};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::IGNORE;
use crate::train::ops::{rows_cols, tensor, values, with_values};

/// Weights of the terms, as text `mse=0.1,cos=0.05`, and where they apply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HiddenTerms {
    /// Of the mean square error beside the mean square of the teacher's state.
    pub mse: f64,
    /// Of one minus the cosine.
    pub cosine: f64,
    /// Blocks of the student whose output is compared; none means all.
    #[serde(with = "layers")]
    pub layers: LayerSet,
}

impl HiddenTerms {
    /// Whether anything is compared.
    pub fn any(&self) -> bool {
        self.mse > 0.0 || self.cosine > 0.0
    }

    /// The compared blocks of a student with `layers`, in order.
    pub fn chosen(&self, layers: usize) -> impl Iterator<Item = usize> {
        let (all, set) = (self.layers.is_empty(), self.layers);
        (0..layers).filter(move |layer| all || set.contains(*layer))
    }

    /// The same terms at these blocks of the student only; at all of them if there are none.
    pub fn at(self, layers: &[u16]) -> Self {
        Self {
            layers: LayerSet::new(DecoderSpec::MAX_LAYERS, |layer| layers.contains(&(layer as u16))),
            ..self
        }
    }

    /// The numbers of the blocks, empty for all of them.
    pub fn numbers(&self) -> Vec<usize> {
        (0..DecoderSpec::MAX_LAYERS).filter(|layer| self.layers.contains(*layer)).collect()
    }
}

impl FromStr for HiddenTerms {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut terms = Self::default();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let place = match name.trim() {
                "mse" => &mut terms.mse,
                "cos" => &mut terms.cosine,
                other => return Err(format!("hidden term `{other}`, expected mse or cos")),
            };
            match weight.trim().parse::<f64>() {
                Ok(value) if value > 0.0 && value <= 1000.0 => *place = value,
                _ => {
                    return Err(format!(
                        "weight `{}` of {name}, expected above 0, up to 1000",
                        weight.trim()
                    ));
                }
            }
        }
        Ok(terms)
    }
}

impl fmt::Display for HiddenTerms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = [("mse", self.mse), ("cos", self.cosine)];
        let said = terms.iter().filter(|(_, weight)| *weight > 0.0);
        let said: Vec<String> = said.map(|(name, weight)| format!("{name}={weight}")).collect();
        f.write_str(&said.join(","))
    }
}

/// A set of layers as a list of numbers.
mod layers {
    use super::{DecoderSpec, LayerSet};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(set: &LayerSet, to: S) -> Result<S::Ok, S::Error> {
        let numbers: Vec<usize> = (0..DecoderSpec::MAX_LAYERS).filter(|layer| set.contains(*layer)).collect();
        numbers.serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<LayerSet, D::Error> {
        let numbers = Vec::<usize>::deserialize(from)?;
        if let Some(layer) = numbers.iter().find(|layer| **layer >= DecoderSpec::MAX_LAYERS) {
            return Err(serde::de::Error::custom(format!("layer {layer}, which no model has")));
        }
        Ok(LayerSet::new(DecoderSpec::MAX_LAYERS, |layer| numbers.contains(&layer)))
    }
}

/// The terms between `student` and `teacher`, both `[n, width]`, averaged over the rows whose target is not
/// [`IGNORE`] and multiplied by `scale`, and their value without it.
///
/// # Errors
/// The shapes do not fit.
pub fn hidden_loss(
    student: &Tensor,
    teacher: &Tensor,
    targets: &[u32],
    terms: &HiddenTerms,
    scale: f64,
) -> Result<(Tensor, f64)> {
    if student.dims() != teacher.dims() || student.dim(0)? != targets.len() {
        let (found, expected) = (student.dims(), teacher.dims());
        bail!("hidden loss: {found:?} beside {expected:?} and {} targets", targets.len());
    }
    let op = HiddenLoss {
        teacher: teacher.detach(),
        targets: targets.to_vec(),
        terms: *terms,
        scale,
        gradient: Mutex::new(None),
    };
    let loss = student.apply_op1(op)?;
    let value = f64::from(loss.to_scalar::<f32>()?) / scale;
    Ok((loss, value))
}

struct HiddenLoss {
    teacher: Tensor,
    targets: Vec<u32>,
    terms: HiddenTerms,
    scale: f64,
    gradient: Mutex<Option<Tensor>>,
}

impl HiddenLoss {
    /// The value of one row times `factor`; `out` becomes its gradient.
    fn row(&self, s: &[f32], t: &[f32], factor: f64, out: &mut [f32]) -> f64 {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        // A state of nothing but zeros has no direction and no scale.
        let (st, ss, tt) = (dot(s, t), dot(s, s).max(1e-12), dot(t, t).max(1e-12));
        let square: f64 = s.iter().zip(t).map(|(s, t)| f64::from(s - t).powi(2)).sum();
        let norms = (ss * tt).sqrt();
        let HiddenTerms { mse, cosine, .. } = self.terms;
        // d/ds |s - t|^2 / |t|^2 = 2 (s - t) / |t|^2; d/ds -s.t / (|s| |t|) = (s s.t / |s|^2 - t) / (|s| |t|).
        let of_s = (factor * (2.0 * mse / tt + cosine * st / (ss * norms))) as f32;
        let of_t = (factor * (2.0 * mse / tt + cosine / norms)) as f32;
        for ((out, s), t) in out.iter_mut().zip(s).zip(t) {
            *out = of_s * s - of_t * t;
        }
        factor * (mse * square / tt + cosine * (1.0 - st / norms))
    }
}

impl CustomOp1 for HiddenLoss {
    fn name(&self) -> &'static str {
        "hidden-loss"
    }

    fn cpu_fwd(&self, student: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = rows_cols(layout, "hidden loss")?;
        let student = values(student, layout, "hidden loss")?;
        let scored = self.targets.iter().filter(|target| **target != IGNORE).count();
        let factor = self.scale / scored.max(1) as f64;
        let mut gradient = vec![0.0; rows * width];
        let sums: Vec<f64> = with_values(&self.teacher, |teacher| {
            Ok(gradient
                .par_chunks_mut(width)
                .zip(student.par_chunks(width))
                .zip(teacher.par_chunks(width))
                .zip(&self.targets)
                .map(
                    |(((out, s), t), target)| {
                        if *target == IGNORE { 0.0 } else { self.row(s, t, factor, out) }
                    },
                )
                .collect())
        })?;
        *self.gradient.lock().unwrap_or_else(PoisonError::into_inner) = Some(tensor(gradient, rows, width)?);
        Ok((CpuStorage::F32(vec![sums.iter().sum::<f64>() as f32]), Shape::from(())))
    }

    fn bwd(&self, _student: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let gradient = self.gradient.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(gradient) = gradient else { bail!("hidden loss: backward ran twice") };
        (gradient * f64::from(grad.to_scalar::<f32>()?)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    const TARGETS: [u32; 5] = [0, 1, IGNORE, 2, 3];

    #[test]
    fn gradients_of_both_terms() {
        let (student, teacher) = (check::matrix(1, 5, 7), check::matrix(2, 5, 7));
        for text in ["mse=0.5", "cos=2", "mse=0.1,cos=0.7"] {
            let terms: HiddenTerms = text.parse().unwrap();
            assert_eq!(terms.to_string(), text);
            check::gradients(std::slice::from_ref(&student), |x| {
                Ok(hidden_loss(&x[0], &teacher, &TARGETS, &terms, 5.0)?.0)
            });
        }
    }

    #[test]
    fn values_are_those_of_the_definition() {
        let (student, teacher) = (check::matrix(1, 5, 7), check::matrix(2, 5, 7));
        let (s, t) = (student.to_vec2::<f32>().unwrap(), teacher.to_vec2::<f32>().unwrap());
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
        let mean = |f: &dyn Fn(&[f32], &[f32]) -> f32| {
            [0, 1, 3, 4].iter().map(|&i| f64::from(f(&s[i], &t[i]))).sum::<f64>() / 4.0
        };
        let mse = mean(&|s, t| s.iter().zip(t).map(|(s, t)| (s - t).powi(2)).sum::<f32>() / norm(t));
        let cosine =
            mean(&|s, t| 1.0 - s.iter().zip(t).map(|(s, t)| s * t).sum::<f32>() / (norm(s) * norm(t)).sqrt());
        let value = |student: &Tensor, text: &str| {
            let terms = text.parse().unwrap();
            hidden_loss(student, &teacher, &TARGETS, &terms, 3.0).unwrap().1
        };
        assert!((value(&student, "mse=1") - mse).abs() < 1e-5);
        assert!((value(&student, "cos=1") - cosine).abs() < 1e-5);
        assert!((value(&student, "mse=2,cos=3") - 2.0 * mse - 3.0 * cosine).abs() < 1e-5);
        assert!(value(&teacher, "mse=1,cos=1").abs() < 1e-6);
        assert!(value(&(&teacher * 4.0).unwrap(), "cos=1").abs() < 1e-6);
        assert!(value(&student.zeros_like().unwrap(), "mse=1,cos=1").is_finite());
    }

    #[test]
    fn what_is_no_term_is_refused() {
        for (text, said) in [("l2=1", "`l2`"), ("mse=0", "`0`"), ("cos=x", "`x`"), ("", "``")] {
            let error = text.parse::<HiddenTerms>().unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        let other = check::matrix(2, 5, 6);
        let terms = "mse".parse().unwrap();
        assert!(hidden_loss(&check::matrix(1, 5, 7), &other, &TARGETS, &terms, 1.0).is_err());
    }
}
