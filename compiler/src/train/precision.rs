//! In what numbers a teacher is asked.
//!
//! It is not trained, so its products need no gradient and may go through the int8 kernels of the device's runtime.
//! Whatever is not a product with a matrix (norms, rope, attention, gates) stays in f32, and so does all that is done
//! to a teacher before training: layers are chosen and students mended by its exact states.

use std::fmt::{self, Display, Formatter};

use candle_core::Error;
use edge_models::Role;
use edge_runtime::kernels::{Features, Kernels};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::TrainError;
use super::graph::Decoder;
use super::ops::Tiles;
use super::projection::Projection;
use super::trainer::{Progress, fingerprint};
use crate::model::Model;
use crate::pack::hex;

/// In what numbers a teacher is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Precision {
    /// 32-bit floats
    #[default]
    F32,
    /// 8-bit integers where it multiplies with matrices: weights as in Q8_0, activations as devices have them
    Int8,
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
    /// `teacher`, ready to be asked. Matrices whose rows are no whole blocks of 32 stay f32; `progress` is told how
    /// many.
    ///
    /// # Errors
    /// A weight is missing, misshapen, or too large for 8 bits and a half-precision scale.
    pub(super) fn decoder(self, teacher: &Model, progress: &mut dyn Progress) -> Result<Decoder, TrainError> {
        let mut decoder = Decoder::new(&teacher.spec, &teacher.weights)?;
        if self == Self::F32 {
            return Ok(decoder);
        }
        // A table that is no head is looked up and never multiplied with.
        let multiplied =
            |role: Role| !role.is_vector() && (role != Role::TokenEmbedding || teacher.spec.tied_embeddings);
        let (mut tiled, mut all) = (0, 0);
        for (role, layer, weight) in teacher.weights.iter().filter(|(role, ..)| multiplied(*role)) {
            all += 1;
            if Tiles::fit(weight.dim(1)?) {
                let tiles = Tiles::round(weight).map_err(|error| {
                    Error::Msg(format!("teacher in int8: {role:?} of layer {layer}: {error}"))
                })?;
                decoder.replace(role, layer, Projection::Tiled(weight.clone(), tiles))?;
                tiled += 1;
            }
        }
        let rest = if tiled < all { ", the others are no whole blocks of 32 wide and stay f32" } else { "" };
        let name = Kernels::select(Features::detect()).name();
        progress.note(&format!("the teacher is asked in int8 ({name}): {tiled} of {all} matrices{rest}"));
        Ok(decoder)
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
