//! The object behind `edge_session *`: a runtime session with its tokenizer, sampler and buffers.

use crate::abi::{EdgeLimits, EdgeSampling, EdgeWorkers, negative};
use crate::arena::{Layout, Parts};
use crate::team::Team;
use edge_runtime::format::Gguf;
use edge_runtime::session::{Sampler, SamplerConfig, Session};
use edge_runtime::tokenizer::{Encode, Tokenizer, Utf8Stream};
use edge_runtime::{Code, Error, Result};

/// `EDGE_SPECIAL`.
const EDGE_SPECIAL: u32 = 1;
/// `EDGE_NO_BOS`.
const EDGE_NO_BOS: u32 = 2;

/// A session in the caller's arena. What it borrows lives as long as the caller lets it, which is as
/// long as the caller uses it.
pub struct EdgeSession {
    session: Session<'static>,
    sampler: Sampler,
    logits: &'static mut [f32],
    candidates: &'static mut [u32],
    text: Option<Text>,
    kernels: &'static str,
    error: Option<Error>,
}

/// What a session with a vocabulary has besides.
struct Text {
    tokenizer: Tokenizer<'static>,
    scratch: &'static mut [u32],
    ids: &'static mut [u32],
    piece: &'static mut [u8],
    utf8: &'static mut [u8],
}

/// Builds a session in `arena`, of which it takes the first bytes.
pub(crate) fn open(
    model: &'static [u8],
    limits: &EdgeLimits,
    workers: Option<&EdgeWorkers>,
    arena: &'static mut [u8],
) -> Result<&'static mut EdgeSession> {
    let layout = Layout::new(model, limits)?;
    let team = Team::new(workers, layout.workers)?;
    let has_tokenizer = layout.has_tokenizer();
    let parts = layout.carve(arena)?;
    let team: &'static Team = place(parts.team, team)?;
    let Parts { index, scratch, ids, piece, utf8, logits, candidates, .. } = parts;
    let text = if has_tokenizer {
        Some(Text { tokenizer: Tokenizer::new(&layout.file, index)?, scratch, ids, piece, utf8 })
    } else {
        None
    };
    let value = EdgeSession {
        session: Session::new(&layout.file, &layout.plan, layout.kernels, team.workers(), parts.runtime)?,
        sampler: sampler(&EdgeSampling::default())?,
        logits,
        candidates,
        text,
        kernels: layout.kernels.name(),
        error: None,
    };
    place(parts.session, value)
}

/// Moves `value` into its part of the arena.
fn place<T>(part: &'static mut [u8], value: T) -> Result<&'static mut T> {
    let to = part.as_mut_ptr().cast::<T>();
    if part.len() < size_of::<T>() || !to.is_aligned() {
        return Err(Error::new(Code::ArenaTooSmall, "arena").found(part.len() as u64, size_of::<T>() as u64));
    }
    // SAFETY: the part is large enough and aligned, as just checked, and nobody else has it.
    unsafe {
        to.write(value);
        Ok(&mut *to)
    }
}

/// The caller's wishes as the runtime has them: there, 1 stands for a filter that lets all pass.
fn sampler(wish: &EdgeSampling) -> Result<Sampler> {
    let or_one = |value: f32| if value == 0.0 { 1.0 } else { value };
    Sampler::new(SamplerConfig {
        temperature: wish.temperature,
        top_k: wish.top_k as usize,
        top_p: or_one(wish.top_p),
        min_p: wish.min_p,
        repeat_penalty: or_one(wish.repeat_penalty),
        repeat_window: wish.repeat_window as usize,
        seed: wish.seed,
    })
}

impl EdgeSession {
    /// Runs `work` and turns its result into what a C function returns; an error is kept.
    pub(crate) fn keep_error(&mut self, work: impl FnOnce(&mut Self) -> Result<usize>) -> i32 {
        let result = work(self).and_then(|value| {
            i32::try_from(value)
                .map_err(|_| Error::new(Code::OutOfRange, "result").found(value as u64, i32::MAX as u64))
        });
        result.unwrap_or_else(|error| {
            self.error = Some(error);
            negative(&error)
        })
    }

    pub(crate) fn last_error(&self) -> Option<Error> {
        self.error
    }

    pub(crate) fn kernels(&self) -> &'static str {
        self.kernels
    }

    fn text(&mut self) -> Result<&mut Text> {
        self.text.as_mut().ok_or_else(|| Error::new(Code::Unsupported, "").hint("the file has no vocabulary"))
    }

    pub(crate) fn tokenize(&mut self, text: &[u8], flags: u32, tokens: &mut [u32]) -> Result<usize> {
        let Text { tokenizer, scratch, .. } = self.text()?;
        tokenizer.encode(text, encode(flags)?, scratch, tokens)
    }

    pub(crate) fn piece(&mut self, token: u32, buffer: &mut [u8]) -> Result<usize> {
        self.text()?.tokenizer.piece(token, buffer)
    }

    pub(crate) fn is_end(&mut self, token: u32) -> Result<bool> {
        Ok(self.text()?.tokenizer.is_end_of_generation(token))
    }

    pub(crate) fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.session.feed(tokens)
    }

    pub(crate) fn logits(&self) -> &[f32] {
        self.session.logits()
    }

    pub(crate) fn position(&self) -> usize {
        self.session.position()
    }

    pub(crate) fn truncate(&mut self, count: usize) -> Result<()> {
        self.session.truncate(count)
    }

    pub(crate) fn shift(&mut self, keep: usize, discard: usize) -> Result<()> {
        self.session.shift(keep, discard)
    }

    pub(crate) fn reuse(&mut self, tokens: &[u32]) -> usize {
        self.session.reuse(tokens)
    }

    pub(crate) fn saved_bytes(&self) -> u64 {
        self.session.saved_bytes() as u64
    }

    pub(crate) fn save(&mut self, out: &mut [u8]) -> Result<usize> {
        self.session.save(out)
    }

    pub(crate) fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        self.session.restore(bytes)
    }

    pub(crate) fn attach(&mut self, slot: u32, adapter: &[u8], scale: f32) -> Result<()> {
        self.session.attach(slot as usize, &Gguf::parse(adapter)?, scale)
    }

    pub(crate) fn set_adapter_scale(&mut self, slot: u32, scale: f32) -> Result<()> {
        self.session.set_adapter_scale(slot as usize, scale)
    }

    pub(crate) fn detach(&mut self, slot: u32) -> Result<()> {
        self.session.detach(slot as usize)
    }

    pub(crate) fn set_sampling(&mut self, sampling: &EdgeSampling) -> Result<()> {
        self.sampler = sampler(sampling)?;
        Ok(())
    }

    pub(crate) fn next(&mut self) -> Result<u32> {
        let logits = self.session.logits();
        if logits.len() != self.logits.len() {
            return Err(
                Error::new(Code::BadArgument, "").hint("no token was fed since the beginning or a cut")
            );
        }
        // The penalty changes logits, and the caller may look at them or choose again.
        self.logits.copy_from_slice(logits);
        self.sampler.sample(self.logits, self.session.tokens(), self.candidates)
    }

    /// See `edge_generate`; `say` takes text and answers whether to go on.
    pub(crate) fn generate(
        &mut self,
        prompt: &[u8],
        flags: u32,
        max_tokens: u32,
        mut say: impl FnMut(&[u8]) -> bool,
    ) -> Result<usize> {
        self.feed_prompt(prompt, flags)?;
        let mut stream = Utf8Stream::new();
        let mut count = 0;
        while count < max_tokens as usize {
            let token = self.next()?;
            if self.is_end(token)? {
                break;
            }
            let Text { tokenizer, piece, utf8, .. } = self.text()?;
            let piece_length = tokenizer.piece(token, piece)?;
            let length = stream.push(&piece[..piece_length], utf8)?;
            let go_on = length == 0 || say(&utf8[..length]);
            self.feed(&[token])?;
            count += 1;
            if !go_on {
                return Ok(count);
            }
        }
        let utf8 = &mut *self.text()?.utf8;
        let length = stream.finish(utf8)?;
        if length > 0 {
            say(&utf8[..length]);
        }
        Ok(count)
    }

    fn feed_prompt(&mut self, prompt: &[u8], flags: u32) -> Result<()> {
        let mut options = encode(flags)?;
        options.add_bos &= self.session.position() == 0;
        let Text { tokenizer, scratch, ids, .. } = self.text()?;
        let count = tokenizer.encode(prompt, options, scratch, ids)?;
        // Lent out for the call, since feeding needs all of the session.
        let ids = core::mem::take(ids);
        let result = self.feed(&ids[..count]);
        self.text()?.ids = ids;
        result
    }
}

/// The caller's flags as the tokenizer has them.
fn encode(flags: u32) -> Result<Encode> {
    if flags & !(EDGE_SPECIAL | EDGE_NO_BOS) != 0 {
        return Err(Error::new(Code::BadArgument, "flags").found(u64::from(flags), 0));
    }
    Ok(Encode { add_bos: flags & EDGE_NO_BOS == 0, parse_special: flags & EDGE_SPECIAL != 0 })
}
