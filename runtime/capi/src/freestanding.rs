//! What the standard library would bring and a library for bare devices must bring itself.

/// The runtime has no panic path that a file or a caller can reach; should one be reached all the
/// same, the process stops at once rather than go on with a broken promise.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        #[cfg(target_arch = "aarch64")]
        // SAFETY: raises a debug exception, which ends the process; nothing is read or written.
        unsafe {
            core::arch::asm!("brk #1", options(nomem, nostack))
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: raises an invalid-opcode exception, which ends the process.
        unsafe {
            core::arch::asm!("ud2", options(nomem, nostack))
        }
        core::hint::spin_loop();
    }
}
