//! Mixed precision: a type for each tensor, so that a file of a given size says what the model says as nearly as it can.
//!
//! Each tensor is rounded alone, as it will be, and the divergence of the predictions measured, in its smallest type.
//! Divergence is quadratic in small errors, so in other types it is taken to be that times the ratio of the errors of
//! plain rounding, weighed by the activations that meet them. What all tensors add up to is minimized under the size by a
//! Lagrange multiplier.

use std::collections::BTreeMap;

use candle_core::Tensor;
use edge_models::{Role, TensorRow};
use edge_runtime::format::DType;

use super::calibrate::{
    self, CalibrationError, Method, Progress, READERS, Sample, TABLE_DAMPING, factor, head_role, through,
};
use super::moments::{Factor, Moments};
use super::{Blocks, Encoding, Imatrix, Mix, gptq};
use crate::export::gguf::{ExportError, measure};
use crate::model::Model;
use crate::student::{Reference, StudentError};
use crate::train::Projection;
use crate::train::graph::Decoder;
use crate::train::loss;
use crate::train::ops::with_values;

/// Tokens on which divergence is measured.
const PROBE_TOKENS: usize = 512;
/// One position in this many is scored.
const STRIDE: usize = 2;
/// Tokens that say how columns weigh.
const IMPORTANCE_TOKENS: usize = 8192;
/// Where tensors begin in a file.
const ALIGNMENT: u64 = 32;

/// Types that a tensor may become.
const CANDIDATES: [DType; 8] =
    [DType::Q4_0, DType::Q4K, DType::Q4_1, DType::Q5_0, DType::Q5K, DType::Q5_1, DType::Q6K, DType::Q8_0];

/// Why no mix was found.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum BudgetError {
    #[error("the smallest types take {smallest} bytes, the budget is {budget}")]
    TooSmall { smallest: u64, budget: u64 },
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(transparent)]
    Student(#[from] StudentError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// What is scarce.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Bytes of the file.
    File(u64),
    /// Bytes of the weights that a token reads: all of them, but one row alone of an embedding table that is no head.
    Read(u64),
}

/// What a tensor costs in one type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The type.
    pub dtype: DType,
    /// Bytes in the file.
    pub bytes: u64,
    /// Bytes of the budget.
    pub cost: u64,
    /// Nats per token that rounding to it adds to the divergence.
    pub kl: f64,
}

/// One tensor of the file and what may become of it.
#[derive(Clone, Debug)]
pub struct Sensitivity {
    /// Its (first) role.
    pub role: Role,
    /// Its layer.
    pub layer: usize,
    /// From the smallest.
    pub choices: Vec<Choice>,
}

/// Types within `budget` under which a file that is rounded by `method`, with `damping` as in
/// [`Rounding`](super::calibrate::Rounding), diverges least from `model`, and the divergence that is to be expected if
/// no matrix makes up for another.
///
/// # Errors
/// No mix is that small; the text is too short or not the model's.
pub fn choose(
    model: &Model,
    budget: Budget,
    method: Method,
    damping: f64,
    sample: Sample<'_>,
    progress: Progress<'_>,
) -> Result<(Encoding, f64), BudgetError> {
    let mut tensors = sensitivities(model, method, damping, sample, progress)?;
    let smallest = measure(model, &encoding(&tensors, &vec![0; tensors.len()]))?;
    let matrices: u64 = tensors.iter().map(|tensor| tensor.choices[0].bytes).sum();
    // What no choice changes: vectors, and of a file its header and vocabulary.
    let (budget, rest) = match budget {
        Budget::File(budget) => (budget, smallest.bytes - matrices),
        Budget::Read(budget) => {
            let looked_up = |tensor: &&mut Sensitivity| tensor.role == Role::TokenEmbedding;
            for table in tensors.iter_mut().filter(looked_up).filter(|_| !model.spec.tied_embeddings) {
                table.choices.iter_mut().for_each(|choice| choice.cost /= model.spec.vocab as u64);
            }
            (budget, smallest.data_bytes.saturating_sub(matrices))
        }
    };
    let least = rest + tensors.iter().map(|tensor| tensor.choices[0].cost).sum::<u64>();
    if least > budget {
        return Err(BudgetError::TooSmall { smallest: least, budget });
    }
    let picks = allocate(&tensors, budget - rest);
    let kl = tensors.iter().zip(&picks).map(|(tensor, pick)| tensor.choices[*pick].kl).sum();
    Ok((encoding(&tensors, &picks), kl))
}

/// The choice of each tensor whose sum of divergences is least within `budget` bytes: for a price of a byte, each
/// tensor takes what is cheapest to it; the lowest price at which all fits, then single steps with what is left.
fn allocate(tensors: &[Sensitivity], budget: u64) -> Vec<usize> {
    let bytes = |picks: &[usize]| -> u64 {
        tensors.iter().zip(picks).map(|(tensor, pick)| tensor.choices[*pick].cost).sum()
    };
    let at = |price: f64| -> Vec<usize> {
        let pick = |tensor: &Sensitivity| {
            let cost = |choice: &Choice| choice.kl + price * choice.cost as f64;
            let costs = tensor.choices.iter().map(cost).enumerate();
            costs.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(index, _)| index)
        };
        tensors.iter().map(pick).collect()
    };
    // Nats a byte; at the highest nothing but size counts.
    let (mut low, mut high) = (1e-30f64, 1e6f64);
    if bytes(&at(low)) <= budget {
        return at(low);
    }
    for _ in 0..200 {
        let price = (low * high).sqrt();
        if bytes(&at(price)) <= budget { high = price } else { low = price }
    }
    let mut picks = at(high);
    loop {
        let left = budget - bytes(&picks).min(budget);
        let step = tensors.iter().enumerate().flat_map(|(index, tensor)| {
            let now = tensor.choices[picks[index]];
            tensor.choices.iter().enumerate().filter_map(move |(pick, choice)| {
                let more = choice.cost.checked_sub(now.cost).filter(|more| *more <= left)?;
                let gain = now.kl - choice.kl;
                (gain > 0.0).then_some((gain / more.max(1) as f64, index, pick))
            })
        });
        match step.max_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((_, index, pick)) => picks[index] = pick,
            None => return picks,
        }
    }
}

fn encoding(tensors: &[Sensitivity], picks: &[usize]) -> Encoding {
    let mut weights: BTreeMap<u32, (u64, DType)> = BTreeMap::new();
    let mut types = BTreeMap::new();
    for (tensor, pick) in tensors.iter().zip(picks) {
        let Choice { dtype, bytes, .. } = tensor.choices[*pick];
        types.insert((tensor.role, tensor.layer), dtype);
        let per_block = (dtype.block_len() as u64, dtype.block_bytes() as u64);
        weights.entry(dtype as u32).or_insert((0, dtype)).0 += bytes * per_block.0 / per_block.1;
    }
    // The file calls itself by what most of its weights are.
    let most = weights.into_values().max_by_key(|(count, _)| *count).map(|(_, dtype)| dtype);
    let mix = Mix::ALL.into_iter().rev().find(|mix| Some(mix.base()) == most).unwrap_or(Mix::Q8_0);
    Encoding::with_types(mix, types)
}

/// Measures every tensor of `model` alone.
///
/// # Errors
/// The text is too short or not the model's, or the model computes nonsense.
pub fn sensitivities(
    model: &Model,
    method: Method,
    damping: f64,
    sample: Sample<'_>,
    progress: Progress<'_>,
) -> Result<Vec<Sensitivity>, BudgetError> {
    let most =
        |tokens: usize| &sample.ids[..sample.ids.len().min(tokens / sample.length.max(1) * sample.length)];
    let known = Sample { ids: most(IMPORTANCE_TOKENS.max(sample.length)), ..sample };
    let importance = calibrate::imatrix(model, known, &mut |_, _, _| {})?;
    let length = sample.length.min(PROBE_TOKENS / 2);
    let probe = Probe::new(
        model,
        Sample { ids: &sample.ids[..sample.ids.len().min(PROBE_TOKENS)], length, ..sample },
    )?;
    let spec = &model.spec;
    let rows = spec
        .family
        .tensors
        .iter()
        .filter(|row| row.leads() && !row.role.is_vector() && row.role.required(spec));
    let (inside, tables): (Vec<&TensorRow>, Vec<_>) = rows.partition(|row| row.role.per_layer());
    let total = inside.len() * spec.layers + tables.len();
    let mut scratch = Decoder::new(spec, &model.weights)?;
    let mut found = Vec::new();
    let mut measure = |row: &TensorRow, layer: usize, how: How<'_>| -> Result<(), BudgetError> {
        found.push(probe.tensor(row, layer, how, &importance, &mut scratch)?);
        progress(found.len(), total, row.gguf);
        Ok(())
    };
    let plain = if method == Method::Plain { How::Plain } else { How::Weighed };
    if method != Method::Gptq {
        for layer in 0..spec.layers {
            inside.iter().try_for_each(|row| measure(row, layer, plain))?;
        }
        tables.iter().try_for_each(|row| measure(row, 0, plain))?;
        return Ok(found);
    }
    // The residual stream of the text, chunk by chunk.
    let chunks = known.chunks(spec.vocab)?;
    let streams = chunks.iter().map(|chunk| probe.decoder.embed(chunk));
    let mut streams = streams.collect::<candle_core::Result<Vec<_>>>()?;
    for layer in 0..spec.layers {
        let mut moments = READERS.map(|roles| Moments::new(roles[0].shape(spec)[1], 0));
        for stream in &mut streams {
            let (inputs, behind) = through(&probe.decoder, layer, stream, known.length)?;
            moments.iter_mut().zip(&inputs).try_for_each(|(moments, input)| moments.add(input, None))?;
            *stream = behind;
        }
        for (roles, moments) in READERS.iter().zip(moments) {
            let factor = factor(roles[0], layer, &moments, damping)?;
            let rows = inside.iter().filter(|row| roles.contains(&row.role));
            rows.copied().try_for_each(|row| measure(row, layer, How::Gptq(&factor)))?;
        }
    }
    let mut moments = Moments::new(spec.hidden, 0);
    for stream in &streams {
        moments.add(&probe.decoder.final_norm(stream)?, None)?;
    }
    let head = head_role(model);
    let damping = if spec.tied_embeddings { TABLE_DAMPING * damping } else { damping };
    let factor = factor(head, 0, &moments, damping)?;
    for row in tables {
        measure(row, 0, if row.role == head { How::Gptq(&factor) } else { How::Plain })?;
    }
    Ok(found)
}

/// How a matrix is rounded.
#[derive(Clone, Copy)]
enum How<'a> {
    /// Each block by itself.
    Plain,
    /// The same, errors weighed by the activations that they meet.
    Weighed,
    /// By GPTQ, for inputs of which this is the factor.
    Gptq(&'a Factor),
}

/// The exact model on a little text.
struct Probe<'m> {
    model: &'m Model,
    decoder: Decoder,
    ids: Vec<u32>,
    length: usize,
    /// The residual stream before each layer.
    states: Vec<Tensor>,
    hidden: Tensor,
    reference: Reference,
}

impl<'m> Probe<'m> {
    fn new(model: &'m Model, sample: Sample<'_>) -> Result<Self, BudgetError> {
        let decoder = Decoder::new(&model.spec, &model.weights)?;
        let ids = sample.chunks(model.spec.vocab)?.concat();
        let windows = ids.len() / sample.length;
        let mut states = vec![decoder.embed(&ids)?];
        for layer in 0..model.spec.layers {
            states.push(decoder.block(layer, &states[layer], windows, sample.length)?);
        }
        let hidden = decoder.final_norm(&states[model.spec.layers])?;
        let rows = (STRIDE - 1..ids.len()).step_by(STRIDE).collect();
        let all = Reference::new(&hidden, &decoder.head()?, (0..ids.len()).collect())?;
        let reference = all.subset(rows)?;
        Ok(Self { model, decoder, ids, length: sample.length, states, hidden, reference })
    }

    /// What becomes of the predictions with the matrices of one tensor rounded, and nothing else.
    fn tensor(
        &self,
        row: &TensorRow,
        layer: usize,
        how: How<'_>,
        importance: &Imatrix,
        scratch: &mut Decoder,
    ) -> Result<Sensitivity, BudgetError> {
        let spec = &self.model.spec;
        let [rows, cols] = row.file_shape(spec);
        let mut choices = Vec::new();
        for dtype in CANDIDATES {
            let Some(row_bytes) = dtype.row_bytes(cols).filter(|bytes| *bytes > 0) else { continue };
            let bytes = ((row_bytes * rows) as u64).next_multiple_of(ALIGNMENT);
            choices.push(Choice { dtype, bytes, cost: bytes, kl: 0.0 });
        }
        choices.sort_by_key(|choice| choice.bytes);
        let mut unit = None;
        for choice in &mut choices {
            let (mut error, mut rounded) = (0.0, Vec::new());
            for role in row.members() {
                let (squares, matrix) = self.round(*role, layer, choice.dtype, how, importance)?;
                error += squares;
                rounded.push((*role, matrix));
            }
            // Measured once, in the smallest type.
            let unit = match unit {
                Some(unit) => unit,
                None => {
                    if let How::Gptq(factor) = how {
                        for (role, matrix) in &mut rounded {
                            *matrix = self.gptq(*role, layer, choice.dtype, factor)?;
                        }
                    }
                    let kl = self.divergence_with(row.role, layer, rounded, scratch)?;
                    *unit.insert(kl / f64::max(error, f64::MIN_POSITIVE))
                }
            };
            choice.kl = unit * error;
        }
        if choices.is_empty() {
            // Rows of no whole number of blocks.
            let bytes = ((2 * rows * cols) as u64).next_multiple_of(ALIGNMENT);
            choices.push(Choice { dtype: DType::F16, bytes, cost: bytes, kl: 0.0 });
        }
        Ok(Sensitivity { role: row.role, layer, choices })
    }

    fn weight(&self, role: Role, layer: usize) -> candle_core::Result<Tensor> {
        match self.model.weights.get(role, layer) {
            Some(weight) => weight.contiguous(),
            None => candle_core::bail!("weight {role:?} of layer {layer} is missing"),
        }
    }

    /// `sum(importance * (w - q)^2)` of a matrix as `dtype`, each block by itself, and the matrix.
    fn round(
        &self,
        role: Role,
        layer: usize,
        dtype: DType,
        how: How<'_>,
        importance: &Imatrix,
    ) -> Result<(f64, Tensor), BudgetError> {
        let shape = role.shape(&self.model.spec);
        let columns = importance.importance(role, layer, &self.model.spec);
        let weighed = columns.as_deref().filter(|_| !matches!(how, How::Plain));
        let weight = self.weight(role, layer)?;
        let rounded = with_values(&weight, |values| Ok(Blocks::quantize(dtype, shape, values, weighed)))?
            .map_err(|source| CalibrationError::Quantize { role, layer, source })?
            .tensor()?;
        let columns = columns.unwrap_or_else(|| vec![1.0; shape[1]]);
        let error = (&weight - &rounded)?.sqr()?.sum(0)?.to_vec1::<f32>()?;
        let error =
            error.iter().zip(&columns).map(|(error, weight)| f64::from(*error) * f64::from(*weight)).sum();
        Ok((error, rounded))
    }

    /// A matrix rounded to `dtype` by GPTQ.
    fn gptq(&self, role: Role, layer: usize, dtype: DType, factor: &Factor) -> Result<Tensor, BudgetError> {
        let shape = role.shape(&self.model.spec);
        let rounded = with_values(&self.weight(role, layer)?, |values| {
            Ok(gptq::round(dtype, values, shape[1], factor)
                .and_then(|rounded| Blocks::new(dtype, shape, rounded.blocks)))
        })?;
        Ok(rounded.map_err(|source| CalibrationError::Quantize { role, layer, source })?.tensor()?)
    }

    /// Divergence with some matrices of a layer replaced in `scratch`, which is the exact model before and after.
    fn divergence_with(
        &self,
        role: Role,
        layer: usize,
        matrices: Vec<(Role, Tensor)>,
        scratch: &mut Decoder,
    ) -> Result<f64, BudgetError> {
        let roles: Vec<Role> = matrices.iter().map(|(role, _)| *role).collect();
        for (role, matrix) in matrices {
            scratch.replace(role, layer, Projection::Dense(matrix))?;
        }
        let kl = self.divergence(role, layer, scratch)?;
        for role in roles {
            scratch.replace(role, layer, self.decoder.matrix(role, layer)?.clone())?;
        }
        Ok(kl)
    }

    fn divergence(&self, role: Role, layer: usize, changed: &Decoder) -> Result<f64, BudgetError> {
        let windows = self.ids.len() / self.length;
        let (mut x, first) = match role {
            _ if role.per_layer() => (self.states[layer].clone(), layer),
            Role::TokenEmbedding => (changed.embed(&self.ids)?, 0),
            _ => (self.states[self.model.spec.layers].clone(), self.model.spec.layers),
        };
        for layer in first..self.model.spec.layers {
            x = changed.block(layer, &x, windows, self.length)?;
        }
        let hidden = changed.final_norm(&x)?;
        if role.per_layer() {
            return Ok(self.reference.divergence(&hidden, &self.decoder.head()?)?.max(0.0));
        }
        // Another head: no short cut.
        let targets: Vec<u32> =
            (0..self.ids.len()).map(|i| if i % STRIDE == STRIDE - 1 { 0 } else { loss::IGNORE }).collect();
        let parts =
            loss::divergence(&hidden, &changed.head()?, &self.hidden, &self.decoder.head()?, &targets)?;
        Ok(parts.kl.max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::calibrate::tests::{divergence, through_a_file};
    use crate::quantize::calibrate::{Rounding, round_model};
    use crate::train::fixture::{text, tiny_in_blocks};

    fn tensors() -> Vec<Sensitivity> {
        // Bytes and divergence of three types, the tensors being of unlike size and sensitivity.
        [(10u64, 4.0), (10, 0.1), (40, 1.0), (25, 9.0), (5, 0.5)]
            .into_iter()
            .map(|(size, kl)| {
                let choice = |dtype, bits, share| Choice {
                    dtype,
                    bytes: size * bits,
                    cost: size * bits,
                    kl: kl * share,
                };
                let choices = vec![
                    choice(DType::Q4_0, 4, 1.0),
                    choice(DType::Q5_0, 5, 0.25),
                    choice(DType::Q8_0, 8, 0.004),
                ];
                Sensitivity { role: Role::FfnUp, layer: 0, choices }
            })
            .collect()
    }

    #[test]
    fn allocations_are_nearly_the_best_and_within_the_budget() {
        let tensors = tensors();
        let sums = |picks: &[usize]| {
            let chosen = tensors.iter().zip(picks).map(|(tensor, pick)| tensor.choices[*pick]);
            chosen.fold((0, 0.0), |(bytes, kl), choice| (bytes + choice.bytes, kl + choice.kl))
        };
        let all: Vec<Vec<usize>> =
            (0..243).map(|i| (0..5).map(|at| i / 3usize.pow(at) % 3).collect()).collect();
        for budget in (360..=720).step_by(15) {
            let (bytes, kl) = sums(&allocate(&tensors, budget));
            assert!(bytes <= budget, "{bytes} of {budget}");
            let fitting = all.iter().map(|picks| sums(picks)).filter(|(bytes, _)| *bytes <= budget);
            let best = fitting.map(|(_, kl)| kl).fold(f64::INFINITY, f64::min);
            assert!(kl <= 1.5 * best + 1e-9, "{budget}: {kl}, the best is {best}");
        }
        assert_eq!(allocate(&tensors, 360), [0; 5]);
        assert_eq!(allocate(&tensors, 720), [2; 5]);
    }

    #[test]
    fn a_mix_under_a_budget_beats_one_type_of_the_same_size() {
        let model = tiny_in_blocks(3, 5);
        let ids = text(1024);
        let sample = Sample { ids: &ids, length: 16, bos: None };
        let uniform = Encoding::from(Mix::Q5_0);
        let budget = measure(&model, &uniform).unwrap().bytes;
        let mut last = 0;
        let (mixed, expected) =
            choose(&model, Budget::File(budget), Method::Plain, 0.0, sample, &mut |done, _, _| last = done)
                .unwrap();
        assert_eq!(last, 3 * 7 + 1);
        let size = measure(&model, &mixed).unwrap().bytes;
        assert!(size <= budget && size > budget * 95 / 100, "{size} of {budget}");
        let [uniform, found] =
            [&uniform, &mixed].map(|encoding| divergence(&model, &through_a_file(&model, encoding)));
        assert!(found < uniform, "{found} {uniform}");
        assert!((0.3..3.0).contains(&(expected / found)), "{expected} {found}");
        let error =
            choose(&model, Budget::File(1000), Method::Plain, 0.0, sample, &mut |_, _, _| {}).unwrap_err();
        assert!(matches!(error, BudgetError::TooSmall { budget: 1000, smallest } if smallest > 1000));
    }

    /// So it does where both are rounded by GPTQ, which leaves less of some matrices' errors than of others'.
    #[test]
    fn a_mix_beats_one_type_under_gptq_too() {
        let model = tiny_in_blocks(3, 5);
        let ids = text(3072);
        let sample = Sample { ids: &ids, length: 16, bos: None };
        let uniform = Encoding::from(Mix::Q5_0);
        let budget = Budget::File(measure(&model, &uniform).unwrap().bytes);
        let mut last = 0;
        let choose = |damping, tell: Progress<'_>| {
            choose(&model, budget, Method::Gptq, damping, sample, tell).unwrap()
        };
        let (mixed, expected) =
            choose(Rounding::default().damping, &mut |done, total, _| last = total - done);
        assert_eq!(last, 0);
        // With damping beyond all inputs columns know nothing of each other, and little is made up for.
        let damped = choose(1e6, &mut |_, _, _| {}).1;
        assert!(damped > 1.1 * expected, "{damped} {expected}");
        let [uniform, found] = [uniform, mixed].map(|encoding| {
            let rounding = Rounding { propagation: 0.0, ..Rounding::default() };
            let rounded = round_model(&model, encoding, sample, rounding, &mut |_, _, _| {}).unwrap();
            divergence(&model, &through_a_file(&model, &rounded.encoding))
        });
        assert!(found < uniform, "{found} {uniform}");
        assert!((0.3..3.0).contains(&(expected / found)), "{expected} {found}");
    }

    /// A table that is only looked up costs next to nothing to read, so it stays precise, and matrices share the rest.
    #[test]
    fn what_a_token_reads_is_a_budget_of_its_own() {
        let mut model = tiny_in_blocks(2, 5);
        let ids = text(1024);
        let sample = Sample { ids: &ids, length: 16, bos: None };
        let table = model.weights.get(Role::TokenEmbedding, 0).unwrap().clone();
        model.weights.insert(Role::Output, 0, table);
        model.spec.tied_embeddings = false;
        let read = |encoding: &Encoding| -> u64 {
            let read = model.weights.iter().filter(|(role, ..)| *role != Role::TokenEmbedding);
            read.map(|(role, layer, weight)| {
                let dtype = encoding.dtype(role, layer, &model.spec);
                let cols = *weight.dims().last().unwrap();
                (dtype.row_bytes(cols).unwrap() * (weight.elem_count() / cols)) as u64
            })
            .sum()
        };
        let budget = read(&Mix::Q5_0.into());
        let (found, _) =
            choose(&model, Budget::Read(budget), Method::Plain, 0.0, sample, &mut |_, _, _| {}).unwrap();
        assert_eq!(found.dtype(Role::TokenEmbedding, 0, &model.spec), DType::Q8_0);
        let bytes = read(&found);
        assert!(bytes <= budget && bytes > budget * 9 / 10, "{bytes} of {budget}");
    }
}
