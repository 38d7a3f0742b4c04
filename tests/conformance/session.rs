//! What a session promises besides its logits: rings, prefixes, bytes to save, types of cache.

use edge_run::{Engine, ModelFile, Settings};
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{CacheType, Session};
use edge_runtime::{Code, Error};
use edge_tests::{TinyModel, workspace};
use edgec::profile;

const CONTEXT: usize = 96;
/// Models whose layers have windows shorter than the context: all of them, every other one, five of six.
const WINDOWED: [&str; 3] = ["mistral-swa", "gemma2", "gemma3"];

fn golden(name: &str) -> ModelFile {
    profile::open(&workspace().join("tests/golden/models").join(name)).unwrap()
}

fn tiny() -> ModelFile {
    ModelFile::from_memory("tiny.gguf".as_ref(), TinyModel::gguf())
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 37 + i * i % 11) % 250).collect()
}

fn engine(file: &ModelFile, batch: usize, cache: CacheType) -> Engine {
    Engine::new(file, Settings { batch, cache, threads: 1, ..Settings::new(CONTEXT) }).unwrap()
}

fn all_logits(session: &mut Session<'_>, tokens: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    session.feed_all(tokens, &mut |_, row| logits.extend_from_slice(row)).unwrap();
    logits
}

#[test]
fn the_last_tokens_logits_are_those_of_all_tokens_logits() {
    let ids = tokens(40);
    // The last layer computes only what the asked-for logits need; what it leaves in the cache must not differ.
    for file in [tiny(), golden("gemma3"), golden("phi3")] {
        for cache in [CacheType::Auto, CacheType::F16] {
            let mut whole = engine(&file, 9, cache);
            let expected = all_logits(&mut whole.session(&file).unwrap(), &ids);
            let expected: Vec<&[f32]> = expected.chunks(whole.plan.spec().vocab).collect();
            for batch in [1, 9, 40] {
                let mut engine = engine(&file, batch, cache);
                let mut session = engine.session(&file).unwrap();
                let mut fed = 0;
                // Batches that are whole, not whole, several, and of one token.
                for count in [9, 4, 20, 1, 6] {
                    session.feed(&ids[fed..][..count]).unwrap();
                    fed += count;
                    assert!(session.logits() == expected[fed - 1], "token {fed}, batch {batch}");
                }
            }
        }
    }
}

#[test]
fn a_ring_of_a_windows_length_says_the_same_as_a_cache_of_everything() {
    let ids = tokens(CONTEXT);
    for name in WINDOWED {
        let file = golden(name);
        // As long as the context: nothing is ever overwritten.
        let mut whole = engine(&file, CONTEXT, CacheType::Auto);
        let expected = all_logits(&mut whole.session(&file).unwrap(), &ids);
        for batch in [1, 5, 8] {
            let mut ring = engine(&file, batch, CacheType::Auto);
            let spec = ring.plan.spec();
            let rows = |layer| match spec.window_of(layer) {
                0 => CONTEXT,
                window => CONTEXT.min(window + batch),
            };
            let rows: usize = (0..spec.layers).map(rows).sum();
            assert_eq!(ring.plan.kv_bytes(), rows * spec.kv_width() * 2 * 4, "{name}");
            assert!(ring.plan.kv_bytes() < whole.plan.kv_bytes(), "{name}: the test needs a short window");
            let found = all_logits(&mut ring.session(&file).unwrap(), &ids);
            assert!(found == expected, "{name}, batch {batch}");
        }
    }
}

#[test]
fn a_ring_goes_back_a_batch_and_no_further() {
    let ids = tokens(CONTEXT);
    for name in WINDOWED {
        let file = golden(name);
        let mut engine = engine(&file, 8, CacheType::Auto);
        let mut session = engine.session(&file).unwrap();
        let expected = all_logits(&mut session, &ids);
        let vocab = session.spec().vocab;
        for back in 1..=8 {
            session.truncate(CONTEXT - back).unwrap();
            assert!(session.logits().is_empty());
            let found = all_logits(&mut session, &ids[CONTEXT - back..]);
            assert!(found == expected[(CONTEXT - back) * vocab..], "{name}, {back} back");
        }
        let error = session.truncate(CONTEXT / 2).unwrap_err();
        assert_eq!((error.code, error.found), (Code::Forgotten, CONTEXT as u64 / 2), "{name}");
        assert_eq!(session.position(), CONTEXT);
        session.truncate(0).unwrap();
        assert!(all_logits(&mut session, &ids) == expected, "{name}: from the beginning again");
    }
}

#[test]
fn a_shared_prefix_is_not_computed_again() {
    let file = tiny();
    let mut engine = engine(&file, 8, CacheType::Auto);
    let mut session = engine.session(&file).unwrap();
    let (first, mut second) = (tokens(20), tokens(30));
    second[12] = 7;
    session.feed(&second).unwrap();
    let expected = session.logits().to_vec();
    session.truncate(0).unwrap();
    session.feed(&first).unwrap();
    assert_eq!(session.tokens(), first);
    assert_eq!(session.reuse(&second), 12);
    session.feed(&second[12..]).unwrap();
    assert!(session.logits() == expected);
    assert_eq!(session.tokens(), second);
    // The last token is always to be fed; nothing in common is nothing kept.
    assert_eq!(session.reuse(&second), 29);
    assert_eq!(session.reuse(&second[..5]), 4);
    assert_eq!(session.reuse(&[249]), 0);
    assert_eq!(session.reuse(&[]), 0);
    // A window that has lost the prefix keeps nothing.
    let file = golden("mistral-swa");
    let mut small = self::engine(&file, 1, CacheType::Auto);
    let mut session = small.session(&file).unwrap();
    session.feed(&tokens(CONTEXT)).unwrap();
    assert_eq!(session.reuse(&tokens(40)), 0);
    session.feed(&tokens(40)).unwrap();
    assert_eq!(session.tokens(), tokens(40));
}

fn saved(session: &mut Session<'_>) -> Vec<u8> {
    let mut bytes = vec![0xa5; session.saved_bytes() + 3];
    let length = session.save(&mut bytes).unwrap();
    assert_eq!(&bytes[length..], [0xa5; 3]);
    bytes.truncate(length);
    bytes
}

#[test]
fn a_restored_session_goes_on_bit_for_bit() {
    let ids = tokens(CONTEXT);
    let cases = [
        (tiny(), vec![CacheType::F16, CacheType::F32, CacheType::Q8_0]),
        (golden("gemma3"), vec![CacheType::Auto, CacheType::F16]),
        (golden("mistral-swa"), vec![CacheType::Auto]),
    ];
    for (file, kinds) in cases {
        for kind in kinds {
            for at in [0, 1, 7, 60] {
                let mut first = engine(&file, 4, kind);
                let mut session = first.session(&file).unwrap();
                session.feed(&ids[..at]).unwrap();
                let bytes = saved(&mut session);
                let logits = session.logits().to_vec();
                let expected = all_logits(&mut session, &ids[at..]);
                // Another batch and so another ring, with something else in it.
                let mut second = engine(&file, 9, kind);
                let mut session = second.session(&file).unwrap();
                session.feed(&ids[30..60]).unwrap();
                session.restore(&bytes).unwrap();
                assert_eq!((session.tokens(), session.logits()), (&ids[..at], &logits[..]));
                assert!(all_logits(&mut session, &ids[at..]) == expected, "{file:?} {kind:?} at {at}");
            }
        }
    }
}

#[test]
fn foreign_and_damaged_sessions_are_refused_and_change_nothing() {
    let ids = tokens(40);
    let file = tiny();
    let mut first = engine(&file, 4, CacheType::Q8_0);
    let mut session = first.session(&file).unwrap();
    session.feed(&ids).unwrap();
    let bytes = saved(&mut session);
    let mut second = engine(&file, 4, CacheType::Q8_0);
    let mut session = second.session(&file).unwrap();
    session.feed(&ids[..3]).unwrap();
    let before = saved(&mut session);
    let mut refused = |bytes: &[u8], code: Code| {
        let error = session.restore(bytes).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(saved(&mut session) == before);
        error
    };
    for length in (0..bytes.len()).step_by(101).chain([bytes.len() - 1]) {
        refused(&bytes[..length], Code::Truncated);
    }
    let changed = |at: usize, value: u64| {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    for (at, value, code) in [
        (0, 1, Code::ForeignSession),
        (8, 2, Code::ForeignSession),
        (16, 1, Code::ForeignSession),
        (24, 0, Code::ForeignSession),
        (32, CONTEXT as u64 + 1, Code::ContextFull),
        (32, u64::MAX, Code::ContextFull),
        (32, 41, Code::Truncated),
        (32, 39, Code::BadChecksum),
        (40, 2, Code::OutOfRange),
        (40, 0, Code::BadChecksum),
        (48, u64::MAX, Code::BadChecksum),
        (bytes.len() - 8, 0, Code::BadChecksum),
    ] {
        let error: Error = refused(&changed(at, value), code);
        assert_eq!(error.name.as_str(), "saved session");
    }
    for bit in (0..bytes.len() * 8).step_by(4099) {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(session.restore(&bytes).is_err(), "bit {bit}");
    }
    let error = session.save(&mut [0; 100]).unwrap_err();
    assert_eq!((error.code, error.expected), (Code::BufferTooSmall, session.saved_bytes() as u64));
    // Another model.
    let gemma = golden("gemma2");
    let mut third = engine(&gemma, 4, CacheType::Auto);
    let error = third.session(&gemma).unwrap().restore(&bytes).unwrap_err();
    assert_eq!(error.code, Code::ForeignSession);
    session.restore(&bytes).unwrap();
    assert_eq!(session.tokens(), ids);
}

#[test]
fn a_cache_of_integers_is_close_and_the_same_everywhere() {
    let ids = tokens(CONTEXT);
    let file = tiny();
    let run = |kernels: &Kernels, cache| {
        let kernels = Some(kernels.name().to_owned());
        let settings = Settings { batch: 7, cache, kernels, ..Settings::new(CONTEXT) };
        let mut engine = Engine::new(&file, settings).unwrap();
        (all_logits(&mut engine.session(&file).unwrap(), &ids), engine.plan.kv_bytes())
    };
    let (half, half_bytes) = run(Kernels::generic(), CacheType::F16);
    let (blocks, bytes) = run(Kernels::generic(), CacheType::Q8_0);
    assert_eq!(bytes * 32, half_bytes * 17);
    let distance = |a: &[f32], b: &[f32]| {
        let squares: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        (squares / a.len() as f64).sqrt()
    };
    let spread = distance(&half, &vec![0.0; half.len()]);
    let off = distance(&half, &blocks);
    println!("rms of logits {spread:.3}, moved by {off:.5}");
    assert!(off > 0.0 && off < 0.1 * spread, "{off} of {spread}");
    for kernels in Kernels::available() {
        assert!(run(kernels, CacheType::Q8_0).0 == blocks, "{}", kernels.name());
    }
    // Heads of 16 are no blocks.
    let narrow = golden("llama-tied");
    let settings = Settings { cache: CacheType::Q8_0, ..Settings::new(CONTEXT) };
    let error = Engine::new(&narrow, settings).err().unwrap().to_string();
    assert!(error.contains("attention.key_length") && error.contains("[E17]"), "{error}");
}
