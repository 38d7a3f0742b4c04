//! What a session promises besides its logits: rings, prefixes, bytes to save, types of cache.

use edge_models::{DecoderSpec, RopePairing};
use edge_run::{Engine, ModelFile, Settings};
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{CacheType, Session, argmax};
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

/// What [`Session::save`] ends with: FNV-1a over words, each step rotated.
fn checksum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().map(|word| u64::from_le_bytes(*word));
    let all = words.chain(rest.iter().map(|byte| u64::from(*byte))).chain([bytes.len() as u64]);
    all.fold(0xcbf2_9ce4_8422_2325, |hash, word| {
        (hash ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
    })
}

/// A saved `f32` session without the `discard` tokens behind the first `keep`, the keys of those after them turned
/// back one by one in `f64`.
fn turned_back(bytes: &[u8], spec: &DecoderSpec, keep: usize, discard: usize) -> Vec<u8> {
    let position = u64::from_le_bytes(bytes[32..40].try_into().unwrap()) as usize;
    let (row, width, half) = (4 * spec.kv_width(), spec.head_dim, spec.rope_dims / 2);
    let stays = |rows: &[u8], row: usize| [&rows[..keep * row], &rows[(keep + discard) * row..]].concat();
    let mut out = bytes[..48].to_vec();
    out[32..40].copy_from_slice(&((position - discard) as u64).to_le_bytes());
    let (tokens, mut rest) = bytes[48..].split_at(4 * position);
    out.extend(stays(tokens, 4));
    for layer in 0..spec.layers {
        let (keys, tail) = rest.split_at(position * row);
        let (values, tail) = tail.split_at(position * row);
        rest = tail;
        let mut keys = stays(keys, row);
        for key in keys[keep * row..].chunks_exact_mut(4 * width) {
            let mut x: Vec<f64> =
                key.as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect();
            for i in 0..half {
                let rope = spec.rope_of(layer);
                let frequency = rope.theta.powf(-((2 * i) as f64) / spec.rope_dims as f64);
                let (sin, cos) = (-(discard as f64) * frequency / rope.scaling.divisor(frequency)).sin_cos();
                let (a, b) = match spec.family.gguf_rope {
                    RopePairing::Interleaved => (2 * i, 2 * i + 1),
                    RopePairing::Halves => (i, i + half),
                };
                (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
            }
            key.as_chunks_mut().0.iter_mut().zip(x).for_each(|(out, x)| *out = (x as f32).to_le_bytes());
        }
        out.extend(keys);
        out.extend(stays(values, row));
    }
    out.extend(&rest[..rest.len() - 8]);
    let sum = checksum(&out);
    out.extend(sum.to_le_bytes());
    out
}

fn most(logits: &[f32]) -> f32 {
    logits.iter().fold(0.0, |most, x| x.abs().max(most))
}

/// How far `found` is from `expected` at most, beside the largest of these.
fn apart(found: &[f32], expected: &[f32]) -> f32 {
    let differences: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    most(&differences) / most(expected)
}

/// Greedy continuation, with the logits of each step.
fn greedy(session: &mut Session<'_>, count: usize) -> (Vec<u32>, Vec<f32>) {
    let (mut ids, mut logits) = (Vec::new(), Vec::new());
    for _ in 0..count {
        logits.extend_from_slice(session.logits());
        ids.push(argmax(session.logits()));
        session.feed(&ids[ids.len() - 1..]).unwrap();
    }
    (ids, logits)
}

#[test]
fn a_shift_turns_keys_back_exactly() {
    let ids = tokens(CONTEXT);
    for file in [tiny(), golden("llama-tied"), golden("qwen2"), golden("qwen3"), golden("phi3")] {
        let mut first = engine(&file, 8, CacheType::F32);
        let mut session = first.session(&file).unwrap();
        session.feed(&ids).unwrap();
        assert_eq!(session.feed(&[1]).unwrap_err().code, Code::ContextFull);
        for (keep, discard) in [(4, 46), (0, 1), (17, 0), (3, 30)] {
            let bytes = turned_back(&saved(&mut session), session.spec(), keep, discard);
            let mut second = engine(&file, 8, CacheType::F32);
            let mut expected = second.session(&file).unwrap();
            expected.restore(&bytes).unwrap();
            session.shift(keep, discard).unwrap();
            assert_eq!(session.tokens(), expected.tokens(), "{file:?}");
            assert_eq!(session.logits(), expected.logits(), "{file:?}: the logits stay");
            let (found, expected) = (greedy(&mut session, 4), greedy(&mut expected, 4));
            assert_eq!(found.0, expected.0, "{file:?}");
            let off = apart(&found.1, &expected.1);
            assert!(off < 1e-5, "{file:?} {keep} {discard}: {off}");
        }
    }
}

#[test]
fn with_one_layer_a_shift_is_a_session_that_never_saw_what_went() {
    let file = ModelFile::from_memory("one.gguf".as_ref(), TinyModel::of_layers(1));
    let (ids, keep, discard) = (tokens(80), 5, 37);
    let after = [&ids[..keep], &ids[keep + discard..], &[9]].concat();
    let fresh = |kind| {
        let mut engine = engine(&file, 8, kind);
        let mut session = engine.session(&file).unwrap();
        session.feed(&after).unwrap();
        let logits = session.logits().to_vec();
        (logits, greedy(&mut session, 8).0)
    };
    let (exact, continued) = fresh(CacheType::F32);
    for kind in [CacheType::F32, CacheType::F16, CacheType::Q8_0] {
        let mut engine = engine(&file, 8, kind);
        let mut session = engine.session(&file).unwrap();
        session.feed(&ids).unwrap();
        session.shift(keep, discard).unwrap();
        session.feed(&[9]).unwrap();
        assert_eq!(session.tokens(), after);
        // Keys are rounded once more; that is to cost no more than rounding them at all.
        let (off, rounded) = (apart(session.logits(), &exact), apart(&fresh(kind).0, &exact));
        println!("{kind:?}: off by {off:e}, never shifted by {rounded:e}");
        assert!(off <= 2.0 * rounded + 1e-5, "{kind:?}: {off}, never shifted {rounded}");
        if kind == CacheType::F32 {
            assert_eq!(greedy(&mut session, 8).0, continued);
        }
    }
}

#[test]
fn what_cannot_be_shifted_stays_as_it_is() {
    let ids = tokens(40);
    for name in WINDOWED {
        let file = golden(name);
        let mut engine = engine(&file, 8, CacheType::Auto);
        let mut session = engine.session(&file).unwrap();
        session.feed(&ids).unwrap();
        let before = saved(&mut session);
        let error = session.shift(4, 10).unwrap_err();
        assert_eq!((error.code, error.name.as_str()), (Code::Unsupported, "attention.sliding_window"));
        assert!(saved(&mut session) == before, "{name}");
    }
    let file = tiny();
    let mut engine = engine(&file, 8, CacheType::Q8_0);
    let mut session = engine.session(&file).unwrap();
    session.feed(&ids).unwrap();
    let before = saved(&mut session);
    for (keep, discard) in [(40, 1), (0, 41), (41, 0), (usize::MAX, usize::MAX), (1, usize::MAX)] {
        assert_eq!(session.shift(keep, discard).unwrap_err().code, Code::OutOfRange);
        assert!(saved(&mut session) == before, "{keep} {discard}");
    }
    session.shift(0, 40).unwrap();
    assert_eq!(session.position(), 0);
}
