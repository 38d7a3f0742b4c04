//! The weights of a model file: checked against the specification once, found by role afterwards.

use super::arena::Arena;
use super::rope::Frequencies;
use crate::format::{DType, Gguf, GgufConfig, Layout, TILE_ROWS, TensorInfo};
use crate::kernels::{Matrix, dequantize_row};
use crate::{Code, Error, Name, Result};
use edge_models::{DecoderSpec, NameBuf, Role, SpecError, TensorRow, family_by_gguf_name};

/// Reads the specification of `file` from its metadata.
pub(super) fn read_spec(file: &Gguf) -> Result<DecoderSpec> {
    let architecture = file.architecture()?;
    let family =
        family_by_gguf_name(architecture).ok_or_else(|| Error::new(Code::UnknownFamily, architecture))?;
    (family.from_gguf)(&GgufConfig::new(*file)?).map_err(|error| {
        let error_about = |code, key| Error { name: Name::joined(architecture, key), ..Error::new(code, "") };
        match error {
            SpecError::Missing { key } => error_about(Code::MissingKey, key),
            SpecError::OutOfRange { key, found, max, .. } => {
                error_about(Code::OutOfRange, key).found(found as u64, max as u64)
            }
            SpecError::Unsupported { key, expected } => error_about(Code::Unsupported, key).hint(expected),
        }
    })
}

/// Kinds of layers that rotate by different angles: 1, or 2 where those with a window have a rotary
/// embedding of their own.
pub(super) fn kinds_of_rope(spec: &DecoderSpec) -> usize {
    if spec.local_rope.is_some() { 2 } else { 1 }
}

/// The tensors of a file under its specification.
#[derive(Clone, Copy)]
pub(super) struct Weights<'f, 'a> {
    pub(super) file: &'f Gguf<'a>,
    pub(super) spec: &'f DecoderSpec,
}

/// A linear map, `weight [outputs, inputs]` and its bias, which is empty where there is none.
#[derive(Clone, Copy)]
pub(super) struct Linear<'a> {
    pub(super) weight: Matrix<'a>,
    pub(super) bias: &'a [f32],
}

/// One block: its weights, and what tells it from the others. Norms that the model has not are empty.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    /// Tokens that it attends to, its own among them; 0 means all.
    pub(super) window: usize,
    /// Which of [`super::Session`]'s angles rotate its heads.
    pub(super) angles: usize,
    pub(super) attn_norm: &'a [f32],
    pub(super) q: Linear<'a>,
    pub(super) k: Linear<'a>,
    pub(super) v: Linear<'a>,
    pub(super) q_norm: &'a [f32],
    pub(super) k_norm: &'a [f32],
    pub(super) attn_out: Linear<'a>,
    pub(super) attn_post_norm: &'a [f32],
    pub(super) ffn_norm: &'a [f32],
    pub(super) gate: Matrix<'a>,
    pub(super) up: Matrix<'a>,
    pub(super) down: Matrix<'a>,
    pub(super) ffn_post_norm: &'a [f32],
}

/// All weights: matrices stay in the file's bytes, vectors are decoded to `f32` in the arena.
#[derive(Clone, Copy)]
pub(super) struct Model<'a> {
    pub(super) embedding: Matrix<'a>,
    pub(super) layers: &'a [Layer<'a>],
    pub(super) output_norm: &'a [f32],
    pub(super) head: Matrix<'a>,
}

impl<'a> Weights<'_, 'a> {
    /// Checks that every tensor that the specification asks for is there with its shape and a type that
    /// can be run, and that there is no other: one that nobody reads means that the model is not what
    /// its metadata says.
    pub(super) fn check(&self) -> Result<()> {
        let mut wanted = 0;
        for row in self.required_rows().filter(|row| row.leads()) {
            wanted += if row.role.per_layer() { self.spec.layers } else { 1 };
        }
        let found = self.file.tensors().count();
        if found > wanted {
            return Err(self.surplus(found, wanted));
        }
        for row in self.required_rows() {
            for layer in 0..if row.role.per_layer() { self.spec.layers } else { 1 } {
                self.get(row.role, layer)?;
            }
        }
        for (kind, context) in [(0, 0), (0, usize::MAX), (kinds_of_rope(self.spec) - 1, 0)] {
            let frequencies = self.frequencies(kind, context)?;
            (0..self.spec.rope_dims / 2).try_for_each(|index| frequencies.get(index).map(drop))?;
        }
        Ok(())
    }

    /// The rows of the family's table that the specification asks for.
    fn required_rows(&self) -> impl Iterator<Item = &'static TensorRow> {
        self.spec.family.tensors.iter().filter(|row| row.role.required(self.spec))
    }

    /// The rotary frequencies of a kind of layers, 0 or 1, for a context.
    pub(super) fn frequencies(&self, kind: usize, context: usize) -> Result<Frequencies<'_>> {
        let rope = self.spec.local_rope.as_ref().filter(|_| kind > 0).unwrap_or(&self.spec.rope);
        let table = match rope.scaling.divisors(context) {
            Some(role) => Some(self.get(role, 0)?.0),
            None => None,
        };
        Ok(Frequencies::new(rope, self.spec.rope_dims, table))
    }

    /// The error that names the first tensor which nobody asked for.
    fn surplus(&self, found: usize, wanted: usize) -> Error {
        match self.file.tensors().find(|tensor| !self.knows(tensor.name)) {
            Some(tensor) => {
                Error::new(Code::Unsupported, tensor.name).hint("the family has no use for this tensor")
            }
            None => Error::new(Code::BadLength, "tensors")
                .found(found as u64, wanted as u64)
                .hint("a tensor is there twice"),
        }
    }

    /// Whether the specification asks for the tensor called `name`.
    fn knows(&self, name: &str) -> bool {
        self.required_rows().any(|row| {
            let Some((head, tail)) = row.gguf.split_once("{}") else { return row.gguf == name };
            let layer = name.strip_prefix(head).and_then(|rest| rest.strip_suffix(tail));
            let Some(Ok(layer)) = layer.map(str::parse) else { return false };
            layer < self.spec.layers && NameBuf::new(row.gguf, layer).as_str() == name
        })
    }

    /// The tensor of `role` in `layer`, with its type and layout; of a fused tensor the rows of that role.
    fn get(&self, role: Role, layer: usize) -> Result<(TensorInfo<'a>, DType, Layout)> {
        let Some(row) = self.spec.family.tensor(role) else {
            return Err(Error::new(Code::MissingTensor, "").hint("the family has no such tensor"));
        };
        let name = NameBuf::new(row.gguf, layer);
        let info =
            self.file.tensor(name.as_str()).ok_or_else(|| Error::new(Code::MissingTensor, name.as_str()))?;
        let (dtype, layout) = info.weights().ok_or_else(|| {
            Error::new(Code::UnsupportedType, info.name)
                .at(info.offset)
                .found(u64::from(info.type_id), 0)
                .hint(advice(info.type_id))
        })?;
        // `Gguf` bounds the product of all axes, so these cannot overflow.
        let found = [info.dims[1] * info.dims[2] * info.dims[3], info.dims[0]];
        let expected = row.file_shape(self.spec);
        for ((found, expected), hint) in found.into_iter().zip(expected).zip(["rows", "columns"]) {
            if found != expected as u64 {
                return Err(Error::new(Code::WrongShape, info.name).found(found, expected as u64).hint(hint));
            }
        }
        // All rows, or tiles of rows, have as many bytes, and their number follows from the shape that was
        // just found.
        let rows_of_unit = match layout {
            Layout::Rows => 1,
            Layout::Tiles => TILE_ROWS,
        };
        let unit_bytes = info.data.len() / expected[0].div_ceil(rows_of_unit);
        let span = row.span(self.spec);
        if !span.start.is_multiple_of(rows_of_unit) {
            return Err(Error::new(Code::Unsupported, info.name)
                .found(span.start as u64, rows_of_unit as u64)
                .hint("a part of a fused tensor starts within a tile"));
        }
        let units = span.start / rows_of_unit..span.end.div_ceil(rows_of_unit);
        let data = &info.data[units.start * unit_bytes..units.end * unit_bytes];
        Ok((TensorInfo { data, ..info }, dtype, layout))
    }

    /// The type of the tensor of `role` in `layer`, and how its rows lie.
    pub(super) fn kind(&self, role: Role, layer: usize) -> Result<(DType, Layout)> {
        let (_, dtype, layout) = self.get(role, layer)?;
        Ok((dtype, layout))
    }

    /// The type of the embedding table, and nearly always the widest of the file.
    pub(super) fn main_type(&self) -> Result<DType> {
        Ok(self.get(Role::TokenEmbedding, 0)?.1)
    }

    /// The matrix of `role` in `layer`, in the file's bytes.
    fn matrix(&self, role: Role, layer: usize) -> Result<Matrix<'a>> {
        let (info, dtype, layout) = self.get(role, layer)?;
        let [rows, cols] = role.shape(self.spec);
        Matrix::with(layout, dtype, rows, cols, info.data)
            .map_err(|error| Error { name: Name::new(info.name), ..error })
    }

    /// Decodes the vector of `role` in `layer`.
    fn vector(&self, role: Role, layer: usize, out: &mut [f32]) -> Result<()> {
        let (info, dtype, _) = self.get(role, layer)?;
        dequantize_row(dtype, info.data, out).map_err(|error| Error { name: Name::new(info.name), ..error })
    }

    /// Elements of all vectors of one layer.
    pub(super) fn layer_vectors(spec: &DecoderSpec) -> usize {
        let wanted = |role: Role| role.required(spec) && role.per_layer() && role.is_vector();
        spec.family.tensors.iter().filter(|row| wanted(row.role)).map(|row| row.role.shape(spec)[1]).sum()
    }

    /// Builds the table of all weights in the arena.
    ///
    /// `vectors` must have room for all vectors: those of each layer and the output norm.
    pub(super) fn load(&self, arena: &mut Arena<'a>, vectors: &'a mut [f32]) -> Result<Model<'a>> {
        let mut vectors = Vectors { weights: *self, rest: vectors };
        let layers = arena.build(self.spec.layers, |layer| {
            let spec = self.spec;
            let mut linear = |weight, bias: Role| {
                Ok(Linear { weight: self.matrix(weight, layer)?, bias: vectors.take(bias, layer)? })
            };
            let q = linear(Role::AttnQ, Role::AttnQBias)?;
            let k = linear(Role::AttnK, Role::AttnKBias)?;
            let v = linear(Role::AttnV, Role::AttnVBias)?;
            let attn_out = linear(Role::AttnOut, Role::AttnOutBias)?;
            Ok(Layer {
                window: spec.window_of(layer),
                angles: if spec.local.contains(layer) { kinds_of_rope(spec) - 1 } else { 0 },
                attn_norm: vectors.take(Role::AttnNorm, layer)?,
                q,
                k,
                v,
                q_norm: vectors.take(Role::AttnQNorm, layer)?,
                k_norm: vectors.take(Role::AttnKNorm, layer)?,
                attn_out,
                attn_post_norm: vectors.take(Role::AttnPostNorm, layer)?,
                ffn_norm: vectors.take(Role::FfnNorm, layer)?,
                gate: self.matrix(Role::FfnGate, layer)?,
                up: self.matrix(Role::FfnUp, layer)?,
                down: self.matrix(Role::FfnDown, layer)?,
                ffn_post_norm: vectors.take(Role::FfnPostNorm, layer)?,
            })
        })?;
        let embedding = self.matrix(Role::TokenEmbedding, 0)?;
        let head = if self.spec.tied_embeddings { embedding } else { self.matrix(Role::Output, 0)? };
        Ok(Model { embedding, layers, output_norm: vectors.take(Role::OutputNorm, 0)?, head })
    }
}

/// Room for vectors, handed out in parts.
struct Vectors<'w, 'a> {
    weights: Weights<'w, 'a>,
    rest: &'a mut [f32],
}

impl<'a> Vectors<'_, 'a> {
    /// The vector of `role` in `layer`; empty if the model has none.
    fn take(&mut self, role: Role, layer: usize) -> Result<&'a [f32]> {
        if !role.required(self.weights.spec) {
            return Ok(&[]);
        }
        let len = role.shape(self.weights.spec)[1];
        let Some((part, rest)) = core::mem::take(&mut self.rest).split_at_mut_checked(len) else {
            return Err(Error::new(Code::ArenaTooSmall, "vectors"));
        };
        self.rest = rest;
        self.weights.vector(role, layer, part)?;
        Ok(part)
    }
}

/// What to do about GGUF's tensor type `id`, which this build does not run.
fn advice(id: u32) -> &'static str {
    match id {
        // Q3_K and IQ4_NL, whose values wider types hold.
        11 | 20 => "use `edgec pack`",
        // Q2_K.
        10 => "build feature `low-bit`",
        _ => "",
    }
}
