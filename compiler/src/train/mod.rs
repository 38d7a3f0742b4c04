//! Training: the differentiable graph, the loss and the loop that minimizes it.

pub mod adapter;
mod block;
pub mod cache;
pub mod checkpoint;
mod config;
mod error;
pub mod gradients;
pub mod graph;
mod inner;
pub mod interpreter;
pub mod loss;
pub mod low_rank;
pub mod metrics;
mod on_grid;
pub(crate) mod ops;
pub mod optimizer;
pub mod parallel;
mod policy;
mod precision;
pub mod pretrain;
mod projection;
pub mod random;
mod said;
pub mod schedule;
mod start;
mod tape;
mod tensorboard;
pub mod trainee;
pub mod trainer;
pub mod windows;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

pub use config::{RunFolder, TrainConfig};
pub use error::TrainError;
pub use on_grid::{Quantized, quantized};
pub use ops::{Accelerator, AcceleratorError};
pub use precision::Precision;
pub use projection::{Matrices, Projection};
