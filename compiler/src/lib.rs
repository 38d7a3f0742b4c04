//! The host side: reads teachers, cuts and distills students, quantizes, exports, bundles, reports.
//!
//! The only crate that knows candle, the network and the file system.

pub mod adapter;
pub mod atomic;
pub mod bundle;
pub mod demo;
pub mod export;
pub mod model;
pub mod pack;
pub mod pipeline;
pub mod profile;
pub mod quantize;
pub mod report;
pub mod student;
pub mod synth;
pub mod teacher;
pub mod text;
pub mod train;
