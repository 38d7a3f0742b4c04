//! One buffer for several threads: each takes a chunk that nobody has, until none is left.

use super::Workers;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicUsize, Ordering};

/// A buffer in chunks of `len` elements, each of which is handed out once.
struct Chunks<'a, T> {
    start: *mut T,
    total: usize,
    len: usize,
    next: AtomicUsize,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: sharing a `Chunks` lets threads take exclusive chunks, which is sending them `&mut [T]`; no element
// is in two chunks because the counter is atomic and never gives a number twice.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    /// `len` must not be 0.
    fn new(buffer: &'a mut [T], len: usize) -> Self {
        let (start, total) = (buffer.as_mut_ptr(), buffer.len());
        Self { start, total, len, next: AtomicUsize::new(0), buffer: PhantomData }
    }

    /// The next chunk and its number; the last one may be shorter.
    #[expect(clippy::mut_from_ref, reason = "every chunk is handed out once")]
    fn take(&self) -> Option<(usize, &mut [T])> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        let start = index.checked_mul(self.len).filter(|start| *start < self.total)?;
        let len = self.len.min(self.total - start);
        // SAFETY: `start + len <= total`, so the chunk lies within the buffer that `self` borrows mutably
        // for `'a`, which outlives this borrow of `self`. `index` was never given before (the counter
        // would have to wrap, but each call past the end is the last of its thread), so no other chunk
        // overlaps this one.
        Some((index, unsafe { core::slice::from_raw_parts_mut(self.start.add(start), len) }))
    }
}

/// Calls `job(index, chunk)` for every chunk of `len` elements of `buffer`, on all threads if the whole is
/// worth it, else on this one.
pub fn for_each_chunk<T: Send>(
    workers: &dyn Workers,
    worth_sharing: bool,
    buffer: &mut [T],
    len: usize,
    job: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let len = len.max(1);
    if !worth_sharing || buffer.len() <= len || workers.count() <= 1 {
        buffer.chunks_mut(len).enumerate().for_each(|(index, chunk)| job(index, chunk));
        return;
    }
    let chunks = Chunks::new(buffer, len);
    let drain = || {
        while let Some((index, chunk)) = chunks.take() {
            job(index, chunk);
        }
    };
    workers.run(&drain);
    // Whatever is left: nothing if the workers kept their contract.
    drain();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::Single;

    /// Claims two threads and runs one.
    struct Lazy;

    impl Workers for Lazy {
        fn count(&self) -> usize {
            2
        }
        fn run(&self, _: &(dyn Fn() + Sync)) {}
    }

    #[test]
    fn every_chunk_is_done_once_even_by_broken_workers() {
        for workers in [&Single as &dyn Workers, &Lazy] {
            let mut buffer = [0usize; 11];
            for_each_chunk(workers, true, &mut buffer, 4, &|index, chunk| {
                chunk.iter_mut().for_each(|x| *x += index + 1);
            });
            assert_eq!(buffer, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]);
        }
        for_each_chunk(&Lazy, true, &mut [0u8; 0], 0, &|_, _| unreachable!());
    }

    #[cfg(feature = "std")]
    #[test]
    fn threads_share_the_chunks() {
        let pool = crate::workers::Pool::new(3).unwrap();
        for round in 0..200 {
            let mut buffer = [0usize; 1000];
            for_each_chunk(&pool, true, &mut buffer, 7, &|index, chunk| {
                chunk.iter_mut().for_each(|x| *x += index + round);
            });
            assert!(buffer.iter().enumerate().all(|(i, x)| *x == i / 7 + round));
        }
    }
}
