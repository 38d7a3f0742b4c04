//! The one place where several threads write into one buffer.
//!
//! A matrix product is `[tokens, rows]`; threads take ranges of rows, so what one thread writes is not
//! contiguous and cannot be handed out as slices. [`Output`] hands out each range once instead.

use core::marker::PhantomData;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

/// A `[tokens, rows]` buffer that is shared among `threads` threads in parts of a multiple of `unit` rows.
///
/// Each thread's first part is large, because memory is fastest in long runs; the last ones are small, so that
/// a thread that was held up leaves work to the others (as in guided self-scheduling: Polychronopoulos and
/// Kuck 1987).
pub(crate) struct Output<'a> {
    start: *mut f32,
    tokens: usize,
    rows: usize,
    unit: usize,
    threads: usize,
    /// Rows of each thread's first part.
    first: usize,
    next: AtomicUsize,
    buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: the buffer is reached only through `Columns`, and `take` gives every row to one `Columns` only, so
// that no element is accessed by two threads. The counter is atomic.
unsafe impl Sync for Output<'_> {}

/// The right to write the elements of `N` rows, for all tokens.
pub(crate) struct Strip<'a, const N: usize> {
    start: *mut f32,
    tokens: usize,
    stride: usize,
    output: PhantomData<&'a mut [f32]>,
}

/// The right to write the elements of some rows, for all tokens.
pub(crate) struct Columns<'a> {
    start: *mut f32,
    tokens: usize,
    stride: usize,
    rows: Range<usize>,
    output: PhantomData<&'a Output<'a>>,
}

impl<'a> Output<'a> {
    /// Shares `buffer`, which must have `tokens * rows` elements; `unit` and `threads` are at least 1.
    pub fn new(
        buffer: &'a mut [f32],
        tokens: usize,
        rows: usize,
        unit: usize,
        threads: usize,
    ) -> Option<Self> {
        if tokens.checked_mul(rows) != Some(buffer.len()) || unit == 0 || threads == 0 {
            return None;
        }
        // One token has little to compute for what it reads; the more tokens, the less a run of memory matters.
        let first = if tokens == 1 { rows / 16 * 15 / threads } else { rows / 2 / threads };
        let first = (first / unit).max(1) * unit;
        let (start, next) = (buffer.as_mut_ptr(), AtomicUsize::new(0));
        Some(Self { start, tokens, rows, unit, threads, first, next, buffer: PhantomData })
    }

    /// The next part that nobody has; `None` once all are taken.
    ///
    /// Threads take parts instead of computing their share from their number, so that a broken
    /// implementation of `Workers` can lose time but never make two threads write one element.
    pub fn take(&self) -> Option<Columns<'_>> {
        let part = |start: usize| {
            let left = self.rows.checked_sub(start).filter(|left| *left > 0)?;
            let len = match self.threads {
                1 => left,
                threads if start < threads * self.first => self.first,
                threads => (left / (2 * threads)).next_multiple_of(self.unit).max(self.unit),
            };
            Some(len.min(left))
        };
        let start = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |start| part(start).map(|len| start + len));
        let start = start.ok()?;
        let rows = start..start + part(start)?;
        Some(Columns { start: self.start, tokens: self.tokens, stride: self.rows, rows, output: PhantomData })
    }
}

impl Columns<'_> {
    /// The rows of this part.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Writes the element of `token` and `row`; one outside this part is not written.
    #[inline(always)]
    pub fn set(&mut self, token: usize, row: usize, value: f32) {
        debug_assert!(token < self.tokens && self.rows.contains(&row));
        if token < self.tokens && self.rows.contains(&row) {
            // SAFETY: `row < stride` since `rows` lies within `0..stride`, so the offset is less than
            // `tokens * stride`, the length of the buffer that `Output` borrows mutably for as long as this
            // lives. No other `Columns` has `row`, and `self` is borrowed mutably.
            unsafe { self.start.add(token * self.stride + row).write(value) }
        }
    }

    /// The elements of `token` from row `first` on, at most `N`; none outside this part.
    #[inline(always)]
    fn rows_mut<const N: usize>(&mut self, token: usize, first: usize) -> &mut [f32] {
        if token < self.tokens && self.rows.contains(&first) {
            let len = N.min(self.rows.end - first);
            // SAFETY: `first + len <= rows.end <= stride`, so the elements lie within the row of `token`, which is
            // within the buffer that `Output` borrows mutably for as long as this lives. No other `Columns` has
            // these rows, and `self` is borrowed mutably for as long as the slice lives. The buffer was
            // a slice of `f32` and stays initialized.
            unsafe { core::slice::from_raw_parts_mut(self.start.add(token * self.stride + first), len) }
        } else {
            &mut []
        }
    }

    /// The `N` rows from `first` on; `None` unless all are in this part.
    #[inline(always)]
    pub fn strip<const N: usize>(&mut self, first: usize) -> Option<Strip<'_, N>> {
        if first < self.rows.start || first.checked_add(N)? > self.rows.end || self.tokens == 0 {
            return None;
        }
        // SAFETY: `first < rows.end <= stride`, and there is a token, so this is within the buffer.
        let start = unsafe { self.start.add(first) };
        Some(Strip { start, tokens: self.tokens, stride: self.stride, output: PhantomData })
    }

    /// The rows of this part from `first` on.
    #[cfg(target_arch = "x86_64")]
    pub fn from(&mut self, first: usize) -> Columns<'_> {
        let rows = first.max(self.rows.start)..self.rows.end;
        Columns { rows, output: PhantomData, ..*self }
    }

    /// Writes the elements of `token` from row `first` on, as far as they are in this part.
    #[inline(always)]
    pub fn set_rows<const N: usize>(&mut self, token: usize, first: usize, values: &[f32; N]) {
        let to = self.rows_mut::<N>(token, first);
        match to.as_mut_array() {
            Some(to) => *to = *values,
            None => to.copy_from_slice(&values[..to.len()]),
        }
    }

    /// Reads the elements of `token` from row `first` on, as far as they are in this part.
    #[inline(always)]
    pub fn get_rows<const N: usize>(&mut self, token: usize, first: usize, values: &mut [f32; N]) {
        let from = self.rows_mut::<N>(token, first);
        match from.as_array() {
            Some(from) => *values = *from,
            None => values[..from.len()].copy_from_slice(from),
        }
    }
}

impl<'a, const N: usize> Strip<'a, N> {
    /// A strip of its own, one token after the other.
    #[inline(always)]
    pub fn of(sums: &'a mut [[f32; N]]) -> Self {
        Self { start: sums.as_mut_ptr().cast(), tokens: sums.len(), stride: N, output: PhantomData }
    }

    /// Tokens of it.
    #[inline(always)]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Calls for the elements of tokens that are written next: they lie far apart, where nothing else foresees them.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn fetch(&self, tokens: Range<usize>) {
        use core::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        for token in tokens {
            for first in (0..N).step_by(16) {
                // SAFETY: an instruction that every x86-64 processor has or passes over; it reads nothing, so the address
                // may be any.
                unsafe {
                    _mm_prefetch::<_MM_HINT_ET0>(self.start.wrapping_add(token * self.stride + first).cast());
                }
            }
        }
    }

    /// Its elements of `T` tokens from `token` on; `None` unless there are as many.
    #[inline(always)]
    pub fn tokens_mut<const T: usize>(&mut self, token: usize) -> Option<[&mut [f32; N]; T]> {
        if token.checked_add(T)? > self.tokens {
            return None;
        }
        // SAFETY: `start` is the first of `N` elements of a buffer's first row, which has `stride` of them, at least
        // `N` from there on, and the buffer has `tokens` rows: so the arrays lie within it, and those of two tokens do
        // not overlap. `Columns::strip` and `Strip::of` borrow these elements mutably for as long as this lives, and
        // `self` is borrowed mutably for as long as the arrays live. The buffer was a slice of `f32` and stays
        // initialized; arrays are aligned as their elements.
        Some(core::array::from_fn(|i| unsafe {
            &mut *self.start.add((token + i) * self.stride).cast::<[f32; N]>()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::{Output, Strip};

    #[test]
    fn a_strip_has_its_rows_of_every_token() {
        let mut buffer = [0.0; 3 * 10];
        {
            let output = Output::new(&mut buffer, 3, 10, 10, 1).unwrap();
            let mut part = output.take().unwrap();
            assert!(part.strip::<4>(7).is_none());
            let mut strip = part.strip::<4>(6).unwrap();
            assert!(strip.tokens() == 3 && strip.tokens_mut::<2>(2).is_none());
            for (i, to) in strip.tokens_mut::<2>(1).unwrap().into_iter().enumerate() {
                *to = [i as f32 + 1.0; 4];
            }
        }
        for (i, value) in buffer.into_iter().enumerate() {
            let expected = if i % 10 < 6 { 0.0 } else { (i / 10) as f32 };
            assert_eq!(value, expected, "{i}");
        }
        let mut own = [[0.0; 2]; 2];
        assert!(Strip::of(&mut own).tokens_mut::<2>(1).is_none());
    }

    #[test]
    fn every_row_is_taken_once() {
        let mut buffer = [0.0; 3 * 10];
        let output = Output::new(&mut buffer, 3, 10, 2, 2).unwrap();
        while let Some(mut part) = output.take() {
            for row in part.rows() {
                for token in 0..3 {
                    part.set(token, row, (token * 10 + row) as f32);
                }
            }
        }
        assert!(output.take().is_none());
        for (i, value) in buffer.into_iter().enumerate() {
            assert_eq!(value, i as f32);
        }
    }

    #[test]
    fn refuses_a_buffer_of_another_size() {
        assert!(Output::new(&mut [0.0; 29], 3, 10, 4, 1).is_none());
        assert!(Output::new(&mut [], usize::MAX, 2, 4, 1).is_none());
        assert!(Output::new(&mut [0.0; 2], 1, 2, 0, 1).is_none());
    }
}
