//! The host side: reads teachers, cuts and distills students, quantizes, exports, bundles, reports.
//!
//! The only crate that knows candle, the network and the file system.

pub mod atomic;
pub mod bundle;
pub mod export;
pub mod model;
pub mod quantize;
pub mod student;
pub mod train;
