//! In what numbers a model is asked that is not trained: a teacher, or the base beside an adapter.
//!
//! Products with its matrices may go through the int8 kernels of the device's runtime. Whatever is no such product
//! (norms, rope, attention, gates, the adapter) stays in f32, and so does all that is done to a teacher before training:
//! layers are chosen and students mended by its exact states.

use std::fmt::{self, Display, Formatter};

use candle_core::{Error, Tensor};
use edge_models::Role;
use edge_runtime::kernels::{Features, Kernels};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::TrainError;
use super::graph::Decoder;
use super::ops::{Frozen, Tiles};
use super::projection::Projection;
use super::trainer::{Progress, fingerprint};
use crate::model::Model;
use crate::pack::hex;

/// In what numbers a model is asked that is not trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Precision {
    /// 32-bit floats
    #[default]
    F32,
    /// 8-bit integers where it multiplies with matrices: weights as in Q8_0, activations as devices have them
    Int8,
}

/// How many of the matrices are in tiles.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Count {
    tiled: usize,
    all: usize,
}

impl Display for Count {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (Self { tiled, all }, name) = (self, Kernels::select(Features::detect()).name());
        write!(f, "({name}): {tiled} of {all} matrices")?;
        if tiled < all { f.write_str(", the others are no whole blocks of 32 and stay f32") } else { Ok(()) }
    }
}

impl Display for Precision {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
        })
    }
}

impl Precision {
    /// `teacher`, ready to be asked; `progress` is told what it is asked in.
    ///
    /// # Errors
    /// A weight is missing, misshapen, or too large for 8 bits and a half-precision scale.
    pub(super) fn decoder(self, teacher: &Model, progress: &mut dyn Progress) -> Result<Decoder, TrainError> {
        let mut decoder = Decoder::new(&teacher.spec, &teacher.weights)?;
        if self == Self::F32 {
            return Ok(decoder);
        }
        let mut count = Count::default();
        for (role, layer, weight) in teacher.weights.iter().filter(|(role, ..)| !role.is_vector()) {
            let frozen = self.frozen(role, layer, weight, teacher.spec.tied_embeddings, false, &mut count)?;
            decoder.replace(role, layer, Projection::Frozen(frozen))?;
        }
        progress.note(&format!("the teacher is asked in int8 {count}"));
        Ok(decoder)
    }

    /// A matrix that is not trained, in these numbers; f32 if its rows are no whole blocks of 32, nor its columns where
    /// gradients go through it (`both_ways`). Through a head they go in f32 (see the loss). `tied` says whether embeddings
    /// are the head.
    ///
    /// # Errors
    /// A value too large for 8 bits and a half-precision scale.
    pub(super) fn frozen(
        self,
        role: Role,
        layer: usize,
        weight: &Tensor,
        tied: bool,
        both_ways: bool,
        count: &mut Count,
    ) -> Result<Frozen, TrainError> {
        let (rows, cols) = weight.dims2()?;
        let table = matches!(role, Role::TokenEmbedding | Role::Output);
        // A table that is no head is looked up and never multiplied with.
        let multiplied = role != Role::TokenEmbedding || tied;
        count.all += usize::from(multiplied);
        let both_ways = both_ways && !table;
        let fits = Tiles::fit(cols) && (!both_ways || Tiles::fit(rows));
        if self == Self::F32 || !multiplied || !fits {
            return Ok(Frozen::Dense(weight.clone()));
        }
        count.tiled += 1;
        let tiles = if both_ways { Tiles::round_both_ways(weight) } else { Tiles::round(weight) };
        let tiles = tiles.map_err(|error| Error::Msg(format!("int8: {role:?} of layer {layer}: {error}")))?;
        Ok(Frozen::Tiled(weight.clone(), tiles))
    }

    /// What a cache of `teacher`'s answers knows it by: SHA-256, hexadecimal. Other numbers are another teacher.
    ///
    /// # Errors
    /// As [`fingerprint`].
    pub(super) fn fingerprint(self, teacher: &Model) -> Result<String, TrainError> {
        let model = fingerprint(teacher)?;
        Ok(match self {
            Self::F32 => model,
            Self::Int8 => hex(&Sha256::digest(format!("{model} {self}"))),
        })
    }
}
