//! 64-bit ARM.

pub(super) mod dotprod;
pub(super) mod i8mm;
pub(super) mod neon;
mod neon_tiles;
mod rows16;
