//! Speculative decoding (Leviathan et al. 2022, arXiv 2211.17192): a small model drafts, the model that counts
//! verifies all drafted tokens in one batch.
//!
//! Each drafted token `d` was drawn from the draft's distribution `q`; it stays with probability
//! `min(1, p(d) / q(d))` under the target's distribution `p`, otherwise a token is drawn from what `p` has more than
//! `q`. What comes out is distributed exactly as without a draft; greedily, it is the same tokens. (With 32 tokens or
//! more in a batch, [`Kernels::quantize_for`](crate::kernels::Kernels::quantize_for) says what may differ.)

use super::{Sampler, Session};
use crate::format::{Array, Gguf, ValueType};
use crate::{Code, Error, Result};

/// Two sessions at work together, one of which drafts.
///
/// The sampler's settings apply to both distributions, penalties and filters included.
#[derive(Debug)]
pub struct Speculator<'b> {
    /// `[tokens + 1, vocab]`: the draft's distributions, then room for one of the target's.
    probabilities: &'b mut [f32],
    /// `[vocab]`.
    candidates: &'b mut [u32],
    tokens: usize,
    /// Chosen, but not fed to anybody.
    pending: Option<u32>,
    drafted: u64,
    accepted: u64,
}

/// Refuses two files that do not give every token the same text: a draft would speak another language.
///
/// # Errors
/// [`Code::OtherVocabulary`] with the first token that differs, or the numbers of tokens;
/// [`Code::MissingKey`] or [`Code::WrongKeyType`] for a file without a vocabulary.
pub fn same_vocabulary(target: &Gguf<'_>, draft: &Gguf<'_>) -> Result<()> {
    let (target, draft) = (texts(target)?, texts(draft)?);
    let error = |found: usize, expected: usize| {
        Error::new(Code::OtherVocabulary, TOKENS).found(found as u64, expected as u64)
    };
    if target.len() != draft.len() {
        return Err(error(draft.len(), target.len()).hint("tokens"));
    }
    match target.iter().zip(draft.iter()).position(|(target, draft)| target != draft) {
        Some(token) => Err(error(token, token).hint("the same text for this token")),
        None => Ok(()),
    }
}

const TOKENS: &str = "tokenizer.ggml.tokens";

/// The texts of a file's tokens.
fn texts<'f>(file: &Gguf<'f>) -> Result<Array<'f>> {
    let list = file.require(TOKENS)?.as_array().filter(|list| list.element_type() == ValueType::String);
    list.ok_or_else(|| Error::new(Code::WrongKeyType, TOKENS).hint("list of texts"))
}

impl<'b> Speculator<'b> {
    /// Elements of the first buffer of [`Speculator::new`].
    pub fn floats(vocab: usize, tokens: usize) -> usize {
        vocab.saturating_mul(tokens.saturating_add(1))
    }

    /// For drafts of `tokens` tokens from a vocabulary of `vocab`; `probabilities` must hold
    /// [`Speculator::floats`], `candidates` one for each token of the vocabulary.
    ///
    /// # Errors
    /// [`Code::BadArgument`] for no tokens; [`Code::BufferTooSmall`].
    pub fn new(
        vocab: usize,
        tokens: usize,
        probabilities: &'b mut [f32],
        candidates: &'b mut [u32],
    ) -> Result<Self> {
        if tokens == 0 {
            return Err(Error::new(Code::BadArgument, "draft tokens").hint("at least 1"));
        }
        let needed = [Self::floats(vocab, tokens), vocab];
        let held = [probabilities.len(), candidates.len()];
        for (held, needed) in held.into_iter().zip(needed) {
            if held < needed {
                return Err(Error::new(Code::BufferTooSmall, "draft").found(held as u64, needed as u64));
            }
        }
        let (probabilities, candidates) = (&mut probabilities[..needed[0]], &mut candidates[..vocab]);
        Ok(Self { probabilities, candidates, tokens, pending: None, drafted: 0, accepted: 0 })
    }

    /// Drafted tokens so far, and how many of them stayed.
    pub fn counts(&self) -> (u64, u64) {
        (self.drafted, self.accepted)
    }

    /// Chooses the next tokens into the front of `out`, at least one and at most one more than are drafted,
    /// and answers how many. All but the last are in the target's sequence; the last is fed by the next round.
    /// In the first round it is drawn from the target's logits.
    ///
    /// # Errors
    /// [`Code::BufferTooSmall`] for less than `tokens + 1` in `out`; [`Code::OtherVocabulary`] if the sessions'
    /// vocabularies are not as large as this was made for; [`Code::BadArgument`] if a batch of either session is
    /// smaller than a draft; [`Code::ContextFull`] if the target has no room for the token that was
    /// chosen last; what the sessions or the sampler refuse.
    pub fn round(
        &mut self,
        target: &mut Session<'_>,
        draft: &mut Session<'_>,
        sampler: &mut Sampler,
        out: &mut [u32],
    ) -> Result<usize> {
        let vocab = self.candidates.len();
        for session in [&*target, &*draft] {
            if session.spec().vocab != vocab {
                let found = session.spec().vocab as u64;
                return Err(Error::new(Code::OtherVocabulary, "").found(found, vocab as u64).hint("tokens"));
            }
            if session.limits.batch < self.tokens {
                return Err(Error::new(Code::BadArgument, "batch")
                    .found(session.limits.batch as u64, self.tokens as u64)
                    .hint("at least as many as are drafted"));
            }
        }
        if out.len() <= self.tokens {
            return Err(
                Error::new(Code::BufferTooSmall, "out").found(out.len() as u64, self.tokens as u64 + 1)
            );
        }
        let (drafts, p) = self.probabilities.split_at_mut(vocab * self.tokens);
        // What both have room for behind the token that is pending.
        let start = target.position();
        let room = |session: &Session<'_>| session.context().saturating_sub(start + 1);
        let count = self.tokens.min(room(target)).min(room(draft));
        let Some(first) = self.pending.filter(|_| count > 0) else {
            // Nothing to verify: the beginning, or the end of the context.
            if let Some(token) = self.pending {
                target.feed(&[token])?;
            }
            if target.logits().len() != vocab {
                return Err(Error::new(Code::BadArgument, "").hint("no token was fed"));
            }
            p.copy_from_slice(target.logits());
            sampler.distribution(p, target.tokens(), self.candidates)?;
            out[0] = sampler.pick(p);
            self.pending = Some(out[0]);
            return Ok(1);
        };
        let shared = target.tokens().iter().zip(draft.tokens()).take_while(|(a, b)| a == b).count();
        if draft.truncate(shared).is_err() {
            draft.truncate(0)?;
        }
        draft.feed(&target.tokens()[draft.position()..])?;
        draft.feed(&[first])?;
        for (index, q) in drafts.chunks_exact_mut(vocab).take(count).enumerate() {
            q.copy_from_slice(draft.logits());
            sampler.distribution(q, draft.tokens(), self.candidates)?;
            out[index] = sampler.pick(q);
            draft.feed(&[out[index]])?;
        }
        // The token that is pending goes in front of those that were drafted.
        out.copy_within(..count, 1);
        out[0] = first;
        let (mut stayed, mut next) = (0, None);
        let mut judged = Ok(());
        let candidates = &mut *self.candidates;
        target.feed_all(&out[..=count], &mut |row, logits| {
            if next.is_some() || judged.is_err() {
                return;
            }
            p.copy_from_slice(logits);
            let recent = draft.tokens().get(..start + 1 + row).unwrap_or(&[]);
            judged = sampler.distribution(p, recent, candidates);
            if judged.is_err() {
                return;
            }
            next = if row < count {
                sampler.judge(p, &drafts[row * vocab..][..vocab], out[row + 1])
            } else {
                Some(sampler.pick(p))
            };
            stayed += usize::from(row < count && next.is_none());
        })?;
        self.drafted += count as u64;
        self.accepted += stayed as u64;
        target.truncate(start + 1 + stayed)?;
        judged?;
        let next = next.unwrap_or(0);
        out.copy_within(1..=stayed, 0);
        out[stayed] = next;
        self.pending = Some(next);
        Ok(stayed + 1)
    }
}
