//! A mapped pack stays in its file: what is anonymous is the arena and little more.

use std::process::Command;

use edge_run::bench::Memory;
use edge_tests::{Ran, TinyModel, build, skip};

/// What a process has besides its arena: the program's own data, stacks, the tokens of a test.
const BESIDES: u64 = 2 << 20;
/// Enough for a model that is larger than what a process may have besides.
const COPIES: usize = 24;

#[test]
fn a_mapped_pack_costs_its_arena_and_no_copy() {
    if Memory::now() == Memory::default() {
        return skip("/proc/self/status");
    }
    let folder = tempfile::tempdir().unwrap();
    let (gguf, pack) = (folder.path().join("tall.gguf"), folder.path().join("tall.edgepack"));
    std::fs::write(&gguf, TinyModel::of_layers(COPIES)).unwrap();
    edgec::pack::pack(&edgec::profile::open(&gguf).unwrap(), &pack).unwrap();
    let bytes = pack.metadata().unwrap().len();
    assert!(bytes > 3 * BESIDES, "{bytes}");

    let program = build("edge-run", None).join("edge-run");
    for (model, threads) in [(&pack, "1"), (&pack, "2"), (&gguf, "2")] {
        let mut bench = Command::new(&program);
        bench.arg("bench").arg(model).args(["-p", "64", "-n", "16", "-r", "2", "-o", "json", "-t", threads]);
        let tests = Ran::of(&mut bench).json();
        let last = tests.as_array().unwrap().last().unwrap();
        let number = |key: &str| last[key].as_u64().unwrap_or_else(|| panic!("{key}: {last}"));
        let (anonymous, arena) = (number("rss_anon_bytes"), number("arena_bytes"));
        println!(
            "{}: {anonymous} anonymous, arena {arena}, file {}",
            model.display(),
            number("rss_file_bytes")
        );
        assert!(anonymous <= arena + BESIDES, "{anonymous} bytes, arena {arena}");
        // All weights were read, where they lie.
        assert!(number("rss_file_bytes") >= bytes, "{last}");
        assert!(number("peak_rss_bytes") >= anonymous + bytes, "{last}");
    }
}
