//! The C ABI as an application meets it: what it gives, and that it refuses every wrong argument with a
//! number and a text.

use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};

use edge::*;
use edge_runtime::Code;
use edge_runtime::kernels::Kernels;
use edge_tests::{TinyAdapter, TinyModel};

const PROMPT: &str = "in the land";

/// An open session with its model and arena.
struct Open {
    model: Vec<u8>,
    _arena: Vec<u8>,
    session: *mut EdgeSession,
    limits: EdgeLimits,
}

fn limits() -> EdgeLimits {
    EdgeLimits { context: 64, ..EdgeLimits::default() }
}

fn no_error() -> EdgeError {
    EdgeError { code: 0, message: [0; 252] }
}

fn text(error: &EdgeError) -> &str {
    CStr::from_bytes_until_nul(&error.message).unwrap().to_str().unwrap()
}

fn plan(model: &[u8], limits: &EdgeLimits) -> Result<EdgePlanInfo, (i32, String)> {
    let (mut info, mut error) = (EdgePlanInfo::default(), no_error());
    // SAFETY: all pointers come from references.
    let code = unsafe { edge_plan(model.as_ptr().cast(), model.len(), limits, &mut info, &mut error) };
    assert_eq!(error.code, code);
    if code == 0 { Ok(info) } else { Err((code, text(&error).to_owned())) }
}

fn open_in(
    model: &[u8],
    limits: &EdgeLimits,
    workers: *const EdgeWorkers,
    arena: &mut [u8],
) -> Result<*mut EdgeSession, (i32, String)> {
    let (mut session, mut error) = (null_mut(), no_error());
    let (start, size) = (arena.as_mut_ptr().cast(), arena.len());
    // SAFETY: all pointers come from references or are `workers`; tests keep model and arena in place.
    let code = unsafe {
        edge_open(model.as_ptr().cast(), model.len(), limits, workers, start, size, &mut session, &mut error)
    };
    if code == 0 { Ok(session) } else { Err((code, text(&error).to_owned())) }
}

impl Open {
    fn new() -> Self {
        Self::with(limits(), null())
    }

    fn with(limits: EdgeLimits, workers: *const EdgeWorkers) -> Self {
        let model = TinyModel::gguf();
        let mut arena = vec![0xA5; plan(&model, &limits).unwrap().arena_bytes as usize];
        let session = open_in(&model, &limits, workers, &mut arena).unwrap();
        Self { model, _arena: arena, session, limits }
    }

    fn tokenize(&self, text: &str, flags: u32) -> Vec<u32> {
        let mut ids = vec![0; text.len() + 1];
        // SAFETY: the session is open; the text and the ids are slices.
        let count = unsafe {
            edge_tokenize(self.session, text.as_ptr().cast(), text.len(), flags, ids.as_mut_ptr(), ids.len())
        };
        ids.truncate(usize::try_from(count).unwrap());
        ids
    }

    fn feed(&self, ids: &[u32]) -> i32 {
        // SAFETY: the session is open; the ids are a slice.
        unsafe { edge_feed(self.session, ids.as_ptr(), ids.len()) }
    }

    fn logits(&self) -> &[f32] {
        let mut count = 7;
        // SAFETY: the session is open; `count` is a reference. What comes back is as long as it says.
        unsafe {
            let logits = edge_logits(self.session, &mut count);
            if logits.is_null() {
                assert_eq!(count, 0);
                return &[];
            }
            std::slice::from_raw_parts(logits, count)
        }
    }

    fn last_error(&self) -> String {
        let mut buffer = [0u8; 256];
        // SAFETY: the session is open; the buffer is a slice.
        let length = unsafe { edge_last_error(self.session, buffer.as_mut_ptr().cast(), buffer.len()) };
        let text = CStr::from_bytes_until_nul(&buffer).unwrap().to_str().unwrap();
        assert_eq!(text.len(), length as usize);
        text.to_owned()
    }

    fn greedy(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        assert_eq!(self.feed(prompt), 0);
        let mut ids = Vec::new();
        for _ in 0..count {
            // SAFETY: the session is open.
            let id = unsafe { edge_next(self.session) };
            ids.push(u32::try_from(id).unwrap());
            assert_eq!(self.feed(&ids[ids.len() - 1..]), 0);
        }
        ids
    }
}

fn number(code: Code) -> i32 {
    -(code as i32)
}

#[test]
fn a_session_gives_the_runtimes_own_tokens() {
    use edge_runtime::{format::Gguf, kernels::Kernels, session, workers::Single};
    let open = Open::new();
    let prompt = open.tokenize(PROMPT, 0);
    let through_c = open.greedy(&prompt, 16);

    let file = Gguf::parse(&open.model).unwrap();
    let limits = session::Limits { context: 64, ..session::Limits::default() };
    let plan = session::Plan::new(&file, limits).unwrap();
    let mut arena = vec![0; plan.arena_bytes()];
    let mut direct = session::Session::new(&file, &plan, Kernels::generic(), &Single, &mut arena).unwrap();
    direct.feed(&prompt).unwrap();
    for id in &through_c {
        assert_eq!(session::argmax(direct.logits()), *id);
        direct.feed(&[*id]).unwrap();
    }
    assert_eq!(open.logits(), direct.logits());
    // SAFETY: the session is open.
    assert_eq!(unsafe { edge_position(open.session) }, (prompt.len() + 16) as i32);
}

#[test]
fn adapters_come_and_go_and_sessions_are_saved() {
    const Q8_0: u32 = 3;
    let limits = EdgeLimits { adapters: 1, adapter_rank: 16, cache_type: Q8_0, ..limits() };
    let open = Open::with(limits, null());
    let plain = plan(&open.model, &self::limits()).unwrap();
    assert_eq!(plan(&open.model, &limits).unwrap().kv_bytes * 32, plain.kv_bytes * 17);
    let (code, _) = plan(&open.model, &EdgeLimits { cache_type: 9, ..limits }).unwrap_err();
    assert_eq!(code, number(Code::BadArgument));
    let adapter = TinyAdapter::gguf(1, 16);
    let prompt = open.tokenize(PROMPT, 0);
    // SAFETY: the session is open; all other pointers come from slices.
    unsafe {
        let restart = || {
            assert_eq!(edge_truncate(open.session, 0), 0);
            assert_eq!(edge_feed(open.session, prompt.as_ptr(), prompt.len()), 0);
            open.logits().to_vec()
        };
        let base = restart();
        let attach = |size| edge_attach(open.session, 0, adapter.as_ptr().cast(), size, 1.0);
        assert_eq!(attach(adapter.len() / 2), number(Code::TensorOutOfBounds));
        assert_eq!(attach(adapter.len()), 0);
        let adapted = restart();
        assert!(adapted != base);
        assert_eq!(edge_set_adapter_scale(open.session, 0, 0.0), 0);
        assert!(restart() == base);
        assert_eq!(edge_set_adapter_scale(open.session, 0, 1.0), 0);
        assert!(restart() == adapted);

        let mut saved = vec![0u8; edge_saved_bytes(open.session) as usize];
        let (start, size) = (saved.as_mut_ptr().cast(), saved.len());
        assert_eq!(edge_save(open.session, start, size - 1), number(Code::BufferTooSmall));
        assert_eq!(edge_save(open.session, start, size), 0);
        assert_eq!(edge_detach(open.session, 0), 0);
        assert!(restart() == base);
        assert_eq!(edge_detach(open.session, 1), number(Code::OutOfRange));
        assert_eq!(edge_restore(open.session, saved.as_ptr().cast(), size - 1), number(Code::Truncated));
        assert_eq!(edge_restore(open.session, saved.as_ptr().cast(), size), 0);
        assert!(open.logits() == adapted && edge_position(open.session) == prompt.len() as i32);
        let kept = prompt.len() as i32 - 1;
        assert_eq!(edge_reuse(open.session, prompt.as_ptr(), prompt.len()), kept);
        assert_eq!(edge_position(open.session), kept);
    }
}

#[test]
fn generate_gives_the_text_of_the_tokens() {
    unsafe extern "C" fn append(text: *mut c_void, bytes: *const c_char, length: usize) -> i32 {
        // SAFETY: the test hands over a String; the library says that the bytes are UTF-8.
        unsafe {
            let bytes = std::slice::from_raw_parts(bytes.cast(), length);
            (*text.cast::<String>()).push_str(std::str::from_utf8(bytes).unwrap());
        }
        0
    }
    unsafe extern "C" fn stop(_: *mut c_void, _: *const c_char, _: usize) -> i32 {
        1
    }
    let open = Open::new();
    let ids = open.greedy(&open.tokenize(PROMPT, 0), 16);
    let mut bytes = Vec::new();
    for id in ids {
        let mut piece = [0u8; 64];
        // SAFETY: the session is open; the piece is a slice.
        let length = unsafe { edge_piece(open.session, id, piece.as_mut_ptr().cast(), piece.len()) };
        bytes.extend_from_slice(&piece[..usize::try_from(length).unwrap()]);
    }
    let mut generated = String::new();
    let prompt = PROMPT.as_ptr().cast();
    // SAFETY: the session is open, the prompt a slice, the context what the callback expects.
    unsafe {
        assert_eq!(edge_truncate(open.session, 0), 0);
        let context = (&raw mut generated).cast();
        assert_eq!(edge_generate(open.session, prompt, PROMPT.len(), 0, 16, Some(append), context), 16);
        assert_eq!(generated, String::from_utf8_lossy(&bytes));
        assert_eq!(edge_truncate(open.session, 0), 0);
        let stopped = edge_generate(open.session, prompt, PROMPT.len(), 0, 16, Some(stop), null_mut());
        assert!((1..16).contains(&stopped), "{stopped}");
        assert_eq!(edge_truncate(open.session, 0), 0);
        assert_eq!(edge_generate(open.session, prompt, PROMPT.len(), 0, 16, None, null_mut()), 16);
    }
}

#[test]
fn the_callers_threads_do_the_work() {
    unsafe extern "C" fn run(calls: *mut c_void, job: Job, context: *mut c_void) {
        // SAFETY: the test hands over a counter; it is only touched here, by the calling thread.
        unsafe { *calls.cast::<usize>() += 1 };
        let context = context as usize;
        std::thread::scope(|scope| {
            for index in 0..3 {
                // SAFETY: each index below the count once, and all end before this function does.
                scope.spawn(move || unsafe { job(context as *mut c_void, index) });
            }
            // A share that does not exist finds nothing left to do.
            // SAFETY: as above.
            scope.spawn(move || unsafe { job(context as *mut c_void, 99) });
        });
    }
    let mut calls = 0usize;
    let workers = EdgeWorkers { count: 3, context: (&raw mut calls).cast(), run: Some(run) };
    let limits = EdgeLimits { workers: 3, ..limits() };
    let (three, one) = (Open::with(limits, &workers), Open::new());
    let prompt = one.tokenize(PROMPT, 0);
    assert_eq!(three.greedy(&prompt, 8), one.greedy(&prompt, 8));
    assert_eq!(three.logits(), one.logits());
    assert!(calls > 8, "{calls}");
}

#[test]
fn a_team_of_the_callers_threads_does_the_work() {
    let (mut team, mut workers) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: both places are there to be written.
    let (team, workers) = unsafe {
        assert_eq!(edge_team_init(team.as_mut_ptr(), 3, null(), workers.as_mut_ptr()), 0);
        (team.assume_init_ref(), workers.assume_init_ref())
    };
    let (three, one) = (Open::with(EdgeLimits { workers: 3, ..limits() }, workers), Open::new());
    let prompt = one.tokenize(PROMPT, 0);
    let expected = one.greedy(&prompt, 8);
    std::thread::scope(|scope| {
        // SAFETY: the team stays in place until the threads have ended.
        let threads = [(); 2].map(|()| scope.spawn(|| unsafe { edge_worker_run(team) }));
        assert_eq!(three.greedy(&prompt, 8), expected);
        // SAFETY: as above.
        assert_eq!(unsafe { edge_team_stop(team) }, 0);
        assert_eq!(threads.map(|thread| thread.join().unwrap()), [0; 2]);
    });
    assert_eq!(three.logits(), one.logits());
    // SAFETY: the session is open; a stopped team leaves all to the caller.
    assert_eq!(unsafe { edge_truncate(three.session, 0) }, 0);
    assert_eq!(three.greedy(&prompt, 8), expected);
}

#[test]
fn a_team_refuses_wrong_arguments() {
    let (mut team, mut workers) = (MaybeUninit::<EdgeTeam>::uninit(), MaybeUninit::<EdgeWorkers>::uninit());
    let half = EdgeWaiting { context: null_mut(), wait: None, wake: None };
    let (null_code, misaligned) = (number(Code::BadArgument), number(Code::BadAlignment));
    let (to, out) = (team.as_mut_ptr(), workers.as_mut_ptr());
    // SAFETY: every pointer is null, misaligned (and so never followed) or comes from a reference.
    unsafe {
        assert_eq!(edge_team_init(null_mut(), 2, null(), out), null_code);
        assert_eq!(edge_team_init(to, 2, null(), null_mut()), null_code);
        assert_eq!(edge_team_init(to.byte_add(1), 2, null(), out), misaligned);
        assert_eq!(edge_team_init(to, 0, null(), out), null_code);
        assert_eq!(edge_team_init(to, 2, &half, out), null_code);
        assert_eq!(edge_worker_run(null()), null_code);
        assert_eq!(edge_team_stop(null()), null_code);
    }
}

#[test]
fn sampling_is_seeded_and_checked() {
    let open = Open::new();
    let prompt = open.tokenize(PROMPT, 0);
    let with = |sampling: EdgeSampling| {
        // SAFETY: the session is open.
        unsafe {
            assert_eq!(edge_truncate(open.session, 0), 0);
            assert_eq!(edge_set_sampling(open.session, &sampling), 0);
        }
        open.greedy(&prompt, 16)
    };
    let hot = EdgeSampling { temperature: 5.0, seed: 1, ..EdgeSampling::default() };
    let greedy = with(EdgeSampling::default());
    let first = with(hot);
    assert_eq!(with(hot), first);
    assert_ne!(with(EdgeSampling { seed: 2, ..hot }), first);
    assert_eq!(with(EdgeSampling { top_k: 1, ..hot }), greedy);
    let penalized =
        with(EdgeSampling { repeat_penalty: 100.0, repeat_window: 64, ..EdgeSampling::default() });
    let distinct: std::collections::BTreeSet<_> = penalized.iter().collect();
    assert_eq!(distinct.len(), penalized.len(), "no token twice under a heavy penalty: {penalized:?}");
    // SAFETY: the session is open.
    let wrong = unsafe { edge_set_sampling(open.session, &EdgeSampling { temperature: -1.0, ..hot }) };
    assert_eq!(wrong, number(Code::BadArgument));
    assert!(open.last_error().contains("temperature"));
}

#[test]
fn null_and_misaligned_pointers_are_refused() {
    let open = Open::new();
    let (model, size) = (open.model.as_ptr().cast::<c_void>(), open.model.len());
    let (mut info, mut error) = (EdgePlanInfo::default(), no_error());
    let (null_code, misaligned) = (number(Code::BadArgument), number(Code::BadAlignment));
    // SAFETY: every pointer is null, misaligned (and so never followed) or comes from a reference.
    unsafe {
        assert_eq!(edge_plan(null(), size, &open.limits, &mut info, &mut error), null_code);
        assert_eq!(text(&error), "bad argument 0, `model` (null pointer) [E22]");
        assert_eq!(edge_plan(model, size, null(), &mut info, &mut error), null_code);
        assert_eq!(edge_plan(model, size, &open.limits, null_mut(), &mut error), null_code);
        assert_eq!(edge_plan(model, size, &open.limits, null_mut(), null_mut()), null_code);
        let crooked = (&raw mut info).byte_add(1);
        assert_eq!(edge_plan(model, size, &open.limits, crooked, &mut error), misaligned);
        assert_eq!(
            edge_plan(model, usize::MAX, &open.limits, &mut info, null_mut()),
            number(Code::BadLength)
        );

        for bad in [null_mut(), open.session.byte_add(1)] {
            let code = if bad.is_null() { null_code } else { misaligned };
            assert_eq!(edge_tokenize(bad, null(), 0, 0, null_mut(), 0), code);
            assert_eq!(edge_piece(bad, 0, null_mut(), 0), code);
            assert_eq!(edge_is_end(bad, 0), code);
            assert_eq!(edge_feed(bad, null(), 0), code);
            assert_eq!(edge_position(bad), code);
            assert_eq!(edge_truncate(bad, 0), code);
            assert_eq!(edge_shift(bad, 0, 0), code);
            assert_eq!(edge_reuse(bad, null(), 0), code);
            assert_eq!(edge_saved_bytes(bad), 0);
            assert_eq!(edge_save(bad, null_mut(), 0), code);
            assert_eq!(edge_restore(bad, null(), 0), code);
            assert_eq!(edge_attach(bad, 0, null(), 0, 1.0), code);
            assert_eq!(edge_set_adapter_scale(bad, 0, 1.0), code);
            assert_eq!(edge_detach(bad, 0), code);
            assert_eq!(edge_set_sampling(bad, null()), code);
            assert_eq!(edge_next(bad), code);
            assert_eq!(edge_generate(bad, null(), 0, 0, 0, None, null_mut()), code);
            assert_eq!(edge_last_error(bad, null_mut(), 0), code);
            assert!(edge_logits(bad, null_mut()).is_null());
        }
        assert_eq!(edge_feed(open.session, null(), 3), null_code);
        assert_eq!(open.last_error(), "bad argument 0, `tokens` (null pointer) [E22]");
        assert_eq!(edge_feed(open.session, std::ptr::without_provenance(2), 3), misaligned);
        assert_eq!(edge_tokenize(open.session, null(), 3, 0, null_mut(), 0), null_code);
        assert_eq!(edge_generate(open.session, null(), 3, 0, 1, None, null_mut()), null_code);
    }
}

#[test]
fn an_arena_of_any_smaller_size_is_refused_and_any_start_will_do() {
    let model = TinyModel::gguf();
    let needed = plan(&model, &limits()).unwrap().arena_bytes as usize;
    let mut arena = vec![0; needed + 64];
    let mut smaller: Vec<_> = (0..200).chain((200..needed).step_by(4099)).chain([needed - 1]).collect();
    smaller.dedup();
    for size in smaller {
        let (code, message) = open_in(&model, &limits(), null(), &mut arena[..size]).unwrap_err();
        assert_eq!(code, number(Code::ArenaTooSmall), "{size}: {message}");
        assert!(message.contains(&needed.to_string()), "{message}");
    }
    let mut seen = Vec::new();
    for start in 0..64 {
        let arena = &mut arena[start..][..needed];
        let session = open_in(&model, &limits(), null(), arena).unwrap();
        // SAFETY: the session is open.
        unsafe {
            assert_eq!(
                edge_generate(session, PROMPT.as_ptr().cast(), PROMPT.len(), 0, 4, None, null_mut()),
                4
            );
            seen.push(edge_next(session));
        }
    }
    assert!(seen.iter().all(|token| *token == seen[0]), "{seen:?}");
}

#[test]
fn wrong_arguments_have_their_own_numbers() {
    let open = Open::new();
    let prompt = open.tokenize(PROMPT, 0);
    assert_eq!(prompt[0], 0, "begins with BOS");
    assert_eq!(open.tokenize(PROMPT, 2), prompt[1..], "EDGE_NO_BOS");
    assert_eq!(open.tokenize("<|end|>", 3), [1], "EDGE_SPECIAL");
    assert!(open.tokenize("<|end|>", 2).len() > 1);
    let mut ids = [0; 2];
    // SAFETY: the session is open; the other pointers come from slices.
    unsafe {
        assert_eq!(edge_next(open.session), number(Code::BadArgument), "nothing was fed yet");
        assert!(open.logits().is_empty());
        let (text, length) = (PROMPT.as_ptr().cast(), PROMPT.len());
        assert_eq!(
            edge_tokenize(open.session, text, length, 4, ids.as_mut_ptr(), 2),
            number(Code::BadArgument)
        );
        assert_eq!(
            edge_tokenize(open.session, text, length, 0, ids.as_mut_ptr(), 2),
            number(Code::BufferTooSmall)
        );
        assert_eq!(edge_piece(open.session, 99_999, null_mut(), 0), number(Code::BadToken));
        assert_eq!(edge_piece(open.session, prompt[1], null_mut(), 0), number(Code::BufferTooSmall));
        assert_eq!(edge_is_end(open.session, 1), 1);
        assert_eq!(edge_is_end(open.session, 5), 0);
        assert_eq!(open.feed(&[99_999]), number(Code::BadToken));
        assert_eq!(open.feed(&[2; 65]), number(Code::ContextFull));
        assert_eq!(edge_position(open.session), 0, "nothing was added");
        assert_eq!(open.feed(&[2; 64]), 0);
        assert_eq!(open.feed(&[2]), number(Code::ContextFull));
        assert!(open.last_error().contains("65") && open.last_error().contains("64"));
        assert_eq!(edge_shift(open.session, 8, 57), number(Code::OutOfRange));
        assert_eq!(edge_shift(open.session, 8, 28), 0);
        assert_eq!(edge_position(open.session), 36);
        assert_eq!(open.feed(&[2; 28]), 0);
        assert_eq!(open.feed(&[2]), number(Code::ContextFull));
        assert_eq!(edge_truncate(open.session, 63), 0);
        assert!(open.logits().is_empty());
        assert_eq!(open.feed(&[2]), 0);
        assert_eq!(CStr::from_ptr(edge_error_text(-19)), c"the context window is full");
    }
    let one = EdgeWorkers { count: 2, context: null_mut(), run: None };
    let mut arena = vec![0; plan(&open.model, &limits()).unwrap().arena_bytes as usize];
    let (code, message) = open_in(&open.model, &limits(), &one, &mut arena).unwrap_err();
    assert_eq!(code, number(Code::BadArgument), "{message}");
}

#[test]
fn a_session_names_its_kernels() {
    let fastest = Kernels::available().next().unwrap().name();
    // x86-64 has to be told what its processor can do.
    let untold = if cfg!(target_arch = "x86_64") { "generic" } else { fastest };
    for (cpu_features, expected) in [(0, untold), (u64::MAX, fastest)] {
        let open = Open::with(EdgeLimits { cpu_features, ..limits() }, null());
        let name = |capacity: usize| {
            let mut buffer = vec![0xA5u8; capacity];
            // SAFETY: the session is open; the buffer is a slice.
            let length = unsafe { edge_kernels(open.session, buffer.as_mut_ptr().cast(), buffer.len()) };
            assert_eq!(length as usize, expected.len());
            CStr::from_bytes_until_nul(&buffer).unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!((name(32).as_str(), name(3).as_str()), (expected, &expected[..2]));
    }
    let mut buffer = [0u8; 8];
    // SAFETY: null is refused; the buffer is a slice.
    let refused = unsafe { edge_kernels(null(), buffer.as_mut_ptr().cast(), buffer.len()) };
    assert_eq!(refused, number(Code::BadArgument));
}

#[test]
fn damaged_files_are_refused() {
    let model = TinyModel::gguf();
    assert_eq!(plan(b"nonsense", &limits()).unwrap_err().0, number(Code::BadMagic));
    assert_eq!(plan(&[], &limits()).unwrap_err().0, number(Code::Truncated));
    for length in (0..model.len()).step_by(model.len() / 97) {
        assert!(plan(&model[..length], &limits()).is_err(), "{length}");
    }
    let info = plan(&model, &EdgeLimits::default()).unwrap();
    assert_eq!((info.context, info.has_tokenizer, info.text_bytes), (256, 1, 1024));
    assert_eq!(info.vocabulary, 268);
    let huge = EdgeLimits { context: u32::MAX, text_bytes: u32::MAX, batch: u32::MAX, ..limits() };
    match plan(&model, &huge) {
        Ok(info) => assert!(info.arena_bytes > u64::from(u32::MAX)),
        Err((code, _)) => assert_eq!(code, number(Code::OutOfRange)),
    }
}
