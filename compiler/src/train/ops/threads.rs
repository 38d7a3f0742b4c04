//! Tasks on all threads, for the many short parallel stretches of a training step.
//!
//! A step is a thousand of them with a little work of one thread in between. Rayon's threads fall asleep in these gaps,
//! and to wake one takes as long as a good part of the next stretch; the device's own team waits awake for a moment.

use std::sync::{Mutex, OnceLock, PoisonError};

use edge_runtime::workers::{Pool, Workers};

/// As many threads as rayon has.
pub(super) fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(rayon::current_num_threads()).expect("the system starts threads"))
}

/// Runs every task and answers what they gave, in their order.
pub(crate) fn map<T: Send, R: Send>(tasks: Vec<T>, run: impl Fn(T) -> R + Sync) -> Vec<R> {
    let answers = Mutex::new(Vec::from_iter(tasks.iter().map(|_| None)));
    let tasks = Mutex::new(tasks.into_iter().enumerate());
    let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
    pool().run(&|| {
        while let Some((index, task)) = next() {
            let answer = run(task);
            answers.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(answer);
        }
    });
    let answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    answers.into_iter().map(|answer| answer.expect("every task was run")).collect()
}
