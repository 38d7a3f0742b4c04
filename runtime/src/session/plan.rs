//! What a session will need, known before any memory is touched.

use super::adapters::AdapterSizes;
use super::arena::{SLACK, padded_bytes};
use super::cache::{CacheSizes, CacheType};
use super::weights::{Layer, Weights, kinds_of_rope, read_spec};
use crate::format::{DType, Gguf};
use crate::kernels::{ActivationsMut, MAX_RANK};
use crate::{Code, Error, Result};
use edge_models::DecoderSpec;

/// How much a session can do at once. More of anything costs memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of KV cache; 0 is what the model was trained for. More than that is allowed, at the model's
    /// own risk.
    pub context: usize,
    /// Tokens that prefill computes together, at least 1.
    pub batch: usize,
    /// Tokens for which [`super::Session::feed_all`] computes logits together, at least 1; 1 will do for
    /// generation.
    pub logits_rows: usize,
    /// Most threads that will work, at least 1.
    pub workers: usize,
    /// Slots for adapters that can be attached at the same time.
    pub adapters: usize,
    /// Largest rank of an adapter, 1 to 256; of no account without slots.
    pub adapter_rank: usize,
    /// How keys and values are kept.
    pub cache: CacheType,
}

impl Limits {
    /// What `adapter_rank` may be at most.
    pub const MAX_ADAPTER_RANK: usize = MAX_RANK;
}

impl Default for Limits {
    /// What generation with one thread needs: the model's context, batches of 32, no adapters.
    fn default() -> Self {
        Self {
            context: 0,
            batch: 32,
            logits_rows: 1,
            workers: 1,
            adapters: 0,
            adapter_rank: 0,
            cache: CacheType::Auto,
        }
    }
}

/// A model file that was found to be sound, and the memory that a session on it needs.
#[derive(Clone, Debug)]
pub struct Plan {
    spec: DecoderSpec,
    limits: Limits,
    sizes: Sizes,
    arena_bytes: usize,
}

/// Elements of each slice in the arena.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// Norms and biases of all layers, `f32`.
    pub(super) vectors: usize,
    /// Kinds of rotary angles.
    pub(super) ropes: usize,
    /// Inverse frequencies of one kind, `f64`.
    pub(super) frequencies: usize,
    pub(super) cache: CacheSizes,
    /// Tokens of the sequence, `u32`.
    pub(super) history: usize,
    /// The residual stream, `f32`.
    pub(super) residual: usize,
    /// Inputs of the projections from the residual stream and of the attention's output, `f32`.
    pub(super) narrow: usize,
    /// Their integers, `i8`.
    pub(super) narrow_quants: usize,
    /// Input of the down projection, `f32`.
    pub(super) wide: usize,
    /// Its integers, `i8`.
    pub(super) wide_quants: usize,
    /// Outputs of matrices that no other buffer takes, `f32`.
    pub(super) outputs: usize,
    /// Cosines of one kind, and as many sines, `f32`.
    pub(super) angles: usize,
    /// Logits, `f32`.
    pub(super) logits: usize,
    pub(super) adapters: AdapterSizes,
}

impl Sizes {
    /// `None` if a number is beyond the address space.
    fn new(spec: &DecoderSpec, limits: &Limits, cache: CacheType, adapters: AdapterSizes) -> Option<Self> {
        let (hidden, q_width, ffn) = (spec.hidden, spec.q_width(), spec.ffn);
        let batch = |per_token: usize| per_token.checked_mul(limits.batch);
        let rows = |per_token: usize| per_token.checked_mul(ActivationsMut::padded_tokens(limits.batch));
        let floats = ActivationsMut::floats_per_token;
        let quants = ActivationsMut::quants_per_token;
        Some(Self {
            vectors: Weights::layer_vectors(spec).checked_mul(spec.layers)?.checked_add(hidden)?,
            ropes: kinds_of_rope(spec),
            frequencies: spec.rope_dims / 2,
            cache: CacheSizes::new(spec, limits, cache)?,
            history: limits.context,
            residual: batch(hidden)?,
            narrow: rows(floats(hidden).max(floats(q_width)))?,
            narrow_quants: rows(quants(hidden).max(quants(q_width)))?,
            wide: rows(floats(ffn))?,
            wide_quants: rows(quants(ffn))?,
            outputs: batch((q_width + 2 * spec.kv_width()).max(hidden).max(ffn))?,
            angles: batch(spec.rope_dims / 2)?,
            logits: spec.vocab.checked_mul(limits.logits_rows)?,
            adapters,
        })
    }

    /// Bytes of an arena at any address.
    fn arena_bytes(&self, spec: &DecoderSpec) -> Option<usize> {
        let mut total = padded_bytes::<Layer>(spec.layers)?;
        for _ in 0..self.ropes {
            total = total.checked_add(padded_bytes::<f64>(self.frequencies)?)?;
            for angles in [self.angles; 2] {
                total = total.checked_add(padded_bytes::<f32>(angles)?)?;
            }
        }
        for quants in [self.narrow_quants, self.wide_quants] {
            total = total.checked_add(padded_bytes::<i8>(quants)?)?;
        }
        let floats = [self.vectors, self.residual, self.narrow, self.wide, self.outputs, self.logits];
        total = total.checked_add(self.cache.arena_bytes()?)?;
        total = total.checked_add(padded_bytes::<u32>(self.history)?)?;
        for floats in floats {
            total = total.checked_add(padded_bytes::<f32>(floats)?)?;
        }
        total = total.checked_add(self.adapters.arena_bytes()?)?;
        // No object can have more than isize::MAX bytes.
        total.checked_add(SLACK).filter(|total| isize::try_from(*total).is_ok())
    }
}

impl Plan {
    /// Reads the specification of `file` and checks all its tensors.
    ///
    /// # Errors
    /// [`Code::UnknownFamily`] with the name that was found; [`Code::MissingKey`], [`Code::OutOfRange`] or
    /// [`Code::Unsupported`] with the key; [`Code::MissingTensor`], [`Code::WrongShape`],
    /// [`Code::UnsupportedType`] or, for one that nobody would read, [`Code::Unsupported`] with the tensor;
    /// [`Code::BadArgument`] with the limit that is 0, [`Code::OutOfRange`] if no machine has so much
    /// memory.
    pub fn new(file: &Gguf<'_>, limits: Limits) -> Result<Self> {
        for (name, limit) in
            [("batch", limits.batch), ("logits_rows", limits.logits_rows), ("workers", limits.workers)]
        {
            if limit == 0 {
                return Err(Error::new(Code::BadArgument, name).hint("at least 1"));
            }
        }
        let spec = read_spec(file)?;
        let weights = Weights { file, spec: &spec };
        weights.check()?;
        let cache = match (limits.cache, weights.main_type()?) {
            (CacheType::Auto, DType::F32) => CacheType::F32,
            (CacheType::Auto, _) => CacheType::F16,
            (cache, _) => cache,
        };
        cache.check(&spec)?;
        let context = if limits.context == 0 { spec.context } else { limits.context };
        let batch = limits.batch.min(context);
        let limits = Limits { context, batch, logits_rows: limits.logits_rows.min(batch), cache, ..limits };
        let adapters = AdapterSizes::new(&weights, limits.adapters, limits.adapter_rank, batch)?;
        let sizes = adapters.and_then(|adapters| Sizes::new(&spec, &limits, cache, adapters));
        match sizes.and_then(|sizes| Some((sizes, sizes.arena_bytes(&spec)?))) {
            Some((sizes, arena_bytes)) => Ok(Self { spec, limits, sizes, arena_bytes }),
            None => Err(Error::new(Code::OutOfRange, "context")
                .found(context as u64, spec.context as u64)
                .hint("the arena would not fit the address space")),
        }
    }

    /// Bytes that [`super::Session::new`] needs, wherever they start.
    pub fn arena_bytes(&self) -> usize {
        self.arena_bytes
    }

    /// Bytes of the arena that are slots of adapters.
    pub fn adapter_bytes(&self) -> usize {
        // Cannot overflow: it is part of `arena_bytes`.
        self.sizes.adapters.arena_bytes().unwrap_or(0)
    }

    /// Bytes of the arena that are KV cache.
    pub fn kv_bytes(&self) -> usize {
        // Cannot overflow: it is part of `arena_bytes`.
        self.sizes.cache.bytes().unwrap_or(0)
    }

    /// The model.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }

    /// The limits as they will be kept: a context of 0 replaced by the model's, the cache's type never `Auto`, a batch not above the
    /// context, logits rows not above the batch.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub(super) fn sizes(&self) -> &Sizes {
        &self.sizes
    }
}
