//! The device side: reads a model file in place, plans its memory, and turns tokens into tokens.
//!
//! The caller hands over the model's bytes and one arena whose size [`session::Plan`] computed.
//! Nothing here allocates, reads a file, starts a thread or probes a CPU, and no input can make it
//! panic: every refusal is a numbered [`Error`].
#![no_std]

#[cfg(feature = "std")]
extern crate std;

pub mod format;
pub mod session;
mod sort;
pub mod tokenizer;

pub use edge_kernels::{Code, Error, Name, Result, kernels, workers};
