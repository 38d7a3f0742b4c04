//! Reading model files in place. Every byte of a file is hostile until checked here.

mod dtype;
mod edgepack;
mod gguf;
mod half;
mod tiles;

pub use dtype::DType;
pub use edgepack::{PACK_HEADER_BYTES, pack_header, tiled_type_id};
pub use gguf::{Array, Gguf, GgufConfig, TensorInfo, Value, ValueType};
pub use half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub(crate) use tiles::{Factors, Geometry};
pub use tiles::{Layout, TILE_ROWS, tiled_bytes};
