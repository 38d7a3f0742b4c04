//! Hands requests to senders and takes what comes back; one thread decides and writes.

use std::collections::{HashSet, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::answer::Answer;
use super::client::{Client, Failure};
use super::pace::{Pace, backoff};
use super::request::Request;
use super::rows::Rows;
use super::{Error, Options, Summary, Watch};
use crate::train::random::SplitMix64;

/// Requests given up one after another that end the run: the fault is then hardly theirs.
const IN_A_ROW: usize = 16;
/// How long answers that are under way are waited for once the run is to end.
const GRACE: Duration = Duration::from_secs(30);

/// What a sender says.
enum Event {
    /// A try failed, and there will be another.
    Again { request: usize, message: String, wait: Duration },
    /// The request is over.
    Done { request: usize, outcome: Result<Answer, Failure> },
}

/// Asks for all answers that are not there yet and writes them as they come.
///
/// # Errors
/// The options contradict each other, the file of rows cannot be used, or the server refuses or is not there.
/// Rows that were written stay.
pub fn run(options: &Options, watch: &mut dyn Watch) -> Result<Summary, Error> {
    let client = Client::new(options)?;
    let (rows, torn) = Rows::open(&options.out, options.resume)?;
    if torn > 0 {
        watch.note(&format!("{}: took off the {torn} bytes of a torn row", options.out.display()));
    }
    let (requests, mut summary) = requests(options);
    summary.present = requests.iter().filter(|request| rows.has(request)).count();
    if rows.len() > summary.present {
        let others = rows.len() - summary.present;
        watch.note(&format!("{}: {others} rows of other requests stay", options.out.display()));
    }
    let waiting = (0..requests.len()).filter(|&index| !rows.has(&requests[index])).collect();
    let requests = Arc::new(requests);
    let senders = Senders::start(client, options, &requests);
    let wanted = options.count.unwrap_or(usize::MAX).min(requests.len());
    let mut desk =
        Desk { options, requests: &requests, rows, summary, wanted, waiting, in_a_row: 0, noted: false };
    let outcome = desk.serve(&senders, watch);
    senders.pace.stop();
    desk.rows.sync()?;
    outcome.map(|()| desk.summary)
}

/// Every request once.
fn requests(options: &Options) -> (Vec<Request>, Summary) {
    let mut summary = Summary::default();
    let mut seen = HashSet::new();
    let mut requests = Vec::new();
    for prompt in &options.prompts {
        let first = Request::new(prompt, options.endpoint, &options.sampling, 0);
        if !seen.insert(first.id.clone()) {
            summary.duplicate_prompts += 1;
            continue;
        }
        requests.push(first);
        let further = 1..options.answers;
        requests.extend(further.map(|n| Request::new(prompt, options.endpoint, &options.sampling, n)));
    }
    (requests, summary)
}

/// Where requests go out and rows come in.
struct Desk<'a> {
    options: &'a Options,
    requests: &'a [Request],
    rows: Rows,
    summary: Summary,
    /// Rows of these requests that are enough.
    wanted: usize,
    waiting: VecDeque<usize>,
    in_a_row: usize,
    /// It was said that the server gives no probabilities.
    noted: bool,
}

impl Desk<'_> {
    fn serve(&mut self, senders: &Senders, watch: &mut dyn Watch) -> Result<(), Error> {
        let mut under_way = 0;
        let mut outcome = Ok(());
        let mut until = None;
        self.show(watch);
        loop {
            // No more than are wanted, should all of them succeed.
            while outcome.is_ok()
                && under_way < self.options.concurrency
                && self.there() + under_way < self.wanted
                && let Some(request) = self.waiting.pop_front()
            {
                senders.send(request);
                self.summary.asked += 1;
                under_way += 1;
            }
            if under_way == 0 {
                return outcome;
            }
            match senders.next(until) {
                Some(Event::Again { request, message, wait }) => {
                    self.summary.retried += 1;
                    let origin = &self.requests[request].origin;
                    watch.note(&format!("{origin}: {message}; again in {:.1} s", wait.as_secs_f64()));
                }
                Some(Event::Done { request, outcome: answer }) => {
                    under_way -= 1;
                    if let Err(error) = self.take(request, answer, watch)
                        && outcome.is_ok()
                    {
                        senders.pace.stop();
                        until = Some(Instant::now() + GRACE);
                        outcome = Err(error);
                    }
                    self.show(watch);
                }
                None => return outcome.and_then(|()| Err(self.ended("the senders have ended".into()))),
            }
        }
    }

    fn there(&self) -> usize {
        self.summary.present + self.summary.written
    }

    fn show(&self, watch: &mut dyn Watch) {
        let Summary { retried, refused, completion_tokens, .. } = self.summary;
        let message = format!("{completion_tokens} tokens, {retried} retried, {refused} refused");
        watch.progress(self.there(), self.wanted.max(self.there()), &message);
    }

    /// Writes an answer, or decides whether the run can go on without it.
    fn take(
        &mut self,
        request: usize,
        outcome: Result<Answer, Failure>,
        watch: &mut dyn Watch,
    ) -> Result<(), Error> {
        let message = match outcome {
            Ok(answer) => return self.keep(request, &answer, watch),
            // Sent when the run was about to end already.
            Err(Failure::Final(message) | Failure::Busy { message, .. }) => return Err(self.ended(message)),
            Err(Failure::Rejected(message)) => {
                if self.there() == 0 {
                    return Err(self.ended(message));
                }
                message
            }
            Err(Failure::Unusable(message) | Failure::Damaged(message)) => message,
        };
        self.refuse(request, &message, watch)
    }

    fn refuse(&mut self, request: usize, message: &str, watch: &mut dyn Watch) -> Result<(), Error> {
        watch.note(&format!("{}: given up: {message}", self.requests[request].origin));
        self.summary.refused += 1;
        self.in_a_row += 1;
        if self.in_a_row >= IN_A_ROW {
            return Err(
                self.ended(format!("{IN_A_ROW} requests given up one after another, the last: {message}"))
            );
        }
        Ok(())
    }

    fn keep(&mut self, request: usize, answer: &Answer, watch: &mut dyn Watch) -> Result<(), Error> {
        self.summary.prompt_tokens += answer.usage.prompt_tokens;
        self.summary.completion_tokens += answer.usage.completion_tokens;
        if answer.truncated() && self.options.drop_truncated {
            return self.refuse(request, "the token limit cut the answer (--drop-truncated)", watch);
        }
        self.in_a_row = 0;
        if !self.rows.append(&self.requests[request], &self.options.sampling.model, answer)? {
            self.summary.duplicate_answers += 1;
            return Ok(());
        }
        self.summary.written += 1;
        self.summary.truncated += usize::from(answer.truncated());
        self.summary.with_logprobs += usize::from(!answer.tokens.is_empty());
        if self.options.sampling.top_logprobs.is_some() && answer.tokens.is_empty() && !self.noted {
            self.noted = true;
            watch.note("the server gives no token probabilities (--top-logprobs)");
        }
        Ok(())
    }

    fn ended(&self, message: String) -> Error {
        Error::Server { message, rows: self.rows.len(), path: self.options.out.clone() }
    }
}

/// Threads that ask. They end with the run: when there is nothing more to send, or the pace was stopped.
struct Senders {
    pace: Arc<Pace>,
    jobs: Sender<usize>,
    events: Receiver<Event>,
}

impl Senders {
    fn start(client: Client, options: &Options, requests: &Arc<Vec<Request>>) -> Self {
        let (jobs, queue) = channel();
        let (said, events) = channel();
        let pace = Arc::new(Pace::new(options.rate));
        let shared = Arc::new((client, Mutex::new(queue), Arc::clone(requests)));
        for _ in 0..options.concurrency {
            let (shared, pace, said) = (Arc::clone(&shared), Arc::clone(&pace), said.clone());
            let (retries, seed) = (options.retries, options.seed);
            thread::spawn(move || {
                let (client, queue, requests) = &*shared;
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(request) = job else { return };
                    let sender = Attempts { client, pace: &pace, said: &said, request, retries, seed };
                    let outcome = sender.ask(&requests[request].body);
                    if said.send(Event::Done { request, outcome }).is_err() {
                        return;
                    }
                }
            });
        }
        Self { pace, jobs, events }
    }

    fn send(&self, request: usize) {
        // The senders hold the other end for as long as this is here.
        let _ = self.jobs.send(request);
    }

    /// The next event; none after `until`.
    fn next(&self, until: Option<Instant>) -> Option<Event> {
        let Some(until) = until else { return self.events.recv().ok() };
        self.events.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
    }
}

/// The tries at one request.
struct Attempts<'a> {
    client: &'a Client,
    pace: &'a Pace,
    said: &'a Sender<Event>,
    request: usize,
    retries: u32,
    seed: u64,
}

impl Attempts<'_> {
    fn ask(&self, body: &str) -> Result<Answer, Failure> {
        let mut random = SplitMix64::new(self.seed, self.request as u64);
        let stopped = || Failure::Busy { message: "stopped".into(), wait: None };
        for attempt in 0.. {
            if !self.pace.take() {
                return Err(stopped());
            }
            let failure = match self.client.ask(body) {
                Err(failure @ (Failure::Busy { .. } | Failure::Damaged(_))) if attempt < self.retries => {
                    failure
                }
                Err(failure) => return Err(tried(failure, attempt)),
                answer => return answer,
            };
            let mut delay = backoff(&mut random, attempt);
            let message = match failure {
                Failure::Busy { message, wait } => {
                    if let Some(wait) = wait {
                        // It asks everybody.
                        self.pace.hold(wait);
                        delay = delay.max(wait);
                    }
                    message
                }
                Failure::Damaged(message) => message,
                failure => return Err(failure),
            };
            drop(self.said.send(Event::Again { request: self.request, message, wait: delay }));
            if !self.pace.sleep(delay) {
                return Err(stopped());
            }
        }
        Err(stopped())
    }
}

/// A failure that says how often it was tried, if more than once.
fn tried(failure: Failure, retries: u32) -> Failure {
    let after = |message: String| match retries {
        0 => message,
        _ => format!("{message} (after {} tries)", retries + 1),
    };
    match failure {
        Failure::Busy { message, wait } => Failure::Busy { message: after(message), wait },
        Failure::Damaged(message) => Failure::Damaged(after(message)),
        failure => failure,
    }
}
