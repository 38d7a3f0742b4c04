//! The five memory functions that compiled code calls, for a library that is linked without a C library.
//!
//! A shared library with no NEEDED entry must bring its own `memcpy`. These are for that build alone
//! (feature `memory`): the static library leaves the names to the program that links it. They are
//! local to the library, so no other code in the process ever sees them.

use core::arch::asm;

/// Bytes that are moved at once.
const STEP: usize = 16;
type Chunk = [u64; 2];

/// Keeps the compiler from recognizing the surrounding loop as a memory function and replacing it
/// with a call to the very function that it implements.
#[inline(always)]
fn keep_loop() {
    // SAFETY: no instruction at all; without `nomem` the compiler must assume that memory changes here.
    unsafe { asm!("", options(nostack, preserves_flags)) }
}

/// `memcpy`, and `memmove` where `to` lies before `from` or outside its bytes.
///
/// # Safety
/// `len` bytes are readable at `from` and writable at `to`; `to - from`, as an unsigned number, is 0
/// or at least `len`.
unsafe extern "C" fn copy_forward(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    let mut at = 0;
    while len - at >= STEP {
        keep_loop();
        // SAFETY: at + STEP <= len, so both chunks lie in the caller's ranges. A chunk is read whole
        // before it is written, and what is written ends at or before the next byte to be read: `to`
        // is before `from`, or the ranges do not meet.
        unsafe { to.add(at).cast::<Chunk>().write_unaligned(from.add(at).cast::<Chunk>().read_unaligned()) };
        at += STEP;
    }
    while at < len {
        keep_loop();
        // SAFETY: at < len.
        unsafe { to.add(at).write(from.add(at).read()) };
        at += 1;
    }
    to
}

/// `memmove`.
///
/// # Safety
/// `len` bytes are readable at `from` and writable at `to`; the ranges may overlap.
unsafe extern "C" fn copy_overlapping(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: the distance was just checked, the ranges are the caller's.
        return unsafe { copy_forward(to, from, len) };
    }
    let mut left = len;
    while left >= STEP {
        keep_loop();
        left -= STEP;
        // SAFETY: left + STEP <= len. `to` is after `from`, so a chunk that is written from the end
        // covers only bytes that were read already or are read in this very chunk.
        unsafe {
            to.add(left).cast::<Chunk>().write_unaligned(from.add(left).cast::<Chunk>().read_unaligned());
        }
    }
    while left > 0 {
        keep_loop();
        left -= 1;
        // SAFETY: left < len.
        unsafe { to.add(left).write(from.add(left).read()) };
    }
    to
}

/// `memset`.
///
/// # Safety
/// `len` bytes are writable at `to`.
unsafe extern "C" fn fill(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // C says that the value is converted to unsigned char.
    let byte = value as u8;
    let chunk: Chunk = [u64::from_ne_bytes([byte; 8]); 2];
    let mut at = 0;
    while len - at >= STEP {
        keep_loop();
        // SAFETY: at + STEP <= len.
        unsafe { to.add(at).cast::<Chunk>().write_unaligned(chunk) };
        at += STEP;
    }
    while at < len {
        keep_loop();
        // SAFETY: at < len.
        unsafe { to.add(at).write(byte) };
        at += 1;
    }
    to
}

/// `memcmp` and `bcmp`: the difference of the first bytes that differ, or 0.
///
/// # Safety
/// `len` bytes are readable at `a` and at `b`.
unsafe extern "C" fn compare(a: *const u8, b: *const u8, len: usize) -> i32 {
    for at in 0..len {
        keep_loop();
        // SAFETY: at < len.
        let (a, b) = unsafe { (a.add(at).read(), b.add(at).read()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// Gives a function its C name inside the library. A name that only assembly defines is not in the
/// compiler's list of exports, which a `#[no_mangle]` function would be.
#[cfg(all(feature = "memory", not(test)))]
macro_rules! c_name {
    ($($name:literal = $function:ident by $jump:literal,)*) => {
        $(core::arch::global_asm!(
            ".text",
            ".p2align 2",
            concat!(".globl ", $name),
            concat!(".hidden ", $name),
            concat!(".type ", $name, ", %function"),
            concat!($name, ":"),
            concat!($jump, " {function}"),
            concat!(".size ", $name, ", . - ", $name),
            function = sym $function,
        );)*
    };
}

#[cfg(all(feature = "memory", not(test), target_arch = "aarch64"))]
c_name! {
    "memcpy" = copy_forward by "b",
    "memmove" = copy_overlapping by "b",
    "memset" = fill by "b",
    "memcmp" = compare by "b",
    "bcmp" = compare by "b",
}

#[cfg(all(feature = "memory", not(test), target_arch = "x86_64"))]
c_name! {
    "memcpy" = copy_forward by "jmp",
    "memmove" = copy_overlapping by "jmp",
    "memset" = fill by "jmp",
    "memcmp" = compare by "jmp",
    "bcmp" = compare by "jmp",
}

#[cfg(all(feature = "memory", not(test), not(any(target_arch = "aarch64", target_arch = "x86_64"))))]
compile_error!("the shared library without a C library is written for aarch64 and x86_64");

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// Every length around the chunk size, every offset of both sides.
    fn cases() -> impl Iterator<Item = (usize, usize, usize)> {
        (0..70).flat_map(|len| (0..18).flat_map(move |to| (0..18).map(move |from| (len, to, from))))
    }

    fn bytes() -> Vec<u8> {
        (0..128u32).map(|i| (i * 37 + 11) as u8).collect()
    }

    #[test]
    fn move_equals_copy_within_for_every_overlap() {
        for (len, to, from) in cases() {
            let (mut found, mut expected) = (bytes(), bytes());
            expected.copy_within(from..from + len, to);
            let base = found.as_mut_ptr();
            // SAFETY: to + len and from + len are below 128; both pointers come from the same borrow.
            let end = unsafe { copy_overlapping(base.add(to), base.add(from), len) };
            assert_eq!(end, base.wrapping_add(to));
            assert_eq!(found, expected, "{len} bytes from {from} to {to}");
        }
    }

    #[test]
    fn copy_touches_its_range_alone() {
        let source = bytes();
        for (len, to, from) in cases() {
            let (mut found, mut expected) = ([0xEE; 128], [0xEE; 128]);
            expected[to..to + len].copy_from_slice(&source[from..from + len]);
            // SAFETY: two different buffers of 128 bytes, to + len and from + len are below that.
            unsafe { copy_forward(found.as_mut_ptr().add(to), source.as_ptr().add(from), len) };
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn fill_takes_the_low_byte_and_touches_its_range_alone() {
        for (len, to, value) in cases() {
            let (mut found, mut expected) = (bytes(), bytes());
            expected[to..to + len].fill(value as u8);
            // SAFETY: to + len is below 128.
            unsafe { fill(found.as_mut_ptr().add(to), value as i32 | 0x7700, len) };
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn compare_orders_as_slices_do() {
        let a = bytes();
        for (len, differ, delta) in cases() {
            let mut b = a.clone();
            b[differ] = b[differ].wrapping_add(delta as u8);
            // SAFETY: len is below 128.
            let found = unsafe { compare(a.as_ptr(), b.as_ptr(), len) };
            assert_eq!(found.signum(), a[..len].cmp(&b[..len]) as i32);
        }
    }
}
