//! The C ABI of the runtime: `include/edge.h` in Rust, and the only symbols that the device library
//! exports.
//!
//! Each function checks its pointers, turns them into slices and hands over to the runtime; a refusal
//! becomes a negative number, its text is kept for the caller. Nothing here computes, allocates, starts
//! a thread or keeps a global.
#![no_std]

// Without `freestanding` (tests, tools, editors) the standard library brings the panic handler. A
// profile that unwinds needs it too, whatever the features say.
#[cfg(not(all(feature = "freestanding", panic = "abort")))]
extern crate std;

mod abi;
mod arena;
mod cpu;
#[cfg(all(feature = "freestanding", panic = "abort"))]
mod freestanding;
#[cfg(all(
    any(target_os = "linux", target_os = "android"),
    any(target_arch = "aarch64", target_arch = "x86_64")
))]
mod linux;
#[cfg(any(feature = "memory", test))]
mod memory;
mod message;
mod session;
mod team;
mod threads;

use core::ffi::{c_char, c_void};

pub use abi::{
    EdgeError, EdgeLimits, EdgePlanInfo, EdgeSampling, EdgeWaiting, EdgeWorkers, Job, OnText, VERSION,
    WaitFunction, WakeFunction,
};
use abi::{input, input_one, output, output_one};
use edge_runtime::Result;
use message::Message;
pub use session::EdgeSession;
pub use threads::EdgeTeam;

/// Version of the interface.
#[unsafe(no_mangle)]
pub extern "C" fn edge_abi_version() -> u32 {
    VERSION
}

/// A text for an error number; never null.
#[unsafe(no_mangle)]
pub extern "C" fn edge_error_text(code: i32) -> *const c_char {
    message::text(code).as_ptr()
}

/// What a session on a model needs.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_plan(
    model: *const c_void,
    model_size: usize,
    limits: *const EdgeLimits,
    plan: *mut EdgePlanInfo,
    error: *mut EdgeError,
) -> i32 {
    let result = (|| {
        // SAFETY: the caller's promise for each of the three.
        let (model, limits, plan) = unsafe {
            (
                input(model.cast(), model_size, "model")?,
                input_one(limits, "limits")?,
                output_one(plan, "plan")?,
            )
        };
        *plan = arena::Layout::new(model, limits)?.info();
        Ok(0)
    })();
    // SAFETY: the caller's promise about `error`.
    unsafe { abi::report(result, error) }
}

/// Begins a session in the caller's arena.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says; the model, the arena and the workers outlive the session
/// and are used by nothing else.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_open(
    model: *const c_void,
    model_size: usize,
    limits: *const EdgeLimits,
    workers: *const EdgeWorkers,
    arena: *mut c_void,
    arena_size: usize,
    session: *mut *mut EdgeSession,
    error: *mut EdgeError,
) -> i32 {
    let result = (|| {
        // SAFETY: the caller's promise for each; it also says that model and arena outlive the session,
        // which is all that lives longer than this call.
        let (model, limits, arena, session) = unsafe {
            (
                input(model.cast(), model_size, "model")?,
                input_one(limits, "limits")?,
                output(arena.cast(), arena_size, "arena")?,
                output_one(session, "session")?,
            )
        };
        // SAFETY: the caller's promise; null is the calling thread alone.
        let workers = if workers.is_null() { None } else { Some(unsafe { input_one(workers, "workers")? }) };
        *session = core::ptr::null_mut();
        *session = session::open(model, limits, workers, arena)?;
        Ok(0)
    })();
    // SAFETY: the caller's promise about `error`.
    unsafe { abi::report(result, error) }
}

/// Makes a team, and the workers that stand for it.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says; a team that is made anew has no threads in it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_team_init(
    team: *mut EdgeTeam,
    count: u32,
    waiting: *const EdgeWaiting,
    workers: *mut EdgeWorkers,
) -> i32 {
    let result = (|| {
        // SAFETY: the caller's promise. What was in the team's memory is not looked at; a null `waiting` is what
        // the system has.
        let (to, waiting, workers) = unsafe {
            let waiting = if waiting.is_null() { None } else { Some(input_one(waiting, "waiting")?) };
            abi::checked(team, 1, "team")?;
            (team, waiting, output_one(workers, "workers")?)
        };
        let made = EdgeTeam::new(count, waiting)?;
        // SAFETY: not null and aligned, as just checked; the rest is the caller's promise.
        let team = unsafe {
            to.write(made);
            &*to
        };
        *workers = team.workers();
        Ok(0)
    })();
    // SAFETY: null is left alone.
    unsafe { abi::report(result, core::ptr::null_mut()) }
}

/// Works in a team until it is stopped.
///
/// # Safety
/// `team` is null or from [`edge_team_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_worker_run(team: *const EdgeTeam) -> i32 {
    // SAFETY: the caller's promise.
    let result = unsafe { input_one(team, "team") }.map(EdgeTeam::work);
    result.map_or_else(|error| abi::negative(&error), |()| 0)
}

/// Sends the threads of a team away.
///
/// # Safety
/// `team` is null or from [`edge_team_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_team_stop(team: *const EdgeTeam) -> i32 {
    // SAFETY: the caller's promise.
    let result = unsafe { input_one(team, "team") }.map(EdgeTeam::stop);
    result.map_or_else(|error| abi::negative(&error), |()| 0)
}

/// The last error of a session.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_last_error(
    session: *const EdgeSession,
    buffer: *mut c_char,
    capacity: usize,
) -> i32 {
    // SAFETY: the caller's promise for both. The session is only read, so its error stays.
    let arguments = unsafe {
        input_one(session, "session").and_then(|s| Ok((s, output(buffer.cast(), capacity, "buffer")?)))
    };
    match arguments {
        Ok((session, buffer)) => session.last_error().map_or(0, |error| Message::write(&error, buffer)),
        Err(error) => abi::negative(&error),
    }
}

/// The name of a session's kernels.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_kernels(
    session: *const EdgeSession,
    buffer: *mut c_char,
    capacity: usize,
) -> i32 {
    // SAFETY: the caller's promise for both; the session is only read.
    let arguments = unsafe {
        input_one(session, "session").and_then(|s| Ok((s, output(buffer.cast(), capacity, "buffer")?)))
    };
    match arguments {
        Ok((session, buffer)) => Message::write(&session.kernels(), buffer),
        Err(error) => abi::negative(&error),
    }
}

/// Runs `work` on a session and keeps its error.
///
/// # Safety
/// `session` is null or from [`edge_open`], and no other thread uses it meanwhile.
unsafe fn on(session: *mut EdgeSession, work: impl FnOnce(&mut EdgeSession) -> Result<usize>) -> i32 {
    // SAFETY: the caller's promise.
    match unsafe { output_one(session, "session") } {
        Ok(session) => session.keep_error(work),
        Err(error) => abi::negative(&error),
    }
}

/// Text to tokens.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_tokenize(
    session: *mut EdgeSession,
    text: *const c_char,
    length: usize,
    flags: u32,
    tokens: *mut u32,
    capacity: usize,
) -> i32 {
    // SAFETY: the caller's promise for the session and both ranges.
    unsafe {
        on(session, |session| {
            let (text, tokens) = (input(text.cast(), length, "text")?, output(tokens, capacity, "tokens")?);
            session.tokenize(text, flags, tokens)
        })
    }
}

/// The bytes of a token.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_piece(
    session: *mut EdgeSession,
    token: u32,
    buffer: *mut c_char,
    capacity: usize,
) -> i32 {
    // SAFETY: the caller's promise for the session and the buffer.
    unsafe { on(session, |session| session.piece(token, output(buffer.cast(), capacity, "buffer")?)) }
}

/// Whether a token ends a text.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_is_end(session: *mut EdgeSession, token: u32) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { on(session, |session| Ok(usize::from(session.is_end(token)?))) }
}

/// Appends tokens.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_feed(session: *mut EdgeSession, tokens: *const u32, count: usize) -> i32 {
    // SAFETY: the caller's promise for the session and the tokens.
    unsafe {
        on(session, |session| {
            session.feed(input(tokens, count, "tokens")?)?;
            Ok(0)
        })
    }
}

/// The logits after the last token.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_logits(session: *mut EdgeSession, count: *mut usize) -> *const f32 {
    // SAFETY: the caller's promise for both.
    let logits = match unsafe { output_one(session, "session") } {
        Ok(session) => session.logits(),
        Err(_) => &[],
    };
    // SAFETY: the caller's promise; a null `count` is left alone.
    if let Ok(count) = unsafe { output_one(count, "count") } {
        *count = logits.len();
    }
    if logits.is_empty() { core::ptr::null() } else { logits.as_ptr() }
}

/// Number of tokens in the context.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_position(session: *mut EdgeSession) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { on(session, |session| Ok(session.position())) }
}

/// Drops tokens from the end.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_truncate(session: *mut EdgeSession, count: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        on(session, |session| {
            session.truncate(count)?;
            Ok(0)
        })
    }
}

/// Forgets tokens behind the first ones.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_shift(session: *mut EdgeSession, keep: usize, discard: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        on(session, |session| {
            session.shift(keep, discard)?;
            Ok(0)
        })
    }
}

/// Keeps what the context and some tokens have in common.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_reuse(session: *mut EdgeSession, tokens: *const u32, count: usize) -> i32 {
    // SAFETY: the caller's promise for the session and the tokens.
    unsafe { on(session, |session| Ok(session.reuse(input(tokens, count, "tokens")?))) }
}

/// Bytes that [`edge_save`] needs.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_saved_bytes(session: *const EdgeSession) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { input_one(session, "session") }.map_or(0, EdgeSession::saved_bytes)
}

/// Writes a session into a buffer.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_save(session: *mut EdgeSession, buffer: *mut c_void, capacity: usize) -> i32 {
    // SAFETY: the caller's promise for the session and the buffer.
    unsafe {
        on(session, |session| {
            session.save(output(buffer.cast(), capacity, "buffer")?)?;
            Ok(0)
        })
    }
}

/// Puts a saved session in place of this one.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_restore(session: *mut EdgeSession, bytes: *const c_void, size: usize) -> i32 {
    // SAFETY: the caller's promise for the session and the bytes.
    unsafe {
        on(session, |session| {
            session.restore(input(bytes.cast(), size, "bytes")?)?;
            Ok(0)
        })
    }
}

/// Puts an adapter into a slot.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_attach(
    session: *mut EdgeSession,
    slot: u32,
    adapter: *const c_void,
    adapter_size: usize,
    scale: f32,
) -> i32 {
    // SAFETY: the caller's promise for the session and the file.
    unsafe {
        on(session, |session| {
            session.attach(slot, input(adapter.cast(), adapter_size, "adapter")?, scale)?;
            Ok(0)
        })
    }
}

/// Changes what an adapter is multiplied by.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_set_adapter_scale(session: *mut EdgeSession, slot: u32, scale: f32) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        on(session, |session| {
            session.set_adapter_scale(slot, scale)?;
            Ok(0)
        })
    }
}

/// Empties a slot.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_detach(session: *mut EdgeSession, slot: u32) -> i32 {
    // SAFETY: the caller's promise.
    unsafe {
        on(session, |session| {
            session.detach(slot)?;
            Ok(0)
        })
    }
}

/// Sets how tokens are chosen.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_set_sampling(session: *mut EdgeSession, sampling: *const EdgeSampling) -> i32 {
    // SAFETY: the caller's promise for both; null is greedy.
    unsafe {
        on(session, |session| {
            let sampling =
                if sampling.is_null() { EdgeSampling::default() } else { *input_one(sampling, "sampling")? };
            session.set_sampling(&sampling)?;
            Ok(0)
        })
    }
}

/// Chooses a token.
///
/// # Safety
/// `session` is null or valid as `edge.h` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_next(session: *mut EdgeSession) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { on(session, |session| Ok(session.next()? as usize)) }
}

/// Continues a prompt.
///
/// # Safety
/// Pointers are null or valid as `edge.h` says; `on_text` does not use the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn edge_generate(
    session: *mut EdgeSession,
    prompt: *const c_char,
    length: usize,
    flags: u32,
    max_tokens: u32,
    on_text: OnText,
    context: *mut c_void,
) -> i32 {
    let say = |text: &[u8]| match on_text {
        // SAFETY: the caller's promise about its own function.
        Some(on_text) => unsafe { on_text(context, text.as_ptr().cast(), text.len()) == 0 },
        None => true,
    };
    // SAFETY: the caller's promise for the session and the prompt.
    unsafe {
        on(session, |session| {
            session.generate(input(prompt.cast(), length, "prompt")?, flags, max_tokens, say)
        })
    }
}
