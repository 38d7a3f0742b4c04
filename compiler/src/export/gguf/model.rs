//! A whole decoder model as a GGUF file: its hyper-parameters, vocabulary and weights.
//!
//! Keys and tensor names are those of the GGUF specification and of the family table; the same model and
//! mix always give the same bytes. Weights are quantized while they are written, a few rows at a time.

use std::io::{self, Write};
use std::path::Path;

use candle_core::{Storage, Tensor};
use edge_models::{DecoderSpec, LayerSet, NameBuf, Role, RopeScaling, TensorRow};
use edge_runtime::format::DType;
use rayon::prelude::*;

use super::{GgufWriteError, GgufWriter, MetaValue};
use crate::model::{Model, Vocabulary};
use crate::quantize::{Encoding, Mix, QuantizeError, quantize_rows};

/// Version of the quantized block formats, as `general.quantization_version`.
const QUANTIZATION_VERSION: u32 = 2;
/// Values that are quantized between two writes.
const CHUNK: usize = 1 << 20;
/// `tokenizer.ggml.token_type` of a token that only fills up the embedding table.
const UNUSED_TOKEN: i32 = 5;
/// What llama.cpp's converter writes as `tokenizer.ggml.model` for a model without a vocabulary.
pub(crate) const NO_VOCABULARY: &str = "none";

/// Why a model could not be written as GGUF.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ExportError {
    #[error(transparent)]
    Write(#[from] GgufWriteError),
    #[error("tensor `{name}` is missing")]
    MissingTensor { name: String },
    #[error("tensor `{name}` is there although {reason}")]
    UnexpectedTensor { name: String, reason: &'static str },
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor `{name}`: {source}")]
    Quantize { name: String, source: QuantizeError },
    #[error("tensor `{name}`: {source}")]
    Tensor { name: String, source: candle_core::Error },
    #[error("key `{key}` has {found} entries, expected {expected}")]
    Vocabulary { key: &'static str, found: usize, expected: usize },
}

/// What a written file holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Bytes of its tensors.
    pub data_bytes: u64,
    /// Number of weights, a tied table counted once.
    pub weights: u64,
    /// Bits of tensor data for each weight.
    pub bits_per_weight: f64,
}

/// Writes `model` to `path`, whole or not at all.
///
/// # Errors
/// A tensor that is missing, misshapen, or holds a value that its type cannot; the file system's refusal.
pub fn export(model: &Model, mix: Mix, path: &Path) -> Result<Summary, ExportError> {
    export_encoded(model, &mix.into(), path)
}

/// Writes `model` to `path` with the types and blocks of `encoding`, whole or not at all.
///
/// # Errors
/// As [`export`].
pub fn export_encoded(model: &Model, encoding: &Encoding, path: &Path) -> Result<Summary, ExportError> {
    let (file, weights) = assemble(model, encoding)?;
    let summary = summary(&file, weights);
    file.write_atomic(path).map_err(cause)?;
    Ok(summary)
}

/// What [`export_encoded`] would write, without writing it.
///
/// # Errors
/// As [`export`], but for values.
pub fn measure(model: &Model, encoding: &Encoding) -> Result<Summary, ExportError> {
    let (file, weights) = assemble(model, encoding)?;
    Ok(summary(&file, weights))
}

fn summary(file: &GgufWriter<'_>, weights: u64) -> Summary {
    let data_bytes = file.data_bytes();
    let bits_per_weight = 8.0 * data_bytes as f64 / weights as f64;
    Summary { bytes: file.file_bytes(), data_bytes, weights, bits_per_weight }
}

/// The bytes that [`export`] would write.
///
/// # Errors
/// As [`export`].
pub fn export_to_vec(model: &Model, mix: Mix) -> Result<Vec<u8>, ExportError> {
    encoded_to_vec(model, &mix.into())
}

/// The bytes that [`export_encoded`] would write.
///
/// # Errors
/// As [`export`].
pub fn encoded_to_vec(model: &Model, encoding: &Encoding) -> Result<Vec<u8>, ExportError> {
    let (file, _) = assemble(model, encoding)?;
    file.to_vec().map_err(|source| cause(GgufWriteError::Io { path: "memory".into(), source }))
}

/// The bytes of a GGUF file that holds a vocabulary and nothing else.
pub fn vocabulary_file(vocabulary: Option<&Vocabulary>) -> Vec<u8> {
    let mut file = GgufWriter::new();
    match vocabulary {
        Some(vocabulary) => vocabulary.entries.iter().for_each(|(key, value)| {
            // Refused are a key's second entry, of which `Gguf::get` takes no notice either, and keys too
            // long for any reader.
            let _ = file.meta(key, value);
        }),
        None => {
            let _ = file.meta("tokenizer.ggml.model", &NO_VOCABULARY.into());
        }
    }
    // There is no producer that could fail, and a vector takes everything.
    file.to_vec().unwrap_or_default()
}

/// The error of a producer comes through `io::Error`; this takes it out again.
fn cause(error: GgufWriteError) -> ExportError {
    match error {
        GgufWriteError::Io { path, source } => match source.downcast::<ExportError>() {
            Ok(error) => error,
            Err(source) => GgufWriteError::Io { path, source }.into(),
        },
        other => other.into(),
    }
}

/// The file, not yet written, and the number of weights in it.
fn assemble<'m>(model: &'m Model, encoding: &'m Encoding) -> Result<(GgufWriter<'m>, u64), ExportError> {
    let spec = &model.spec;
    let mut file = GgufWriter::new();
    describe(&mut file, model, encoding.mix())?;
    match &model.vocabulary {
        Some(vocabulary) => tokenizer(&mut file, vocabulary, spec.vocab)?,
        None => file.meta("tokenizer.ggml.model", &NO_VOCABULARY.into())?,
    }
    let mut weights = 0;
    for row in spec.family.tensors.iter().filter(|row| !row.role.per_layer() && row.leads()) {
        weights += add(&mut file, model, encoding, row, 0)?;
    }
    for layer in 0..spec.layers {
        for row in spec.family.tensors.iter().filter(|row| row.role.per_layer() && row.leads()) {
            weights += add(&mut file, model, encoding, row, layer)?;
        }
    }
    Ok((file, weights))
}

/// The `general.*` keys and the hyper-parameters.
fn describe(file: &mut GgufWriter<'_>, model: &Model, mix: Mix) -> Result<(), ExportError> {
    let spec = &model.spec;
    let architecture = spec.family.gguf_architecture;
    let number = |value: usize| MetaValue::U32(value as u32);
    file.meta("general.architecture", &architecture.into())?;
    file.meta("general.type", &"model".into())?;
    file.meta("general.name", &model.name.as_str().into())?;
    file.meta("general.file_type", &MetaValue::U32(mix.file_type()))?;
    file.meta("general.quantization_version", &MetaValue::U32(QUANTIZATION_VERSION))?;
    let mut hyper = vec![
        ("block_count", number(spec.layers)),
        ("context_length", number(spec.context)),
        ("embedding_length", number(spec.hidden)),
        ("feed_forward_length", number(spec.ffn)),
        ("attention.head_count", number(spec.heads)),
        ("attention.head_count_kv", number(spec.kv_heads)),
        ("attention.layer_norm_rms_epsilon", MetaValue::F32(spec.norm_eps)),
        ("rope.freq_base", MetaValue::F32(spec.rope.theta as f32)),
        ("rope.dimension_count", number(spec.rope_dims)),
        ("vocab_size", number(spec.vocab)),
    ];
    if spec.heads * spec.head_dim != spec.hidden {
        hyper.push(("attention.key_length", number(spec.head_dim)));
        hyper.push(("attention.value_length", number(spec.head_dim)));
    }
    match spec.rope.scaling {
        RopeScaling::Linear { factor } => {
            hyper.push(("rope.scaling.type", "linear".into()));
            hyper.push(("rope.scaling.factor", MetaValue::F32(factor as f32)));
        }
        RopeScaling::Long { original_context, attention_factor } => {
            hyper.push(("rope.scaling.original_context_length", number(original_context)));
            hyper.push(("rope.scaling.attn_factor", MetaValue::F32(attention_factor)));
        }
        RopeScaling::None | RopeScaling::Llama3 { .. } | RopeScaling::Table => {}
    }
    if let Some(scale) = spec.attn_scale {
        hyper.push(("attention.scale", MetaValue::F32(scale)));
    }
    for (key, cap) in
        [("attn_logit_softcapping", spec.attn_soft_cap), ("final_logit_softcapping", spec.final_soft_cap)]
    {
        if cap > 0.0 {
            hyper.push((key, MetaValue::F32(cap)));
        }
    }
    hyper.extend(windows(spec));
    for (key, value) in hyper {
        file.meta(&format!("{architecture}.{key}"), &value)?;
    }
    Ok(())
}

/// What a file has to say about windows. llama.cpp takes a pattern as a period alone: where layers were
/// cut out of a model so that none fits, its answers are ours up to as many tokens as the window has.
fn windows(spec: &DecoderSpec) -> Vec<(&'static str, MetaValue)> {
    let mut keys = Vec::new();
    let (layers, assumed) = (spec.layers, spec.family.window_period);
    if spec.local.is_empty() {
        // Where readers assume one.
        if assumed > 0 {
            keys.push(("attention.sliding_window", MetaValue::U32(0)));
        }
        return keys;
    }
    keys.push(("attention.sliding_window", MetaValue::U32(spec.window as u32)));
    let local_theta = spec.local_rope.map(|rope| rope.theta);
    if let Some(theta) = local_theta.filter(|_| local_theta != spec.family.local_theta) {
        keys.push(("rope.freq_base_swa", MetaValue::F32(theta as f32)));
    }
    if spec.local != LayerSet::periodic(layers, assumed) {
        let pattern = match spec.local.period(layers) {
            Some(period) => MetaValue::U32(period as u32),
            None => MetaValue::Bools((0..layers).map(|layer| spec.local.contains(layer)).collect()),
        };
        keys.push(("attention.sliding_window_pattern", pattern));
    }
    keys
}

/// The vocabulary as it is, filled up to the rows of the embedding table: llama.cpp takes the number of
/// tokens for the number of rows, and checkpoints round the rows up.
fn tokenizer(file: &mut GgufWriter<'_>, vocabulary: &Vocabulary, rows: usize) -> Result<(), ExportError> {
    for (key, value) in &vocabulary.entries {
        let filled = match (key.as_str(), value) {
            ("tokenizer.ggml.tokens", MetaValue::Strings(tokens)) => {
                let names = (tokens.len()..rows).map(|id| format!("[PAD{id}]").into_bytes());
                MetaValue::Strings(fill("tokenizer.ggml.tokens", tokens, rows, names)?)
            }
            ("tokenizer.ggml.token_type", MetaValue::I32s(kinds)) => {
                let unused = std::iter::repeat(UNUSED_TOKEN);
                MetaValue::I32s(fill("tokenizer.ggml.token_type", kinds, rows, unused)?)
            }
            ("tokenizer.ggml.scores", MetaValue::F32s(scores)) => {
                MetaValue::F32s(fill("tokenizer.ggml.scores", scores, rows, std::iter::repeat(0.0))?)
            }
            _ => value.clone(),
        };
        file.meta(key, &filled)?;
    }
    Ok(())
}

fn fill<T: Clone>(
    key: &'static str,
    list: &[T],
    rows: usize,
    rest: impl Iterator<Item = T>,
) -> Result<Vec<T>, ExportError> {
    if list.len() > rows {
        return Err(ExportError::Vocabulary { key, found: list.len(), expected: rows });
    }
    Ok(list.iter().cloned().chain(rest).take(rows).collect())
}

/// Adds the tensor of a row and of those that are fused with it, if the model must have it; answers how many weights it has.
fn add<'m>(
    file: &mut GgufWriter<'m>,
    model: &'m Model,
    encoding: &'m Encoding,
    row: &TensorRow,
    layer: usize,
) -> Result<u64, ExportError> {
    let (spec, role) = (&model.spec, row.role);
    let name = NameBuf::new(row.gguf, layer).as_str().to_owned();
    if let (Role::RopeFreqs, RopeScaling::Llama3 { .. }) = (role, spec.rope.scaling) {
        let divisors = rope_divisors(spec);
        let bytes: Vec<u8> = divisors.iter().flat_map(|divisor| divisor.to_le_bytes()).collect();
        file.tensor(&name, &[divisors.len() as u64], DType::F32, bytes)?;
        return Ok(0);
    }
    let dtype = encoding.dtype(role, layer, spec);
    let mut parts = Vec::new();
    for &role in row.members() {
        match part(model, role, layer, dtype, &name)? {
            Some(part) => parts.push(Part { blocks: encoding.blocks(role, layer), ..part }),
            None => return Ok(0),
        }
    }
    let [rows, cols] = row.file_shape(spec);
    let dims = [cols as u64, rows as u64];
    let axes = if role.is_vector() { 1 } else { 2 };
    file.tensor_from(&name, &dims[..axes], dtype, move |out| {
        parts.iter().try_for_each(|part| part.write(out))
    })?;
    Ok((rows * cols) as u64)
}

/// The weights of a role on their way into the tensor `name`; `None` if the model has none.
fn part<'m>(
    model: &'m Model,
    role: Role,
    layer: usize,
    dtype: DType,
    name: &str,
) -> Result<Option<Part<'m>>, ExportError> {
    let (spec, name) = (&model.spec, name.to_owned());
    let Some(tensor) = model.weights.get(role, layer) else {
        return if role.required(spec) { Err(ExportError::MissingTensor { name }) } else { Ok(None) };
    };
    if !role.required(spec) {
        let reason = "the model's hyper-parameters leave it out";
        return Err(ExportError::UnexpectedTensor { name, reason });
    }
    let [rows, cols] = role.shape(spec);
    let expected = if role.is_vector() { vec![cols] } else { vec![rows, cols] };
    if tensor.dims() != expected {
        return Err(ExportError::Shape { name, found: tensor.dims().to_vec(), expected });
    }
    let heads = role.permuted_heads(spec);
    // A permuted vector moves single elements.
    let cols = if role.is_vector() && heads.is_some() { 1 } else { cols };
    Ok(Some(Part { name, tensor, dtype, cols, heads, blocks: None }))
}

/// What readers divide the rotary frequencies by (`rope_freqs.weight`), one for each pair.
fn rope_divisors(spec: &DecoderSpec) -> Vec<f32> {
    (0..spec.rope_dims / 2)
        .map(|pair| {
            let exponent = -2.0 * pair as f64 / spec.rope_dims as f64;
            spec.rope.scaling.divisor(spec.rope.theta.powf(exponent)) as f32
        })
        .collect()
}

/// A tensor, or a part of one, on its way into the file.
struct Part<'m> {
    name: String,
    tensor: &'m Tensor,
    dtype: DType,
    cols: usize,
    /// Heads whose rows GGUF stores in another order.
    heads: Option<usize>,
    /// Its blocks, where it is already rounded; else it is quantized on its way.
    blocks: Option<&'m [u8]>,
}

impl Part<'_> {
    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        if let Some(blocks) = self.blocks {
            return self.write_blocks(blocks, out);
        }
        let refuse = |source| io::Error::other(ExportError::Tensor { name: self.name.clone(), source });
        let tensor = self.tensor.contiguous().map_err(refuse)?;
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            return Err(refuse(candle_core::Error::msg("weights must be on the CPU")));
        };
        let values = storage.as_slice::<f32>().map_err(refuse)?;
        // A contiguous tensor may still begin inside a larger storage.
        self.write_values(&values[layout.start_offset()..][..layout.shape().elem_count()], out)
    }

    fn write_blocks(&self, blocks: &[u8], out: &mut dyn Write) -> io::Result<()> {
        let rows = self.tensor.elem_count() / self.cols;
        let row_bytes = blocks.len() / rows;
        match self.heads {
            None => out.write_all(blocks),
            Some(heads) => (0..rows).try_for_each(|row| {
                out.write_all(&blocks[source_row(row, rows / heads) * row_bytes..][..row_bytes])
            }),
        }
    }

    fn write_values(&self, values: &[f32], out: &mut dyn Write) -> io::Result<()> {
        let rows = values.len() / self.cols;
        let step = (CHUNK / self.cols).max(1);
        for first in (0..rows).step_by(step) {
            let range = first..(first + step).min(rows);
            let bytes = match self.heads {
                None => self.quantize(&values[range.start * self.cols..range.end * self.cols]),
                Some(heads) => {
                    let mut chunk = vec![0.0; range.len() * self.cols];
                    chunk.par_chunks_mut(self.cols).zip(range).for_each(|(row, at)| {
                        let from = source_row(at, rows / heads) * self.cols;
                        row.copy_from_slice(&values[from..from + self.cols]);
                    });
                    self.quantize(&chunk)
                }
            };
            let bytes = bytes.map_err(|source| {
                let source = source.below(first);
                io::Error::other(ExportError::Quantize { name: self.name.clone(), source })
            })?;
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    fn quantize(&self, values: &[f32]) -> Result<Vec<u8>, QuantizeError> {
        quantize_rows(self.dtype, values, self.cols, None)
    }
}

/// Where GGUF's row `row` is in a checkpoint whose heads rotate halves: `2i + s` comes from
/// `i + s * head_dim / 2` of the same head.
pub(crate) fn source_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim, row % head_dim);
    head * head_dim + within / 2 + within % 2 * (head_dim / 2)
}
