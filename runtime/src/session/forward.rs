//! The forward step: what a decoder-only transformer computes for a batch of tokens.
//!
//! Driven by the specification alone; it knows no family and no instruction set. Every token's numbers
//! are computed in the same order whatever the batch and the number of threads, so prefill and decode
//! agree bit for bit, but where kernels quantize large batches otherwise ([`Kernels::quantize_for`]).

use super::adapters::{Adapters, Target};
use super::cache::{LayerCache, Part};
use super::rope::Angles;
use super::weights::{Layer, Linear};
use crate::Result;
use crate::kernels::{Activations, ActivationsMut, Kernels, Matrix, Query, Scores};
use crate::workers::{Workers, for_each_chunk};
use core::ops::Range;
use edge_models::{Activation, DecoderSpec};

/// Multiplications below which other threads are not worth waking.
const WORTH_SHARING: usize = 1 << 15;
/// Tokens whose attention is one piece of work.
const TOKENS_TOGETHER: usize = 16;
/// Those where there are so many of them that each thread has two pieces all the same.
const MORE_TOGETHER: usize = 32;
/// Query heads that are handed to the kernel at once.
const LANES: usize = 96;

/// Room for everything between the embedding and the logits of one batch.
pub(super) struct Buffers<'a> {
    /// The residual stream, `[batch, hidden]`.
    pub(super) residual: &'a mut [f32],
    /// Input of the query, key, value, gate, up and head matrices, later the output of attention.
    pub(super) narrow: &'a mut [f32],
    pub(super) narrow_quants: &'a mut [i8],
    /// The gate, later the input of the down projection.
    pub(super) wide: &'a mut [f32],
    pub(super) wide_quants: &'a mut [i8],
    /// Queries, keys and values; what a block adds to the residual stream; the up projection.
    pub(super) outputs: &'a mut [f32],
    pub(super) adapters: Adapters<'a>,
}

/// One batch of tokens on its way through the layers.
#[derive(Clone, Copy)]
pub(super) struct Step<'s> {
    pub(super) spec: &'s DecoderSpec,
    pub(super) kernels: &'static Kernels,
    pub(super) workers: &'s dyn Workers,
    /// Position of the batch's first token.
    pub(super) position: usize,
    /// The first token of the batch that is still on its way.
    pub(super) first: usize,
    /// Number of tokens from there on, at most the batch.
    pub(super) tokens: usize,
    /// The layer that the batch has come to.
    pub(super) layer: usize,
}

impl<'s> Step<'s> {
    /// The keys and values of the batch are added to the layer's cache; then, for the tokens `wanted` of those on
    /// their way, `residual += post_norm(attention(norm(residual)))`. The others end here: answers the step
    /// of those that go on, which have moved to the front of the residual stream.
    pub(super) fn attention(
        &self,
        layer: &Layer,
        angles: &Angles,
        mut cache: LayerCache,
        buffers: &mut Buffers,
        wanted: Range<usize>,
    ) -> Result<Step<'s>> {
        let (spec, n) = (self.spec, self.tokens);
        let all = wanted.len() == n;
        let Buffers { residual, narrow, narrow_quants, outputs, adapters, .. } = buffers;
        let mut input = ActivationsMut::new(n, spec.hidden, narrow, narrow_quants)?;
        self.norm(residual, layer.attn_norm, input.values_mut());
        let input =
            self.kernels.quantize_for(&mut input, &[&layer.q.weight, &layer.k.weight, &layer.v.weight]);

        let kv_width = spec.kv_width();
        let (queries, rest) = outputs.split_at_mut(n * spec.q_width());
        let (keys, rest) = rest.split_at_mut(n * kv_width);
        let values = &mut rest[..n * kv_width];
        let queries = &mut queries[..wanted.len() * spec.q_width()];
        let [k, v] = [(Target::K, &layer.k.weight, &mut *keys), (Target::V, &layer.v.weight, &mut *values)];
        if all {
            self.adapted(&input, [(Target::Q, &layer.q.weight, &mut *queries), k, v], adapters)?;
        } else {
            self.adapted(&input, [k, v], adapters)?;
        }
        self.add_bias(&layer.k, keys);
        self.add_bias(&layer.v, values);
        self.place(keys, kv_width, layer.k_norm, angles);
        let position = self.position + self.first;
        cache.store(self.kernels, Part::Keys, position, keys, kv_width);
        cache.store(self.kernels, Part::Values, position, values, kv_width);

        let step = Step { first: self.first + wanted.start, tokens: wanted.len(), ..*self };
        if step.tokens == 0 {
            return Ok(step);
        }
        if !all {
            residual.copy_within(wanted.start * spec.hidden..wanted.end * spec.hidden, 0);
            let mut input = ActivationsMut::new(step.tokens, spec.hidden, narrow, narrow_quants)?;
            step.norm(residual, layer.attn_norm, input.values_mut());
            let input = step.kernels.quantize_for(&mut input, &[&layer.q.weight]);
            step.adapted(&input, [(Target::Q, &layer.q.weight, &mut *queries)], adapters)?;
        }
        step.attention_of(layer, angles, &cache, buffers)?;
        Ok(step)
    }

    /// What is left of [`Step::attention`] once the outputs begin with the queries of the tokens.
    fn attention_of(
        &self,
        layer: &Layer,
        angles: &Angles,
        cache: &LayerCache,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (spec, n) = (self.spec, self.tokens);
        let Buffers { residual, narrow, narrow_quants, outputs, adapters, .. } = buffers;
        let residual = &mut residual[..n * spec.hidden];
        let queries = &mut outputs[..n * spec.q_width()];
        self.add_bias(&layer.q, queries);
        self.place(queries, spec.q_width(), layer.q_norm, angles);
        cache.round(self.kernels, queries);

        let mut attended = ActivationsMut::new(n, spec.q_width(), narrow, narrow_quants)?;
        self.attend(layer.window, queries, cache, attended.values_mut());
        let attended = self.kernels.quantize_for(&mut attended, &[&layer.attn_out.weight]);
        let added = &mut outputs[..n * spec.hidden];
        let outs = [(Target::AttnOut, &layer.attn_out.weight, &mut *added)];
        self.adapted(&attended, outs, adapters)?;
        self.add_bias(&layer.attn_out, added);
        self.add(added, layer.attn_post_norm, residual);
        Ok(())
    }

    /// `residual += post_norm(down(activation(gate(x)) * up(x)))` with `x = norm(residual)`.
    pub(super) fn feed_forward(&self, layer: &Layer, buffers: &mut Buffers) -> Result<()> {
        let (spec, n) = (self.spec, self.tokens);
        let Buffers { residual, narrow, narrow_quants, wide, wide_quants, outputs, adapters } = buffers;
        let residual = &mut residual[..n * spec.hidden];
        let mut input = ActivationsMut::new(n, spec.hidden, narrow, narrow_quants)?;
        self.norm(residual, layer.ffn_norm, input.values_mut());
        let input = self.kernels.quantize_for(&mut input, &[&layer.gate, &layer.up]);

        let mut inner = ActivationsMut::new(n, spec.ffn, wide, wide_quants)?;
        let up = &mut outputs[..n * spec.ffn];
        let outs = [(Target::Gate, &layer.gate, inner.values_mut()), (Target::Up, &layer.up, &mut *up)];
        self.adapted(&input, outs, adapters)?;
        let up = &*up;
        self.rows(inner.values_mut(), spec.ffn, 16, &|token, gate| {
            let up = &up[token * spec.ffn..][..spec.ffn];
            match spec.activation {
                Activation::Silu => self.kernels.swiglu(gate, up),
                Activation::GeluTanh => self.kernels.geglu(gate, up),
            }
        });
        let inner = self.kernels.quantize_for(&mut inner, &[&layer.down]);
        let added = &mut outputs[..n * spec.hidden];
        self.adapted(&inner, [(Target::Down, &layer.down, &mut *added)], adapters)?;
        self.add(added, layer.ffn_post_norm, residual);
        Ok(())
    }

    /// Logits of the tokens `first..first + count` of those that came through, into `logits`, `[count, vocab]`.
    pub(super) fn head(
        &self,
        norm: &[f32],
        head: &Matrix,
        [first, count]: [usize; 2],
        buffers: &mut Buffers,
        logits: &mut [f32],
    ) -> Result<()> {
        let hidden = self.spec.hidden;
        let Buffers { residual, narrow, narrow_quants, .. } = buffers;
        let mut input = ActivationsMut::new(count, hidden, narrow, narrow_quants)?;
        self.norm(&residual[first * hidden..][..count * hidden], norm, input.values_mut());
        let input = self.kernels.quantize_for(&mut input, &[head]);
        self.matmul(head, &input, logits)?;
        if self.spec.final_soft_cap > 0.0 {
            self.rows(logits, self.spec.vocab, 16, &|_, row| {
                self.kernels.soft_cap(row, self.spec.final_soft_cap);
            });
        }
        Ok(())
    }

    /// Normalizes every row of `x`, `[tokens, hidden]`.
    fn norm(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let hidden = self.spec.hidden;
        self.rows(out, hidden, 4, &|token, out| {
            self.kernels.rms_norm(&x[token * hidden..][..hidden], weight, self.spec.norm_eps, out);
        });
    }

    /// `residual += post_norm(added)`, both `[tokens, hidden]`; without a weight there is no norm.
    fn add(&self, added: &mut [f32], post_norm: &[f32], residual: &mut [f32]) {
        if !post_norm.is_empty() {
            self.rows(added, self.spec.hidden, 4, &|_, row| {
                self.kernels.rms_norm_in_place(row, post_norm, self.spec.norm_eps);
            });
        }
        self.kernels.axpy(1.0, added, residual);
    }

    /// Normalizes, where there is a weight, and rotates every head of every row of `x`, `[tokens, width]`.
    fn place(&self, x: &mut [f32], width: usize, norm: &[f32], angles: &Angles) {
        let spec = self.spec;
        self.rows(x, width, 2, &|token, row| {
            let (cos, sin) = angles.of(self.first + token);
            for head in row.chunks_exact_mut(spec.head_dim) {
                if !norm.is_empty() {
                    self.kernels.rms_norm_in_place(head, norm, spec.norm_eps);
                }
                self.kernels.rope(&mut head[..spec.rope_dims], cos, sin, spec.family.gguf_rope);
            }
        });
    }

    /// Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), causal: token `t` of the batch
    /// sees the positions up to its own, of these the last `window` if that is not 0. Queries and `out` are
    /// `[tokens, heads * head_dim]`.
    fn attend(&self, window: usize, queries: &[f32], cache: &LayerCache, out: &mut [f32]) {
        let spec = self.spec;
        let (width, group) = (spec.head_dim, spec.heads / spec.kv_heads);
        let scores = Scores { scale: spec.score_scale(), soft_cap: spec.attn_soft_cap };
        let position = self.position + self.first;
        // Two multiplications for each element of each cached row.
        let cost = 2 * out.len().saturating_mul(position + self.tokens);
        // Some tokens together, because they see nearly the same rows; of one token each group of heads.
        let (q_width, alone) = (spec.q_width(), self.tokens == 1);
        let many = self.tokens / (2 * MORE_TOGETHER) >= self.workers.count();
        let together = if many { MORE_TOGETHER } else { TOKENS_TOGETHER };
        let part = if alone { group * width } else { together * q_width };
        for_each_chunk(self.workers, cost >= WORTH_SHARING, out, part, &|index, out| {
            let queries = &queries[index * part..][..out.len()];
            let (kv_heads, first_token) =
                if alone { (index..index + 1, 0) } else { (0..spec.kv_heads, index * together) };
            for (kv_at, kv_head) in kv_heads.enumerate() {
                let (cache, ring) = cache.view(kv_head * width);
                let mut lanes = [Query { at: 0, first: 0, end: 0 }; LANES];
                let mut count = 0;
                for (token, row) in (0..out.len()).step_by(if alone { part } else { q_width }).enumerate() {
                    let end = position + first_token + token + 1;
                    let first = if window == 0 { 0 } else { end.saturating_sub(window) };
                    for head in kv_at * group..(kv_at + 1) * group {
                        lanes[count] = Query { at: row + head * width, first, end };
                        count += 1;
                        if count == LANES {
                            self.kernels.attention(queries, width, &lanes, cache, ring, scores, out);
                            count = 0;
                        }
                    }
                }
                if count > 0 {
                    self.kernels.attention(queries, width, &lanes[..count], cache, ring, scores, out);
                }
            }
        });
    }

    /// `out += bias`, `[tokens, outputs]`.
    fn add_bias(&self, linear: &Linear, out: &mut [f32]) {
        if !linear.bias.is_empty() {
            for row in out.chunks_exact_mut(linear.bias.len()) {
                self.kernels.axpy(1.0, linear.bias, row);
            }
        }
    }

    /// `out = weight x`, and what adapters add, of each target.
    fn adapted<const N: usize>(
        &self,
        x: &Activations,
        mut outs: [(Target, &Matrix, &mut [f32]); N],
        adapters: &mut Adapters,
    ) -> Result<()> {
        let products = outs.each_mut().map(|(_, weight, out)| (*weight, &mut **out));
        self.kernels.matmuls(self.workers, x, products)?;
        for (target, weight, out) in outs {
            adapters.apply(self.kernels, self.workers, (self.layer, target), weight, x, out)?;
        }
        Ok(())
    }

    fn matmul(&self, weight: &Matrix, x: &Activations, out: &mut [f32]) -> Result<()> {
        self.kernels.matmul(self.workers, weight, x, out)
    }

    /// Calls `job` for every row of `x`, shared among the threads if `cost` multiplications for each
    /// element make it worth it.
    fn rows(&self, x: &mut [f32], width: usize, cost: usize, job: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let worth = x.len().saturating_mul(cost) >= WORTH_SHARING;
        for_each_chunk(self.workers, worth, x, width, job);
    }
}
