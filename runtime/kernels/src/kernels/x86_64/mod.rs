//! x86-64.

pub(super) mod avx2;
mod avx2_tiles;
pub(super) mod avx512;

use core::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// Whether the CPU has AVX2, FMA and F16C, and whether it has AVX-512 F, BW, VL and VNNI besides, with an
/// operating system that saves the registers (Intel SDM volume 1, 14.3, 14.7.1 and 15.2).
pub(super) fn features() -> (bool, bool) {
    const FMA_OSXSAVE_AVX_F16C: u32 = 1 << 12 | 1 << 27 | 1 << 28 | 1 << 29;
    const AVX2: u32 = 1 << 5;
    const AVX512_F_BW_VL: u32 = 1 << 16 | 1 << 30 | 1 << 31;
    const AVX512_VNNI: u32 = 1 << 11;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & FMA_OSXSAVE_AVX_F16C != FMA_OSXSAVE_AVX_F16C {
        return (false, false);
    }
    // SAFETY: OSXSAVE says that XGETBV can be executed.
    let saved = unsafe { xcr0() };
    let more = __cpuid_count(7, 0);
    let avx2 = saved & 0x06 == 0x06 && more.ebx & AVX2 != 0;
    let avx512 =
        saved & 0xe6 == 0xe6 && more.ebx & AVX512_F_BW_VL == AVX512_F_BW_VL && more.ecx & AVX512_VNNI != 0;
    (avx2, avx2 && avx512)
}

/// The register sets that the operating system saves.
#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: XCR0 exists wherever XGETBV does.
    unsafe { _xgetbv(0) }
}

/// Sixteen bytes as four lanes of four.
#[inline(always)]
fn lanes_of_four(a: &[i8; 16]) -> [i32; 4] {
    let lane = |i: usize| i32::from_le_bytes([a[i] as u8, a[i + 1] as u8, a[i + 2] as u8, a[i + 3] as u8]);
    [lane(0), lane(4), lane(8), lane(12)]
}
