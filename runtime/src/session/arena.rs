//! Typed slices out of the caller's bytes: the only `unsafe` of the session.
//!
//! Every slice takes a multiple of [`ALIGN`] bytes, so the bytes that a list of slices needs do not
//! depend on their order, and [`padded_bytes`] adds up to exactly what [`Arena`] hands out. Nothing is
//! ever given back.

use crate::{Code, Error, Result};

/// Every slice starts at a multiple of this: a cache line, and more than any vector register.
const ALIGN: usize = 64;

/// Bytes that an arena may lose in front because its base is not aligned.
pub(super) const SLACK: usize = ALIGN - 1;

/// Numbers for which every bit pattern is a value.
///
/// # Safety
/// Implementors have no padding, no invalid bit pattern and no destructor.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: floats and integers of the standard library are all that is asked for.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: bytes have neither padding nor an invalid pattern.
unsafe impl Plain for crate::kernels::Q8Block {}
// SAFETY: `repr(C)` with fields of 8, 4 and 4 bytes has no padding, and all three are numbers.
unsafe impl Plain for super::adapters::Entry {}

/// Bytes that `count` elements take with their padding; `None` beyond the address space.
pub(super) fn padded_bytes<T>(count: usize) -> Option<usize> {
    const { assert!(align_of::<T>() <= ALIGN) }
    count.checked_mul(size_of::<T>())?.checked_next_multiple_of(ALIGN)
}

/// What is left of the caller's bytes.
pub(super) struct Arena<'a> {
    rest: &'a mut [u8],
}

impl<'a> Arena<'a> {
    /// The aligned part of `bytes`.
    pub(super) fn new(bytes: &'a mut [u8]) -> Self {
        let skipped = bytes.as_ptr().align_offset(ALIGN).min(bytes.len());
        Self { rest: &mut bytes[skipped..] }
    }

    /// The next `count` elements, holding whatever the bytes held.
    pub(super) fn take<T: Plain>(&mut self, count: usize) -> Result<&'a mut [T]> {
        let start = self.split::<T>(count)?;
        // SAFETY: `split` proved that `count` elements of `T` fit into bytes that are aligned for `T`,
        // belong to this call alone and live for `'a`. They are initialized, being bytes of a slice, and
        // any bytes are a `T` because `T` is `Plain`.
        Ok(unsafe { core::slice::from_raw_parts_mut(start, count) })
    }

    /// The next `count` elements, made by `make` from their index. `T` is `Copy`, so that nothing is
    /// lost when the arena goes away without dropping them.
    pub(super) fn build<T: Copy>(
        &mut self,
        count: usize,
        mut make: impl FnMut(usize) -> Result<T>,
    ) -> Result<&'a [T]> {
        let start = self.split::<T>(count)?;
        for index in 0..count {
            let value = make(index)?;
            // SAFETY: `split` proved that `count` elements fit behind `start`, aligned and exclusive.
            unsafe { start.add(index).write(value) }
        }
        // SAFETY: all `count` elements were just written; the bytes are exclusive to this call and live
        // for `'a`, during which `T: Copy` values may be read freely.
        Ok(unsafe { core::slice::from_raw_parts(start, count) })
    }

    /// Cuts the bytes of `count` elements off. The result is aligned for `T` and valid for reads and
    /// writes of `count` elements during `'a`; nobody else gets these bytes.
    fn split<T>(&mut self, count: usize) -> Result<*mut T> {
        let found = self.rest.len() as u64;
        let Some(bytes) = padded_bytes::<T>(count).filter(|bytes| *bytes <= self.rest.len()) else {
            let wanted = padded_bytes::<T>(count).unwrap_or(usize::MAX);
            return Err(Error::new(Code::ArenaTooSmall, "arena").found(found, wanted as u64));
        };
        let (taken, rest) = core::mem::take(&mut self.rest).split_at_mut(bytes);
        self.rest = rest;
        // `rest` starts at a multiple of ALIGN, or is empty, because `new` aligned it and every part is a
        // multiple of ALIGN; no element has to be valid where there is none. `taken` has room for
        // `count * size_of::<T>()` bytes.
        let start = taken.as_mut_ptr().cast::<T>();
        if count == 0 || size_of::<T>() == 0 {
            return Ok(core::ptr::NonNull::dangling().as_ptr());
        }
        debug_assert!(start.is_aligned());
        Ok(start)
    }

    /// Bytes that nobody has taken.
    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_aligned_disjoint_and_exact_at_any_base() {
        let need: usize =
            [padded_bytes::<f32>(3), padded_bytes::<f64>(9), padded_bytes::<i8>(65), padded_bytes::<u16>(2)]
                .into_iter()
                .flatten()
                .sum();
        let mut bytes = [0xa5u8; 1024];
        for base in 0..ALIGN {
            let mut arena = Arena::new(&mut bytes[base..base + need + SLACK]);
            let floats = arena.take::<f32>(3).unwrap();
            let doubles = arena.take::<f64>(9).unwrap();
            let small = arena.take::<i8>(65).unwrap();
            let built = arena.build(2, |i| Ok(i as u16 + 7)).unwrap();
            assert!(arena.left() < ALIGN, "{}", arena.left());
            floats.fill(1.0);
            doubles.fill(2.0);
            small.fill(3);
            assert_eq!((&*floats, built), (&[1.0; 3][..], &[7, 8][..]));
            assert!(doubles.iter().all(|x| *x == 2.0) && small.iter().all(|x| *x == 3));
            assert_eq!(floats.as_ptr() as usize % ALIGN, 0);
            assert_eq!(doubles.as_ptr() as usize % ALIGN, 0);
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let mut bytes = [0u8; 256];
        let mut arena = Arena::new(&mut bytes);
        assert_eq!(arena.take::<f32>(100).unwrap_err().code, Code::ArenaTooSmall);
        assert_eq!(arena.take::<f64>(usize::MAX / 2).unwrap_err().code, Code::ArenaTooSmall);
        assert_eq!(arena.take::<f32>(0).unwrap().len(), 0);
        let mut none = Arena::new(&mut []);
        assert_eq!(none.take::<i8>(1).unwrap_err().code, Code::ArenaTooSmall);
        assert!(none.take::<i8>(0).unwrap().is_empty());
    }

    #[test]
    fn an_element_that_cannot_be_made_is_the_error() {
        let mut bytes = [0u8; 256];
        let made = Arena::new(&mut bytes).build(2, |i| match i {
            0 => Ok(1u32),
            _ => Err(Error::new(Code::MissingTensor, "x")),
        });
        assert_eq!(made.unwrap_err().code, Code::MissingTensor);
    }
}
