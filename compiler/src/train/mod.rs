//! Training.
pub mod graph;
pub mod loss;
mod ops;
