//! How fast this machine reads memory: the limit of decode, which reads every weight for every token.
//!
//! `bandwidth [THREADS] [MIB]`: each of THREADS (2) adds up its share of MIB mebibytes (1024), five times; the
//! median and the best round are printed in GB/s.

use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 5;
/// Sums beside one another, so that additions wait for memory and not for each other.
const LANES: usize = 32;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| match arguments.next().map(|text| text.parse()) {
        None => default,
        Some(Ok(number)) if number > 0 => number,
        Some(_) => {
            eprintln!("bandwidth: expected bandwidth [THREADS] [MIB], both above 0");
            std::process::exit(2);
        }
    };
    let (threads, mebibytes) = (number(2), number(1024));
    let words = mebibytes * (1 << 20) / size_of::<u64>();
    // Written, so that each page is there.
    let memory: Vec<u64> = (0..words as u64).collect();
    let share = words.div_ceil(threads);
    let mut speeds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            std::thread::scope(|scope| {
                for part in memory.chunks(share) {
                    scope.spawn(move || black_box(sum(part)));
                }
            });
            (words * size_of::<u64>()) as f64 / start.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    speeds.sort_by(f64::total_cmp);
    let (median, best) = (speeds[ROUNDS / 2], speeds[ROUNDS - 1]);
    println!("{threads} threads, {mebibytes} MiB: {median:.1} GB/s, at best {best:.1}");
}

fn sum(part: &[u64]) -> u64 {
    let mut sums = [0u64; LANES];
    for line in part.as_chunks::<LANES>().0 {
        for (sum, word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |total, sum| total.wrapping_add(*sum))
}
