//! The learning rate over a run: a linear warm-up, then half a cosine down to a floor
//! (Loshchilov and Hutter, "SGDR", 2017, without restarts).
//!
//! A pure function of the step number, so a resumed run needs no state of it.

use core::f64::consts::PI;

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Highest learning rate, reached at the end of the warm-up.
    pub peak: f64,
    /// Learning rate that the cosine ends at.
    pub floor: f64,
    /// Steps of the warm-up.
    pub warmup: usize,
    /// Steps of the whole run.
    pub steps: usize,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    ///
    /// The warm-up rises in equal parts from `peak / warmup` and never gives 0, which would waste a
    /// step; the last step of the run gives `floor` exactly.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let length = self.steps.saturating_sub(self.warmup + 1).max(1);
        let progress = ((step - self.warmup) as f64 / length as f64).min(1.0);
        self.floor + (self.peak - self.floor) * 0.5 * (1.0 + (PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_falls_and_ends_at_the_floor() {
        let schedule = Schedule { peak: 1e-3, floor: 1e-4, warmup: 10, steps: 111 };
        assert!((schedule.at(0) - 1e-4).abs() < 1e-12);
        assert!((schedule.at(9) - 1e-3).abs() < 1e-12);
        assert!((schedule.at(10) - 1e-3).abs() < 1e-12);
        assert!((schedule.at(60) - 5.5e-4).abs() < 1e-12);
        assert!((schedule.at(110) - 1e-4).abs() < 1e-12);
        assert_eq!(schedule.at(500), schedule.at(110));
        for step in 10..110 {
            assert!(schedule.at(step + 1) < schedule.at(step));
        }
    }

    #[test]
    fn degenerate_runs() {
        let one = Schedule { peak: 1.0, floor: 0.0, warmup: 0, steps: 1 };
        assert_eq!(one.at(0), 1.0);
        let all_warmup = Schedule { peak: 1.0, floor: 0.0, warmup: 4, steps: 4 };
        assert_eq!(all_warmup.at(3), 1.0);
    }
}
