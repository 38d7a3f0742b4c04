//! A matrix of the graph, and the one place that says how it acts on activations.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};
use edge_models::Role;

use super::ops::{Levels, linear, on_grid};

/// The matrices of a decoder by role and layer (0 for those that exist once).
pub type Matrices = BTreeMap<(Role, usize), Projection>;

/// A matrix `W`, `[out, in]`.
#[derive(Clone, Debug)]
pub enum Projection {
    /// As it is; trained if it is a variable, frozen otherwise.
    Dense(Tensor),
    /// As the blocks of a file hold it, which the forward pass rounds it to.
    OnGrid(OnGrid),
}

/// A matrix and the grid that it is rounded to, row by row.
#[derive(Clone, Debug)]
pub struct OnGrid {
    /// What is rounded, `[out, in]`.
    pub(super) latent: Tensor,
    /// Scales, `[out, in / group]`.
    pub(super) scales: Tensor,
    /// Offsets, likewise.
    pub(super) offsets: Tensor,
    /// The integers.
    pub(super) levels: Levels,
}

impl OnGrid {
    pub(super) fn rounded(&self) -> Result<Tensor> {
        on_grid(&self.latent, &self.scales, &self.offsets, self.levels)
    }

    /// The same of rows `ids`: rows are rounded each by itself.
    fn rows(&self, ids: &Tensor) -> Result<Self> {
        Ok(Self {
            latent: self.latent.index_select(ids, 0)?,
            scales: self.scales.index_select(ids, 0)?,
            offsets: self.offsets.index_select(ids, 0)?,
            levels: self.levels,
        })
    }
}

impl Projection {
    /// `[out, in]`.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::OnGrid(grid) => grid.latent.dims(),
        }
    }

    /// `x W^T` for `x` `[n, in]`.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => linear(x, weight),
            Self::OnGrid(grid) => linear(x, &grid.rounded()?),
        }
    }

    /// Rows `ids` of `W`, `[n, in]`: a table of embeddings.
    ///
    /// # Errors
    /// There is no such row.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => weight.index_select(ids, 0),
            Self::OnGrid(grid) => grid.rows(ids)?.rounded(),
        }
    }

    /// All of `W` with its graph, made for this forward pass where it is not there as such.
    ///
    /// # Errors
    /// What an operation that makes it answers.
    pub fn matrix(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.clone()),
            Self::OnGrid(grid) => grid.rounded(),
        }
    }
}
