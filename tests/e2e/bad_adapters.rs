//! A malformed adapter is refused by number and name, and the slot stays as it was.

use edge_runtime::format::Gguf;
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{Limits, Plan, Session};
use edge_runtime::workers::Single;
use edge_runtime::{Code, Error};
use edge_tests::{TinyAdapter, TinyModel};

const RANK: u64 = 16;
const PROMPT: [u32; 4] = [0, 40, 41, 90];
const TENSOR: &str = "blk.1.ffn_up.weight.lora_b";

/// Where `text` begins in a file.
fn find(bytes: &[u8], text: &str) -> usize {
    let at = bytes.windows(text.len()).position(|window| window == text.as_bytes());
    at.unwrap_or_else(|| panic!("no `{text}`"))
}

/// Puts `value` at `offset` behind `text`.
fn behind(bytes: &mut [u8], text: &str, offset: usize, value: &[u8]) {
    let at = find(bytes, text) + text.len() + offset;
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn replace(bytes: &mut [u8], found: &str, changed: &str) {
    assert_eq!(found.len(), changed.len());
    let at = find(bytes, found);
    bytes[at..at + found.len()].copy_from_slice(changed.as_bytes());
}

/// What the last element of the tensor data is changed to.
fn last_element(bytes: &mut [u8], value: f32) {
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&value.to_le_bytes());
}

type Damage = fn(&mut Vec<u8>);

#[rustfmt::skip]
const CASES: &[(&str, Code, &str, Damage)] = &[
    ("another family", Code::Unsupported, "general.architecture.lambo", |b| replace(b, "llama", "lambo")),
    ("a model", Code::Unsupported, "general.type.adopter", |b| replace(b, "adapter\u{c}", "adopter\u{c}")),
    ("another kind", Code::Unsupported, "adapter.type.lara", |b| replace(b, "\u{4}\0\0\0\0\0\0\0lora", "\u{4}\0\0\0\0\0\0\0lara")),
    ("no alpha", Code::MissingKey, "adapter.lora.alpha", |b| replace(b, "lora.alpha", "lora.alphx")),
    ("alpha NaN", Code::OutOfRange, "adapter.lora.alpha", |b| behind(b, "lora.alpha", 4, &f32::NAN.to_le_bytes())),
    ("alpha infinite", Code::OutOfRange, "adapter.lora.alpha", |b| behind(b, "lora.alpha", 4, &f32::INFINITY.to_le_bytes())),
    ("a layer too many", Code::Unsupported, "blk.9.ffn_up.weight.lora_a", |b| { replace(b, "blk.1.ffn_up.weight.lora_a", "blk.9.ffn_up.weight.lora_a"); replace(b, TENSOR, "blk.9.ffn_up.weight.lora_b"); }),
    ("a matrix that is not there", Code::Unsupported, "blk.1.ffn_ux.weight.lora_a", |b| { replace(b, "blk.1.ffn_up.weight.lora_a", "blk.1.ffn_ux.weight.lora_a"); replace(b, TENSOR, "blk.1.ffn_ux.weight.lora_b"); }),
    ("another name", Code::Unsupported, "blk.1.attn_output.weight.lora_x", |b| replace(b, "blk.1.attn_output.weight.lora_a", "blk.1.attn_output.weight.lora_x")),
    ("the embeddings", Code::Unsupported, "token_embd.weight.lora_a.......", |b| replace(b, "blk.1.attn_output.weight.lora_a", "token_embd.weight.lora_a.......")),
    ("no second half", Code::MissingTensor, "blk.1.ffn_up.weight.lora_a", |b| replace(b, TENSOR, "blk.1.ffn_xx.weight.lora_b")),
    ("no first half", Code::MissingTensor, "blk.1.ffn_up.weight.lora_b", |b| replace(b, "blk.1.ffn_up.weight.lora_a", "blk.1.ffn_up.weight.lora_b")),
    ("twice", Code::BadLength, "blk.1.ffn_up.weight.lora_a", |b| { replace(b, "blk.0.ffn_up.weight.lora_a", "blk.1.ffn_up.weight.lora_a"); replace(b, "blk.0.ffn_up.weight.lora_b", "blk.1.ffn_up.weight.lora_b"); }),
    ("columns", Code::WrongShape, "blk.1.ffn_up.weight.lora_a", |b| { behind(b, "blk.1.ffn_up.weight.lora_a", 4, &128u64.to_le_bytes()); behind(b, "blk.1.ffn_up.weight.lora_a", 12, &32u64.to_le_bytes()); }),
    ("rows", Code::WrongShape, TENSOR, |b| behind(b, TENSOR, 12, &256u64.to_le_bytes())),
    ("ranks that differ", Code::WrongShape, "blk.1.ffn_up.weight.lora_a", |b| { behind(b, TENSOR, 4, &8u64.to_le_bytes()); }),
    ("a type without a decoder", Code::UnsupportedType, TENSOR, |b| behind(b, TENSOR, 20, &[99])),
    ("integers of another type", Code::UnsupportedType, "blk.1.ffn_up.weight.lora_a", |b| behind(b, "blk.1.ffn_up.weight.lora_a", 20, &[2])),
];

#[test]
fn what_is_wrong_is_said_and_the_slot_stays() {
    let model = TinyModel::gguf();
    let file = Gguf::parse(&model).unwrap();
    let limits = Limits { context: 8, adapters: 2, adapter_rank: RANK as usize, ..Limits::default() };
    let plan = Plan::new(&file, limits).unwrap();
    let mut arena = vec![0; plan.arena_bytes()];
    let mut session = Session::new(&file, &plan, Kernels::generic(), &Single, &mut arena).unwrap();
    let good = TinyAdapter::gguf(3, RANK);
    session.attach(1, &Gguf::parse(&good).unwrap(), 1.0).unwrap();
    let say = |session: &mut Session<'_>| {
        session.truncate(0).unwrap();
        session.feed(&PROMPT).unwrap();
        session.logits().to_vec()
    };
    let before = say(&mut session);
    for (case, code, name, damage) in CASES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        let bad = Gguf::parse(&bytes).unwrap_or_else(|error| panic!("{case}: {error}"));
        let error = session.attach(1, &bad, 1.0).expect_err(case);
        assert_eq!((error.code, error.name.as_str()), (*code, *name), "{case}: {error}");
        if *code != Code::BadLength {
            assert!(say(&mut session) == before, "{case}: the slot has changed");
        } else {
            session.attach(1, &Gguf::parse(&good).unwrap(), 1.0).unwrap();
        }
    }
    // Files that end too early never get this far.
    for length in (0..good.len()).step_by(997).chain([good.len() - 1]) {
        assert!(Gguf::parse(&good[..length]).is_err(), "{length} of {} bytes", good.len());
    }
    // The model itself is no adapter.
    let error = session.attach(1, &file, 1.0).unwrap_err();
    assert_eq!((error.code, error.name.as_str()), (Code::MissingKey, "general.type"));

    let number =
        |result: Result<(), Error>| result.map_err(|error| (error.code, error.found, error.expected));
    let large = TinyAdapter::gguf(3, 32);
    let large = Gguf::parse(&large).unwrap();
    assert_eq!(number(session.attach(1, &large, 1.0)), Err((Code::OutOfRange, 32, RANK)));
    let good = Gguf::parse(&good).unwrap();
    assert_eq!(number(session.attach(2, &good, 1.0)), Err((Code::OutOfRange, 2, 1)));
    assert_eq!(number(session.detach(usize::MAX)), Err((Code::OutOfRange, u64::MAX, 1)));
    assert_eq!(session.attach(0, &good, f32::NAN).unwrap_err().code, Code::BadArgument);
    assert_eq!(session.set_adapter_scale(0, f32::INFINITY).unwrap_err().code, Code::BadArgument);
    assert!(say(&mut session) == before);
}

#[test]
fn an_element_that_is_no_number_empties_the_slot() {
    let model = TinyModel::gguf();
    let file = Gguf::parse(&model).unwrap();
    let limits = Limits { context: 8, adapters: 1, adapter_rank: RANK as usize, ..Limits::default() };
    let plan = Plan::new(&file, limits).unwrap();
    let mut arena = vec![0; plan.arena_bytes()];
    let mut session = Session::new(&file, &plan, Kernels::generic(), &Single, &mut arena).unwrap();
    session.feed(&PROMPT).unwrap();
    let base = session.logits().to_vec();
    let good = TinyAdapter::gguf(3, RANK);
    session.attach(0, &Gguf::parse(&good).unwrap(), 1.0).unwrap();
    let mut bytes = good.clone();
    last_element(&mut bytes, f32::NAN);
    let error = session.attach(0, &Gguf::parse(&bytes).unwrap(), 1.0).unwrap_err();
    assert_eq!((error.code, error.name.as_str()), (Code::OutOfRange, "blk.1.ffn_down.weight.lora_b"));
    session.truncate(0).unwrap();
    session.feed(&PROMPT).unwrap();
    assert!(session.logits() == base);
}

#[test]
fn slots_that_make_no_sense_are_refused_by_the_plan() {
    let model = TinyModel::gguf();
    let file = Gguf::parse(&model).unwrap();
    for (adapters, adapter_rank, code) in
        [(1, 0, Code::OutOfRange), (1, 257, Code::OutOfRange), (usize::MAX, 16, Code::OutOfRange)]
    {
        let limits = Limits { adapters, adapter_rank, ..Limits::default() };
        assert_eq!(Plan::new(&file, limits).unwrap_err().code, code, "{adapters} of rank {adapter_rank}");
    }
    // Without slots the rank is of no account, and nothing is set aside.
    let plain = Plan::new(&file, Limits::default()).unwrap();
    let same = Plan::new(&file, Limits { adapter_rank: 9999, ..Limits::default() }).unwrap();
    assert_eq!((plain.arena_bytes(), plain.adapter_bytes()), (same.arena_bytes(), 0));
}
