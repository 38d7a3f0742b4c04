//! Between the start of a session and its hundredth token nothing is allocated, by any thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use edge_runtime::format::Gguf;
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{Limits, Plan, Sampler, SamplerConfig, Session};
use edge_runtime::tokenizer::{Encode, Tokenizer, Utf8Stream};
use edge_runtime::workers::{Pool, Single, Workers};
use edge_tests::TinyModel;

const TOKENS: usize = 100;
const PROMPT: &str = "in the land of Athens, the king sang";

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

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Generates from text to text with memory that was set aside before, and gives the number of calls of
/// the allocator after the session's start, and the text.
fn generate(kernels: &'static Kernels, workers: &dyn Workers) -> (usize, Vec<u8>) {
    let bytes = TinyModel::gguf();
    let file = Gguf::parse(&bytes).unwrap();
    let limits = Limits { context: 256, batch: 8, workers: workers.count(), ..Limits::default() };
    let plan = Plan::new(&file, limits).unwrap();
    let mut arena = vec![0; plan.arena_bytes()];
    let mut index = vec![0; Tokenizer::index_bytes(&file).unwrap()];
    let tokenizer = Tokenizer::new(&file, &mut index).unwrap();
    let mut sampler = Sampler::new(SamplerConfig {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        repeat_penalty: 1.1,
        repeat_window: 64,
        seed: 1,
    })
    .unwrap();
    let vocab = plan.spec().vocab;
    let (mut logits, mut scratch) = (vec![0.0; vocab], vec![0; vocab]);
    let (mut ids, mut words) = (vec![0; 256], vec![0; Tokenizer::scratch_words(PROMPT.len())]);
    let (mut piece, mut out) = ([0; 64], [0; Utf8Stream::most(64)]);
    let mut text = Vec::with_capacity(64 * TOKENS);
    let mut stream = Utf8Stream::new();

    let mut session = Session::new(&file, &plan, kernels, workers, &mut arena).unwrap();
    let before = CALLS.load(Ordering::SeqCst);
    let options = Encode { add_bos: true, parse_special: false };
    let prompt = tokenizer.encode(PROMPT.as_bytes(), options, &mut words, &mut ids).unwrap();
    session.feed(&ids[..prompt]).unwrap();
    for count in prompt..prompt + TOKENS {
        logits.copy_from_slice(session.logits());
        let token = sampler.sample(&mut logits, &ids[..count], &mut scratch).unwrap();
        ids[count] = token;
        let length = tokenizer.piece(token, &mut piece).unwrap();
        let length = stream.push(&piece[..length], &mut out).unwrap();
        text.extend_from_slice(&out[..length]);
        session.feed(&[token]).unwrap();
    }
    session.shift(4, TOKENS / 2).unwrap();
    session.feed(&ids[..1]).unwrap();
    (CALLS.load(Ordering::SeqCst) - before, text)
}

/// One test alone in its program: others would allocate meanwhile.
#[test]
fn a_session_never_allocates() {
    let pool = Pool::new(2).unwrap();
    let mut texts = Vec::new();
    for kernels in Kernels::available() {
        for workers in [&Single as &dyn Workers, &pool] {
            let (calls, text) = generate(kernels, workers);
            assert_eq!(calls, 0, "{} with {} threads", kernels.name(), workers.count());
            texts.push(text);
        }
    }
    assert!(!texts[0].is_empty() && texts.iter().all(|text| *text == texts[0]));

    // The count itself works.
    let before = CALLS.load(Ordering::SeqCst);
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(CALLS.load(Ordering::SeqCst) - before, 2);
}
