//! Progress of long steps: a bar on a terminal, plain lines elsewhere, always on standard error.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One long step.
pub struct Progress {
    title: &'static str,
    bar: Option<ProgressBar>,
    started: Instant,
    last_line: Option<Instant>,
}

/// On a log, a line this often is enough.
const LINE_EVERY: Duration = Duration::from_secs(5);

impl Progress {
    /// Starts a step.
    pub fn start(title: &'static str) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = "{prefix:>10} [{bar:32}] {pos}/{len} {msg}";
            bar.set_style(
                ProgressStyle::with_template(style)
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .progress_chars("=> "),
            );
            bar.set_prefix(title);
            bar
        });
        Self { title, bar, started: Instant::now(), last_line: None }
    }

    /// `done` of `total` units are done; `message` says more.
    pub fn update(&mut self, done: usize, total: usize, message: &str) {
        let eta = self.eta(done, total);
        match &self.bar {
            Some(bar) => {
                bar.set_length(total as u64);
                bar.set_position(done as u64);
                bar.set_message(format!("{message}  ETA {eta}"));
            }
            None => {
                let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY);
                if due || done == total {
                    eprintln!("{:>10} {done}/{total} {message}  ETA {eta}", self.title);
                    self.last_line = Some(Instant::now());
                }
            }
        }
    }

    /// Ends the step with a line that stays on the screen.
    pub fn finish(self, message: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("{:>10} {message}  ({seconds:.1} s)", self.title);
    }

    fn eta(&self, done: usize, total: usize) -> String {
        if done == 0 || done > total {
            return "-".to_owned();
        }
        let left = self.started.elapsed().as_secs_f64() / done as f64 * (total - done) as f64;
        let seconds = left.round() as u64;
        if seconds < 60 {
            format!("{seconds} s")
        } else {
            format!("{}:{:02} min", seconds / 60, seconds % 60)
        }
    }
}

/// A line about a step that is over at once.
pub fn note(title: &str, message: &str) {
    eprintln!("{title:>10} {message}");
}
