//! How numbers are stored: types of weights, half precision, tiles.

mod dtype;
mod half;
mod tiles;

pub use dtype::DType;
pub use half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
pub(crate) use tiles::{Factors, Geometry};
pub use tiles::{Layout, TILE_ROWS, tiled_bytes};
