//! Reading model files in place. Every byte of a file is hostile until checked here.

mod edgepack;
mod gguf;

pub use edge_kernels::format::{
    DType, Layout, TILE_ROWS, bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, tiled_bytes,
};
pub use edgepack::{PACK_HEADER_BYTES, pack_header, tiled_type_id};
pub use gguf::{Array, Gguf, GgufConfig, TensorInfo, Value, ValueType};

#[cfg(test)]
mod pack_tests;
