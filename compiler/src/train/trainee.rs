//! What a run trains: a decoder, the variables in it, and what becomes of them.
//!
//! The trainer knows no more than this of its student. A new way to train (all weights, factors beside frozen
//! weights, weights that are rounded on their way) is one more function that makes a [`Trainee`].

use candle_core::Var;
use edge_models::{NameBuf, Role};

use super::checkpoint::Recipe;
use super::config::TrainConfig;
use super::error::TrainError;
use super::graph::Decoder;
use super::optimizer::Parameter;
use super::trainer::fingerprint;
use crate::model::{Model, Weights};

/// A decoder with variables in it, which become an `R` when they are trained.
pub struct Trainee<R> {
    pub(super) decoder: Decoder,
    /// The variables; the loss must reach each of them.
    pub(super) parameters: Vec<Parameter>,
    /// What it is, by name; a checkpoint of another one is refused.
    pub(super) recipe: Recipe,
    finish: Box<dyn FnOnce() -> Result<R, TrainError>>,
}

impl<R> Trainee<R> {
    /// A trainee; `finish` reads what it is made of from the variables, which it shares.
    pub(super) fn new(
        decoder: Decoder,
        parameters: Vec<Parameter>,
        recipe: Recipe,
        finish: impl FnOnce() -> Result<R, TrainError> + 'static,
    ) -> Self {
        Self { decoder, parameters, recipe, finish: Box::new(finish) }
    }

    /// How many numbers are trained.
    pub fn trained(&self) -> u64 {
        self.parameters.iter().map(|parameter| parameter.var.elem_count() as u64).sum()
    }

    /// What the variables have become.
    pub(super) fn finish(self) -> Result<R, TrainError> {
        (self.finish)()
    }
}

/// Every weight of `model` is trained, the embedding table only if `config` says so, and the result is the model;
/// weight decay acts on the matrices.
///
/// # Errors
/// The weights are not those of the model's specification.
pub fn full(model: Model, config: &TrainConfig) -> Result<Trainee<Model>, TrainError> {
    let recipe = Recipe::from([("student".to_owned(), fingerprint(&model)?)]);
    let (model, parameters) = into_parameters(model, config)?;
    let decoder = Decoder::new(&model.spec, &model.weights)?;
    Ok(Trainee::new(decoder, parameters, recipe, move || Ok(detached(model))))
}

/// Makes every weight a variable of its own, named as in a Hugging Face checkpoint.
///
/// The returned model holds the same variables. Divisors of the rotary frequencies are constants of the
/// architecture and stay as they are.
fn into_parameters(mut model: Model, config: &TrainConfig) -> Result<(Model, Vec<Parameter>), TrainError> {
    let mut weights = Weights::default();
    let mut parameters = Vec::new();
    for (role, layer, tensor) in model.weights.iter() {
        if role.is_rope_table() || (role == Role::TokenEmbedding && !config.embeddings) {
            weights.insert(role, layer, tensor.clone());
            continue;
        }
        let name = match model.spec.family.tensor(role) {
            Some(row) if row.fused.is_empty() => NameBuf::new(row.hf, layer).as_str().to_owned(),
            // In a file it has no name of its own.
            _ => format!("{role:?}.{layer}"),
        };
        // `detach` first: of a variable, `from_tensor` would give the variable itself and training
        // would then change the caller's model.
        let var = Var::from_tensor(&tensor.detach())?;
        weights.insert(role, layer, var.as_tensor().clone());
        let decay = !role.is_vector() && (role != Role::TokenEmbedding || config.decay_embeddings);
        parameters.push(Parameter { name, var, decay });
    }
    model.weights = weights;
    Ok((model, parameters))
}

/// The model with plain tensors for variables.
fn detached(mut model: Model) -> Model {
    let trained: Vec<_> =
        model.weights.iter().map(|(role, layer, tensor)| (role, layer, tensor.detach())).collect();
    for (role, layer, tensor) in trained {
        model.weights.insert(role, layer, tensor);
    }
    model
}
