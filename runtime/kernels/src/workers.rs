//! Threads are the caller's: the runtime hands out work through [`Workers`] and never starts one.
//!
//! [`Team`] makes workers of threads that somebody brings; with the feature `std` there is [`Pool`], a team of
//! threads of the standard library.

mod chunks;
#[cfg(feature = "std")]
mod pool;
mod team;
mod worth;

pub use chunks::for_each_chunk;
#[cfg(feature = "std")]
pub use pool::Pool;
pub use team::{Team, Waiting};

/// A group of threads that can run one job together.
pub trait Workers: Sync {
    /// Number of threads that work is divided for, at least 1.
    fn count(&self) -> usize;

    /// Calls `job` at least once, possibly at the same time on several threads, and returns when all calls have
    /// returned. Each call does of the work what no other has taken.
    fn run(&self, job: &(dyn Fn() + Sync));
}

/// The calling thread alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Workers for Single {
    fn count(&self) -> usize {
        1
    }

    fn run(&self, job: &(dyn Fn() + Sync)) {
        job();
    }
}
