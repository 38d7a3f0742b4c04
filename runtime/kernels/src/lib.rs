//! The arithmetic of the device side: everything that a token spends its time in.
//!
//! A crate of its own because a device library is compiled for size but for this part, and what is fast is decided
//! for a whole crate. It knows how weights are stored and who shares the work, but no file, no model and no session;
//! `edge-runtime` is the only one to use it, and hands on what others need.
#![no_std]

#[cfg(feature = "std")]
extern crate std;

mod error;
pub mod format;
pub mod kernels;
pub mod workers;

pub use error::{Code, Error, Name, Result};
