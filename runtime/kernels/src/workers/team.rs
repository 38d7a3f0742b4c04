//! Threads that share jobs, whoever brings them: they come, wait for jobs, and go.
//!
//! A decoded token is some hundreds of jobs of a few microseconds each, so waking a sleeping thread for every one
//! would cost more than the work; a thread that waited awake forever would burn the battery. They wait awake for a
//! moment, then sleep.
//!
//! A job is work that its threads take in parts, so it needs no thread in particular. Who runs it does all that
//! nobody else has taken, and waits only for threads that have begun: one that the system does not let run, or that
//! has left, holds up nobody. Where those that have begun are often late, it does without them for a while ([`Worth`]).

use super::Workers;
use super::worth::{Worth, ticks};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

// What a team is at, in one word, so that a thread can sleep until it changes.
/// Threads at work on the job, besides the one that runs it.
const INSIDE: u32 = (1 << 10) - 1;
/// There is a job that threads may begin.
const OPEN: u32 = 1 << 10;
/// Threads sleep until there is another job.
const SLEEPERS: u32 = 1 << 11;
/// Who runs the job sleeps until nobody is at work on it.
pub(super) const AWAITED: u32 = 1 << 12;
/// Threads are to go.
pub(super) const STOPPED: u32 = 1 << 13;
/// The rest counts jobs. A thread that sleeps until the count comes round misses a job, and none needs it.
const GENERATION: u32 = 1 << 14;

/// How threads wait.
pub trait Waiting: Sync {
    /// Rounds of [`Waiting::pause`] before a thread sleeps.
    fn rounds(&self) -> u32 {
        4096
    }

    /// One round of waiting awake.
    fn pause(&self) {
        core::hint::spin_loop();
    }

    /// Sleeps as long as `word` is `value`; may return at any time. Once `word` has changed, a
    /// [`Waiting::wake`] that follows ends the sleep, also one that is just about to begin.
    fn sleep(&self, word: &AtomicU32, value: u32);

    /// Ends the sleep of all threads.
    fn wake(&self, word: &AtomicU32);
}

/// A group of threads that share jobs. It starts none: a thread is in it while it is in [`Team::work`].
#[derive(Debug)]
pub struct Team<W> {
    count: usize,
    state: AtomicU32,
    /// The current job; valid while the state says `OPEN` or anybody is inside.
    job: AtomicPtr<Job<'static>>,
    /// One job at a time.
    busy: AtomicBool,
    worth: Worth,
    waiting: W,
}

/// A job, on the stack of the thread that runs it.
struct Job<'j> {
    run: &'j (dyn Fn() + Sync),
    /// Other threads that have taken part.
    helpers: AtomicUsize,
}

impl<W: Waiting> Team<W> {
    /// A team of about `count` threads, the one that runs jobs among them. Jobs are divided for that many; that
    /// fewer or more are there does no harm.
    pub fn new(count: usize, waiting: W) -> Self {
        let (state, job) = (AtomicU32::new(0), AtomicPtr::new(core::ptr::null_mut()));
        Self { count: count.max(1), state, job, busy: AtomicBool::new(false), worth: Worth::new(), waiting }
    }

    /// Works on jobs until [`Team::stop`]; for as many threads as like to. A job that unwinds takes its thread along.
    pub fn work(&self) {
        let mut done = None;
        loop {
            let idle = |state: u32| {
                let new = state & OPEN != 0 && Some(state / GENERATION) != done && state & INSIDE != INSIDE;
                !new && state & STOPPED == 0
            };
            let state = self.wait_while(idle, SLEEPERS);
            if state & STOPPED != 0 {
                return;
            }
            // At most `INSIDE` threads, as just checked, so the count never runs over.
            let entered =
                self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed);
            if entered.is_err() {
                continue;
            }
            done = Some(state / GENERATION);
            let _inside = Inside(self);
            // SAFETY: the exchange found `OPEN`, so the pointer is that of a job whose `run` has not returned: it
            // returns only after it has taken `OPEN` away and then found nobody inside, and this thread
            // is inside until `_inside` is dropped, after the last use. The exchange acquired what `open` released,
            // the pointer and the job among it.
            let job = unsafe { &*self.job.load(Ordering::Relaxed) };
            job.helpers.fetch_add(1, Ordering::Relaxed);
            (job.run)();
        }
    }

    /// Sends all threads away; those at work finish their part first. Jobs are then run by their callers alone.
    pub fn stop(&self) {
        self.state.fetch_or(STOPPED, Ordering::Release);
        self.waiting.wake(&self.state);
    }

    /// Lets threads begin `job`, until the answer is dropped.
    fn open<'j>(&'j self, job: &'j Job<'j>) -> Opened<'j, W> {
        // Only the lifetime changes; `Opened` ends all use of the pointer before `'j` does.
        let job = core::ptr::from_ref(job).cast_mut().cast();
        self.job.store(job, Ordering::Relaxed);
        let next = |state: u32| Some((state.wrapping_add(GENERATION) | OPEN) & !SLEEPERS);
        let before = self.state.fetch_update(Ordering::Release, Ordering::Relaxed, next);
        if before.is_ok_and(|state| state & SLEEPERS != 0) {
            self.waiting.wake(&self.state);
        }
        Opened(self)
    }

    /// Waits while `idle` says so of the state, awake first and then asleep with `mark` set in the state, which
    /// asks to be woken. Answers the state that is not idle.
    fn wait_while(&self, idle: impl Fn(u32) -> bool, mark: u32) -> u32 {
        for _ in 0..self.waiting.rounds() {
            let state = self.state.load(Ordering::Acquire);
            if !idle(state) {
                return state;
            }
            self.waiting.pause();
        }
        loop {
            let state = self.state.load(Ordering::Acquire);
            if !idle(state) {
                return state;
            }
            let marked = state | mark;
            // One that fails found another state, to be looked at first.
            let exchange =
                self.state.compare_exchange_weak(state, marked, Ordering::Relaxed, Ordering::Relaxed);
            if exchange.is_ok() {
                self.waiting.sleep(&self.state, marked);
            }
        }
    }
}

impl<W: Waiting> Workers for Team<W> {
    fn count(&self) -> usize {
        self.count
    }

    /// Also runs jobs from inside a job and from several threads at once: the one that finds the others
    /// busy does all the work itself.
    fn run(&self, job: &(dyn Fn() + Sync)) {
        if self.busy.swap(true, Ordering::Acquire) {
            return job();
        }
        let _busy = Busy(&self.busy);
        if !self.worth.sharing() {
            return job();
        }
        let entry = Job { run: job, helpers: AtomicUsize::new(0) };
        let began = ticks();
        let opened = self.open(&entry);
        job();
        let done = ticks();
        drop(opened);
        self.worth.book(entry.helpers.into_inner(), began, done);
    }
}

/// A job that threads may begin. Dropped, also by unwinding, it ends the job and waits for all who have begun.
struct Opened<'t, W: Waiting>(&'t Team<W>);

impl<W: Waiting> Drop for Opened<'_, W> {
    fn drop(&mut self) {
        let state = &self.0.state;
        if state.fetch_and(!OPEN, Ordering::Acquire) & INSIDE != 0 {
            self.0.wait_while(|state| state & INSIDE != 0, AWAITED);
            state.fetch_and(!AWAITED, Ordering::Relaxed);
        }
    }
}

/// The right to run a job.
struct Busy<'t>(&'t AtomicBool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// A thread at work on a job.
struct Inside<'t, W: Waiting>(&'t Team<W>);

impl<W: Waiting> Drop for Inside<'_, W> {
    fn drop(&mut self) {
        let before = self.0.state.fetch_sub(1, Ordering::Release);
        if before & INSIDE == 1 && before & AWAITED != 0 {
            self.0.waiting.wake(&self.0.state);
        }
    }
}
