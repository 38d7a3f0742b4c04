//! What text says about a model's matrices: sums of squares for [`Imatrix`], and rounding in the order of the
//! forward pass ([`round_model`]).
//!
//! Rounding walks two streams of states through the model side by side, the exact one and the one of what is already
//! rounded. Each matrix first moves towards what makes up for all rounding before it (the ridge regression of what
//! the exact stream wants on what the rounded one offers; Arai and Ichikawa 2025, "Quantization Error Propagation"),
//! then [`gptq`] rounds it. Moments are those of one matrix, or of those that read the same, at a time.

use std::ops::RangeInclusive;

use candle_core::Tensor;
use edge_models::Role;
use edge_runtime::format::DType;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::encoding::Encoding;
use super::gptq::{self, Rounded};
use super::imatrix::Imatrix;
use super::moments::{Factor, Moments};
use super::{Blocks, Mix, QuantizeError, quantize_rows};
use crate::model::{Model, Weights};
use crate::train::Projection;
use crate::train::graph::Decoder;
use crate::train::ops::{Matrix, gemm, with_values};

/// Tokens that go through the model at a time.
const CHUNK: usize = 2048;

/// Windows on which the head's inputs are learned before anything is rounded.
const HEAD_TOKENS: usize = 8192;

/// Damping of a tied head, times that of other matrices: its rows are embeddings too.
pub(super) const TABLE_DAMPING: f64 = 10.0;

/// Most of the damping that is tried where a Gram matrix is too close to singular, times the first.
const DAMPING_RETRIES: RangeInclusive<i32> = 0..=3;

/// Why a model could not be calibrated.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CalibrationError {
    #[error("the calibration text has {found} tokens, one window needs {needed}")]
    TextTooShort { found: usize, needed: usize },
    #[error("token {token} at {position} of the calibration text, the vocabulary has {vocab}")]
    Token { token: u32, position: usize, vocab: usize },
    #[error("{role:?} of layer {layer}: {source}")]
    Quantize { role: Role, layer: usize, source: QuantizeError },
    #[error("{role:?} of layer {layer}: its inputs are not finite, or all damping is in vain")]
    NotDefinite { role: Role, layer: usize },
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// Text to calibrate on.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Tokens; what does not fill a window is left out.
    pub ids: &'a [u32],
    /// Tokens of a window.
    pub length: usize,
    /// What takes the place of each window's first token, if the vocabulary asks for it.
    pub bos: Option<u32>,
}

/// How matrices are rounded to the blocks of their types.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Method {
    /// Each block by itself.
    Plain,
    /// Each block by itself, errors weighed by the mean square of the activations that they meet.
    Imatrix,
    /// Column after column, later ones making up for the errors of earlier ones.
    #[default]
    Gptq,
}

/// What [`round_model`] makes up for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rounding {
    /// Added to the diagonal of the Gram matrix, as a share of its mean.
    pub damping: f64,
    /// Share of the errors before a matrix that it makes up for, 0 to 1.
    pub propagation: f32,
}

impl Default for Rounding {
    fn default() -> Self {
        Self { damping: 0.01, propagation: 0.5 }
    }
}

/// Who is told how many of how many steps are done, and what the last one was.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize, &str);

impl Sample<'_> {
    /// Tokens of chunks of whole windows.
    pub(super) fn chunks(&self, vocab: usize) -> Result<Vec<Vec<u32>>, CalibrationError> {
        let windows = self.ids.len().checked_div(self.length).unwrap_or(0);
        if windows == 0 {
            let needed = self.length.max(1);
            return Err(CalibrationError::TextTooShort { found: self.ids.len(), needed });
        }
        let mut ids = self.ids[..windows * self.length].to_vec();
        if let Some(position) = ids.iter().position(|token| *token as usize >= vocab) {
            return Err(CalibrationError::Token { token: ids[position], position, vocab });
        }
        if let Some(bos) = self.bos {
            ids.iter_mut().step_by(self.length).for_each(|token| *token = bos);
        }
        let chunk = (CHUNK / self.length).max(1) * self.length;
        Ok(ids.chunks(chunk).map(<[u32]>::to_vec).collect())
    }
}

/// Matrices of a layer, those that read the same together.
pub(super) const READERS: [&[Role]; 4] = [
    &[Role::AttnQ, Role::AttnK, Role::AttnV],
    &[Role::AttnOut],
    &[Role::FfnGate, Role::FfnUp],
    &[Role::FfnDown],
];

/// What the [`READERS`] of a layer read if the residual stream before it is `x`, and the stream behind it.
pub(super) fn through(
    decoder: &Decoder,
    layer: usize,
    x: &Tensor,
    length: usize,
) -> candle_core::Result<([Tensor; 4], Tensor)> {
    let normed = decoder.attention_input(layer, x)?;
    let mixed = decoder.mix(layer, &normed, length)?;
    let x = decoder.add_attention(layer, x, &mixed)?;
    let ffn = decoder.ffn_input(layer, &x)?;
    let gated = decoder.gate(layer, &ffn)?;
    let x = decoder.add_ffn(layer, &x, &gated)?;
    Ok(([normed, mixed, ffn, gated], x))
}

/// Sums of squares of what every matrix of `model` reads on the text.
///
/// # Errors
/// The text is shorter than a window or not the model's.
pub fn imatrix(
    model: &Model,
    sample: Sample<'_>,
    progress: Progress<'_>,
) -> Result<Imatrix, CalibrationError> {
    let spec = &model.spec;
    let decoder = Decoder::new(spec, &model.weights)?;
    let chunks = sample.chunks(spec.vocab)?;
    // Of each layer's inputs, and of the head's.
    let mut sums: Vec<[Vec<f32>; 4]> = vec![Default::default(); spec.layers];
    let mut head = Vec::new();
    for (index, chunk) in chunks.iter().enumerate() {
        let mut x = decoder.embed(chunk)?;
        for (layer, sums) in sums.iter_mut().enumerate() {
            let (inputs, behind) = through(&decoder, layer, &x, sample.length)?;
            for (sums, input) in sums.iter_mut().zip(&inputs) {
                add_squares(sums, input)?;
            }
            x = behind;
        }
        add_squares(&mut head, &decoder.final_norm(&x)?)?;
        progress(index + 1, chunks.len(), "windows");
    }
    let tokens = chunks.iter().map(Vec::len).sum();
    let (windows, length) = ((tokens / sample.length) as u32, sample.length as u32);
    let mut imatrix = Imatrix::default();
    (imatrix.windows, imatrix.length) = (windows, length);
    for (layer, sums) in sums.into_iter().enumerate() {
        for (roles, sums) in READERS.into_iter().zip(sums) {
            roles.iter().for_each(|role| imatrix.insert(*role, layer, spec, sums.clone(), tokens));
        }
    }
    imatrix.insert(head_role(model), 0, spec, head, tokens);
    Ok(imatrix)
}

/// The matrix that makes the logits.
pub(super) fn head_role(model: &Model) -> Role {
    if model.spec.tied_embeddings { Role::TokenEmbedding } else { Role::Output }
}

/// `sums += sum(x^2)` over the rows of `x`; chunks of 64 rows in f32, their sums in order.
fn add_squares(sums: &mut Vec<f32>, x: &Tensor) -> candle_core::Result<()> {
    let (_, cols) = x.dims2()?;
    sums.resize(cols, 0.0);
    with_values(&x.contiguous()?, |x| {
        let parts = x.par_chunks(64 * cols).map(|rows| {
            let mut part = vec![0.0f32; cols];
            for row in rows.chunks(cols) {
                part.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x);
            }
            part
        });
        for part in parts.collect::<Vec<_>>() {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        Ok(())
    })
}

/// Quantizes the matrices of `model` to the types of `encoding`, weighing each column by its importance where
/// `importance` answers with one; the blocks are left in `encoding`.
///
/// # Errors
/// A value or importance that a type cannot take.
pub fn weigh(
    model: &Model,
    mut encoding: Encoding,
    importance: impl Fn(Role, usize) -> Option<Vec<f32>>,
) -> Result<Encoding, CalibrationError> {
    let spec = &model.spec;
    for (role, layer, weight) in model.weights.iter().filter(|(role, ..)| !role.is_vector()) {
        let dtype = encoding.dtype(role, layer, spec);
        let Some(importance) = importance(role, layer).filter(|_| !dtype.is_float()) else { continue };
        let blocks = with_values(&weight.contiguous()?, |values| {
            Ok(Blocks::quantize(dtype, role.shape(spec), values, Some(&importance)))
        })?
        .map_err(|source| CalibrationError::Quantize { role, layer, source })?;
        encoding.insert(role, layer, blocks);
    }
    Ok(encoding)
}

/// `model` rounded to `mix` by `method`, knowing the text. Eight bits leave nothing to make up for, and floating-point
/// numbers have no blocks: there every method is the plain one.
///
/// # Errors
/// As [`imatrix`], [`weigh`] and [`round_model`].
pub fn encode(
    model: &Model,
    mix: Mix,
    method: Method,
    sample: Sample<'_>,
    progress: Progress<'_>,
) -> Result<Encoding, CalibrationError> {
    if mix.base().is_float() || mix == Mix::Q8_0 {
        return Ok(mix.into());
    }
    match method {
        Method::Plain => Ok(mix.into()),
        Method::Imatrix => {
            let known = imatrix(model, sample, progress)?;
            weigh(model, mix.into(), |role, layer| known.importance(role, layer, &model.spec))
        }
        Method::Gptq => Ok(round_model(model, mix.into(), sample, Rounding::default(), progress)?.encoding),
    }
}

/// A model whose matrices are rounded.
pub struct RoundedModel {
    /// Types, and the blocks of every matrix that is not of a floating-point type.
    pub encoding: Encoding,
    /// What was rounded to those blocks, in the places of the weights; a start for training behind them.
    pub latent: Weights,
}

/// Rounds the matrices of `model` to the types of `encoding`, each on what the text brings to it through those that
/// are rounded already.
///
/// # Errors
/// The text is shorter than a window or not the model's; a value that a type cannot hold.
pub fn round_model(
    model: &Model,
    encoding: Encoding,
    sample: Sample<'_>,
    rounding: Rounding,
    progress: Progress<'_>,
) -> Result<RoundedModel, CalibrationError> {
    let decoder = || Decoder::new(&model.spec, &model.weights);
    let mut walk = Walk {
        model,
        exact: decoder()?,
        rounded: decoder()?,
        encoding,
        latent: model.weights.clone(),
        rounding,
        length: sample.length,
        streams: Vec::new(),
    };
    let chunks = sample.chunks(model.spec.vocab)?;
    let total = model.spec.layers + 2;
    walk.tables(&chunks)?;
    progress(1, total, "embeddings");
    for chunk in &chunks {
        let (exact, rounded) = (walk.exact.embed(chunk)?, walk.rounded.embed(chunk)?);
        walk.streams.push(Pair { exact, rounded });
    }
    for layer in 0..model.spec.layers {
        walk.layer(layer)?;
        progress(layer + 2, total, &format!("layer {layer}"));
    }
    walk.head()?;
    progress(total, total, "head");
    Ok(RoundedModel { encoding: walk.encoding, latent: walk.latent })
}

/// The same states in both streams.
#[derive(Clone)]
struct Pair {
    exact: Tensor,
    rounded: Tensor,
}

impl Pair {
    /// What the rounded stream lacks.
    fn difference(&self) -> candle_core::Result<Tensor> {
        &self.exact - &self.rounded
    }
}

/// How far off what comes in, or what comes out, is.
enum Lack<'a> {
    /// Of the inputs.
    Inputs,
    /// Of the outputs, given what they should be.
    Outputs(&'a [Tensor]),
}

/// Two models on their way through the text.
struct Walk<'m> {
    model: &'m Model,
    exact: Decoder,
    /// Matrices are replaced one after the other.
    rounded: Decoder,
    encoding: Encoding,
    latent: Weights,
    rounding: Rounding,
    length: usize,
    /// The residual streams, chunk by chunk.
    streams: Vec<Pair>,
}

impl Walk<'_> {
    /// The embedding table, and with it a tied head. As a head it is rounded for the final states of the exact model.
    fn tables(&mut self, chunks: &[Vec<u32>]) -> Result<(), CalibrationError> {
        let (role, spec) = (Role::TokenEmbedding, &self.model.spec);
        let dtype = self.encoding.dtype(role, 0, spec);
        if dtype.is_float() {
            return Ok(());
        }
        // Eight bits leave nothing to make up for.
        if !spec.tied_embeddings || dtype == DType::Q8_0 {
            let latent = self.weight(role, 0)?;
            let blocks = quantize_rows(dtype, &latent, spec.hidden, None)
                .map_err(|source| CalibrationError::Quantize { role, layer: 0, source })?;
            return self.keep(role, 0, Rounded { dtype, blocks, latent });
        }
        let mut moments = Moments::new(spec.hidden, 0);
        let mut tokens = 0;
        for chunk in chunks {
            moments.add(&self.exact.hidden(chunk, chunk.len() / self.length, self.length)?, None)?;
            tokens += chunk.len();
            if tokens >= HEAD_TOKENS {
                break;
            }
        }
        let factor = factor(role, 0, &moments, TABLE_DAMPING * self.rounding.damping)?;
        self.round(role, 0, &factor, self.weight(role, 0)?)
    }

    fn layer(&mut self, layer: usize) -> Result<(), CalibrationError> {
        let length = self.length;
        let inputs = self.pairs(|decoder, x| decoder.attention_input(layer, x))?;
        self.matrices(layer, &[Role::AttnQ, Role::AttnK, Role::AttnV], &inputs, &Lack::Inputs)?;
        let mixed = self.both(&inputs, |decoder, x| decoder.mix(layer, x, length))?;
        drop(inputs);
        let wanted = self.wanted(Role::AttnOut, layer, &mixed)?;
        self.matrices(layer, &[Role::AttnOut], &mixed, &Lack::Outputs(&wanted))?;
        self.advance(&mixed, |decoder, x, mixed| decoder.add_attention(layer, x, mixed))?;

        let inputs = self.pairs(|decoder, x| decoder.ffn_input(layer, x))?;
        self.matrices(layer, &[Role::FfnGate, Role::FfnUp], &inputs, &Lack::Inputs)?;
        let gated = self.both(&inputs, |decoder, x| decoder.gate(layer, x))?;
        drop(inputs);
        let wanted = self.wanted(Role::FfnDown, layer, &gated)?;
        self.matrices(layer, &[Role::FfnDown], &gated, &Lack::Outputs(&wanted))?;
        self.advance(&gated, |decoder, x, gated| decoder.add_ffn(layer, x, gated))
    }

    /// A head that is not tied.
    fn head(&mut self) -> Result<(), CalibrationError> {
        if self.model.spec.tied_embeddings {
            return Ok(());
        }
        let inputs = self.pairs(Decoder::final_norm)?;
        self.matrices(0, &[Role::Output], &inputs, &Lack::Inputs)
    }

    /// `body` of the residual streams.
    fn pairs(
        &self,
        body: impl Fn(&Decoder, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Vec<Pair>> {
        self.both(&self.streams, body)
    }

    fn both(
        &self,
        pairs: &[Pair],
        body: impl Fn(&Decoder, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Vec<Pair>> {
        let pair = |pair: &Pair| {
            Ok(Pair { exact: body(&self.exact, &pair.exact)?, rounded: body(&self.rounded, &pair.rounded)? })
        };
        pairs.iter().map(pair).collect()
    }

    /// Moves the residual streams on by what `pairs` add.
    fn advance(
        &mut self,
        pairs: &[Pair],
        body: impl Fn(&Decoder, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<(), CalibrationError> {
        for (stream, pair) in self.streams.iter_mut().zip(pairs) {
            *stream = Pair {
                exact: body(&self.exact, &stream.exact, &pair.exact)?,
                rounded: body(&self.rounded, &stream.rounded, &pair.rounded)?,
            };
        }
        Ok(())
    }

    /// What a matrix whose outputs join the residual stream should give: what it gave, and what the stream lacks.
    /// Where a norm comes between, the stream's lack is another matter.
    fn wanted(&self, role: Role, layer: usize, inputs: &[Pair]) -> candle_core::Result<Vec<Tensor>> {
        let matrix = self.exact.matrix(role, layer)?;
        let wanted = |(input, stream): (&Pair, &Pair)| {
            let output = matrix.apply(&input.exact)?;
            if self.model.spec.post_norms { Ok(output) } else { output + stream.difference()? }
        };
        inputs.iter().zip(&self.streams).map(wanted).collect()
    }

    /// Rounds matrices that read the same inputs.
    fn matrices(
        &mut self,
        layer: usize,
        roles: &[Role],
        inputs: &[Pair],
        lack: &Lack<'_>,
    ) -> Result<(), CalibrationError> {
        let (spec, share) = (self.model.spec, self.rounding.propagation);
        if roles.iter().all(|role| self.encoding.dtype(*role, layer, &spec).is_float()) {
            return Ok(());
        }
        let [rows, cols] = roles[0].shape(&spec);
        let width = match lack {
            _ if share == 0.0 => 0,
            Lack::Inputs => cols,
            Lack::Outputs(_) => rows,
        };
        let mut moments = Moments::new(cols, width);
        for (index, input) in inputs.iter().enumerate() {
            let lacking = match lack {
                _ if share == 0.0 => None,
                Lack::Inputs => Some(input.difference()?),
                Lack::Outputs(wanted) => {
                    let found = self.exact.matrix(roles[0], layer)?.apply(&input.rounded)?;
                    Some((&wanted[index] - found)?)
                }
            };
            moments.add(&input.rounded, lacking.as_ref())?;
        }
        let factor = factor(roles[0], layer, &moments, self.rounding.damping)?;
        for role in roles {
            let mut weight = self.weight(*role, layer)?;
            if share > 0.0 {
                let cross = moments.cross.as_slice();
                let moves =
                    if matches!(lack, Lack::Inputs) { times(&weight, cross, cols) } else { cross.to_vec() };
                make_up(&mut weight, moves, &factor, share);
            }
            self.round(*role, layer, &factor, weight)?;
        }
        Ok(())
    }

    /// Rounds `weight` in the place of a matrix.
    fn round(
        &mut self,
        role: Role,
        layer: usize,
        factor: &Factor,
        weight: Vec<f32>,
    ) -> Result<(), CalibrationError> {
        let spec = &self.model.spec;
        let dtype = self.encoding.dtype(role, layer, spec);
        if dtype.is_float() {
            return Ok(());
        }
        let rounded = gptq::round(dtype, &weight, role.shape(spec)[1], factor)
            .map_err(|source| CalibrationError::Quantize { role, layer, source })?;
        self.keep(role, layer, rounded)
    }

    /// From here on the rounded model has these blocks.
    fn keep(&mut self, role: Role, layer: usize, rounded: Rounded) -> Result<(), CalibrationError> {
        let shape = role.shape(&self.model.spec);
        let blocks = Blocks::new(rounded.dtype, shape, rounded.blocks)
            .map_err(|source| CalibrationError::Quantize { role, layer, source })?;
        self.rounded.replace(role, layer, Projection::Dense(blocks.tensor()?))?;
        self.encoding.insert(role, layer, blocks);
        let latent = Tensor::from_vec(rounded.latent, (shape[0], shape[1]), &candle_core::Device::Cpu)?;
        self.latent.insert(role, layer, latent);
        Ok(())
    }

    fn weight(&self, role: Role, layer: usize) -> candle_core::Result<Vec<f32>> {
        match self.model.weights.get(role, layer) {
            Some(weight) => weight.flatten_all()?.to_vec1(),
            None => candle_core::bail!("weight {role:?} of layer {layer} is missing"),
        }
    }
}

/// The factor of what a matrix reads, with more damping where it takes it.
pub(super) fn factor(
    role: Role,
    layer: usize,
    moments: &Moments,
    damping: f64,
) -> Result<Factor, CalibrationError> {
    DAMPING_RETRIES
        .into_iter()
        .find_map(|retry| Factor::new(&moments.gram, moments.cols(), damping * 10f64.powi(retry)))
        .ok_or(CalibrationError::NotDefinite { role, layer })
}

/// `a b` for `b` `[cols, cols]`.
fn times(a: &[f32], b: &[f64], cols: usize) -> Vec<f64> {
    let b: Vec<f32> = b.iter().map(|sum| *sum as f32).collect();
    let mut product = vec![0.0; a.len()];
    let (a, b) = (Matrix::new(a, a.len() / cols, cols), Matrix::new(&b, cols, cols));
    gemm(&mut product, a, b, 1.0, false, true);
    product.into_iter().map(f64::from).collect()
}

/// Moves a matrix by a share of the ridge regression of what is lacking on the inputs: `moves` are the sums of what
/// is lacking times the inputs.
fn make_up(weight: &mut [f32], mut moves: Vec<f64>, factor: &Factor, share: f32) {
    factor.solve(&mut moves);
    let share = f64::from(share);
    weight.iter_mut().zip(moves).for_each(|(weight, by)| *weight += (share * by) as f32);
}

#[cfg(test)]
pub(super) mod tests;
