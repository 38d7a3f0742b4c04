//! The differentiable decoder, driven by [`DecoderSpec`] alone, as the device's forward step is.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use candle_core::{Result, Tensor, bail};
use edge_models::{DecoderSpec, Role, Rope};

use super::block;
use super::loss::Head;
use super::ops::{Heads, RopeTable, add, add_row, attention, glu, rms_norm, rope, with_values};
use super::projection::{Matrices, Projection};
use crate::model::Weights;

/// A decoder over tensor handles: those that are variables are trained. Clones share everything.
#[derive(Clone)]
pub struct Decoder {
    spec: DecoderSpec,
    matrices: Arc<Matrices>,
    /// All weights that are not matrices.
    vectors: Arc<Weights>,
    /// Angles by length of a sequence, and whether they are those of layers with a window.
    tables: Arc<Mutex<BTreeMap<(usize, bool), RopeTable>>>,
    recompute: bool,
}

impl Decoder {
    /// A decoder with `weights`, which it shares.
    ///
    /// # Errors
    /// A weight is missing or has another shape than `spec` says.
    pub fn new(spec: &DecoderSpec, weights: &Weights) -> Result<Self> {
        let (mut matrices, mut vectors) = (Matrices::new(), Weights::default());
        for (role, layer, weight) in weights.iter() {
            if role.is_vector() {
                vectors.insert(role, layer, weight.clone());
            } else {
                matrices.insert((role, layer), Projection::Dense(weight.clone()));
            }
        }
        Self::assemble(spec, matrices, vectors)
    }

    /// A decoder of matrices and of all weights that are none.
    ///
    /// # Errors
    /// A weight is missing or has another shape than `spec` says.
    pub fn assemble(spec: &DecoderSpec, matrices: Matrices, vectors: Weights) -> Result<Self> {
        for row in spec.family.tensors.iter().filter(|row| row.role.required(spec)) {
            let layers = if row.role.per_layer() { spec.layers } else { 1 };
            for layer in 0..layers {
                let [rows, cols] = row.role.shape(spec);
                let (found, expected) = if row.role.is_vector() {
                    (vectors.get(row.role, layer).map(Tensor::dims), vec![cols])
                } else {
                    (matrices.get(&(row.role, layer)).map(Projection::dims), vec![rows, cols])
                };
                match found {
                    None => bail!("weight {:?} of layer {layer} is missing", row.role),
                    Some(found) if found != expected => {
                        bail!(
                            "weight {:?} of layer {layer} has shape {found:?}, expected {expected:?}",
                            row.role
                        );
                    }
                    Some(_) => {}
                }
            }
        }
        let (matrices, vectors) = (Arc::new(matrices), Arc::new(vectors));
        Ok(Self { spec: *spec, matrices, vectors, tables: Arc::default(), recompute: false })
    }

    /// Whether blocks are computed again in the backward pass, to keep their inputs only.
    pub fn recompute(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// See [`Self::recompute`].
    pub(super) fn recomputes(&self) -> bool {
        self.recompute
    }

    /// Hyper-parameters.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// All weights as they are now, without their graph.
    ///
    /// # Errors
    /// What an operation that makes a matrix answers.
    pub fn weights(&self) -> Result<Weights> {
        let mut weights = Weights::default();
        for (role, layer, vector) in self.vectors.iter() {
            weights.insert(role, layer, vector.detach());
        }
        for ((role, layer), matrix) in self.matrices.iter() {
            weights.insert(*role, *layer, matrix.matrix()?.detach());
        }
        Ok(weights)
    }

    /// The output head, made for one forward pass.
    ///
    /// # Errors
    /// What an operation that makes its matrix answers.
    pub fn head(&self) -> Result<Head> {
        let role = if self.spec.tied_embeddings { Role::TokenEmbedding } else { Role::Output };
        let matrix = self.matrix(role, 0)?;
        let (weight, tiles) = (matrix.matrix()?, matrix.tiles().cloned());
        Ok(Head { weight, tiles, soft_cap: self.spec.final_soft_cap })
    }

    /// Embeddings of `tokens`, `[n, hidden]`.
    ///
    /// # Errors
    /// A token lies outside the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let embedded = self.matrix(Role::TokenEmbedding, 0)?.rows(tokens)?;
        match self.spec.embedding_scale {
            1.0 => Ok(embedded),
            scale => embedded * f64::from(scale),
        }
    }

    /// One transformer block on `x` `[batch * length, hidden]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn block(&self, layer: usize, x: &Tensor, batch: usize, length: usize) -> Result<Tensor> {
        block::block(self, layer, x, batch, length)
    }

    /// [`Self::block`] in single operations.
    pub(super) fn compute_block(
        &self,
        layer: usize,
        x: &Tensor,
        batch: usize,
        length: usize,
    ) -> Result<Tensor> {
        let spec = &self.spec;
        if x.dims() != [batch * length, spec.hidden] {
            bail!("block: x has shape {:?}, expected [{batch} * {length}, {}]", x.dims(), spec.hidden);
        }
        let normed = self.attention_input(layer, x)?;
        let mixed = self.mix(layer, &normed, length)?;
        let x = self.add_attention(layer, x, &mixed)?;
        let normed = self.ffn_input(layer, &x)?;
        let gated = self.gate(layer, &normed)?;
        self.add_ffn(layer, &x, &gated)
    }

    /// What queries, keys and values are made from.
    pub(crate) fn attention_input(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        self.norm(x, Role::AttnNorm, layer)
    }

    /// What attention over sequences of `length` gives for [`Self::attention_input`].
    pub(crate) fn mix(&self, layer: usize, normed: &Tensor, length: usize) -> Result<Tensor> {
        let spec = &self.spec;
        let table = self.table(layer, length)?;
        let q = self.project(normed, layer, Role::AttnQ, Some(Role::AttnQBias))?;
        let k = self.project(normed, layer, Role::AttnK, Some(Role::AttnKBias))?;
        let v = self.project(normed, layer, Role::AttnV, Some(Role::AttnVBias))?;
        let q = rope(&self.norm_heads(q, Role::AttnQNorm, layer)?, &table)?;
        let k = rope(&self.norm_heads(k, Role::AttnKNorm, layer)?, &table)?;
        let shape = Heads {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            length,
            window: spec.window_of(layer),
            scale: spec.score_scale(),
            soft_cap: spec.attn_soft_cap,
        };
        attention(&q, &k, &v, shape)
    }

    /// The residual stream after attention.
    pub(crate) fn add_attention(&self, layer: usize, x: &Tensor, mixed: &Tensor) -> Result<Tensor> {
        let added = self.project(mixed, layer, Role::AttnOut, Some(Role::AttnOutBias))?;
        add(x, &self.post_norm(added, Role::AttnPostNorm, layer)?)
    }

    /// What gate and up are made from.
    pub(crate) fn ffn_input(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        self.norm(x, Role::FfnNorm, layer)
    }

    /// What goes down again, of [`Self::ffn_input`].
    pub(crate) fn gate(&self, layer: usize, normed: &Tensor) -> Result<Tensor> {
        let gate = self.project(normed, layer, Role::FfnGate, None)?;
        let up = self.project(normed, layer, Role::FfnUp, None)?;
        glu(&gate, &up, self.spec.activation)
    }

    /// The residual stream after the feed-forward network.
    pub(crate) fn add_ffn(&self, layer: usize, x: &Tensor, gated: &Tensor) -> Result<Tensor> {
        let added = self.project(gated, layer, Role::FfnDown, None)?;
        add(x, &self.post_norm(added, Role::FfnPostNorm, layer)?)
    }

    /// Puts another matrix of the same shape in the place of one.
    pub(crate) fn replace(&mut self, role: Role, layer: usize, matrix: Projection) -> Result<()> {
        let (found, expected) = (matrix.dims(), self.matrix(role, layer)?.dims());
        if found != expected {
            bail!("weight {role:?} of layer {layer} has shape {found:?}, expected {expected:?}");
        }
        Arc::make_mut(&mut self.matrices).insert((role, layer), matrix);
        Ok(())
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
        self.hidden_with(tokens, batch, length, &mut |_, _| ())
    }

    /// The same; `visit` is shown the output of every block.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn hidden_with(
        &self,
        tokens: &[u32],
        batch: usize,
        length: usize,
        visit: &mut dyn FnMut(usize, &Tensor),
    ) -> Result<Tensor> {
        let mut x = self.embed(tokens)?;
        for layer in 0..self.spec.layers {
            x = self.block(layer, &x, batch, length)?;
            visit(layer, &x);
        }
        self.final_norm(&x)
    }

    /// Logits `[batch * length, vocab]`, all at once: for small models and short texts.
    ///
    /// # Errors
    /// As [`Decoder::hidden`].
    pub fn logits(&self, tokens: &[u32], batch: usize, length: usize) -> Result<Tensor> {
        self.head()?.logits(&self.hidden(tokens, batch, length)?)
    }

    pub(crate) fn matrix(&self, role: Role, layer: usize) -> Result<&Projection> {
        match self.matrices.get(&(role, layer)) {
            Some(matrix) => Ok(matrix),
            None => bail!("weight {role:?} of layer {layer} is missing"),
        }
    }

    fn vector(&self, role: Role, layer: usize) -> Result<&Tensor> {
        match self.vectors.get(role, layer) {
            Some(vector) => Ok(vector),
            None => bail!("weight {role:?} of layer {layer} is missing"),
        }
    }

    fn norm(&self, x: &Tensor, role: Role, layer: usize) -> Result<Tensor> {
        rms_norm(x, self.vector(role, layer)?, self.spec.norm_eps)
    }

    /// Normalizes what a block adds, where the model does that.
    fn post_norm(&self, added: Tensor, role: Role, layer: usize) -> Result<Tensor> {
        if role.required(&self.spec) { self.norm(&added, role, layer) } else { Ok(added) }
    }

    /// Normalizes every head in the rows of `x`, where the model does that.
    fn norm_heads(&self, x: Tensor, role: Role, layer: usize) -> Result<Tensor> {
        if role.required(&self.spec) { self.norm(&x, role, layer) } else { Ok(x) }
    }

    fn project(&self, x: &Tensor, layer: usize, role: Role, bias: Option<Role>) -> Result<Tensor> {
        let y = self.matrix(role, layer)?.apply(x)?;
        match bias.filter(|bias| bias.required(&self.spec)) {
            Some(bias) => add_row(&y, self.vector(bias, layer)?),
            None => Ok(y),
        }
    }

    /// The angles of `layer` in sequences of `length`.
    fn table(&self, layer: usize, length: usize) -> Result<RopeTable> {
        let spec = &self.spec;
        let mut tables = self.tables.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = (length, spec.local.contains(layer));
        if let Some(table) = tables.get(&key) {
            return Ok(table.clone());
        }
        let rope = spec.rope_of(layer);
        let frequencies = inverse_frequencies(rope, spec.rope_dims, length, &self.vectors)?;
        let table = RopeTable::new(&frequencies, spec.head_dim, length, rope.scaling.magnitude());
        tables.insert(key, table.clone());
        Ok(table)
    }
}

/// `theta^(-2i / dims)` in radians per token, stretched as the specification or the file says.
fn inverse_frequencies(rope: &Rope, dims: usize, length: usize, vectors: &Weights) -> Result<Vec<f64>> {
    let divisors = match rope.scaling.divisors(length).map(|role| (role, vectors.get(role, 0))) {
        None => vec![1.0; dims / 2],
        Some((_, Some(table))) => with_values(table, |values| Ok(values.to_vec()))?,
        Some((role, None)) => bail!("weight {role:?} is missing"),
    };
    let frequency = |(i, divisor): (usize, f32)| {
        let plain = rope.theta.powf(-2.0 * i as f64 / dims as f64);
        plain / rope.scaling.divisor(plain) / f64::from(divisor)
    };
    Ok(divisors.into_iter().enumerate().map(frequency).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::gradients::Gradients;
    use crate::train::loss::{Objective, Target, loss};
    use crate::train::ops::check::{self, noise};
    use crate::train::optimizer::Parameter;
    use candle_core::{Device, Var};
    use edge_models::{Activation, FAMILIES, LayerSet, RopeScaling};

    /// A small model with whatever the family can have.
    fn spec(family: &str) -> DecoderSpec {
        let plain = DecoderSpec {
            layers: 2,
            hidden: 16,
            heads: 4,
            kv_heads: 2,
            head_dim: 6,
            rope_dims: 6,
            ffn: 20,
            vocab: 23,
            context: 64,
            norm_eps: 1e-5,
            ..DecoderSpec::plain(FAMILIES.iter().find(|known| known.name == family).unwrap())
        };
        let gemma = DecoderSpec {
            activation: Activation::GeluTanh,
            tied_embeddings: true,
            post_norms: true,
            embedding_scale: 4.0,
            window: 3,
            local: LayerSet::periodic(2, 2),
            attn_scale: Some(0.5),
            ..plain
        };
        match family {
            "mistral" => DecoderSpec { window: 3, local: LayerSet::periodic(2, 0), ..plain },
            "qwen2" => DecoderSpec { qkv_bias: true, tied_embeddings: true, ..plain },
            "qwen3" => DecoderSpec { qk_norm: true, ..plain },
            "phi3" => {
                let scaling = RopeScaling::Long { original_context: 4, attention_factor: 1.2 };
                DecoderSpec { rope_dims: 4, rope: Rope { scaling, ..plain.rope }, ..plain }
            }
            "gemma2" => DecoderSpec { attn_soft_cap: 1.5, final_soft_cap: 2.0, ..gemma },
            "gemma3" => {
                DecoderSpec { qk_norm: true, local_rope: Some(Rope { theta: 50.0, ..plain.rope }), ..gemma }
            }
            _ => plain,
        }
    }

    fn variables(spec: &DecoderSpec) -> Vec<(Role, usize, Var)> {
        let mut variables = Vec::new();
        for row in spec.family.tensors.iter().filter(|row| row.role.required(spec)) {
            for layer in 0..if row.role.per_layer() { spec.layers } else { 1 } {
                let [rows, cols] = row.role.shape(spec);
                let shape = if row.role.is_vector() { vec![cols] } else { vec![rows, cols] };
                let offset = if row.role.is_norm() || row.role.is_rope_table() { 1.0 } else { 0.0 };
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
        let objective = Objective { alpha: 0.5, temperature: 2.0, ..Objective::default() };
        for family in FAMILIES.iter().map(|family| family.name) {
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
            let (hidden, head) = (teacher.hidden(&tokens, 2, 5).unwrap(), teacher.head().unwrap());
            let evaluate = || {
                let student = Decoder::new(&spec, &weights(&variables)).unwrap();
                let states = student.hidden(&tokens, 2, 5).unwrap();
                let teacher = Target::Teacher(&hidden, &head);
                loss(&states, &student.head().unwrap(), teacher, &targets, &objective, 1.0).unwrap()
            };
            let named = |(role, layer, var): &(Role, usize, Var)| Parameter {
                name: format!("{family}: {role:?} of layer {layer}"),
                var: var.clone(),
                decay: false,
            };
            let trained = variables.iter().filter(|(role, ..)| !role.is_rope_table());
            let parameters: Vec<Parameter> = trained.map(named).collect();
            let mut gradients = Gradients::new(&parameters);
            gradients.add(&evaluate().0).unwrap();
            for (Parameter { name, var, .. }, grad) in
                parameters.iter().zip(gradients.sums(&parameters).unwrap())
            {
                let grad = Tensor::from_slice(grad, var.shape(), &Device::Cpu).unwrap();
                check::slope(var, &grad, name, || evaluate().1.loss);
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
