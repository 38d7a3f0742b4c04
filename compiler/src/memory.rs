//! What the system's allocator does with memory that is freed: within a stage it stays, between stages it goes back.
//!
//! Training frees and asks for the same hundreds of megabytes in every step; given back to the system in between, each
//! page costs a fault and is filled with zeros again. What comes after it asks for other sizes, beside which the freed ones
//! would count.

/// Tells glibc to keep memory that is freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep() {
    // SAFETY: `mallopt` takes two integers, and these options are glibc's own. They say where `malloc` takes memory
    // from and when it gives it back; nothing that was allocated is touched, and no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// Gives back what was freed and kept.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn give_back() {
    // SAFETY: it takes an integer, locks the allocator as every allocation does, and touches none.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep() {}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn give_back() {}
