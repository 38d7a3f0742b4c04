//! When requests are sent: no faster than the rate, not while the server asks to wait, later after each
//! fault.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::train::random::SplitMix64;

/// First delay after a fault; each further one is twice as long.
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(60);

/// Shared by all senders.
pub struct Pace {
    /// Requests a second.
    rate: Option<f64>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    stopped: bool,
    /// A token bucket of one token: when the next is there.
    next: Instant,
}

impl Pace {
    pub fn new(rate: Option<f64>) -> Self {
        let state = State { stopped: false, next: Instant::now() };
        Self { rate, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Nobody waits any more, and nobody is to send.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Waits for the next token and takes it. False once stopped.
    pub fn take(&self) -> bool {
        let interval = self.rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(1.0 / rate));
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            if state.stopped {
                return false;
            }
            if state.next <= now {
                state.next = now + interval;
                return true;
            }
            let wait = state.next - now;
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// No token for anybody within `wait`.
    pub fn hold(&self, wait: Duration) {
        let mut state = self.lock();
        state.next = state.next.max(Instant::now() + wait);
    }

    /// Waits. False if stopped meanwhile.
    pub fn sleep(&self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        let mut state = self.lock();
        while !state.stopped {
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return true;
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The delay before try number `attempt` + 1: exponential, half of it a matter of chance, so that requests
/// that failed together do not come back together.
pub fn backoff(random: &mut SplitMix64, attempt: u32) -> Duration {
    let whole = FIRST.saturating_mul(2u32.saturating_pow(attempt)).min(LONGEST);
    whole.mul_f64(0.5 + 0.5 * random.unit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_a_limit() {
        let mut random = SplitMix64::new(1, 2);
        let delays: Vec<_> = (0..40).map(|attempt| backoff(&mut random, attempt)).collect();
        for (attempt, delay) in delays.iter().enumerate() {
            let whole = 0.5 * 2f64.powi(attempt as i32).min(120.0);
            assert!((0.5 * whole..=whole).contains(&delay.as_secs_f64()), "{attempt}: {delay:?}");
        }
        let mut again = SplitMix64::new(1, 2);
        assert_eq!(delays[0], backoff(&mut again, 0));
    }

    #[test]
    fn tokens_come_at_the_rate_and_stopping_wakes_everybody() {
        let started = Instant::now();
        let pace = Pace::new(Some(100.0));
        assert!((0..6).all(|_| pace.take()));
        assert!(started.elapsed() >= Duration::from_millis(50), "{:?}", started.elapsed());
        pace.hold(Duration::from_secs(600));
        std::thread::scope(|scope| {
            let waiting = [scope.spawn(|| pace.take()), scope.spawn(|| pace.sleep(Duration::from_secs(600)))];
            pace.stop();
            assert!(waiting.into_iter().all(|thread| !thread.join().unwrap()));
        });
    }
}
