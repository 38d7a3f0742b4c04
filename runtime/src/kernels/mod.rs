//! Arithmetic on weights and activations, one implementation per instruction set.
//!
//! [`Kernels`] is the one dispatch table. `generic` is the oracle: every fast kernel has a twin there
//! and is tested against it over shapes. Kernels never know a model family.

mod activations;
mod dispatch;
mod exp;
mod generic;
mod matmul;

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use activations::{Activations, ActivationsMut};
pub use dispatch::{Features, Kernels};
pub use generic::dequantize_row;
pub use matmul::Matrix;
