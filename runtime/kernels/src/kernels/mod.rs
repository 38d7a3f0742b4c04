//! Arithmetic on weights and activations, one implementation per instruction set.
//!
//! [`Kernels`] is the one dispatch table. Algorithms are written once over the operations of
//! `simd::Simd` and instantiated per instruction set; `generic` is the oracle, and every other table
//! agrees with it bit for bit (see `simd`), but for large batches (`tiles::TileKernels::wide`). Kernels never know a model
//! family, never allocate, and never start a thread: matrices are shared among the caller's
//! [`Workers`](crate::workers::Workers).
#![allow(clippy::inline_always, reason = "algorithms are instantiated inside functions with CPU features")]

mod activations;
mod attention;
mod blocks;
mod dispatch;
mod exp;
mod float;
mod generic;
mod integers;
mod low_rank;
mod matmul;
mod output;
mod simd;
mod table;
mod tiles;

#[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use activations::{Activations, ActivationsMut};
pub use attention::{KeyValues, Q8Block, Query, Ring, Scores};
pub use dispatch::{Features, Kernels};
pub use exp::exp;
pub use generic::dequantize_row;
#[cfg(feature = "low-bit")]
pub use generic::{IQ4_NL_VALUES, q3_k_scale};
pub use integers::q8_0_block;
pub use low_rank::{LowRank, MAX_RANK, Precision};
pub use matmul::Matrix;
pub use tiles::{pack_tiles, put_q8_0};

#[cfg(test)]
mod tests;
