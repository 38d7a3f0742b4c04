//! How the caller's block of memory is divided: planned once, carved once.

use crate::abi::{EdgeLimits, EdgePlanInfo};
use crate::cpu;
use crate::session::EdgeSession;
use crate::team::Team;
use edge_runtime::format::Gguf;
use edge_runtime::kernels::Kernels;
use edge_runtime::session::{CacheType, Limits, Plan};
use edge_runtime::tokenizer::{Tokenizer, Utf8Stream};
use edge_runtime::{Code, Error, Result};

/// Every part begins at a multiple of it, wherever the arena does.
const ALIGNMENT: usize = 64;
const _: () = assert!(align_of::<EdgeSession>() <= ALIGNMENT && align_of::<Team>() <= ALIGNMENT);

const DEFAULT_BATCH: usize = 32;
const TEXT_BYTES_PER_TOKEN: usize = 4;

/// What a model needs under given limits.
pub(crate) struct Layout<'a> {
    pub(crate) file: Gguf<'a>,
    pub(crate) plan: Plan,
    pub(crate) kernels: &'static Kernels,
    pub(crate) workers: usize,
    text_bytes: usize,
    /// `None` for a file without a vocabulary.
    text: Option<TextSizes>,
}

/// Sizes of what tokenizing needs.
#[derive(Clone, Copy, Default)]
struct TextSizes {
    /// Bytes of the tokenizer's index, where the model file does not bring it.
    index: usize,
    /// Words of its scratch for the longest text.
    scratch: usize,
    /// Tokens of the longest text.
    ids: usize,
    /// Bytes of the longest token.
    piece: usize,
    /// Bytes of the text that a token can complete.
    utf8: usize,
}

/// Number of parts of the arena.
const PARTS: usize = 10;

/// The arena, divided.
pub(crate) struct Parts<'a> {
    pub(crate) session: &'a mut [u8],
    pub(crate) team: &'a mut [u8],
    pub(crate) index: &'a mut [u8],
    pub(crate) scratch: &'a mut [u32],
    pub(crate) ids: &'a mut [u32],
    pub(crate) piece: &'a mut [u8],
    pub(crate) utf8: &'a mut [u8],
    /// For the sampler, each as long as the vocabulary.
    pub(crate) logits: &'a mut [f32],
    pub(crate) candidates: &'a mut [u32],
    /// The runtime's own arena.
    pub(crate) runtime: &'a mut [u8],
}

impl<'a> Layout<'a> {
    /// Checks the model and adds up what it needs.
    pub(crate) fn new(model: &'a [u8], limits: &EdgeLimits) -> Result<Self> {
        let file = Gguf::parse(model)?;
        let workers = limits.workers.max(1) as usize;
        let batch = if limits.batch == 0 { DEFAULT_BATCH } else { limits.batch as usize };
        let wanted = Limits {
            context: limits.context as usize,
            batch,
            workers,
            adapters: limits.adapters as usize,
            adapter_rank: limits.adapter_rank as usize,
            cache: match limits.cache_type {
                0 => CacheType::Auto,
                1 => CacheType::F16,
                2 => CacheType::F32,
                3 => CacheType::Q8_0,
                other => {
                    let error = Error::new(Code::BadArgument, "limits.cache_type");
                    return Err(error.found(u64::from(other), 3));
                }
            },
            ..Limits::default()
        };
        let plan = Plan::new(&file, wanted)?;
        let text_bytes = match limits.text_bytes {
            0 => plan.limits().context.saturating_mul(TEXT_BYTES_PER_TOKEN),
            bytes => bytes as usize,
        };
        let text = TextSizes::new(&file, text_bytes)?;
        let kernels = Kernels::select(cpu::features(limits.cpu_features));
        Ok(Self { file, plan, kernels, workers, text_bytes, text })
    }

    /// For the caller.
    pub(crate) fn info(&self) -> EdgePlanInfo {
        EdgePlanInfo {
            arena_bytes: self.arena_bytes() as u64,
            kv_bytes: self.plan.kv_bytes() as u64,
            context: u32(self.plan.limits().context),
            vocabulary: u32(self.plan.spec().vocab),
            text_bytes: u32(self.text_bytes),
            has_tokenizer: u32::from(self.text.is_some()),
        }
    }

    /// The file has a vocabulary.
    pub(crate) fn has_tokenizer(&self) -> bool {
        self.text.is_some()
    }

    /// Size of the arena in bytes, wherever it starts.
    pub(crate) fn arena_bytes(&self) -> usize {
        self.sizes().iter().fold(ALIGNMENT - 1, |sum, bytes| sum.saturating_add(padded(*bytes)))
    }

    /// Bytes of each part, in order.
    fn sizes(&self) -> [usize; PARTS] {
        let text = self.text.unwrap_or_default();
        let words = |count: usize| count.saturating_mul(size_of::<u32>());
        let vocabulary = words(self.plan.spec().vocab);
        [
            size_of::<EdgeSession>(),
            size_of::<Team>(),
            text.index,
            words(text.scratch),
            words(text.ids),
            text.piece,
            text.utf8,
            vocabulary,
            vocabulary,
            self.plan.arena_bytes(),
        ]
    }

    /// Divides the caller's block.
    pub(crate) fn carve<'m>(&self, arena: &'m mut [u8]) -> Result<Parts<'m>> {
        let needed = self.arena_bytes();
        if arena.len() < needed {
            return Err(Error::new(Code::ArenaTooSmall, "arena").found(arena.len() as u64, needed as u64));
        }
        let start = arena.as_ptr().addr();
        let mut rest = &mut arena[start.wrapping_neg() % ALIGNMENT..];
        let parts = self.sizes().map(|bytes| {
            // Never beyond the end: at most ALIGNMENT - 1 bytes were skipped, and these with the padded
            // sizes add up to `needed`.
            let (part, tail) = core::mem::take(&mut rest).split_at_mut(padded(bytes));
            rest = tail;
            &mut part[..bytes]
        });
        let [session, team, index, scratch, ids, piece, utf8, logits, candidates, runtime] = parts;
        Ok(Parts {
            session,
            team,
            index,
            scratch: words(scratch),
            ids: words(ids),
            piece,
            utf8,
            logits: floats(logits),
            candidates: words(candidates),
            runtime,
        })
    }
}

impl TextSizes {
    fn new(file: &Gguf<'_>, text_bytes: usize) -> Result<Option<Self>> {
        if file.get("tokenizer.ggml.model").is_none() {
            return Ok(None);
        }
        let piece = Tokenizer::longest_text(file)?;
        Ok(Some(Self {
            index: Tokenizer::index_bytes(file)?,
            scratch: Tokenizer::scratch_words(text_bytes),
            ids: Tokenizer::most_ids(text_bytes),
            piece,
            utf8: Utf8Stream::most(piece),
        }))
    }
}

/// A number for the caller; one that does not fit belongs to an arena that no machine has.
fn u32(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn padded(bytes: usize) -> usize {
    bytes.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX)
}

/// A part as words: it begins at a multiple of [`ALIGNMENT`] and is a whole number of words long.
fn words(bytes: &mut [u8]) -> &mut [u32] {
    // SAFETY: any four bytes are a u32.
    let (before, words, after) = unsafe { bytes.align_to_mut() };
    debug_assert!(before.is_empty() && after.is_empty());
    words
}

/// As [`words`], as floats.
fn floats(bytes: &mut [u8]) -> &mut [f32] {
    // SAFETY: any four bytes are an f32.
    let (before, floats, after) = unsafe { bytes.align_to_mut() };
    debug_assert!(before.is_empty() && after.is_empty());
    floats
}
