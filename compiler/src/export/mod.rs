//! Open formats that other engines read.

pub mod gguf;
pub mod hf;
