//! A team of the caller's threads: `edge_team`, which lives in the caller's memory.
//!
//! Threads sleep by the caller's functions if it has any; otherwise by a futex on Linux and Android, and elsewhere
//! on the spot, by what the processor has for waiting.

use core::ffi::c_void;
use core::sync::atomic::AtomicU32;

use crate::abi::{EdgeWaiting, EdgeWorkers, Job, WaitFunction, WakeFunction};
use edge_runtime::workers::{Team, Waiting, Workers};
use edge_runtime::{Code, Error, Result};

/// `edge_team`.
pub struct EdgeTeam(Team<Sleep>);

/// Bytes that `edge.h` gives an `edge_team`.
const BYTES: usize = 128;
const _: () = assert!(size_of::<EdgeTeam>() <= BYTES && align_of::<EdgeTeam>() <= 8);

/// How the threads of a team sleep.
enum Sleep {
    System,
    Caller { context: *mut c_void, wait: WaitFunction, wake: WakeFunction },
}

// SAFETY: the fields never change. `context` is only handed to the two functions, and edge.h demands of the caller
// that they may be called with it from any of the team's threads.
unsafe impl Sync for Sleep {}

impl EdgeTeam {
    /// A team of `count` threads, the one that uses sessions among them.
    pub(crate) fn new(count: u32, waiting: Option<&EdgeWaiting>) -> Result<Self> {
        if count == 0 {
            return Err(Error::new(Code::BadArgument, "count").hint("at least 1 thread"));
        }
        let sleep = match waiting {
            None => Sleep::System,
            Some(EdgeWaiting { context, wait: Some(wait), wake: Some(wake) }) => {
                Sleep::Caller { context: *context, wait: *wait, wake: *wake }
            }
            Some(_) => return Err(Error::new(Code::BadArgument, "waiting").hint("null pointer")),
        };
        Ok(Self(Team::new(count as usize, sleep)))
    }

    /// What `edge_open` takes; it leads to `self` by its address.
    pub(crate) fn workers(&self) -> EdgeWorkers {
        let context = core::ptr::from_ref(self).cast_mut().cast();
        EdgeWorkers { count: self.0.count() as u32, context, run: Some(run) }
    }

    /// The life of a thread.
    pub(crate) fn work(&self) {
        self.0.work();
    }

    /// Sends all threads away.
    pub(crate) fn stop(&self) {
        self.0.stop();
    }
}

/// A job and what it works on.
struct Call(Job, *mut c_void);

// SAFETY: a job may be called with its context by several threads at the same time: that is what `run` of
// `edge_workers` is there for.
unsafe impl Sync for Call {}

/// `edge_workers.run` of a team.
///
/// # Safety
/// `team` leads to an [`EdgeTeam`], and `job` may be called with `context` by any thread until this returns.
unsafe extern "C" fn run(team: *mut c_void, job: Job, context: *mut c_void) {
    // SAFETY: the caller's promise.
    let team = unsafe { &*team.cast::<EdgeTeam>() };
    let call = &Call(job, context);
    // SAFETY: the caller's promise. All calls are over when the team's `run` returns.
    team.0.run(&|| unsafe { (call.0)(call.1, 0) });
}

impl Waiting for Sleep {
    fn sleep(&self, word: &AtomicU32, value: u32) {
        match self {
            Self::System => system::sleep(word, value),
            // SAFETY: the caller's own function with its own context; the word outlives the call.
            Self::Caller { context, wait, .. } => unsafe { wait(*context, word.as_ptr(), value) },
        }
    }

    fn wake(&self, word: &AtomicU32) {
        match self {
            Self::System => system::wake(word),
            // SAFETY: as above.
            Self::Caller { context, wake, .. } => unsafe { wake(*context, word.as_ptr()) },
        }
    }
}

#[cfg(all(
    any(target_os = "linux", target_os = "android"),
    any(target_arch = "aarch64", target_arch = "x86_64")
))]
mod system {
    use crate::linux::{call, number::FUTEX};
    use core::sync::atomic::AtomicU32;

    /// Operations on words that no other process sees (Linux `include/uapi/linux/futex.h`).
    const WAIT_PRIVATE: usize = 128;
    const WAKE_PRIVATE: usize = 129;

    pub(super) fn sleep(word: &AtomicU32, value: u32) {
        // SAFETY: the kernel only reads the word. It refuses if that is not `value` any more; no time limit.
        unsafe { call(FUTEX, [word.as_ptr().expose_provenance(), WAIT_PRIVATE, value as usize, 0]) };
    }

    pub(super) fn wake(word: &AtomicU32) {
        // SAFETY: the kernel only takes the word's address.
        unsafe { call(FUTEX, [word.as_ptr().expose_provenance(), WAKE_PRIVATE, i32::MAX as usize, 0]) };
    }
}

#[cfg(not(all(
    any(target_os = "linux", target_os = "android"),
    any(target_arch = "aarch64", target_arch = "x86_64")
)))]
mod system {
    use core::sync::atomic::AtomicU32;

    /// Until the next event of the processor, which may have come already; an interrupt is one.
    pub(super) fn sleep(_: &AtomicU32, _: u32) {
        #[cfg(target_arch = "aarch64")]
        // SAFETY: waits; no register and no memory changes.
        unsafe {
            core::arch::asm!("wfe", options(nomem, nostack, preserves_flags))
        }
        core::hint::spin_loop();
    }

    pub(super) fn wake(_: &AtomicU32) {
        #[cfg(target_arch = "aarch64")]
        // SAFETY: makes what was written seen, then sends all processors an event; nothing changes.
        unsafe {
            core::arch::asm!("dsb ishst", "sev", options(nostack, preserves_flags))
        }
    }
}
