//! Which hidden states of a student are compared with which of its teacher's, and through what.
//!
//! A student that was cut from its teacher compares each block with the teacher's before the next layer that stayed,
//! another one with blocks at even distances. Where the widths differ a matrix that is trained beside the student takes
//! its states to the teacher's width; it is no part of the student.

use std::cell::RefCell;

use candle_core::{Device, Tensor, Var};
use edge_models::DecoderSpec;

use super::error::TrainError;
use super::graph::Decoder;
use super::loss::{HiddenTerms, hidden_loss};
use super::ops::linear;
use super::optimizer::Parameter;
use super::random::SplitMix64;

/// The comparison of hidden states.
pub(super) struct Inner {
    terms: HiddenTerms,
    pairs: Vec<Pair>,
}

struct Pair {
    student: usize,
    teacher: usize,
    /// `[teacher's width, student's width]`.
    projection: Option<Var>,
}

impl Inner {
    /// What `terms` ask for; `None` if that is nothing. `kept` are the teacher's layers that the student's came
    /// from, empty if they came from elsewhere.
    ///
    /// # Errors
    /// A block that the student does not have.
    pub fn new(
        terms: &HiddenTerms,
        student: &DecoderSpec,
        teacher: &DecoderSpec,
        kept: &[usize],
        seed: u64,
    ) -> Result<Option<Self>, TrainError> {
        if !terms.any() {
            return Ok(None);
        }
        if let Some(layer) = terms.numbers().into_iter().find(|layer| *layer >= student.layers) {
            let (setting, expected) = ("layer with a hidden-state term", "below the student's layers");
            return Err(TrainError::Setting { setting, found: layer.to_string(), expected });
        }
        let came_from = |layer: usize| match kept.get(layer) {
            Some(_) => kept.get(layer + 1).copied().unwrap_or(teacher.layers) - 1,
            None => ((layer + 1) * teacher.layers / student.layers).max(1) - 1,
        };
        let pairs = terms.chosen(student.layers).map(|layer| {
            let shape = (teacher.hidden, student.hidden);
            let projection = (shape.0 != shape.1).then(|| projection(shape, seed, layer)).transpose()?;
            Ok(Pair { student: layer, teacher: came_from(layer), projection })
        });
        Ok(Some(Self { terms: *terms, pairs: pairs.collect::<candle_core::Result<_>>()? }))
    }

    /// The matrices that are trained.
    pub fn parameters(&self) -> impl Iterator<Item = Parameter> {
        self.pairs.iter().filter_map(|pair| {
            let name = format!("projection.{}", pair.student);
            Some(Parameter { name, var: pair.projection.clone()?, decay: true })
        })
    }

    /// The pairs in words, for a checkpoint.
    pub fn describe(&self) -> String {
        let pairs = self.pairs.iter().map(|pair| format!("{}:{}", pair.student, pair.teacher));
        pairs.collect::<Vec<_>>().join(" ")
    }

    /// Final hidden states of `teacher`, and the states inside that are compared.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn of_teacher(
        &self,
        teacher: &Decoder,
        tokens: &[u32],
        shape: (usize, usize),
    ) -> candle_core::Result<States> {
        States::of(teacher, tokens, shape, |layer| self.pairs.iter().any(|pair| pair.teacher == layer))
    }

    /// The same of `student`.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn of_student(
        &self,
        student: &Decoder,
        tokens: &[u32],
        shape: (usize, usize),
    ) -> candle_core::Result<States> {
        States::of(student, tokens, shape, |layer| self.pairs.iter().any(|pair| pair.student == layer))
    }

    /// The mean over the pairs, times `scale`, with its graph, and its value without.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn loss(
        &self,
        student: &States,
        teacher: &States,
        targets: &[u32],
        scale: f64,
    ) -> candle_core::Result<(Tensor, f64)> {
        let count = self.pairs.len() as f64;
        let mut sum: Option<Tensor> = None;
        let mut value = 0.0;
        for pair in &self.pairs {
            let (s, t) = (student.inside(pair.student)?, teacher.inside(pair.teacher)?);
            let s = match &pair.projection {
                Some(projection) => linear(s, projection)?,
                None => s.clone(),
            };
            let (loss, of_pair) = hidden_loss(&s, t, targets, &self.terms, scale / count)?;
            value += of_pair / count;
            sum = Some(match sum {
                Some(sum) => (sum + loss)?,
                None => loss,
            });
        }
        match sum {
            Some(sum) => Ok((sum, value)),
            None => candle_core::bail!("no hidden state to compare"),
        }
    }
}

/// Final hidden states of a model and some inside it.
pub(super) struct States {
    pub last: Tensor,
    inside: Vec<(usize, Tensor)>,
}

impl States {
    fn of(
        model: &Decoder,
        tokens: &[u32],
        (batch, length): (usize, usize),
        wanted: impl Fn(usize) -> bool,
    ) -> candle_core::Result<Self> {
        let inside = RefCell::new(Vec::new());
        let last = model.hidden_with(tokens, batch, length, &mut |layer, x| {
            if wanted(layer) {
                inside.borrow_mut().push((layer, x.clone()));
            }
        })?;
        Ok(Self { last, inside: inside.into_inner() })
    }

    fn inside(&self, layer: usize) -> candle_core::Result<&Tensor> {
        match self.inside.iter().find(|(found, _)| *found == layer) {
            Some((_, states)) => Ok(states),
            None => candle_core::bail!("no hidden states of layer {layer}"),
        }
    }
}

/// A fresh projection that keeps the size of what goes through it.
fn projection((rows, cols): (usize, usize), seed: u64, layer: usize) -> candle_core::Result<Var> {
    let mut values = vec![0f32; rows * cols];
    SplitMix64::new(seed, (1 << 48) | layer as u64).fill_normal(&mut values, 1.0 / (cols as f64).sqrt());
    Var::from_tensor(&Tensor::from_vec(values, (rows, cols), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::tiny;
    use super::super::ops::check;
    use super::*;

    fn spec(layers: usize, hidden: usize) -> DecoderSpec {
        DecoderSpec { layers, hidden, ..tiny(1, 1).spec }
    }

    #[test]
    fn blocks_are_compared_with_what_the_next_layer_expects() {
        let terms: HiddenTerms = "mse".parse().unwrap();
        let pairs = |student, teacher, kept: &[usize]| {
            let inner = Inner::new(&terms, &spec(student, 16), &spec(teacher, 16), kept, 0).unwrap().unwrap();
            assert_eq!(inner.parameters().count(), 0);
            inner.describe()
        };
        assert_eq!(pairs(3, 8, &[0, 2, 7]), "0:1 1:6 2:7");
        assert_eq!(pairs(3, 9, &[]), "0:2 1:5 2:8");
        assert_eq!(pairs(4, 2, &[]), "0:0 1:0 2:0 3:1");
        assert!(Inner::new(&HiddenTerms::default(), &spec(3, 16), &spec(8, 16), &[], 0).unwrap().is_none());
        let one = HiddenTerms { layers: edge_models::LayerSet::new(9, |layer| layer == 2), ..terms };
        assert!(Inner::new(&one, &spec(2, 16), &spec(4, 16), &[], 0).is_err());
        let inner = Inner::new(&one, &spec(3, 12), &spec(6, 16), &[], 0).unwrap().unwrap();
        assert_eq!(inner.describe(), "2:5");
        assert_eq!(inner.parameters().next().unwrap().var.dims(), [16, 12]);
    }

    #[test]
    fn gradients_reach_states_and_projection() {
        let terms: HiddenTerms = "mse=0.3,cos=0.4".parse().unwrap();
        let inner = Inner::new(&terms, &spec(1, 5), &spec(1, 7), &[], 0).unwrap().unwrap();
        let (states, weight) = (check::matrix(1, 4, 5), check::matrix(2, 7, 5));
        let teacher = States { last: states.clone(), inside: vec![(0, check::matrix(3, 4, 7))] };
        check::gradients(&[states, weight], |x| {
            let projection = linear(&x[0], &x[1])?;
            let student = States { last: projection.clone(), inside: vec![(0, projection)] };
            let plain = Inner { terms, pairs: vec![Pair { student: 0, teacher: 0, projection: None }] };
            Ok(plain.loss(&student, &teacher, &[0, 1, 2, 3], 4.0)?.0)
        });
        // The very path of a run: the variable gets a gradient.
        let student = States { last: check::matrix(1, 4, 5), inside: vec![(0, check::matrix(1, 4, 5))] };
        let (loss, value) = inner.loss(&student, &teacher, &[0, 1, 2, 3], 2.0).unwrap();
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - 2.0 * value).abs() < 1e-5 && value > 0.0);
        let var = inner.parameters().next().unwrap().var;
        assert!(loss.backward().unwrap().get(var.as_tensor()).is_some());
    }
}
