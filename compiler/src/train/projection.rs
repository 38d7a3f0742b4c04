//! A matrix of the graph, and the one place that says how it acts on activations.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};
use edge_models::Role;

use super::ops::{linear, rows};

/// The matrices of a decoder by role and layer (0 for those that exist once).
pub type Matrices = BTreeMap<(Role, usize), Projection>;

/// A matrix `W`, `[out, in]`.
#[derive(Clone, Debug)]
pub enum Projection {
    /// As it is; trained if it is a variable, frozen otherwise.
    Dense(Tensor),
}

impl Projection {
    /// `[out, in]`.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Dense(weight) => weight.dims(),
        }
    }

    /// `x W^T` for `x` `[n, in]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => linear(x, weight),
        }
    }

    /// Rows `ids` of `W`, `[n, in]`: a table of embeddings.
    ///
    /// # Errors
    /// There is no such row.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => rows(weight, ids),
        }
    }

    /// All of `W` with its graph, made for this forward pass where it is not there as such.
    ///
    /// # Errors
    /// What an operation that makes it answers.
    pub fn matrix(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.clone()),
        }
    }
}
