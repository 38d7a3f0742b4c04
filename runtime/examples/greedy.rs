//! Feeds token ids to a GGUF and prints the likeliest continuation:
//! `cargo run --release -p edge-runtime --features std --example greedy -- MODEL THREADS COUNT ID,ID,…`.

use edge_runtime::format::Gguf;
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{Limits, Plan, Session, argmax};
use edge_runtime::workers::Pool;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &'static str| arguments.next().ok_or(what);
    let (model, threads, count) = (next("MODEL")?, next("THREADS")?.parse()?, next("COUNT")?.parse()?);
    let prompt: Vec<u32> = next("IDS")?.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let kernels = Kernels::available().next().ok_or("no kernels")?;
    let bytes = std::fs::read(model)?;
    let file = Gguf::parse(&bytes)?;
    let limits = Limits {
        context: prompt.len() + count,
        batch: 64,
        logits_rows: 1,
        workers: threads,
        ..Limits::default()
    };
    let plan = Plan::new(&file, limits)?;
    let mut arena = vec![0; plan.arena_bytes()];
    let pool = Pool::new(threads)?;
    let start = Instant::now();
    let mut session = Session::new(&file, &plan, kernels, &pool, &mut arena)?;
    let open = start.elapsed();
    let start = Instant::now();
    session.feed(&prompt)?;
    let prefill = start.elapsed();
    let start = Instant::now();
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(argmax(session.logits()));
        session.feed(&ids[ids.len() - 1..])?;
    }
    let decode = start.elapsed();
    println!("{ids:?}");
    let rate = |count: usize, time: std::time::Duration| count as f64 / time.as_secs_f64();
    eprintln!(
        "{}, {threads} threads, arena {} bytes, opened in {open:?}, prefill {:.1} tok/s, decode {:.1} tok/s",
        kernels.name(),
        plan.arena_bytes(),
        rate(prompt.len(), prefill),
        rate(count, decode),
    );
    Ok(())
}
