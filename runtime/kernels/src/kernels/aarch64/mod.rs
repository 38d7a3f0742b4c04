//! 64-bit ARM.
#![allow(clippy::needless_range_loop, reason = "indices name registers")]

pub(super) mod dotprod;
pub(super) mod i8mm;
mod i8mm_panel;
pub(super) mod neon;
mod neon_tiles;
mod products;
mod rows16;
