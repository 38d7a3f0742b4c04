//! What a decoder language model *is*, as data.
//!
//! One [`DecoderSpec`] describes every family. It is read from a Hugging Face `config.json` or from
//! GGUF metadata through the same [`Config`] trait, and it drives both the differentiable graph on
//! the host and the forward step on the device. This crate never computes anything with weights,
//! never allocates and names no instruction set.
#![no_std]

mod config;
pub mod families;
mod layers;
mod math;
mod rope;
mod spec;
mod tensor;

pub use config::{Config, SpecError};
pub use families::{FAMILIES, Family, family_by_gguf_name, family_by_hf_type};
pub use layers::LayerSet;
pub use rope::{Rope, RopePairing, RopeScaling};
pub use spec::{Activation, DecoderSpec};
pub use tensor::{NameBuf, Role, TensorRow};
