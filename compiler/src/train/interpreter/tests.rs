//! Two cuts of the same text, and students of teachers whose vocabularies are not theirs.

use std::ops::ControlFlow;
use std::path::Path;

use edge_models::{DecoderSpec, family_by_gguf_name};

use super::*;
use crate::model::{Model, Vocabulary};
use crate::train::loss::{Objective, Target, loss};
use crate::train::pretrain::initialize;
use crate::train::trainer::{Progress, StepReport, Teacher, Text, train, train_from};
use crate::train::{RunFolder, TrainConfig, trainee};
use crate::{demo, profile, student};

const GPT2: &str = "gpt-2";
const LLAMA: &str = "llama-spm";
const SMOLLM2: &str = "smollm2";

fn golden(name: &str) -> HostTokenizer {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tokenizers");
    HostTokenizer::open(&Path::new(folder).join(format!("ggml-vocab-{name}.gguf"))).unwrap()
}

/// Bytes of tokens; a control token is its name.
fn spelled(tokenizer: &HostTokenizer, ids: &[u32]) -> Vec<u8> {
    let pieces = Pieces::new(tokenizer).unwrap();
    ids.iter().flat_map(|&id| pieces.spelled(id).unwrap().0).collect()
}

const TEXTS: [&str; 5] = [
    "The state of the Union is strong, and incontrovertibly so.",
    "  two spaces,\n\nnew lines\tand 1234567 numbers",
    "naïve Ünïcode 漢字 ζ 😀 xylophones",
    "a",
    "\u{1}\u{2} control characters \u{0}",
];

/// Between common boundaries both sides spell the same; together the pairs are nearly all of a plain text.
#[test]
fn pairs_spell_the_same() {
    for (own, theirs) in [(GPT2, LLAMA), (LLAMA, GPT2), (SMOLLM2, GPT2), (GPT2, SMOLLM2), (LLAMA, LLAMA)] {
        let (student, teacher) = (golden(own), golden(theirs));
        let interpreter = Interpreter::new(&student, &teacher, teacher.view().len()).unwrap();
        for text in TEXTS {
            let mut window = student.encode(text, true, false).unwrap();
            window.extend(student.eos());
            window.extend(student.encode("And more.", true, false).unwrap());
            let Spoken { ids, pairs } = interpreter.speak(&window, usize::MAX).unwrap();
            let mut last = (0, 0);
            for (rows, beside) in &pairs {
                assert!(
                    rows.start >= last.0 && beside.start >= last.1 && !rows.is_empty() && !beside.is_empty()
                );
                last = (rows.end, beside.end);
                let tokens = &window[rows.start + 1..=rows.end];
                let said = &ids[beside.start + 1..=beside.end];
                let (a, b) = (spelled(&student, tokens), spelled(&teacher, said));
                // A control token that plays the same part may have another name, and SentencePiece puts a space
                // before a text.
                let part =
                    tokens.len() == 1 && [student.bos_to_add(), student.eos()].contains(&Some(tokens[0]));
                let begins = rows.start == 0
                    || [student.view().bos(), student.eos()].contains(&Some(window[rows.start]));
                let spaced = |a: &[u8], b: &[u8]| a.strip_prefix(b" ") == Some(b);
                assert!(
                    a == b || part || (begins && (spaced(&a, &b) || spaced(&b, &a))),
                    "{own} {theirs} {text:?}: {tokens:?} {said:?}"
                );
            }
            if text == TEXTS[0] {
                let covered: usize = pairs.iter().map(|(rows, _)| rows.len()).sum();
                assert!(covered + 5 >= window.len(), "{own} {theirs}: {covered} of {}", window.len());
            }
            let cut = interpreter.speak(&window, 3).unwrap();
            assert!(cut.ids.len() <= 3 && cut.pairs.iter().all(|(_, beside)| beside.end < 3));
        }
    }
}

/// A vocabulary beside itself: everything is one token on both sides.
#[test]
fn the_same_vocabulary_is_alike_everywhere() {
    let tokenizer = golden(GPT2);
    let interpreter = Interpreter::new(&tokenizer, &tokenizer, tokenizer.view().len()).unwrap();
    assert_eq!(interpreter.in_common(), tokenizer.view().len());
    let ids = tokenizer.encode(&demo::TEXT[..demo::TEXT.floor_char_boundary(2000)], true, false).unwrap();
    let common = interpreter.common(&ids, 64, 4).unwrap();
    assert_eq!(common.targets, 256);
    // Where a window begins within a word it may be cut otherwise.
    assert!(common.alike > 240 && common.grouped >= common.alike, "{common:?}");
    let other = golden(LLAMA);
    let interpreter = Interpreter::new(&tokenizer, &other, other.view().len()).unwrap();
    let common = interpreter.common(&ids, 64, 4).unwrap();
    assert!(interpreter.in_common() > 10_000 && common.alike > 150 && common.grouped > 240, "{common:?}");
}

/// Nothing is compared across what one side has no token for.
#[test]
fn what_has_no_counterpart_is_not_compared() {
    let (student, teacher) = (golden(SMOLLM2), golden(GPT2));
    let interpreter = Interpreter::new(&student, &teacher, teacher.view().len()).unwrap();
    let window = student.encode("one two<|im_start|>three<repo_name> four five", false, true).unwrap();
    let Spoken { pairs, .. } = interpreter.speak(&window, usize::MAX).unwrap();
    let name = student.view().find(b"<repo_name>").unwrap();
    let place = window.iter().position(|id| *id == name).unwrap();
    assert!(pairs.iter().all(|(rows, _)| !(rows.start + 1..=rows.end).contains(&place)), "{pairs:?}");
    assert!(pairs.iter().any(|(rows, _)| rows.start > place), "{pairs:?}");
    assert!(interpreter.speak(&[], usize::MAX).unwrap().pairs.is_empty());
    // A token beyond the vocabulary, as a padded head may draw it.
    let strange = [window[0], student.view().len() as u32 + 7, window[1]];
    assert!(interpreter.speak(&strange, usize::MAX).unwrap().pairs.is_empty());
}

/// A random Llama with the tokens of a golden vocabulary that `text` uses.
fn model(name: &str, layers: usize, hidden: usize, text: &str) -> Model {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tokenizers");
    let file = profile::open(&Path::new(folder).join(format!("ggml-vocab-{name}.gguf"))).unwrap();
    let vocabulary = Vocabulary::from_gguf(&file.parse().unwrap()).unwrap();
    let ids = HostTokenizer::of(&file).unwrap().encode(text, true, false).unwrap();
    let keep = student::tokens_to_keep(&vocabulary, &ids, 1).unwrap();
    let spec = DecoderSpec {
        layers,
        hidden,
        heads: 2,
        kv_heads: 1,
        head_dim: hidden / 2,
        rope_dims: hidden / 2,
        ffn: 2 * hidden,
        vocab: vocabulary.tokens().len(),
        context: 256,
        norm_eps: 1e-5,
        tied_embeddings: true,
        ..DecoderSpec::plain(family_by_gguf_name("llama").unwrap())
    };
    let weights = initialize(&spec, 3).unwrap();
    student::trim(&Model { spec, weights, vocabulary: Some(vocabulary), name: name.into() }, &keep).unwrap()
}

fn tokenizer(model: &Model) -> HostTokenizer {
    HostTokenizer::of(&profile::lay_out(model, Path::new("(model)")).unwrap()).unwrap()
}

struct Losses(Vec<f64>);

impl Progress for Losses {
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.0.push(report.row.loss);
        ControlFlow::Continue(())
    }

    fn note(&mut self, _message: &str) {}
}

impl Losses {
    /// Means over the first and over the last ten steps.
    fn ends(&self) -> (f64, f64) {
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        (mean(&self.0[..10]), mean(&self.0[self.0.len() - 10..]))
    }
}

const LENGTH: usize = 48;

fn config(steps: u64, objective: Objective, align: bool) -> TrainConfig {
    TrainConfig {
        tokens: steps * 2 * LENGTH as u64,
        length: LENGTH,
        lr: 4e-3,
        objective,
        align,
        ..TrainConfig::default()
    }
}

/// Cross-entropy of a text, in nats a token.
fn judge(model: &Model, ids: &[u32]) -> f64 {
    let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
    let rows = (ids.len() - 1) / LENGTH * LENGTH;
    let hidden = decoder.hidden(&ids[..rows], rows / LENGTH, LENGTH).unwrap();
    let head = decoder.head().unwrap();
    loss(&hidden, &head, Target::Text, &ids[1..=rows], &Objective::default(), 1.0).unwrap().1.cross_entropy
}

/// A Llama of Llama 2's SentencePiece tokens teaches one of GPT-2's byte-level tokens, both ways: what is minimized
/// falls, and the student gets better at text that it has not seen.
#[test]
fn a_student_of_another_vocabulary_learns() {
    let whole = &demo::TEXT[..demo::TEXT.floor_char_boundary(24_000)];
    let (lesson, exam) = whole.split_at(whole.floor_char_boundary(21_000));
    let (teacher, student) = (model(LLAMA, 2, 64, whole), model(GPT2, 1, 32, whole));
    let (theirs, own) = (tokenizer(&teacher), tokenizer(&student));
    let folder = tempfile::tempdir().unwrap();
    let run = RunFolder::new(folder.path(), false, None);
    let read = |tokenizer: &HostTokenizer, text: &str| tokenizer.encode(text, true, false).unwrap();

    let ids = read(&theirs, lesson);
    let scored = vec![true; ids.len()];
    let text = Text { ids: &ids, scored: &scored };
    let mut losses = Losses(vec![]);
    let learner = trainee::full(teacher, &TrainConfig::default()).unwrap();
    let teacher =
        train(None, learner, text, &config(300, Objective::default(), false), &run, &mut losses).unwrap();

    let interpreter = Interpreter::new(&own, &theirs, teacher.spec.vocab).unwrap();
    let (ids, exam) = (read(&own, lesson), read(&own, exam));
    let scored = vec![true; ids.len()];
    let text = Text { ids: &ids, scored: &scored };
    let common = interpreter.common(&ids, LENGTH, 64).unwrap();
    assert!(2 * common.alike > common.targets && common.grouped > common.alike, "{common:?}");
    let before = judge(&student, &exam);
    let taught = |objective: Objective, align: bool| {
        let learner = trainee::full(student.clone(), &TrainConfig::default()).unwrap();
        let mut losses = Losses(vec![]);
        let teacher = Some(Teacher::Foreign(&teacher, &interpreter));
        let config = config(120, objective, align);
        let student = train_from(teacher, learner, text, &config, &run, &mut losses).unwrap();
        (losses.ends(), judge(&student, &exam))
    };
    let ((first, last), after) = taught(Objective::default(), true);
    println!("aligned: loss {first:.3} -> {last:.3}, cross-entropy {before:.3} -> {after:.3}");
    assert!(last < 0.9 * first && after < before - 0.5, "{first} {last}, {before} {after}");
    let universal = Objective { universal: true, ..Objective::default() };
    let ((first, last), _) = taught(universal, false);
    println!("by rank alone: loss {first:.3} -> {last:.3}");
    assert!(last < 0.9 * first, "{first} {last}");
    let ((first, last), after) = taught(Objective { alpha: 0.5, ..universal }, false);
    println!("by rank and text: loss {first:.3} -> {last:.3}, cross-entropy {before:.3} -> {after:.3}");
    assert!(last < 0.9 * first && after < before - 0.5, "{first} {last}, {before} {after}");
}

#[test]
fn settings_that_need_one_vocabulary_are_refused() {
    let universal = Objective { universal: true, ..Objective::default() };
    let cache = "top-k=5".parse().ok();
    let hidden = "mse=1".parse().unwrap();
    for (config, said) in [
        (
            TrainConfig { cache, ..config(1, universal, false) },
            "the teacher's cache is asked for, expected none",
        ),
        (TrainConfig { cache, ..config(1, Objective::default(), true) }, "the teacher's cache is"),
        (TrainConfig { hidden, ..config(1, Objective::default(), true) }, "hidden-state term"),
        (config(1, universal, true), "loss is uld"),
    ] {
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
