//! A [`Team`] of threads of the standard library. After [`Pool::new`] nothing allocates.

use super::{Team, Waiting, Workers};
use core::any::Any;
use core::sync::atomic::{AtomicU32, Ordering};
use std::boxed::Box;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::vec::Vec;

/// Threads that were started together and end with it; the one that calls [`Workers::run`] works besides them.
#[derive(Debug)]
pub struct Pool {
    team: Arc<Team<Parking>>,
    threads: Vec<JoinHandle<()>>,
}

/// Where threads sleep.
#[derive(Debug)]
struct Parking {
    /// There are more threads than processors: one that waits awake lets others run.
    crowded: bool,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Parking {
    fn lock(&self) -> MutexGuard<'_, ()> {
        // It guards nothing that could be left half done.
        self.lock.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Waiting for Parking {
    fn rounds(&self) -> u32 {
        // About 0.1 ms, longer than the single-threaded parts between two jobs of one token.
        if self.crowded { 256 } else { 4096 }
    }

    fn pause(&self) {
        if self.crowded { thread::yield_now() } else { core::hint::spin_loop() }
    }

    fn sleep(&self, word: &AtomicU32, value: u32) {
        let guard = self.lock();
        if word.load(Ordering::Acquire) == value {
            drop(self.changed.wait(guard));
        }
    }

    fn wake(&self, _: &AtomicU32) {
        // A thread that has seen the old word holds the lock until it sleeps.
        drop(self.lock());
        self.changed.notify_all();
    }
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
        let crowded = thread::available_parallelism().is_ok_and(|processors| threads > processors.get());
        let parking = Parking { crowded, lock: Mutex::new(()), changed: Condvar::new() };
        let mut pool = Self { team: Arc::new(Team::new(threads, parking)), threads: Vec::new() };
        for index in 1..threads {
            let team = Arc::clone(&pool.team);
            let name = std::format!("edge-{index}");
            pool.threads.push(thread::Builder::new().name(name).spawn(move || team.work())?);
        }
        Ok(pool)
    }
}

impl Workers for Pool {
    fn count(&self) -> usize {
        self.team.count()
    }

    /// Also runs jobs from inside a job and from several threads at once: the one that finds the others
    /// busy does all the work itself. A panic of any thread is passed on when all have returned.
    fn run(&self, job: &(dyn Fn() + Sync)) {
        if self.threads.is_empty() {
            return job();
        }
        let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
        let kept = || panic.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.team.run(&|| {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(job)) {
                kept().get_or_insert(payload);
            }
        });
        let payload = kept().take();
        if let Some(payload) = payload {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.team.stop();
        for thread in self.threads.drain(..) {
            // A thread cannot have panicked: what its jobs do is caught.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::team::{AWAITED, STOPPED};
    use super::*;
    use core::sync::atomic::{AtomicBool, AtomicUsize};
    use std::time::Duration;

    /// Runs a job of 64 parts of which each may be done once, and some time after it none.
    fn check(workers: &dyn Workers, part: impl Fn(usize) + Sync) {
        let (next, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        let done: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
        workers.run(&|| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(done) = done.get(index) else { return };
                part(index);
                assert!(!over.load(Ordering::Relaxed));
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        over.store(true, Ordering::Relaxed);
        assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn every_part_is_done_once_by_any_number_of_threads() {
        for threads in 1..=6 {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.count(), threads);
            for _ in 0..500 {
                check(&pool, |_| {});
            }
        }
        assert!(Pool::new(0).is_err());
    }

    #[test]
    fn threads_that_sleep_are_woken_and_slow_ones_waited_for() {
        for _ in 0..3 {
            // A pool that has waited so long before would do without threads for a while.
            let pool = Pool::new(3).unwrap();
            thread::sleep(Duration::from_millis(30));
            let workers = Mutex::new(Vec::new());
            check(&pool, |index| {
                // Whoever begins first waits for another: nobody is late for good.
                if index < 3 {
                    thread::sleep(Duration::from_millis(20 * (index as u64 + 1)));
                }
                workers.lock().unwrap().push(thread::current().id());
            });
            let mut workers = workers.into_inner().unwrap();
            workers.dedup();
            assert!(workers.len() > 1, "one thread did it all");
        }
    }

    #[test]
    fn a_job_may_run_a_job_and_several_callers_may_meet() {
        let pool = Pool::new(2).unwrap();
        check(&pool, |_| check(&pool, |_| {}));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..300).for_each(|_| check(&pool, |_| {})));
            }
        });
    }

    #[test]
    fn threads_come_and_go_while_jobs_run() {
        let parking = || Parking { crowded: true, lock: Mutex::new(()), changed: Condvar::new() };
        for count in [2, 4] {
            let team = Team::new(count, parking());
            thread::scope(|scope| {
                (0..3).for_each(|_| drop(scope.spawn(|| team.work())));
                (0..300).for_each(|_| check(&team, |_| {}));
                scope.spawn(|| {
                    thread::sleep(Duration::from_millis(3));
                    team.stop();
                });
                (0..3000).for_each(|_| check(&team, |_| {}));
                // One that comes too late goes at once.
                team.work();
                check(&team, |_| {});
            });
        }
    }

    #[test]
    fn a_thread_that_does_not_run_holds_up_nobody() {
        struct Late(Parking);

        impl Waiting for Late {
            fn sleep(&self, word: &AtomicU32, value: u32) {
                self.0.sleep(word, value);
            }
            // Who sleeps until there is a job sleeps on, as on a system that has no processor for it.
            fn wake(&self, word: &AtomicU32) {
                if word.load(Ordering::Relaxed) & (AWAITED | STOPPED) != 0 {
                    self.0.wake(word);
                }
            }
        }
        let parking = Parking { crowded: true, lock: Mutex::new(()), changed: Condvar::new() };
        let team = Team::new(3, Late(parking));
        thread::scope(|scope| {
            (0..2).for_each(|_| drop(scope.spawn(|| team.work())));
            thread::sleep(Duration::from_millis(30));
            (0..100).for_each(|_| check(&team, |_| {}));
            team.stop();
        });
    }

    #[test]
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn threads_that_are_always_late_are_left_out_until_they_are_not() {
        let pool = Pool::new(2).unwrap();
        let (caller, shared, late) = (thread::current().id(), AtomicUsize::new(0), AtomicBool::new(true));
        let job = || {
            if thread::current().id() != caller {
                shared.fetch_add(1, Ordering::Relaxed);
                if late.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(10));
                }
            } else {
                // Long enough for the other one to begin.
                thread::sleep(Duration::from_micros(200));
            }
        };
        let start = std::time::Instant::now();
        (0..1000).for_each(|_| pool.run(&job));
        let tries = shared.swap(0, Ordering::Relaxed);
        assert!((1..100).contains(&tries), "{tries} of 1000 jobs were shared with a late thread");
        late.store(false, Ordering::Relaxed);
        while shared.load(Ordering::Relaxed) < 500 {
            pool.run(&job);
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "a thread that is late no more is left out for good"
            );
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3).unwrap();
        for guilty in [0, 31, 63] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                check(&pool, |index| assert_ne!(index, guilty, "part {index} gives up"));
            }));
            let payload = result.unwrap_err();
            assert!(payload.downcast_ref::<std::string::String>().unwrap().contains("gives up"));
            check(&pool, |_| {});
        }
    }
}
