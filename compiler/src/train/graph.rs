//! The differentiable decoder, driven by [`DecoderSpec`] alone, as the device's forward step is.

use std::collections::BTreeMap;
use std::sync::Mutex;

use candle_core::{Device, Result, Tensor, bail};
use edge_models::{DecoderSpec, Role, RopeScaling};

use super::ops::{Heads, RopeTable, attention, linear, rms_norm, rope, swiglu, with_values};
use crate::model::Weights;

/// A decoder over tensor handles: those that are variables are trained.
pub struct Decoder {
    spec: DecoderSpec,
    weights: Weights,
    head: Tensor,
    inverse_frequencies: Vec<f64>,
    /// Angles by length of a sequence.
    tables: Mutex<BTreeMap<usize, RopeTable>>,
}

impl Decoder {
    /// A decoder with `weights`, which it shares.
    ///
    /// # Errors
    /// A weight is missing or has another shape than `spec` says.
    pub fn new(spec: &DecoderSpec, weights: &Weights) -> Result<Self> {
        for row in spec.family.tensors.iter().filter(|row| row.role.required(spec)) {
            let layers = if row.role.per_layer() { spec.layers } else { 1 };
            for layer in 0..layers {
                let [rows, cols] = row.role.shape(spec);
                let expected = if row.role.is_vector() { vec![cols] } else { vec![rows, cols] };
                match weights.get(row.role, layer) {
                    None => bail!("weight {:?} of layer {layer} is missing", row.role),
                    Some(weight) if weight.dims() != expected => {
                        bail!(
                            "weight {:?} of layer {layer} has shape {:?}, expected {expected:?}",
                            row.role,
                            weight.dims()
                        );
                    }
                    Some(_) => {}
                }
            }
        }
        let head_role = if spec.tied_embeddings { Role::TokenEmbedding } else { Role::Output };
        let Some(head) = weights.get(head_role, 0).cloned() else { bail!("weight {head_role:?} is missing") };
        let inverse_frequencies = inverse_frequencies(spec, weights)?;
        Ok(Self {
            spec: *spec,
            weights: weights.clone(),
            head,
            inverse_frequencies,
            tables: Mutex::new(BTreeMap::new()),
        })
    }

    /// Hyper-parameters.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The output head, `[vocab, hidden]`.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Embeddings of `tokens`, `[n, hidden]`.
    ///
    /// # Errors
    /// A token lies outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(tokens, &Device::Cpu)?;
        self.weight(Role::TokenEmbedding, 0)?.index_select(&ids, 0)
    }

    /// One transformer block on `x` `[batch * length, hidden]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn block(&self, layer: usize, x: &Tensor, batch: usize, length: usize) -> Result<Tensor> {
        let spec = &self.spec;
        if x.dims() != [batch * length, spec.hidden] {
            bail!("block: x has shape {:?}, expected [{batch} * {length}, {}]", x.dims(), spec.hidden);
        }
        let table = self.table(length);
        let normed = self.norm(x, Role::AttnNorm, layer)?;
        let q = self.project(&normed, layer, Role::AttnQ, Some(Role::AttnQBias))?;
        let k = self.project(&normed, layer, Role::AttnK, Some(Role::AttnKBias))?;
        let v = self.project(&normed, layer, Role::AttnV, Some(Role::AttnVBias))?;
        let shape = Heads { heads: spec.heads, kv_heads: spec.kv_heads, head_dim: spec.head_dim, length };
        let mixed = attention(&rope(&q, &table)?, &rope(&k, &table)?, &v, shape)?;
        let x = (x + self.project(&mixed, layer, Role::AttnOut, Some(Role::AttnOutBias))?)?;

        let normed = self.norm(&x, Role::FfnNorm, layer)?;
        let gate = self.project(&normed, layer, Role::FfnGate, None)?;
        let up = self.project(&normed, layer, Role::FfnUp, None)?;
        // The only activation that a specification can name is SiLU; a second one becomes a match here.
        let gated = swiglu(&gate, &up)?;
        x + self.project(&gated, layer, Role::FfnDown, None)?
    }

    /// The norm before the head.
    ///
    /// # Errors
    /// The shape does not fit.
    pub fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        self.norm(x, Role::OutputNorm, 0)
    }

    /// Final hidden states `[batch * length, hidden]` of `tokens`, sequence after sequence.
    ///
    /// # Errors
    /// A token lies outside the vocabulary, or the shapes do not fit.
    pub fn hidden(&self, tokens: &[u32], batch: usize, length: usize) -> Result<Tensor> {
        let mut x = self.embed(tokens)?;
        for layer in 0..self.spec.layers {
            x = self.block(layer, &x, batch, length)?;
        }
        self.final_norm(&x)
    }

    /// Logits `[batch * length, vocab]`, all at once: for small models and short texts.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn logits(&self, tokens: &[u32], batch: usize, length: usize) -> Result<Tensor> {
        linear(&self.hidden(tokens, batch, length)?, &self.head)
    }

    fn weight(&self, role: Role, layer: usize) -> Result<&Tensor> {
        match self.weights.get(role, layer) {
            Some(weight) => Ok(weight),
            None => bail!("weight {role:?} of layer {layer} is missing"),
        }
    }

    fn norm(&self, x: &Tensor, role: Role, layer: usize) -> Result<Tensor> {
        rms_norm(x, self.weight(role, layer)?, self.spec.norm_eps)
    }

    fn project(&self, x: &Tensor, layer: usize, role: Role, bias: Option<Role>) -> Result<Tensor> {
        let y = linear(x, self.weight(role, layer)?)?;
        match bias.filter(|bias| bias.required(&self.spec)) {
            Some(bias) => y.broadcast_add(self.weight(bias, layer)?),
            None => Ok(y),
        }
    }

    fn table(&self, length: usize) -> RopeTable {
        let mut tables = self.tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        tables.entry(length).or_insert_with(|| RopeTable::new(&self.inverse_frequencies, length)).clone()
    }
}

/// `theta^(-2i / head_dim)` in radians per token, stretched as the specification or the file says.
fn inverse_frequencies(spec: &DecoderSpec, weights: &Weights) -> Result<Vec<f64>> {
    let divisors = match (spec.rope.scaling, weights.get(Role::RopeFreqs, 0)) {
        (RopeScaling::Table, Some(table)) => with_values(table, |values| Ok(values.to_vec()))?,
        _ => vec![1.0; spec.head_dim / 2],
    };
    let frequency = |(i, divisor): (usize, f32)| {
        let plain = spec.rope.theta.powf(-2.0 * i as f64 / spec.head_dim as f64);
        plain / spec.rope.scaling.divisor(plain) / f64::from(divisor)
    };
    Ok(divisors.into_iter().enumerate().map(frequency).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::loss::{Objective, loss};
    use crate::train::ops::check::noise;
    use candle_core::Var;
    use edge_models::{Activation, Rope, family_by_gguf_name};

    fn spec(family: &str) -> DecoderSpec {
        let qwen = family == "qwen2";
        DecoderSpec {
            family: family_by_gguf_name(family).unwrap(),
            layers: 2,
            hidden: 16,
            heads: 4,
            kv_heads: 2,
            head_dim: 6,
            ffn: 20,
            vocab: 23,
            context: 64,
            norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None },
            qkv_bias: qwen,
            attn_out_bias: false,
            activation: Activation::Silu,
            tied_embeddings: qwen,
        }
    }

    fn variables(spec: &DecoderSpec) -> Vec<(Role, usize, Var)> {
        let mut variables = Vec::new();
        for row in spec.family.tensors.iter().filter(|row| row.role.required(spec)) {
            for layer in 0..if row.role.per_layer() { spec.layers } else { 1 } {
                let [rows, cols] = row.role.shape(spec);
                let shape = if row.role.is_vector() { vec![cols] } else { vec![rows, cols] };
                let offset = if row.gguf.contains("norm") { 1.0 } else { 0.0 };
                let values: Vec<f32> =
                    noise(variables.len() as u64 + 7, rows * cols).iter().map(|x| x * 0.4 + offset).collect();
                let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
                variables.push((row.role, layer, Var::from_tensor(&tensor).unwrap()));
            }
        }
        variables
    }

    fn weights(variables: &[(Role, usize, Var)]) -> Weights {
        let mut weights = Weights::default();
        for (role, layer, var) in variables {
            weights.insert(*role, *layer, var.as_tensor().clone());
        }
        weights
    }

    /// No parameter's gradient is cut: each has one, and it is the slope that finite differences find.
    #[test]
    fn every_parameter_has_the_gradient_of_the_loss() {
        let tokens: Vec<u32> = (0..10).map(|i| i * 7 % 23).collect();
        let targets: Vec<u32> = (0..10).map(|i| i * 5 % 23).collect();
        let objective = Objective { alpha: 0.5, temperature: 2.0 };
        for family in ["llama", "qwen2"] {
            let spec = spec(family);
            let variables = variables(&spec);
            let teacher = Decoder::new(&spec, &{
                let mut shuffled = Weights::default();
                for (role, layer, var) in &variables {
                    shuffled.insert(*role, *layer, (var.as_tensor().detach() * 1.3).unwrap());
                }
                shuffled
            })
            .unwrap();
            let hidden = teacher.hidden(&tokens, 2, 5).unwrap();
            let evaluate = || {
                let student = Decoder::new(&spec, &weights(&variables)).unwrap();
                let states = student.hidden(&tokens, 2, 5).unwrap();
                let teacher = Some((&hidden, teacher.head()));
                loss(&states, student.head(), teacher, &targets, &objective, 1.0).unwrap()
            };
            let grads = evaluate().0.backward().unwrap();
            for (role, layer, var) in &variables {
                let grad = grads
                    .get(var.as_tensor())
                    .unwrap_or_else(|| panic!("{family}: {role:?} of layer {layer} has no gradient"));
                let grad = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let before = var.as_tensor().copy().unwrap();
                let values = before.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let along = noise(5, values.len());
                let at = |step: f32| {
                    let moved: Vec<f32> = values.iter().zip(&along).map(|(x, d)| x + step * d).collect();
                    var.set(&Tensor::from_vec(moved, before.shape(), &Device::Cpu).unwrap()).unwrap();
                    evaluate().1.loss
                };
                let step = 4e-3;
                let numeric = (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step)))
                    / (12.0 * f64::from(step));
                var.set(&before).unwrap();
                let exact: f64 = grad.iter().zip(&along).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                let size = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
                assert!(size > 0.0, "{family}: {role:?} of layer {layer} has a zero gradient");
                assert!(
                    (numeric - exact).abs() < 2e-3 * (1.0 + size) + 1e-2 * exact.abs(),
                    "{family}: {role:?} of layer {layer}: finite difference {numeric}, backward {exact}"
                );
            }
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let spec = spec("llama");
        let mut weights = weights(&variables(&spec));
        weights.insert(Role::FfnUp, 1, Tensor::zeros((3, 3), candle_core::DType::F32, &Device::Cpu).unwrap());
        let message = Decoder::new(&spec, &weights).err().unwrap().to_string();
        assert!(message.contains("FfnUp") && message.contains("layer 1"), "{message}");
    }
}
