//! System calls of Linux and Android, where there is no C library to make them.

use core::arch::asm;

/// Numbers of system calls (Linux `include/uapi/asm-generic/unistd.h`, `arch/x86/entry/syscalls/syscall_64.tbl`).
#[cfg(target_arch = "aarch64")]
pub(crate) mod number {
    pub(crate) const OPENAT: usize = 56;
    pub(crate) const CLOSE: usize = 57;
    pub(crate) const READ: usize = 63;
    pub(crate) const FUTEX: usize = 98;
}
#[cfg(target_arch = "x86_64")]
pub(crate) mod number {
    pub(crate) const FUTEX: usize = 202;
}

/// A system call; below 0 is an error's number.
///
/// # Safety
/// What the call does with its arguments must be sound.
pub(crate) unsafe fn call(number: usize, [a, b, c, d]: [usize; 4]) -> isize {
    let result;
    // SAFETY: Linux keeps all registers but x0 (`Documentation/arch/arm64`, syscall ABI); memory may be written as
    // the call says, so it is not declared untouched.
    #[cfg(target_arch = "aarch64")]
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
    // SAFETY: Linux keeps all registers but rax, rcx and r11 (System V ABI for x86-64, appendix A.2.1); memory as
    // above.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}
