//! `edgec`: from a teacher to a student on a device, with one command.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    keep_memory();
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("edgec: {}", cli::one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// Tells glibc to keep memory that is freed. Training frees and asks for the same hundreds of megabytes in every
/// step; given back to the system in between, each page costs a fault and is filled with zeros again.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_memory() {
    // SAFETY: `mallopt` takes two integers, and these options are glibc's own. They say where `malloc` takes memory
    // from and when it gives it back; nothing that was allocated is touched, and no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_memory() {}
