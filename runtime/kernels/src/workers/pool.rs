//! Threads of the standard library that wait for jobs: they spin for a moment, then sleep.
//!
//! A decoded token is some hundreds of jobs of a few microseconds each, so waking a sleeping thread for
//! every one would cost more than the work; a thread that spun forever would burn the battery. After
//! [`Pool::new`] nothing allocates (except that a thread which the standard library did not start gets its
//! handle at its first [`Workers::run`]).

use super::Workers;
use core::any::Any;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::boxed::Box;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle, Thread};
use std::vec::Vec;

/// Rounds of spinning before a thread sleeps: about 0.1 ms, longer than the single-threaded parts between
/// two jobs of one token.
const SPINS: u32 = 4096;

/// A fixed group of threads; the one that calls [`Workers::run`] works as number 0.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// One job at a time.
    busy: AtomicBool,
}

/// What the threads see.
#[derive(Debug, Default)]
struct Shared {
    /// Goes up by one for every job, after `job` was set.
    generation: AtomicUsize,
    /// The current job; valid until `running` is 0.
    job: AtomicPtr<Job>,
    /// Threads that have not finished the current job.
    running: AtomicUsize,
    /// The pool is being dropped.
    stop: AtomicBool,
    /// What the first thread that panicked said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A job, on the stack of the thread that waits for it.
struct Job {
    /// The function, its lifetime erased.
    run: *const (dyn Fn(usize) + Sync),
    caller: Thread,
}

impl Pool {
    /// A pool of `threads` threads, the caller's among them.
    ///
    /// # Errors
    /// `InvalidInput` for 0 threads; what the operating system says if it does not start one.
    pub fn new(threads: usize) -> io::Result<Self> {
        if threads == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a pool of 0 threads"));
        }
        // Makes sure that this thread has its handle.
        let _ = thread::current();
        let mut pool = Self { shared: Arc::default(), threads: Vec::new(), busy: AtomicBool::new(false) };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let name = std::format!("edge-{index}");
            pool.threads.push(thread::Builder::new().name(name).spawn(move || shared.work(index))?);
        }
        Ok(pool)
    }

    /// Runs `job` on all threads; `busy` must be held.
    fn run_on_all(&self, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is used by threads between the store to
        // `generation` and their decrement of `running`; this function returns, normally or by unwinding,
        // only after `running` is 0, so `job` outlives every use.
        let run = unsafe {
            core::mem::transmute::<*const (dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync + 'static)>(
                job,
            )
        };
        let mut entry = Job { run, caller: thread::current() };
        shared.running.store(self.threads.len(), Ordering::Relaxed);
        shared.job.store(&mut entry, Ordering::Relaxed);
        shared.generation.fetch_add(1, Ordering::Release);
        self.threads.iter().for_each(|thread| thread.thread().unpark());
        let own = catch_unwind(AssertUnwindSafe(|| job(0)));
        wait_until(|| shared.running.load(Ordering::Acquire) == 0);
        let theirs = shared.take_panic();
        if let Some(payload) = own.err().or(theirs) {
            self.busy.store(false, Ordering::Release);
            resume_unwind(payload);
        }
    }
}

impl Workers for Pool {
    fn count(&self) -> usize {
        self.threads.len() + 1
    }

    /// Also runs jobs from inside a job and from several threads at once: the one that finds the others
    /// busy does all the work itself. A panic of any thread is passed on when all have returned.
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        if self.threads.is_empty() || self.busy.swap(true, Ordering::Acquire) {
            return (0..self.count()).for_each(job);
        }
        self.run_on_all(job);
        self.busy.store(false, Ordering::Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread cannot have panicked: it catches what its jobs do.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The life of a thread: waits for a job, does its part, says so.
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            wait_until(|| {
                self.generation.load(Ordering::Acquire) != seen || self.stop.load(Ordering::Acquire)
            });
            let generation = self.generation.load(Ordering::Acquire);
            if generation == seen {
                return;
            }
            seen = generation;
            // SAFETY: a new generation was seen with acquire ordering, so `job` points to the entry that
            // was stored before it. The entry stays alive until `running` is 0, which it cannot become
            // before this thread's decrement below; the pointers are not used after it.
            let entry = unsafe { &*self.job.load(Ordering::Relaxed) };
            // SAFETY: as above, for the function that the entry points to.
            let run = unsafe { &*entry.run };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| run(index))) {
                self.keep_panic(payload);
            }
            let caller = entry.caller.clone();
            if self.running.fetch_sub(1, Ordering::AcqRel) == 1 {
                caller.unpark();
            }
        }
    }

    fn keep_panic(&self, payload: Box<dyn Any + Send>) {
        let mut kept = self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        kept.get_or_insert(payload);
    }

    fn take_panic(&self) -> Option<Box<dyn Any + Send>> {
        self.panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take()
    }
}

/// Spins, then sleeps until `done`. Whoever makes it true unparks this thread afterwards.
fn wait_until(done: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if done() {
            return;
        }
        core::hint::spin_loop();
    }
    while !done() {
        thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn counts(pool: &Pool, job: impl Fn(usize) + Sync) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..pool.count()).map(|_| AtomicUsize::new(0)).collect();
        pool.run(&|index| {
            counts[index].fetch_add(1, Ordering::Relaxed);
            job(index);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_thread_runs_every_job_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.count(), threads);
            for _ in 0..500 {
                assert_eq!(counts(&pool, |_| {}), std::vec![1; threads]);
            }
        }
        assert!(Pool::new(0).is_err());
    }

    #[test]
    fn wakes_threads_that_sleep_and_waits_for_slow_ones() {
        let pool = Pool::new(3).unwrap();
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(30));
            let slow = |index| thread::sleep(Duration::from_millis(10 * index as u64));
            assert_eq!(counts(&pool, slow), [1; 3]);
        }
    }

    #[test]
    fn a_job_may_run_a_job() {
        let pool = Pool::new(3).unwrap();
        let inner = AtomicUsize::new(0);
        let outer = counts(&pool, |_| {
            pool.run(&|_| {
                inner.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!((outer, inner.into_inner()), (std::vec![1; 3], 9));
    }

    #[test]
    fn several_callers_at_once() {
        let pool = Pool::new(2).unwrap();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..300).for_each(|_| assert_eq!(counts(&pool, |_| {}), [1; 2])));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        for guilty in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(&|index| assert_ne!(index, guilty, "thread {index} gives up"));
            }));
            let payload = result.unwrap_err();
            assert!(payload.downcast_ref::<std::string::String>().unwrap().contains("gives up"));
            assert_eq!(counts(&pool, |_| {}), [1; 3]);
        }
    }
}
