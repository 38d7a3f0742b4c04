//! What the CPU can do beyond the baseline.
//!
//! On 64-bit ARM only the operating system can tell, and there is no C library here to ask: Linux and Android are
//! read `/proc/self/auxv` from, by their system calls. Where that cannot be read, and on other systems, the answer
//! is what the caller has promised.

use crate::abi::{CPU_AVX2, CPU_DOTPROD, CPU_I8MM};
use edge_runtime::kernels::Features;

/// What this CPU and its operating system offer; `promised` are `EDGE_CPU_` bits.
pub(crate) fn features(promised: u64) -> Features {
    let has = |bit: u64| promised & bit != 0;
    if cfg!(not(target_arch = "aarch64")) {
        // The CPU is asked itself: the bit only allows what goes beyond the baseline.
        return if has(CPU_AVX2) { Features::detect() } else { Features::NONE };
    }
    #[cfg(all(target_arch = "aarch64", any(target_os = "linux", target_os = "android")))]
    if let Some([hwcap, hwcap2]) = auxv::hwcaps() {
        // SAFETY: the kernel's own words about the CPUs that run this process.
        return unsafe { Features::from_hwcap(hwcap, hwcap2) };
    }
    // SAFETY: `edge_plan` and `edge_open`, where the bits come from, demand that each is true of this CPU.
    unsafe { Features::told(has(CPU_DOTPROD), has(CPU_I8MM)) }
}

#[cfg(all(target_arch = "aarch64", any(target_os = "linux", target_os = "android")))]
mod auxv {
    use crate::linux::{
        call,
        number::{CLOSE, OPENAT, READ},
    };
    use core::ffi::CStr;

    /// Keys of the vector (Linux `include/uapi/linux/auxvec.h`).
    const AT_HWCAP: u64 = 16;
    const AT_HWCAP2: u64 = 26;
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
}
