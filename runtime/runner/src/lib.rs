//! Runs and times a model through the runtime, on a host or a device with an operating system.
//!
//! A file is mapped, never read into memory: what the kernel drops under pressure it can read again.
//! Everything else that a session needs is one allocation of the size that the plan tells. This crate
//! knows nothing of training or targets; `edgec` and the program `edge-run` share it.

pub mod bench;
mod chat;
mod draft;
mod engine;
mod processors;
mod statistics;

pub use chat::{ChatPieces, NoSystemMessage};
pub use draft::{Drafter, Drafting};
pub use engine::{Adapter, Engine, Error, ModelFile, Settings};
pub use processors::Processors;
pub use statistics::{Percentiles, Statistics};
