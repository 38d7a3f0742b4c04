//! Whether the other threads are worth waiting for.
//!
//! A thread that the system stops in the midst of its part holds up the job for a time slice, some milliseconds, in
//! which a single thread would have done a hundred jobs. Where other programs want the same processors, that can
//! cost more than the threads bring. So each job is booked: the time that others saved, and the time that they were
//! waited for. While the sum says that they cost more, jobs are run without them.

pub(super) use clock::ticks;
use core::sync::atomic::{AtomicUsize, Ordering};

/// The most that is remembered of good times, so that bad ones are noticed soon. In milliseconds, as what follows.
const MEMORY: usize = 4;
/// How long jobs are run alone, at first; twice as long each time that another try fails.
const SHORTEST: usize = 32;
const LONGEST: usize = 512;

/// The books of a team. Only the thread that runs the team's job writes; they are atomic to be shared at all.
#[derive(Debug)]
pub(super) struct Worth {
    /// Ticks that the others have saved and not yet cost.
    saved: AtomicUsize,
    /// The tick from which on jobs are shared again.
    resumes: AtomicUsize,
    /// Milliseconds to run alone when they have cost too much.
    pause: AtomicUsize,
}

impl Worth {
    pub(super) fn new() -> Self {
        let saved = AtomicUsize::new(MEMORY * clock::millisecond());
        Self { saved, resumes: AtomicUsize::new(ticks()), pause: AtomicUsize::new(SHORTEST) }
    }

    /// Whether the job that begins now should be shared.
    pub(super) fn sharing(&self) -> bool {
        let left = self.resumes.load(Ordering::Relaxed).wrapping_sub(ticks());
        // A time that has passed is a huge distance; so is one after a clock was set back.
        left == 0 || left > LONGEST * clock::millisecond()
    }

    /// Books a job that `helpers` other threads took part in: what its own thread did took until `done`, all of it
    /// until now.
    pub(super) fn book(&self, helpers: usize, began: usize, done: usize) {
        let now = ticks();
        let most = MEMORY * clock::millisecond();
        // As long as this thread worked, so did each of the others, were they not stopped; half of that, because threads
        // share the memory's bandwidth too.
        let saved = self
            .saved
            .load(Ordering::Relaxed)
            .saturating_add(helpers * (done.wrapping_sub(began) / 2))
            .min(most);
        let pause = self.pause.load(Ordering::Relaxed);
        let (saved, pause) = match saved.checked_sub(now.wrapping_sub(done)) {
            Some(saved) if saved == most => (saved, SHORTEST),
            Some(saved) => (saved, pause),
            None => {
                self.resumes.store(now.wrapping_add(pause * clock::millisecond()), Ordering::Relaxed);
                (0, (2 * pause).min(LONGEST))
            }
        };
        self.saved.store(saved, Ordering::Relaxed);
        self.pause.store(pause, Ordering::Relaxed);
    }
}

/// A counter that all cores of the processor share.
#[cfg(target_arch = "x86_64")]
mod clock {
    pub fn ticks() -> usize {
        // SAFETY: reads a counter that every x86-64 processor has.
        unsafe { core::arch::x86_64::_rdtsc() as usize }
    }

    /// As of a processor of 2 GHz: others are off by a factor that does not matter.
    pub fn millisecond() -> usize {
        2_000_000
    }
}

/// A counter that all cores of the processor share, on systems that let programs read it.
#[cfg(all(
    target_arch = "aarch64",
    any(target_os = "linux", target_os = "android", target_vendor = "apple")
))]
mod clock {
    use core::arch::asm;

    pub fn ticks() -> usize {
        let ticks: usize;
        // SAFETY: reads a counter; nothing else changes.
        unsafe { asm!("mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack, preserves_flags)) };
        ticks
    }

    pub fn millisecond() -> usize {
        let hertz: usize;
        // SAFETY: reads the counter's frequency; nothing else changes.
        unsafe { asm!("mrs {}, cntfrq_el0", out(reg) hertz, options(nomem, nostack, preserves_flags)) };
        hertz / 1000
    }
}

/// No counter to be read without asking: no time passes, and jobs are always shared.
#[cfg(not(any(
    target_arch = "x86_64",
    all(target_arch = "aarch64", any(target_os = "linux", target_os = "android", target_vendor = "apple"))
)))]
mod clock {
    pub fn ticks() -> usize {
        0
    }

    pub fn millisecond() -> usize {
        0
    }
}
