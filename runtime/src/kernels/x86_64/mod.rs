//! x86-64.

pub(super) mod avx2;

use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// Whether the CPU has AVX2 and F16C and the operating system saves the wide registers (Intel SDM volume 1,
/// 14.3 and 14.7.1).
pub(super) fn has_avx2() -> bool {
    const OSXSAVE_AVX_F16C: u32 = 1 << 27 | 1 << 28 | 1 << 29;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE_AVX_F16C != OSXSAVE_AVX_F16C {
        return false;
    }
    // SAFETY: OSXSAVE says that XGETBV can be executed.
    let saved = unsafe { xcr0() };
    saved & 6 == 6 && __cpuid_count(7, 0).ebx & 1 << 5 != 0
}

/// The register sets that the operating system saves.
#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: XCR0 exists wherever XGETBV does.
    unsafe { _xgetbv(0) }
}
