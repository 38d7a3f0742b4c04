//! Reading model files in place. Every byte of a file is hostile until checked here.

mod dtype;
mod gguf;
mod half;

pub use dtype::DType;
pub use gguf::{Array, Gguf, GgufConfig, TensorInfo, Value, ValueType};
pub use half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
