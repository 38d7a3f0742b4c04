//! Adapters come and go between tokens without an allocation and without a trace.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use edge_run::ModelFile;
use edge_runtime::format::Gguf;
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{Limits, Plan, Session, argmax};
use edge_runtime::workers::{Pool, Single, Workers};
use edge_tests::{TinyAdapter, TinyModel};

/// Swaps with the fastest kernels; the others get a tenth.
const SWAPS: usize = 1000;
const PROMPT: [u32; 6] = [0, 40, 41, 90, 7, 120];

/// The system's allocator, with a count of the calls.
struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The token after the prompt with one adapter alone, in a session of its own.
fn alone(file: &Gguf<'_>, adapter: Option<&[u8]>, kernels: &'static Kernels) -> (u32, Vec<f32>) {
    let limits = Limits { context: 16, adapters: 1, adapter_rank: 24, ..Limits::default() };
    let plan = Plan::new(file, limits).unwrap();
    let mut arena = vec![0; plan.arena_bytes()];
    let mut session = Session::new(file, &plan, kernels, &Single, &mut arena).unwrap();
    if let Some(adapter) = adapter {
        session.attach(0, &Gguf::parse(adapter).unwrap(), 1.0).unwrap();
    }
    session.feed(&PROMPT).unwrap();
    (argmax(session.logits()), session.logits().to_vec())
}

fn swap(file: &Gguf<'_>, kernels: &'static Kernels, workers: &dyn Workers, swaps: usize) {
    let (one, two) = (TinyAdapter::gguf(1, 16), TinyAdapter::gguf(2, 24));
    let expected = [alone(file, Some(&one), kernels), alone(file, Some(&two), kernels)];
    let none = alone(file, None, kernels);
    assert!(expected[0].0 != expected[1].0 && expected[0].0 != none.0, "the test needs adapters that matter");

    let limits =
        Limits { context: 16, adapters: 1, adapter_rank: 24, workers: workers.count(), ..Limits::default() };
    let plan = Plan::new(file, limits).unwrap();
    let mut arena = vec![0; plan.arena_bytes()];
    let files = [Gguf::parse(&one).unwrap(), Gguf::parse(&two).unwrap()];
    let mut session = Session::new(file, &plan, kernels, workers, &mut arena).unwrap();
    let before = CALLS.load(Ordering::SeqCst);
    for round in 0..swaps {
        let which = round % 2;
        session.attach(0, &files[which], 1.0).unwrap();
        session.truncate(0).unwrap();
        session.feed(&PROMPT).unwrap();
        assert!(argmax(session.logits()) == expected[which].0 && session.logits() == expected[which].1);
    }
    // Switched off or taken out, it leaves the model as it was.
    session.set_adapter_scale(0, 0.0).unwrap();
    session.truncate(0).unwrap();
    session.feed(&PROMPT).unwrap();
    assert!(session.logits() == none.1);
    session.set_adapter_scale(0, 1.0).unwrap();
    session.detach(0).unwrap();
    session.truncate(0).unwrap();
    session.feed(&PROMPT).unwrap();
    assert!(session.logits() == none.1);
    // The cache of the tokens so far stays when an adapter comes.
    session.attach(0, &files[0], 1.0).unwrap();
    assert_eq!(session.position(), PROMPT.len());
    assert_eq!(CALLS.load(Ordering::SeqCst) - before, 0, "{}", kernels.name());
}

/// The same model in tiles.
fn packed(model: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("tiny.edgepack");
    let source = ModelFile::from_memory("tiny.gguf".as_ref(), model.to_vec());
    edgec::pack::pack(&source, &out).unwrap();
    std::fs::read(out).unwrap()
}

/// One test alone in its program: others would allocate meanwhile.
#[test]
fn a_thousand_swaps_leak_nothing() {
    let pool = Pool::new(2).unwrap();
    let model = TinyModel::gguf();
    let pack = packed(&model);
    let [file, pack] = [&model, &pack].map(|bytes| Gguf::parse(bytes).unwrap());
    for (index, kernels) in Kernels::available().enumerate() {
        let swaps = if index == 0 { SWAPS } else { SWAPS / 10 };
        swap(&file, kernels, &Single, swaps);
        swap(&file, kernels, &pool, SWAPS / 10);
        swap(&pack, kernels, &Single, SWAPS / 10);
    }
    // In tiles or in rows an adapter says the same, up to the rounding of sums.
    let adapter = TinyAdapter::gguf(1, 16);
    let [rows, tiles] = [&file, &pack].map(|file| alone(file, Some(&adapter), Kernels::generic()).1);
    let difference = rows.iter().zip(&tiles).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = rows.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    assert!(difference < 0.01 * largest, "{difference} of {largest}");
}
