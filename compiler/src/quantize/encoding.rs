//! What a file is made of: the type of each tensor, and the blocks of those that are already rounded.
//!
//! A [`Mix`] alone is an encoding: everything is quantized while it is written. Who rounds with more than the
//! weights in hand leaves the blocks here, and the file holds exactly those.

use std::collections::BTreeMap;

use edge_models::{DecoderSpec, Role};
use edge_runtime::format::DType;

use super::{Blocks, Mix};

/// Types of all tensors, and blocks of some.
#[derive(Clone, Debug)]
pub struct Encoding {
    mix: Mix,
    /// Where they are not the mix's.
    types: BTreeMap<(Role, usize), DType>,
    blocks: BTreeMap<(Role, usize), Blocks>,
}

impl From<Mix> for Encoding {
    fn from(mix: Mix) -> Self {
        Self { mix, types: BTreeMap::new(), blocks: BTreeMap::new() }
    }
}

impl Encoding {
    /// Types of its own for some tensors, those of `mix` for the others. In a tensor that several roles share, the
    /// type of the first one counts.
    pub fn with_types(mix: Mix, types: BTreeMap<(Role, usize), DType>) -> Self {
        Self { mix, types, blocks: BTreeMap::new() }
    }

    /// The type of a tensor.
    pub fn dtype(&self, role: Role, layer: usize, spec: &DecoderSpec) -> DType {
        let first = spec.family.tensor(role).map_or(role, |row| row.members()[0]);
        match self.types.get(&(first, layer)) {
            Some(dtype) => *dtype,
            None => self.mix.dtype(first, layer, spec),
        }
    }

    /// The mix of all tensors that have no type of their own, and the one that the file says it is.
    pub fn mix(&self) -> Mix {
        self.mix
    }

    /// The blocks of a tensor that is already rounded.
    pub fn blocks(&self, role: Role, layer: usize) -> Option<&[u8]> {
        self.blocks.get(&(role, layer)).map(Blocks::bytes)
    }

    /// Leaves the blocks of a matrix, which must be of the type that it has here.
    pub fn insert(&mut self, role: Role, layer: usize, blocks: Blocks) {
        self.blocks.insert((role, layer), blocks);
    }

    /// All blocks by role and layer.
    pub fn iter(&self) -> impl Iterator<Item = (Role, usize, &Blocks)> {
        self.blocks.iter().map(|((role, layer), blocks)| (*role, *layer, blocks))
    }
}
