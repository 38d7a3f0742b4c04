//! The caller's threads as the runtime's workers.

use core::ffi::c_void;

use crate::abi::EdgeWorkers;
use edge_runtime::workers::{Single, Workers};
use edge_runtime::{Code, Error, Result};

/// The caller's threads, or the calling thread alone.
pub(crate) enum Team {
    /// The calling thread.
    Alone(Single),
    /// `edge_workers`.
    Caller(CallerThreads),
}

/// `edge_workers` with at least one thread and a function.
pub(crate) struct CallerThreads {
    count: u32,
    context: *mut c_void,
    run: unsafe extern "C" fn(*mut c_void, crate::abi::Job, *mut c_void),
}

// SAFETY: the fields never change. `context` is only handed to `run`, and edge.h demands of the caller
// that both may be used from any thread that calls the library.
unsafe impl Sync for CallerThreads {}

impl Team {
    /// Checks the caller's threads against the number that the arena was planned for.
    pub(crate) fn new(workers: Option<&EdgeWorkers>, planned: usize) -> Result<Self> {
        let count = workers.map_or(1, |workers| workers.count);
        if count as usize != planned {
            return Err(Error::new(Code::BadArgument, "workers.count")
                .found(u64::from(count), planned as u64)
                .hint("as many as limits.workers"));
        }
        let Some(workers) = workers else { return Ok(Self::Alone(Single)) };
        let run =
            workers.run.ok_or_else(|| Error::new(Code::BadArgument, "workers.run").hint("null pointer"))?;
        Ok(Self::Caller(CallerThreads { count, context: workers.context, run }))
    }

    /// As the runtime wants it.
    pub(crate) fn workers(&self) -> &dyn Workers {
        match self {
            Self::Alone(single) => single,
            Self::Caller(threads) => threads,
        }
    }
}

/// What a job's context points to while `run` is at work.
struct Work<'j> {
    job: &'j (dyn Fn() + Sync),
}

impl Workers for CallerThreads {
    fn count(&self) -> usize {
        self.count as usize
    }

    fn run(&self, job: &(dyn Fn() + Sync)) {
        let work = Work { job };
        // SAFETY: `run` is the caller's function with the caller's context. It returns only when all
        // jobs have, as edge.h demands, so `work` outlives every use of the pointer to it.
        unsafe { (self.run)(self.context, do_share, (&raw const work).cast_mut().cast()) }
    }
}

/// Does of a job what no other thread has taken.
///
/// # Safety
/// `context` is the one that [`CallerThreads::run`] handed out, and that call has not returned yet.
unsafe extern "C" fn do_share(context: *mut c_void, _: u32) {
    // SAFETY: the caller's promise. The job is `Sync`, so several threads may call it at once.
    let work = unsafe { &*context.cast::<Work<'_>>() };
    (work.job)();
}
