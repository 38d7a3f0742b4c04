//! A matrix of the graph, and the one place that says how it acts on activations.

use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor};
use edge_models::Role;

use super::low_rank::LowRank;
use super::ops::{Frozen, Levels, Tiles, linear, on_grid, rows};

/// The matrices of a decoder by role and layer (0 for those that exist once).
pub type Matrices = BTreeMap<(Role, usize), Projection>;

/// A matrix `W`, `[out, in]`.
#[derive(Clone, Debug)]
pub enum Projection {
    /// As it is; trained if it is a variable, frozen otherwise.
    Dense(Tensor),
    /// As the blocks of a file hold it, which the forward pass rounds it to.
    OnGrid(OnGrid),
    /// Not trained.
    Frozen(Frozen),
    /// Not trained, with a trained update beside it.
    LowRank(Box<LowRank>),
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
    fn rows(&self, ids: &[u32]) -> Result<Self> {
        Ok(Self {
            latent: rows(&self.latent, ids)?,
            scales: rows(&self.scales, ids)?,
            offsets: rows(&self.offsets, ids)?,
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
            Self::Frozen(weight) => weight.dims(),
            Self::LowRank(weight) => weight.base.dims(),
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
            Self::Frozen(weight) => weight.apply(x),
            Self::LowRank(weight) => weight.apply(x),
        }
    }

    /// Rows `ids` of `W`, `[n, in]`: a table of embeddings.
    ///
    /// # Errors
    /// There is no such row.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        match self {
            Self::OnGrid(grid) => grid.rows(ids)?.rounded(),
            Self::Dense(weight) | Self::Frozen(Frozen::Dense(weight) | Frozen::Tiled(weight, _)) => {
                rows(weight, ids)
            }
            Self::Frozen(Frozen::Blocks(blocks, _)) => {
                let cols = blocks.dims()[1];
                let mut values = vec![0.0; ids.len() * cols];
                for (id, out) in ids.iter().zip(values.chunks_exact_mut(cols)) {
                    blocks
                        .row(*id as usize, out)
                        .map_err(|error| candle_core::Error::Msg(error.to_string()))?;
                }
                Tensor::from_vec(values, (ids.len(), cols), &Device::Cpu)
            }
            Self::LowRank(_) => rows(&self.matrix()?, ids),
        }
    }

    /// All of `W` with its graph, made for this forward pass where it is not there as such.
    ///
    /// # Errors
    /// What an operation that makes it answers.
    pub fn matrix(&self) -> Result<Tensor> {
        match self {
            Self::OnGrid(grid) => grid.rounded(),
            Self::Dense(weight) | Self::Frozen(Frozen::Dense(weight) | Frozen::Tiled(weight, _)) => {
                Ok(weight.clone())
            }
            Self::Frozen(Frozen::Blocks(blocks, _)) => {
                let [rows, cols] = *blocks.dims();
                let mut values = vec![0.0; rows * cols];
                blocks.values(&mut values).map_err(|error| candle_core::Error::Msg(error.to_string()))?;
                Tensor::from_vec(values, (rows, cols), &Device::Cpu)
            }
            Self::LowRank(weight) => weight.matrix(),
        }
    }
    /// What multiplies in its place, if that is not itself.
    pub(super) fn tiles(&self) -> Option<&Tiles> {
        match self {
            Self::Frozen(Frozen::Tiled(_, tiles)) => Some(tiles),
            Self::Dense(_) | Self::OnGrid(_) | Self::Frozen(_) | Self::LowRank(_) => None,
        }
    }
}
