//! A draft changes when tokens come, never which.

use std::sync::Arc;

use edge_run::{Adapter, Drafter, Engine, ModelFile, Settings};
use edge_runtime::Code;
use edge_runtime::format::Gguf;
use edge_runtime::session::{Sampler, SamplerConfig, same_vocabulary};
use edge_tests::{TinyAdapter, TinyModel, workspace};
use edgec::profile;

const PROMPT: [u32; 6] = [0, 40, 41, 90, 7, 120];
const TOKENS: usize = 60;
/// Exactly what the prompt and the tokens need, so that the last rounds have no room for a whole draft.
const CONTEXT: usize = PROMPT.len() + TOKENS - 1;

fn tiny(seed: u64) -> ModelFile {
    ModelFile::from_memory("tiny.gguf".as_ref(), TinyModel::of_seed(seed))
}

fn settings(adapters: &[Adapter]) -> Settings {
    let adapters = adapters.to_vec();
    Settings { batch: 8, logits_rows: 8, threads: 1, adapters, ..Settings::new(CONTEXT) }
}

fn plain(target: &ModelFile, settings: Settings, config: SamplerConfig) -> Vec<u32> {
    let mut engine = Engine::new(target, settings).unwrap();
    let mut session = engine.session(target).unwrap();
    let mut sampler = Sampler::new(config).unwrap();
    session.feed(&PROMPT).unwrap();
    let mut found = Vec::new();
    while found.len() < TOKENS {
        let mut logits = session.logits().to_vec();
        let mut scratch = vec![0; logits.len()];
        found.push(sampler.sample(&mut logits, session.tokens(), &mut scratch).unwrap());
        if found.len() < TOKENS {
            session.feed(&found[found.len() - 1..]).unwrap();
        }
    }
    found
}

/// The tokens with a draft, and the share of drafted ones that stayed.
fn drafted(
    target: &ModelFile,
    draft: &ModelFile,
    settings: Settings,
    config: SamplerConfig,
    ahead: usize,
) -> (Vec<u32>, String) {
    let mut drafter = Drafter::new(target, draft, &settings, ahead).unwrap();
    let mut engine = Engine::new(target, settings).unwrap();
    let mut session = engine.session(target).unwrap();
    session.feed(&PROMPT).unwrap();
    let mut drafting = drafter.start().unwrap();
    let mut sampler = Sampler::new(config).unwrap();
    let (mut found, mut out) = (Vec::new(), vec![0; ahead + 1]);
    while found.len() < TOKENS {
        let count = drafting.round(&mut session, &mut sampler, &mut out).unwrap();
        assert!((1..=ahead + 1).contains(&count));
        found.extend_from_slice(&out[..count]);
        let fed = session.position() - PROMPT.len();
        assert_eq!(session.tokens()[PROMPT.len()..], found[..fed]);
        assert_eq!(fed, found.len() - 1, "all but the last are fed");
    }
    found.truncate(TOKENS);
    (found, drafting.report())
}

#[test]
fn greedy_tokens_are_the_same_whoever_drafts() {
    let target = tiny(7);
    let adapter = ModelFile::from_memory("adapter.gguf".as_ref(), TinyAdapter::gguf(5, 16));
    let adapter = [Adapter { file: Arc::new(adapter), scale: 0.02 }];
    let penalty = SamplerConfig { repeat_penalty: 1.3, repeat_window: 12, ..SamplerConfig::default() };
    // The draft is the target itself, nearly the target, and somebody else.
    let cases: [(u64, &[Adapter], [f64; 2]); 3] =
        [(7, &[], [100.0, 100.0]), (7, &adapter, [5.0, 99.9]), (8, &[], [0.0, 30.0])];
    for (seed, adapters, [least, most]) in cases {
        for config in [SamplerConfig::default(), penalty] {
            let expected = plain(&target, settings(adapters), config);
            for ahead in [1, 3, 7] {
                let draft = tiny(seed);
                let (found, report) = drafted(&target, &draft, settings(adapters), config, ahead);
                assert_eq!(found, expected, "{report}");
                println!("seed {seed}, {} adapters, {ahead} ahead: {report}", adapters.len());
                let share = report.rsplit_once('(').unwrap().1.split(' ').next().unwrap();
                let share: f64 = share.parse().unwrap();
                assert!(least <= share && share <= most, "{report}");
            }
        }
    }
}

#[test]
fn a_draft_that_is_the_target_is_never_refused_even_when_sampling() {
    let target = tiny(7);
    let config =
        SamplerConfig { temperature: 0.9, top_k: 40, top_p: 0.95, seed: 3, ..SamplerConfig::default() };
    let (_, report) = drafted(&target, &tiny(7), settings(&[]), config, 5);
    assert!(report.contains("(100.0 %)"), "{report}");
}

#[test]
fn drafts_in_another_language_and_of_impossible_lengths_are_refused() {
    let (target, other) = (TinyModel::gguf(), TinyModel::gguf());
    let mut changed = other.clone();
    let at = changed.windows(7).position(|window| window == b"<|end|>").unwrap();
    changed[at + 2] = b'E';
    let file = |bytes| Gguf::parse(bytes).unwrap();
    same_vocabulary(&file(&target), &file(&other)).unwrap();
    let error = same_vocabulary(&file(&target), &file(&changed)).unwrap_err();
    assert_eq!((error.code, error.found), (Code::OtherVocabulary, 1));
    let golden = profile::open(&workspace().join("tests/golden/models/llama-tied")).unwrap();
    let (target, error) = (tiny(7), |file: &ModelFile, ahead| {
        Drafter::new(&tiny(7), file, &settings(&[]), ahead).and_then(|mut d| d.start().map(drop)).unwrap_err()
    });
    assert!(error(&golden, 3).to_string().contains("[E11]"), "{}", error(&golden, 3));
    assert!(error(&target, 0).to_string().contains("[E22]"), "{}", error(&target, 0));
    // A draft longer than a batch could not be taken back where there are windows.
    let mut drafter = Drafter::new(&target, &target, &settings(&[]), 9).unwrap();
    let mut engine = Engine::new(&target, settings(&[])).unwrap();
    let mut session = engine.session(&target).unwrap();
    session.feed(&PROMPT).unwrap();
    let mut sampler = Sampler::new(SamplerConfig::default()).unwrap();
    let refused = drafter.start().unwrap().round(&mut session, &mut sampler, &mut [0; 10]).unwrap_err();
    assert!(refused.to_string().contains("`batch`"), "{refused}");
}
