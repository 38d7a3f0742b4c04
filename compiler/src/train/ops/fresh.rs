//! Memory for results, which each thread fills with zeros where it is about to write: filling all of it first is a pass
//! over memory for which the other threads wait.

use std::array::from_fn;
use std::mem::MaybeUninit;

use super::threads;

/// Values that one task fills where nothing else is done to them.
const CHUNK: usize = 1 << 16;

/// `N` vectors of `len` values. `body` gets zeros to write to, those of a chunk of `chunk` values (fewer at the end) of each
/// vector, and the number of the first; what it answers comes in the order of the chunks.
pub(crate) fn fresh_with<const N: usize, R: Send>(
    len: usize,
    chunk: usize,
    body: impl Fn(usize, [&mut [f32]; N]) -> R + Sync,
) -> ([Vec<f32>; N], Vec<R>) {
    let chunk = chunk.max(1);
    let mut made: [Vec<f32>; N] = from_fn(|_| Vec::with_capacity(len));
    let mut chunks = made.each_mut().map(|made| made.spare_capacity_mut()[..len].chunks_mut(chunk));
    let starts = (0..len).step_by(chunk);
    let tasks: Vec<_> = starts
        .map(|start| (start, chunks.each_mut().map(|parts| parts.next().unwrap_or_default())))
        .collect();
    let answers = threads::map(tasks, |(start, parts)| body(start, parts.map(cleared)));
    for made in &mut made {
        // SAFETY: every task has cleared its chunk, and the chunks are all of the first `len` values.
        unsafe { made.set_len(len) };
    }
    (made, answers)
}

/// A vector of `len` values; the rest as [`fresh_with`].
pub(crate) fn fresh(len: usize, chunk: usize, body: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let ([made], _) = fresh_with(len, chunk, |start, [part]| body(start, part));
    made
}

/// Zeros.
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    fresh(len, CHUNK, |_, _| ())
}

fn cleared(part: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    part.fill(MaybeUninit::new(0.0));
    // SAFETY: the same memory, of which every value was just written; borrowed as before.
    unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr().cast(), part.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_all_there_is() {
        for (len, chunk) in [(0, 3), (1, 3), (6, 3), (7, 3), (100, 1), (5, 9)] {
            let ([a, b], firsts) = fresh_with(len, chunk, |start, [a, b]| {
                assert!(a.iter().chain(&*b).all(|x| *x == 0.0) && a.len() == b.len() && a.len() <= chunk);
                a.iter_mut().enumerate().for_each(|(i, a)| *a = (start + i) as f32);
                start
            });
            assert_eq!(a, (0..len).map(|i| i as f32).collect::<Vec<_>>());
            assert_eq!(b, zeros(len));
            assert_eq!(firsts, (0..len).step_by(chunk).collect::<Vec<_>>());
        }
    }
}
