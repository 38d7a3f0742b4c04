//! What the CPU can do beyond the baseline.
//!
//! On 64-bit ARM only the operating system can tell, and there is no C library here to ask: Linux and Android are
//! read `/proc/self/auxv` from, by their system calls. Where that cannot be read, and on other systems, the answer
//! is nothing.

use edge_runtime::kernels::Features;

/// What this CPU and its operating system offer.
#[cfg(not(all(target_arch = "aarch64", any(target_os = "linux", target_os = "android"))))]
pub(crate) fn features() -> Features {
    Features::detect()
}

/// What this CPU and its operating system offer.
#[cfg(all(target_arch = "aarch64", any(target_os = "linux", target_os = "android")))]
pub(crate) fn features() -> Features {
    let [hwcap, hwcap2] = auxv::hwcaps().unwrap_or_default();
    // SAFETY: the kernel's own words about the CPUs that run this process, or no bit at all.
    unsafe { Features::from_hwcap(hwcap, hwcap2) }
}

#[cfg(all(target_arch = "aarch64", any(target_os = "linux", target_os = "android")))]
mod auxv {
    use core::arch::asm;
    use core::ffi::CStr;

    /// Keys of the vector (Linux `include/uapi/linux/auxvec.h`).
    const AT_HWCAP: u64 = 16;
    const AT_HWCAP2: u64 = 26;
    /// Numbers of system calls (Linux `include/uapi/asm-generic/unistd.h`).
    const OPENAT: usize = 56;
    const CLOSE: usize = 57;
    const READ: usize = 63;
    /// A relative path would begin at the working directory; this one is absolute.
    const AT_FDCWD: isize = -100;
    const O_CLOEXEC: usize = 0o2_000_000;
    /// Linux hands over some twenty pairs of a key and a value; the rest of a longer vector is left out.
    const BYTES: usize = 64 * 16;

    /// `AT_HWCAP` and `AT_HWCAP2`, 0 where the vector has none; `None` if it cannot be read.
    pub(super) fn hwcaps() -> Option<[u64; 2]> {
        let mut bytes = [0; BYTES];
        let length = read(c"/proc/self/auxv", &mut bytes)?;
        let pairs = bytes[..length].as_chunks::<8>().0.as_chunks::<2>().0;
        let value = |wanted| {
            let mut pairs = pairs.iter().map(|pair| pair.map(u64::from_ne_bytes));
            pairs.find(|[key, _]| *key == wanted).map_or(0, |[_, value]| value)
        };
        Some([value(AT_HWCAP), value(AT_HWCAP2)])
    }

    /// Fills `bytes` from the start of a file; how many there were.
    fn read(path: &CStr, bytes: &mut [u8]) -> Option<usize> {
        // SAFETY: the path ends with 0 and outlives the call, which only reads it.
        let opened =
            unsafe { call(OPENAT, [AT_FDCWD as usize, path.as_ptr().expose_provenance(), O_CLOEXEC, 0]) };
        let file = usize::try_from(opened).ok()?;
        let mut length = 0;
        let ended = loop {
            let rest = &mut bytes[length..];
            // SAFETY: the kernel writes at most `rest.len()` bytes, all of them into `rest`.
            let count = unsafe { call(READ, [file, rest.as_mut_ptr().expose_provenance(), rest.len(), 0]) };
            match usize::try_from(count) {
                Ok(0) => break Some(length),
                Ok(count) => length += count.min(rest.len()),
                Err(_) => break None,
            }
        };
        // SAFETY: the file is this function's own and not used again.
        unsafe { call(CLOSE, [file, 0, 0, 0]) };
        ended
    }

    /// A system call; below 0 is an error's number.
    ///
    /// # Safety
    /// What the call does with its arguments must be sound.
    unsafe fn call(number: usize, [a, b, c, d]: [usize; 4]) -> isize {
        let result;
        // SAFETY: Linux keeps all registers but x0 (`Documentation/arch/arm64`, syscall ABI); memory may be
        // written as the call says, so it is not declared untouched.
        unsafe {
            asm!(
                "svc #0",
                in("x8") number,
                inlateout("x0") a => result,
                in("x1") b,
                in("x2") c,
                in("x3") d,
                options(nostack),
            );
        }
        result
    }
}
