//! A model in memory: what every step of the pipeline takes and gives.

use std::collections::BTreeMap;

use candle_core::Tensor;
use edge_models::{DecoderSpec, Role};

use crate::export::gguf::MetaValue;

/// A model in memory.
#[derive(Clone, Debug)]
pub struct Model {
    /// Hyper-parameters.
    pub spec: DecoderSpec,
    /// Weights, f32 on the CPU.
    pub weights: Weights,
    /// Vocabulary, if the source has one.
    pub vocabulary: Option<Vocabulary>,
    /// What users see as its name.
    pub name: String,
}

/// Weights by role and layer (0 for tensors that exist once).
///
/// Always f32 on the CPU and in Hugging Face's row order (heads rotate halves), whatever file they
/// came from. A linear weight is `[out, in]`, a vector `[n]`.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<(usize, Role), Tensor>,
}

impl Weights {
    /// The tensor of `role` in `layer`, if it is there.
    pub fn get(&self, role: Role, layer: usize) -> Option<&Tensor> {
        self.tensors.get(&(layer, role))
    }

    /// Puts a tensor in, replacing one that was there.
    pub fn insert(&mut self, role: Role, layer: usize, tensor: Tensor) {
        self.tensors.insert((layer, role), tensor);
    }

    /// Every tensor, by layer and role.
    pub fn iter(&self) -> impl Iterator<Item = (Role, usize, &Tensor)> {
        self.tensors.iter().map(|((layer, role), tensor)| (*role, *layer, tensor))
    }
}

/// A vocabulary, as the `tokenizer.*` entries of a GGUF file (chat template included).
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// The entries, in order, with their full keys.
    pub entries: Vec<(String, MetaValue)>,
}
