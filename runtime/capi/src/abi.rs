//! What crosses the boundary: the structs of `edge.h`, and pointers that become references once they
//! have been checked.

use core::ffi::{c_char, c_void};

use crate::message::Message;
use edge_runtime::{Code, Error, Result};

/// `EDGE_ABI_VERSION`.
pub const VERSION: u32 = 2;

/// `EDGE_CPU_AVX2`.
pub(crate) const CPU_AVX2: u64 = 1;
/// `EDGE_CPU_DOTPROD`.
pub(crate) const CPU_DOTPROD: u64 = 1 << 1;
/// `EDGE_CPU_I8MM`.
pub(crate) const CPU_I8MM: u64 = 1 << 2;

/// `edge_error`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EdgeError {
    /// What the function returned.
    pub code: i32,
    /// Text that ends with 0.
    pub message: [u8; 252],
}

/// `edge_limits`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct EdgeLimits {
    /// Most tokens in the KV cache; 0: the model's own context.
    pub context: u32,
    /// Prompt tokens computed together; 0: 32.
    pub batch: u32,
    /// Threads; 0: 1.
    pub workers: u32,
    /// Longest text to be tokenized at once; 0: 4 for each token of context.
    pub text_bytes: u32,
    /// `EDGE_CPU_` bits.
    pub cpu_features: u64,
    /// Slots for adapters.
    pub adapters: u32,
    /// Largest rank of an adapter.
    pub adapter_rank: u32,
    /// `EDGE_CACHE_`.
    pub cache_type: u32,
}

/// `edge_plan_info`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct EdgePlanInfo {
    /// Size of the arena.
    pub arena_bytes: u64,
    /// The part of it that is the KV cache.
    pub kv_bytes: u64,
    /// Most tokens in the KV cache.
    pub context: u32,
    /// Number of tokens.
    pub vocabulary: u32,
    /// Longest text to be tokenized at once.
    pub text_bytes: u32,
    /// 1 if the file has a vocabulary.
    pub has_tokenizer: u32,
}

/// A job of [`EdgeWorkers`].
pub type Job = unsafe extern "C" fn(job_context: *mut c_void, index: u32);

/// `edge_workers`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EdgeWorkers {
    /// Number of threads.
    pub count: u32,
    /// Handed to `run`.
    pub context: *mut c_void,
    /// Runs a job on all threads.
    pub run: Option<unsafe extern "C" fn(context: *mut c_void, job: Job, job_context: *mut c_void)>,
}

/// `edge_waiting.wait`.
pub type WaitFunction = unsafe extern "C" fn(context: *mut c_void, word: *const u32, value: u32);

/// `edge_waiting.wake`.
pub type WakeFunction = unsafe extern "C" fn(context: *mut c_void, word: *const u32);

/// `edge_waiting`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EdgeWaiting {
    /// Handed to both functions.
    pub context: *mut c_void,
    /// Sleeps as long as the word has the value.
    pub wait: Option<WaitFunction>,
    /// Ends the sleep of all threads.
    pub wake: Option<WakeFunction>,
}

/// `edge_sampling`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct EdgeSampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is all.
    pub top_k: u32,
    /// 0 or 1 is all.
    pub top_p: f32,
    /// 0 is all.
    pub min_p: f32,
    /// 0 or 1 is none.
    pub repeat_penalty: f32,
    /// Recent tokens that the penalty looks at.
    pub repeat_window: u32,
    /// Seed.
    pub seed: u64,
}

/// `edge_on_text`.
pub type OnText =
    Option<unsafe extern "C" fn(context: *mut c_void, text: *const c_char, length: usize) -> i32>;

/// Refuses a null or misaligned pointer and more bytes than an object can have.
pub(crate) fn checked<T>(pointer: *const T, count: usize, name: &'static str) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::new(Code::BadArgument, name).hint("null pointer"));
    }
    if !pointer.is_aligned() {
        return Err(Error::new(Code::BadAlignment, name).found(pointer as u64, align_of::<T>() as u64));
    }
    let most = isize::MAX as usize / size_of::<T>();
    if count > most {
        return Err(Error::new(Code::BadLength, name).found(count as u64, most as u64));
    }
    Ok(())
}

/// `count` values to be read. No values may be at null.
///
/// # Safety
/// A pointer that is neither null nor misaligned leads to `count` values that nobody changes during `'a`.
pub(crate) unsafe fn input<'a, T>(pointer: *const T, count: usize, name: &'static str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    checked(pointer, count, name)?;
    // SAFETY: not null, aligned and not too large, as just checked; the rest is the caller's promise.
    Ok(unsafe { core::slice::from_raw_parts(pointer, count) })
}

/// `count` values to be written. No values may be at null.
///
/// # Safety
/// A pointer that is neither null nor misaligned leads to `count` values of an integer type, initialized
/// or not, that nobody else uses during `'a`.
pub(crate) unsafe fn output<'a, T>(pointer: *mut T, count: usize, name: &'static str) -> Result<&'a mut [T]> {
    if count == 0 {
        return Ok(&mut []);
    }
    checked(pointer, count, name)?;
    // SAFETY: not null, aligned and not too large, as just checked; the rest is the caller's promise.
    Ok(unsafe { core::slice::from_raw_parts_mut(pointer, count) })
}

/// One value to be read.
///
/// # Safety
/// As [`input`].
pub(crate) unsafe fn input_one<'a, T>(pointer: *const T, name: &'static str) -> Result<&'a T> {
    checked(pointer, 1, name)?;
    // SAFETY: not null and aligned, as just checked; the rest is the caller's promise.
    Ok(unsafe { &*pointer })
}

/// One value to be written.
///
/// # Safety
/// As [`output`], for a valid value of any type.
pub(crate) unsafe fn output_one<'a, T>(pointer: *mut T, name: &'static str) -> Result<&'a mut T> {
    checked(pointer, 1, name)?;
    // SAFETY: not null and aligned, as just checked; the rest is the caller's promise.
    Ok(unsafe { &mut *pointer })
}

/// The number that a function returns for an error.
pub(crate) fn negative(error: &Error) -> i32 {
    -i32::from(error.number())
}

/// The number that a function returns; writes the error where the caller wants it.
///
/// # Safety
/// `to` is null, misaligned or leads to an [`EdgeError`] that nobody else uses.
pub(crate) unsafe fn report(result: Result<i32>, to: *mut EdgeError) -> i32 {
    let code = result.as_ref().map_or_else(negative, |value| *value);
    // SAFETY: the caller's promise.
    if let Ok(to) = unsafe { output_one(to, "error") } {
        *to = EdgeError { code, message: [0; 252] };
        if let Err(error) = &result {
            Message::write(error, &mut to.message);
        }
    }
    code
}
