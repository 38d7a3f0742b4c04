//! Threads are the caller's: the runtime hands out work through [`Workers`] and never starts one.
//!
//! With the feature `std` there is [`Pool`], a caller's group of threads of the standard library.

mod chunks;
#[cfg(feature = "std")]
mod pool;

pub use chunks::for_each_chunk;
#[cfg(feature = "std")]
pub use pool::Pool;

/// A fixed group of threads that can run one job together.
pub trait Workers: Sync {
    /// Number of threads, at least 1.
    fn count(&self) -> usize;

    /// Calls `job(0)`, `job(1)`, … `job(count - 1)`, each once, possibly at the same time, and returns
    /// when all have returned.
    fn run(&self, job: &(dyn Fn(usize) + Sync));
}

/// The calling thread alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single;

impl Workers for Single {
    fn count(&self) -> usize {
        1
    }

    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        job(0);
    }
}

/// The part of `0..len` that worker `index` of `count` takes, in units of `step`.
pub fn share(len: usize, step: usize, index: usize, count: usize) -> core::ops::Range<usize> {
    let units = len.div_ceil(step);
    let bound = |i: usize| (units * i / count * step).min(len);
    bound(index)..bound(index + 1)
}
