//! [`DecoderSpec`]: the hyper-parameters and switches of a decoder-only transformer.

use crate::{Config, Family, LayerSet, Rope, RopeScaling, SpecError, math};

/// Everything that tells one decoder-only transformer from another, besides its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecoderSpec {
    /// The row of the family table that this specification was read with.
    pub family: &'static Family,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Inner width of the feed-forward network.
    pub ffn: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Longest context that the model was trained for, in tokens.
    pub context: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The same for the layers in `local`, where it is another.
    pub local_rope: Option<Rope>,
    /// Elements of a head that are rotated, from the first on; even.
    pub rope_dims: usize,
    /// Tokens that a layer in `local` attends to, its own among them; 0 if there is no such layer.
    pub window: usize,
    /// Layers with a sliding window.
    pub local: LayerSet,
    /// What scores are multiplied by, where that is not `1 / sqrt(head_dim)`.
    pub attn_scale: Option<f32>,
    /// Scores `x` become `cap * tanh(x / cap)`; 0 if they stay as they are.
    pub attn_soft_cap: f32,
    /// The same for logits.
    pub final_soft_cap: f32,
    /// What embeddings are multiplied by.
    pub embedding_scale: f32,
    /// Every head of queries and keys is normalized before it is rotated.
    pub qk_norm: bool,
    /// Attention and feed-forward network are normalized once more before they are added to the residual
    /// stream.
    pub post_norms: bool,
    /// Query, key and value projections carry a bias.
    pub qkv_bias: bool,
    /// The output projection of the attention carries a bias.
    pub attn_out_bias: bool,
    /// Gate of the feed-forward network.
    pub activation: Activation,
    /// The output head is the embedding table.
    pub tied_embeddings: bool,
}

/// Activation of the gated feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)` (SwiGLU).
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` (GeGLU; Hendrycks and Gimpel 2016, arXiv
    /// 1606.08415, section 2).
    GeluTanh,
}

impl DecoderSpec {
    /// Most blocks that a file may ask for.
    pub const MAX_LAYERS: usize = 512;

    /// A specification without layers and sizes that has all switches as in Llama; where readers start.
    pub fn plain(family: &'static Family) -> Self {
        Self {
            family,
            layers: 0,
            hidden: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            ffn: 0,
            vocab: 0,
            context: 0,
            norm_eps: 1e-6,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            local_rope: None,
            rope_dims: 0,
            window: 0,
            local: LayerSet::EMPTY,
            attn_scale: None,
            attn_soft_cap: 0.0,
            final_soft_cap: 0.0,
            embedding_scale: 1.0,
            qk_norm: false,
            post_norms: false,
            qkv_bias: false,
            attn_out_bias: false,
            activation: Activation::Silu,
            tied_embeddings: false,
        }
    }

    /// Most tokens that `layer` attends to, its own among them; 0 means all.
    pub fn window_of(&self, layer: usize) -> usize {
        if self.local.contains(layer) { self.window } else { 0 }
    }

    /// The rotary embedding of `layer`.
    pub fn rope_of(&self, layer: usize) -> &Rope {
        match &self.local_rope {
            Some(rope) if self.local.contains(layer) => rope,
            _ => &self.rope,
        }
    }

    /// What scores are multiplied by.
    pub fn score_scale(&self) -> f32 {
        self.attn_scale.unwrap_or_else(|| 1.0 / math::sqrt(self.head_dim as f64) as f32)
    }

    /// `query_pre_attn_scalar` of Gemma's files, whose inverse square root scores are multiplied by.
    pub fn query_pre_attn_scalar(&self) -> f64 {
        let scale = f64::from(self.score_scale());
        let exact = 1.0 / (scale * scale);
        // What files say is an integer, and half of an f32's precision tells which.
        let nearest = (exact + 0.5) as u64 as f64;
        if (exact - nearest).abs() < 1e-6 * exact { nearest } else { exact }
    }

    /// With the scores' scale that `query_pre_attn_scalar` stands for.
    pub(crate) fn with_query_pre_attn_scalar(self, scalar: f64) -> Self {
        let scale = (scalar != self.head_dim as f64).then(|| 1.0 / math::sqrt(scalar) as f32);
        Self { attn_scale: scale, ..self }
    }

    /// With a window of `window` tokens in the layers `local`; a window of 0 is none.
    pub(crate) fn with_windows(self, window: usize, local: LayerSet) -> Self {
        if window == 0 || local.is_empty() {
            return Self { window: 0, local: LayerSet::EMPTY, local_rope: None, ..self };
        }
        Self { window, local, ..self }
    }

    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Parameters of the model, counting a tied head once.
    pub fn parameters(&self) -> u64 {
        let attention = self.hidden * (2 * self.q_width() + 2 * self.kv_width());
        let bias = if self.qkv_bias { self.q_width() + 2 * self.kv_width() } else { 0 }
            + if self.attn_out_bias { self.hidden } else { 0 };
        let norms = if self.post_norms { 4 } else { 2 } * self.hidden
            + if self.qk_norm { 2 * self.head_dim } else { 0 };
        let block = attention + bias + 3 * self.hidden * self.ffn + norms;
        let tables = if self.tied_embeddings { 1 } else { 2 } * self.vocab * self.hidden;
        (self.layers * block + tables + self.hidden) as u64
    }

    /// Refuses what no real model has, so that later arithmetic on these numbers cannot overflow.
    pub fn validate(self) -> Result<Self, SpecError> {
        let bounds: [(&'static str, usize, usize, usize); 9] = [
            ("block_count", self.layers, 1, Self::MAX_LAYERS),
            ("embedding_length", self.hidden, 1, 1 << 16),
            ("attention.head_count", self.heads, 1, 1 << 10),
            ("attention.head_count_kv", self.kv_heads, 1, self.heads),
            ("attention.key_length", self.head_dim, 2, 1 << 10),
            ("rope.dimension_count", self.rope_dims, 2, self.head_dim),
            ("feed_forward_length", self.ffn, 1, 1 << 19),
            ("vocab_size", self.vocab, 1, 1 << 21),
            ("context_length", self.context, 1, 1 << 24),
        ];
        for (key, found, min, max) in bounds {
            if found < min || found > max {
                return Err(SpecError::OutOfRange {
                    key,
                    found: found as f64,
                    min: min as f64,
                    max: max as f64,
                });
            }
        }
        let numbers: [(&'static str, f64, f64, f64); 7] = [
            ("rope.freq_base", self.rope.theta, 1.0, 1e12),
            ("rope.freq_base_swa", self.local_rope.map_or(1.0, |rope| rope.theta), 1.0, 1e12),
            ("rope.scaling.attn_factor", f64::from(self.rope.scaling.magnitude()), 1e-3, 1e3),
            ("attention.scale", f64::from(self.score_scale()), 1e-6, 1e6),
            ("attn_logit_softcapping", f64::from(self.attn_soft_cap), 0.0, 1e6),
            ("final_logit_softcapping", f64::from(self.final_soft_cap), 0.0, 1e6),
            ("embedding_scale", f64::from(self.embedding_scale), 1e-6, 1e6),
        ];
        for (key, found, min, max) in numbers {
            if !(found >= min && found <= max) {
                return Err(SpecError::OutOfRange { key, found, min, max });
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(SpecError::Unsupported {
                key: "attention.head_count_kv",
                expected: "a divisor of the number of query heads",
            });
        }
        for (key, width) in
            [("attention.key_length", self.head_dim), ("rope.dimension_count", self.rope_dims)]
        {
            if !width.is_multiple_of(2) {
                return Err(SpecError::Unsupported { key, expected: "an even width" });
            }
        }
        if !(self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(SpecError::OutOfRange {
                key: "attention.layer_norm_rms_epsilon",
                found: f64::from(self.norm_eps),
                min: 0.0,
                max: 1.0,
            });
        }
        Ok(self)
    }
}

/// `config.uint(key)` as a size, or the error that names the key.
pub(crate) fn required(config: &dyn Config, key: &'static str) -> Result<usize, SpecError> {
    let value = config.uint(key).ok_or(SpecError::Missing { key })?;
    size(value, key)
}

/// `value` as a size; more than 2^40 is refused before it can overflow anything.
pub(crate) fn size(value: u64, key: &'static str) -> Result<usize, SpecError> {
    const MAX: u64 = 1 << 40;
    match usize::try_from(value) {
        Ok(size) if value <= MAX => Ok(size),
        _ => Err(SpecError::OutOfRange { key, found: value as f64, min: 0.0, max: MAX as f64 }),
    }
}
