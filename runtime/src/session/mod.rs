//! A model at work: a plan of its memory, the forward step over a KV cache, and the choice of the next
//! token.
//!
//! [`Plan`] checks the file and counts the bytes; [`Session`] takes an arena of that size and never asks
//! for more. Nothing here knows a model family (the specification does) or an instruction set (the
//! kernels do), and nothing allocates.

mod adapters;
mod arena;
mod cache;
mod forward;
mod plan;
mod rope;
mod sampler;
mod saved;
mod shift;
mod speculative;
mod weights;

pub use adapters::ADAPTER_BASE;
pub use cache::CacheType;
pub use plan::{Limits, Plan};
pub use sampler::{Sampler, SamplerConfig, argmax};
pub use speculative::{Speculator, same_vocabulary};

use crate::format::Gguf;
use crate::kernels::Kernels;
use crate::workers::Workers;
use crate::{Code, Error, Result};
use adapters::Adapters;
use arena::Arena;
use cache::Cache;
use core::ops::Range;
use edge_models::DecoderSpec;
use forward::{Buffers, Step};
use rope::Angles;
use weights::{Model, Weights, read_spec};

/// One sequence of tokens on one model.
pub struct Session<'a> {
    spec: DecoderSpec,
    /// SHA-256 of the GGUF file that a pack was made from.
    source: Option<&'a [u8; 32]>,
    limits: Limits,
    kernels: &'static Kernels,
    workers: &'a dyn Workers,
    model: Model<'a>,
    /// Those of layers that see all, and those of layers with a window, if they are others.
    angles: [Option<Angles<'a>>; 2],
    cache: Cache<'a>,
    buffers: Buffers<'a>,
    /// `[logits_rows, vocab]`.
    logits: &'a mut [f32],
    /// The row of `logits` that belongs to the last token.
    last_row: Option<usize>,
    /// The tokens so far, and room for the rest of the context.
    history: &'a mut [u32],
    position: usize,
    /// What `position` has been at most since the sequence began: windows have lost what lies far behind.
    highest: usize,
    /// The first position of which windows have anything.
    lowest: usize,
}

impl core::fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { spec, limits, kernels, position, .. } = self;
        write!(f, "Session({}, {}, {limits:?}, at {position})", spec.family.name, kernels.name())
    }
}

impl<'a> Session<'a> {
    /// Begins a session on the file that `plan` was made from. The arena may hold anything and start
    /// anywhere; `workers` share the large matrices.
    ///
    /// # Errors
    /// [`Code::ArenaTooSmall`] if it has less than [`Plan::arena_bytes`]; [`Code::BadArgument`] if there
    /// are more threads than planned or the file is another one.
    pub fn new(
        file: &Gguf<'a>,
        plan: &Plan,
        kernels: &'static Kernels,
        workers: &'a dyn Workers,
        arena: &'a mut [u8],
    ) -> Result<Self> {
        if arena.len() < plan.arena_bytes() {
            return Err(
                Error::new(Code::ArenaTooSmall, "arena").found(arena.len() as u64, plan.arena_bytes() as u64)
            );
        }
        let limits = plan.limits();
        if workers.count() > limits.workers {
            return Err(Error::new(Code::BadArgument, "workers")
                .found(workers.count() as u64, limits.workers as u64)
                .hint("more threads than the plan allows"));
        }
        let spec = *plan.spec();
        if read_spec(file)? != spec {
            return Err(Error::new(Code::BadArgument, "file").hint("not the one that the plan was made from"));
        }
        let sizes = plan.sizes();
        let mut arena = Arena::new(arena);
        let weights = Weights { file, spec: &spec };
        let vectors = arena.take(sizes.vectors)?;
        let model = weights.load(&mut arena, vectors)?;
        let mut angles = [None, None];
        for (kind, angles) in angles.iter_mut().enumerate().take(sizes.ropes) {
            let source = weights.frequencies(kind, limits.context)?;
            *angles = Some(Angles {
                frequencies: arena.build(sizes.frequencies, |index| source.get(index))?,
                magnitude: source.magnitude(),
                cos: arena.take(sizes.angles)?,
                sin: arena.take(sizes.angles)?,
            });
        }
        let cache = Cache::new(&mut arena, &sizes.cache, &spec)?;
        let buffers = Buffers {
            residual: arena.take(sizes.residual)?,
            narrow: arena.take(sizes.narrow)?,
            narrow_quants: arena.take(sizes.narrow_quants)?,
            wide: arena.take(sizes.wide)?,
            wide_quants: arena.take(sizes.wide_quants)?,
            outputs: arena.take(sizes.outputs)?,
            adapters: Adapters::new(&mut arena, &sizes.adapters)?,
        };
        let logits = arena.take(sizes.logits)?;
        let history = arena.take(sizes.history)?;
        Ok(Self {
            spec,
            source: file.packed_from(),
            limits,
            kernels,
            workers,
            model,
            angles,
            cache,
            buffers,
            logits,
            last_row: None,
            history,
            position: 0,
            highest: 0,
            lowest: 0,
        })
    }

    /// Adds tokens to the sequence, in batches; afterwards [`Session::logits`] are those after the last.
    ///
    /// # Errors
    /// [`Code::BadToken`] or [`Code::ContextFull`]; then nothing was added.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        self.check(tokens)?;
        let mut left = tokens.len();
        for batch in tokens.chunks(self.limits.batch) {
            left -= batch.len();
            // Only the very last token's logits are asked for.
            let wanted = if left == 0 { batch.len() - 1..batch.len() } else { 0..0 };
            self.step(batch, wanted)?;
        }
        if tokens.is_empty() { Ok(()) } else { self.head(0, 1) }
    }

    /// As [`Session::feed`]; `sink` gets the index of every token and the logits after it, `[vocab]`.
    ///
    /// # Errors
    /// As [`Session::feed`].
    pub fn feed_all(&mut self, tokens: &[u32], sink: &mut dyn FnMut(usize, &[f32])) -> Result<()> {
        self.check(tokens)?;
        let Limits { batch, logits_rows, .. } = self.limits;
        for (index, tokens) in tokens.chunks(batch).enumerate() {
            self.step(tokens, 0..tokens.len())?;
            for first in (0..tokens.len()).step_by(logits_rows) {
                let count = logits_rows.min(tokens.len() - first);
                self.head(first, count)?;
                for (row, logits) in self.logits.chunks_exact(self.spec.vocab).take(count).enumerate() {
                    sink(index * batch + first + row, logits);
                }
            }
        }
        Ok(())
    }

    /// Logits after the last token, `[vocab]`; empty while there are none, that is before the first
    /// [`Session::feed`] and after [`Session::truncate`].
    pub fn logits(&self) -> &[f32] {
        match self.last_row {
            Some(row) => &self.logits[row * self.spec.vocab..][..self.spec.vocab],
            None => &[],
        }
    }

    /// Number of tokens in the sequence.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Number of tokens that fit.
    pub fn context(&self) -> usize {
        self.limits.context
    }

    /// The tokens of the sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.history[..self.position]
    }

    /// Forgets all tokens from `position` on, and with them the logits; nothing happens if there are none.
    ///
    /// # Errors
    /// [`Code::Forgotten`] if a layer with a window no longer has the tokens in front of `position`, which
    /// it keeps for a batch more than its window. To forget everything is always possible.
    pub fn truncate(&mut self, position: usize) -> Result<()> {
        if position >= self.position {
            return Ok(());
        }
        if !saved::has_rows(&self.spec, &self.limits, position, [self.lowest, self.highest]) {
            let kept = self.highest.saturating_sub(self.limits.batch);
            return Err(Error::new(Code::Forgotten, "").found(position as u64, kept as u64));
        }
        if position == 0 {
            (self.highest, self.lowest) = (0, 0);
        }
        self.position = position;
        self.last_row = None;
        Ok(())
    }

    /// Keeps of the sequence what `tokens` begin with, and forgets the rest; answers how many are kept, which
    /// need not be fed again. At least the last of `tokens` has to be, because nothing else gives its logits.
    /// Where windows have lost what lies in front of the difference, nothing is kept.
    pub fn reuse(&mut self, tokens: &[u32]) -> usize {
        let shared = self.tokens().iter().zip(tokens).take_while(|(old, new)| old == new).count();
        let shared = shared.min(tokens.len().saturating_sub(1));
        if self.truncate(shared).is_err() {
            // Possible everywhere.
            let _ = self.truncate(0);
        }
        self.position
    }

    /// Puts the LoRA adapter in `file` into `slot`, in place of the one that is there; what tokens are fed from
    /// now on is computed with it, times `scale`, besides those of other slots. Tokens that are in the
    /// sequence stay as they were computed. `file` is copied and not needed afterwards.
    ///
    /// # Errors
    /// What is wrong with the file or does not fit the model, with its key or tensor, [`Code::OtherBase`] if it was
    /// made for another file than the one that this pack was made from, or [`Code::OutOfRange`] for a slot or a rank beyond the limits; then the slot stays as it was. It is empty after
    /// [`Code::OutOfRange`] for an element that is not finite.
    pub fn attach(&mut self, slot: usize, file: &Gguf<'_>, scale: f32) -> Result<()> {
        // The outputs of a batch are as wide as the widest matrix, and nobody needs them between batches.
        let Buffers { outputs, adapters, .. } = &mut self.buffers;
        adapters::check_base(file, self.source)?;
        adapters.attach(slot, file, scale, &self.spec, self.model.layers, outputs)
    }

    /// Changes what an adapter is multiplied by; 0 switches it off without taking it out.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] for a slot beyond the limits, [`Code::BadArgument`] for a scale that is not finite.
    pub fn set_adapter_scale(&mut self, slot: usize, scale: f32) -> Result<()> {
        self.buffers.adapters.set_scale(slot, scale)
    }

    /// Empties a slot.
    ///
    /// # Errors
    /// [`Code::OutOfRange`] for a slot beyond the limits.
    pub fn detach(&mut self, slot: usize) -> Result<()> {
        self.buffers.adapters.detach(slot)
    }

    /// The model.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// Refuses tokens before any of them has changed anything.
    fn check(&self, tokens: &[u32]) -> Result<()> {
        if tokens.len() > self.limits.context - self.position {
            let wanted = self.position.saturating_add(tokens.len());
            return Err(Error::new(Code::ContextFull, "").found(wanted as u64, self.limits.context as u64));
        }
        match tokens.iter().find(|token| **token as usize >= self.spec.vocab) {
            Some(token) => {
                Err(Error::new(Code::BadToken, "").found(u64::from(*token), self.spec.vocab as u64))
            }
            None => Ok(()),
        }
    }

    /// Takes one batch through all layers; the residual stream of its tokens `wanted`, whose logits are asked for,
    /// stays in the buffers. Of the others the last layer needs keys and values alone.
    fn step(&mut self, tokens: &[u32], wanted: Range<usize>) -> Result<()> {
        self.last_row = None;
        let Self { spec, model, angles, cache, buffers, .. } = self;
        for angles in angles.iter_mut().flatten() {
            angles.fill(self.position, tokens.len());
        }
        for (token, row) in tokens.iter().zip(buffers.residual.chunks_exact_mut(spec.hidden)) {
            model.embedding.dequantize(*token as usize, row)?;
            if spec.embedding_scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= spec.embedding_scale);
            }
        }
        for (index, layer) in model.layers.iter().enumerate() {
            let Some(angles) = &angles[layer.angles] else { continue };
            let step = Step {
                spec,
                kernels: self.kernels,
                workers: self.workers,
                position: self.position,
                first: 0,
                tokens: tokens.len(),
                layer: index,
            };
            let wanted = if index + 1 < model.layers.len() { 0..tokens.len() } else { wanted.clone() };
            let cache = cache.layer(spec, &self.limits, index);
            let step = step.attention(layer, angles, cache, buffers, wanted)?;
            if step.tokens > 0 {
                step.feed_forward(layer, buffers)?;
            }
        }
        self.history[self.position..][..tokens.len()].copy_from_slice(tokens);
        self.position += tokens.len();
        self.highest = self.highest.max(self.position);
        Ok(())
    }

    /// Logits of `count` of the tokens that the last batch was asked for, from the one at `first` on.
    fn head(&mut self, first: usize, count: usize) -> Result<()> {
        let Self { spec, model, buffers, .. } = self;
        let logits = &mut self.logits[..count * spec.vocab];
        let step = Step {
            spec,
            kernels: self.kernels,
            workers: self.workers,
            position: self.position,
            first: 0,
            tokens: count,
            layer: spec.layers,
        };
        step.head(model.output_norm, &model.head, [first, count], buffers, logits)?;
        self.last_row = Some(count - 1);
        Ok(())
    }
}
