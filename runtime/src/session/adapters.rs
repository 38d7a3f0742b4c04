//! LoRA adapters (Hu et al. 2021, arXiv 2106.09685) beside the weights: `y = W x + scale * B (A x)`.
//!
//! An adapter is a GGUF file as llama.cpp has it. Attaching one checks it against the model and copies it
//! into a slot that the plan set aside: as `f32` beside float matrices, and beside quantized ones as 8-bit
//! integers, a quarter of an `f32` file to read for every token. Afterwards its bytes are not needed any more. Nothing
//! here touches the KV cache: what is in there was computed with whatever was attached then.

use super::arena::{Arena, padded_bytes};
use super::weights::{Layer, Weights};
use crate::format::{DType, Gguf, Layout, TensorInfo, tiled_bytes};
use crate::kernels::{
    Activations, Kernels, LowRank, MAX_RANK, Matrix, Precision, dequantize_row, put_q8_0, q8_0_block,
};
use crate::workers::{Workers, for_each_chunk};
use crate::{Code, Error, Name, Result};
use edge_models::{DecoderSpec, NameBuf, Role, TensorRow};

/// A matrix that can be adapted: its place among a layer's entries.
#[derive(Clone, Copy)]
pub(super) enum Target {
    Q = 0,
    K = 1,
    V = 2,
    AttnOut = 3,
    Gate = 4,
    Up = 5,
    Down = 6,
}

/// Their roles, in that order.
const TARGETS: [Role; 7] =
    [Role::AttnQ, Role::AttnK, Role::AttnV, Role::AttnOut, Role::FfnGate, Role::FfnUp, Role::FfnDown];
/// The key of an adapter that names the GGUF file it was made for: its SHA-256 in hexadecimal digits.
pub const ADAPTER_BASE: &str = "edge.base.sha256";
/// Multiplications below which other threads are not worth waking.
const WORTH_SHARING: usize = 1 << 15;

/// Where a slot keeps the update of one matrix: `A` at byte `at`, `B` behind it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Entry {
    at: u64,
    /// What `B (A x)` is multiplied by besides the slot's scale.
    factor: f32,
    /// 0 if there is no update.
    rank: u32,
}

/// All slots.
pub(super) struct Adapters<'a> {
    /// Scale of each slot; 0 for one that is empty or switched off.
    scales: &'a mut [f32],
    /// `[slots, layers, 7]`.
    entries: &'a mut [Entry],
    /// `[slots, slot_bytes]`.
    data: &'a mut [u8],
    slot_bytes: usize,
    /// `A x` of a batch, `[batch, max_rank]`.
    low: &'a mut [f32],
    max_rank: usize,
}

/// What the slots of a plan need.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AdapterSizes {
    slots: usize,
    max_rank: usize,
    entries: usize,
    slot_bytes: usize,
    low: usize,
}

/// How the update of a matrix is kept.
#[derive(Clone, Copy)]
enum Kept {
    /// As `f32`.
    Floats,
    /// As 8-bit integers, `A` laid out as the matrix is, because it meets the same activations.
    Integers(Layout),
}

impl Kept {
    /// Beside a matrix of type `dtype` that lies as `layout` says.
    fn beside(dtype: DType, layout: Layout) -> Self {
        if dtype.is_float() { Self::Floats } else { Self::Integers(layout) }
    }

    /// Of `B`.
    fn precision(self) -> Precision {
        match self {
            Self::Floats => Precision::Exact,
            Self::Integers(_) => Precision::Integers,
        }
    }

    /// Of `A`.
    fn down(self) -> (DType, Layout) {
        match self {
            Self::Floats => (DType::F32, Layout::Rows),
            Self::Integers(layout) => (DType::Q8_0, layout),
        }
    }

    /// Bytes of `A` and of `B` for a matrix `[rows, cols]`; `None` beyond the address space.
    fn bytes(self, [rows, cols]: [usize; 2], rank: usize) -> Option<[usize; 2]> {
        let down = match self.down() {
            (dtype, Layout::Rows) => dtype.row_bytes(cols)?.checked_mul(rank)?,
            (dtype, Layout::Tiles) => tiled_bytes(dtype, rank, cols)?,
        };
        Some([down, LowRank::bytes(self.precision(), rows, rank)?])
    }
}

impl Layer<'_> {
    /// The matrix of each target.
    pub(super) fn matrices(&self) -> [&Matrix<'_>; TARGETS.len()] {
        let Self { q, k, v, attn_out, gate, up, down, .. } = self;
        [&q.weight, &k.weight, &v.weight, &attn_out.weight, gate, up, down]
    }
}

impl AdapterSizes {
    /// Of `slots` slots for adapters up to rank `max_rank`; `None` beyond the address space.
    pub(super) fn new(
        weights: &Weights,
        slots: usize,
        max_rank: usize,
        batch: usize,
    ) -> Result<Option<Self>> {
        if slots == 0 {
            return Ok(Some(Self::default()));
        }
        if !(1..=MAX_RANK).contains(&max_rank) {
            return Err(Error::new(Code::OutOfRange, "adapter_rank")
                .found(max_rank as u64, MAX_RANK as u64)
                .hint("at least 1 where there are adapters"));
        }
        let spec = weights.spec;
        let mut slot_bytes = Some(0usize);
        for layer in 0..spec.layers {
            for role in TARGETS {
                let (dtype, layout) = weights.kind(role, layer)?;
                let bytes = Kept::beside(dtype, layout).bytes(role.shape(spec), max_rank);
                slot_bytes = bytes.and_then(|[down, up]| slot_bytes?.checked_add(down)?.checked_add(up));
            }
        }
        let sizes = || {
            Some(Self {
                slots,
                max_rank,
                entries: (spec.layers * TARGETS.len()).checked_mul(slots)?,
                slot_bytes: slot_bytes?,
                low: batch.checked_mul(max_rank)?,
            })
        };
        Ok(sizes())
    }

    /// Bytes in the arena.
    pub(super) fn arena_bytes(&self) -> Option<usize> {
        let parts = [
            padded_bytes::<f32>(self.slots)?,
            padded_bytes::<Entry>(self.entries)?,
            padded_bytes::<u8>(self.slots.checked_mul(self.slot_bytes)?)?,
            padded_bytes::<f32>(self.low)?,
        ];
        parts.into_iter().try_fold(0usize, usize::checked_add)
    }
}

/// One pair of tensors of a file.
struct Pair<'f> {
    row: &'static TensorRow,
    layer: usize,
    /// `[rank, cols]`.
    down: TensorInfo<'f>,
    /// `[rows, rank]`.
    up: TensorInfo<'f>,
    rank: usize,
}

impl<'a> Adapters<'a> {
    pub(super) fn new(arena: &mut Arena<'a>, sizes: &AdapterSizes) -> Result<Self> {
        let adapters = Self {
            scales: arena.take(sizes.slots)?,
            entries: arena.take(sizes.entries)?,
            data: arena.take(sizes.slots * sizes.slot_bytes)?,
            slot_bytes: sizes.slot_bytes,
            low: arena.take(sizes.low)?,
            max_rank: sizes.max_rank,
        };
        adapters.scales.fill(0.0);
        adapters.entries.fill(Entry { at: 0, factor: 0.0, rank: 0 });
        Ok(adapters)
    }

    /// The entries of a slot.
    fn slot(&mut self, slot: usize) -> Result<&mut [Entry]> {
        let slots = self.scales.len();
        let Some(per_slot) = self.entries.len().checked_div(slots).filter(|_| slot < slots) else {
            return Err(Error::new(Code::OutOfRange, "adapter slot")
                .found(slot as u64, slots.saturating_sub(1) as u64)
                .hint("as many as limits.adapters"));
        };
        Ok(&mut self.entries[slot * per_slot..][..per_slot])
    }

    /// Empties a slot.
    pub(super) fn detach(&mut self, slot: usize) -> Result<()> {
        self.slot(slot)?.fill(Entry { at: 0, factor: 0.0, rank: 0 });
        self.scales[slot] = 0.0;
        Ok(())
    }

    /// Sets what a slot's update is multiplied by.
    pub(super) fn set_scale(&mut self, slot: usize, scale: f32) -> Result<()> {
        self.slot(slot)?;
        if !scale.is_finite() {
            return Err(Error::new(Code::BadArgument, "adapter scale").hint("a finite number"));
        }
        self.scales[slot] = scale;
        Ok(())
    }

    /// Copies the adapter in `file` into `slot`; `scratch` has room for the longest row of any matrix.
    pub(super) fn attach(
        &mut self,
        slot: usize,
        file: &Gguf<'_>,
        scale: f32,
        spec: &DecoderSpec,
        layers: &[Layer],
        scratch: &mut [f32],
    ) -> Result<()> {
        self.slot(slot)?;
        if !scale.is_finite() {
            return Err(Error::new(Code::BadArgument, "adapter scale").hint("a finite number"));
        }
        let alpha = check_metadata(file, spec)?;
        // A pair for each matrix; more would be there twice, and be looked for again and again.
        let (found, most) = (file.tensors().count(), 2 * TARGETS.len() * spec.layers);
        if found == 0 || found > most {
            return Err(Error::new(Code::BadLength, "tensors").found(found as u64, most as u64));
        }
        for tensor in file.tensors() {
            Pair::find(file, &tensor, spec, self.max_rank)?;
        }
        // From here on the slot is written, and stays empty if a tensor turns out to hold nonsense.
        self.detach(slot)?;
        let mut at = 0;
        for tensor in file.tensors() {
            let Some(pair) = Pair::find(file, &tensor, spec, self.max_rank)? else { continue };
            let copied = self.copy(slot, &pair, alpha, spec, layers, scratch, &mut at);
            if let Err(error) = copied {
                self.detach(slot)?;
                return Err(error);
            }
        }
        self.scales[slot] = scale;
        Ok(())
    }

    /// Copies one pair, for each role that its matrix serves, to byte `at` of the slot, and moves that on.
    #[expect(clippy::too_many_arguments, reason = "one step of `attach`, with its state")]
    fn copy(
        &mut self,
        slot: usize,
        pair: &Pair<'_>,
        alpha: f32,
        spec: &DecoderSpec,
        layers: &[Layer],
        scratch: &mut [f32],
        at: &mut usize,
    ) -> Result<()> {
        let rank = pair.rank;
        // llama.cpp's rule: an alpha of 0 is none.
        let factor = if alpha == 0.0 { 1.0 } else { alpha / rank as f32 };
        let mut first_row = 0;
        for role in pair.row.members() {
            let shape @ [rows, cols] = role.shape(spec);
            let target = TARGETS.iter().position(|target| target == role);
            let (Some(target), Some(layer)) = (target, layers.get(pair.layer)) else { continue };
            let weight = layer.matrices()[target];
            let kept = Kept::beside(weight.dtype(), weight.layout());
            let bytes = kept.bytes(shape, rank);
            let start = slot * self.slot_bytes + *at;
            let end = (slot + 1) * self.slot_bytes;
            let room = self.data.get_mut(start..end).and_then(|room| {
                let [down, up] = bytes?;
                let (down, rest) = room.split_at_mut_checked(down)?;
                Some((down, rest.get_mut(..up)?))
            });
            let entry = &mut self.entries[(slot * layers.len() + pair.layer) * TARGETS.len() + target];
            let (Some((down, up)), 0) = (room, entry.rank) else {
                return Err(Error::new(Code::BadLength, pair.down.name).hint("a tensor is there twice"));
            };
            let (moved, row) = (down.len() + up.len(), &mut scratch[..cols]);
            let norm = copy_down(kept, &pair.down, row, down)?;
            let read = &mut |index: usize, out: &mut [f32]| row_of(&pair.up, first_row + index, out);
            LowRank::pack(kept.precision(), [rows, rank], read, up)?;
            *entry = Entry { at: *at as u64, factor: factor * norm, rank: rank as u32 };
            *at += moved;
            first_row += rows;
        }
        Ok(())
    }

    /// `out += scale * B (A x)` for matrix `target` of layer `layer` and every slot; `out` is `[tokens, rows]`.
    pub(super) fn apply(
        &mut self,
        kernels: &Kernels,
        workers: &dyn Workers,
        (layer, target): (usize, Target),
        weight: &Matrix,
        x: &Activations,
        out: &mut [f32],
    ) -> Result<()> {
        let slots = self.scales.len();
        let (kept, shape) = (Kept::beside(weight.dtype(), weight.layout()), [weight.rows(), weight.cols()]);
        let [rows, cols] = shape;
        for slot in 0..slots {
            let entry =
                self.entries[slot * (self.entries.len() / slots) + layer * TARGETS.len() + target as usize];
            let scale = self.scales[slot] * entry.factor;
            let (rank, start) = (entry.rank as usize, slot * self.slot_bytes + entry.at as usize);
            let bytes = kept.bytes(shape, rank).filter(|_| rank > 0 && scale != 0.0);
            let Some([down, up]) = bytes else { continue };
            let (down, up) = self.data[start..start + down + up].split_at(down);
            let (dtype, layout) = kept.down();
            let down = Matrix::with(layout, dtype, rank, cols, down)?;
            let up = LowRank::new(kept.precision(), rows, rank, up)?;
            let low = &mut self.low[..x.tokens() * rank];
            kernels.matmul(workers, &down, x, low)?;
            low.iter_mut().for_each(|x| *x *= scale);
            let worth = rank * out.len() >= WORTH_SHARING && x.tokens() > 1;
            for_each_chunk(workers, worth, out, rows, &|token, y| {
                kernels.add_low_rank(&up, &low[token * rank..][..rank], y);
            });
        }
        Ok(())
    }
}

/// Refuses an adapter that was made for another file than `source`, where both are known.
pub(super) fn check_base(file: &Gguf<'_>, source: Option<&[u8; 32]>) -> Result<()> {
    let Some(value) = file.get(ADAPTER_BASE) else { return Ok(()) };
    let hash = value.as_str().and_then(|text| {
        let (mut hash, digits) = ([0; 32], text.as_bytes().as_chunks::<2>());
        for (byte, [high, low]) in hash.iter_mut().zip(digits.0) {
            let digit = |digit: u8| char::from(digit).to_digit(16);
            *byte = (digit(*high)? << 4 | digit(*low)?) as u8;
        }
        (text.len() == 64).then_some(hash)
    });
    let Some(hash) = hash else {
        return Err(Error::new(Code::WrongKeyType, ADAPTER_BASE).hint("64 hexadecimal digits"));
    };
    match source {
        Some(source) if *source != hash => {
            let start = |hash: &[u8; 32]| hash.iter().take(8).fold(0, |n, byte| n << 8 | u64::from(*byte));
            Err(Error::new(Code::OtherBase, ADAPTER_BASE).found(start(&hash), start(source)))
        }
        _ => Ok(()),
    }
}

/// Checks that `file` is a LoRA adapter for models of the family of `spec`; gives its alpha.
fn check_metadata(file: &Gguf<'_>, spec: &DecoderSpec) -> Result<f32> {
    for (key, wanted) in [
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", spec.family.gguf_architecture),
    ] {
        let found = file.require(key)?.as_str();
        let found = found.ok_or_else(|| Error::new(Code::WrongKeyType, key).hint("text"))?;
        if found != wanted {
            return Err(Error { name: Name::joined(key, found), ..Error::new(Code::Unsupported, "") }.hint(
                if key == "general.architecture" {
                    "the model is of another family"
                } else {
                    "a LoRA adapter"
                },
            ));
        }
    }
    if let Some((key, _)) = file.metadata().find(|(key, _)| key.starts_with("adapter.alora.")) {
        return Err(Error::new(Code::Unsupported, key).hint("adapters that wait for a token are not run"));
    }
    let key = "adapter.lora.alpha";
    let alpha = file.require(key)?.as_float();
    let alpha = alpha.ok_or_else(|| Error::new(Code::WrongKeyType, key).hint("a number"))? as f32;
    if !alpha.is_finite() {
        return Err(Error::new(Code::OutOfRange, key).hint("a finite number"));
    }
    Ok(alpha)
}

impl<'f> Pair<'f> {
    /// The pair whose first half is `tensor`, checked; `None` for a second half that has its first.
    fn find(
        file: &Gguf<'f>,
        tensor: &TensorInfo<'f>,
        spec: &DecoderSpec,
        max_rank: usize,
    ) -> Result<Option<Self>> {
        let error = |code, hint| Error::new(code, tensor.name).hint(hint);
        let (base, is_down) = match (tensor.name.strip_suffix(".lora_a"), tensor.name.strip_suffix(".lora_b"))
        {
            (Some(base), _) => (base, true),
            (_, Some(base)) => (base, false),
            _ => return Err(error(Code::Unsupported, "expected tensors .lora_a and .lora_b")),
        };
        let other = file
            .tensors()
            .find(|other| other.name.strip_prefix(base) == Some(if is_down { ".lora_b" } else { ".lora_a" }));
        let other = other.ok_or_else(|| error(Code::MissingTensor, "this half of the pair is alone"))?;
        if !is_down {
            return Ok(None);
        }
        let Some((row, layer)) = matrix_called(base, spec) else {
            return Err(error(Code::Unsupported, "the model has no such matrix that could be adapted"));
        };
        let (down, up) = (*tensor, other);
        let [rows, cols] = row.file_shape(spec);
        let rank = up.dims[0];
        for (tensor, expected) in [(&down, [cols as u64, rank]), (&up, [rank, rows as u64])] {
            let found = [tensor.dims[0], tensor.dims[1] * tensor.dims[2] * tensor.dims[3]];
            for ((found, expected), hint) in found.into_iter().zip(expected).zip(["columns", "rows"]) {
                if found != expected {
                    return Err(Error::new(Code::WrongShape, tensor.name).found(found, expected).hint(hint));
                }
            }
            if !matches!(tensor.dtype, Some(DType::F32 | DType::F16 | DType::BF16 | DType::Q8_0)) {
                return Err(Error::new(Code::UnsupportedType, tensor.name)
                    .at(tensor.offset)
                    .found(u64::from(tensor.type_id), 0)
                    .hint("adapters are F32, F16, BF16 or Q8_0"));
            }
        }
        if rank > max_rank as u64 {
            return Err(Error::new(Code::OutOfRange, tensor.name)
                .found(rank, max_rank as u64)
                .hint("the rank that limits.adapter_rank allows"));
        }
        Ok(Some(Self { row, layer, down, up, rank: rank as usize }))
    }
}

/// The row and layer of the matrix called `name`, if it is one that can be adapted.
fn matrix_called(name: &str, spec: &DecoderSpec) -> Option<(&'static TensorRow, usize)> {
    spec.family.tensors.iter().filter(|row| row.leads() && TARGETS.contains(&row.role)).find_map(|row| {
        let (head, tail) = row.gguf.split_once("{}")?;
        let layer = name.strip_prefix(head)?.strip_suffix(tail)?.parse().ok()?;
        (layer < spec.layers && NameBuf::new(row.gguf, layer).as_str() == name).then_some((row, layer))
    })
}

/// Decodes row `index` of `tensor`, which must be finite.
fn row_of(tensor: &TensorInfo<'_>, index: usize, out: &mut [f32]) -> Result<()> {
    // The shape was checked, and a tensor of a known type has the bytes of all its rows.
    let bytes = tensor.data.len() / tensor.rows().max(1);
    let row = tensor.data.get(index * bytes..).and_then(|rest| rest.get(..bytes)).unwrap_or(&[]);
    let error = |error: Error| Error { name: Name::new(tensor.name), ..error };
    dequantize_row(tensor.dtype.unwrap_or(DType::F32), row, out).map_err(error)?;
    match out.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(column) => Err(Error::new(Code::OutOfRange, tensor.name)
            .at(tensor.offset)
            .found((index * out.len() + column) as u64, 0)
            .hint("this element is not a finite number")),
    }
}

/// Copies `A`; gives what its products must be multiplied by.
///
/// Integers have a half-precision scale for each block, whose range small weights would leave: they are
/// multiplied by a power of two that brings the largest between 1/2 and 1.
fn copy_down(kept: Kept, tensor: &TensorInfo<'_>, row: &mut [f32], out: &mut [u8]) -> Result<f32> {
    let (rank, cols) = (tensor.rows(), row.len());
    let mut peak = 0;
    for index in 0..rank {
        row_of(tensor, index, row)?;
        peak = row.iter().fold(peak, |peak: u32, x| peak.max(x.to_bits() & 0x7fff_ffff));
        if let Kept::Floats = kept {
            let out = out.as_chunks_mut::<4>().0[index * cols..].iter_mut();
            out.zip(&*row).for_each(|(out, x)| *out = x.to_le_bytes());
        }
    }
    let Kept::Integers(layout) = kept else { return Ok(1.0) };
    let exponent = (peak >> 23).clamp(1, 252);
    let up = f32::from_bits((253 - exponent) << 23);
    // A last tile may have more rows than there are.
    out.fill(0);
    for index in 0..rank {
        row_of(tensor, index, row)?;
        row.iter_mut().for_each(|x| *x *= up);
        for (at, block) in row.as_chunks::<32>().0.iter().enumerate() {
            let block = q8_0_block(block);
            match layout {
                Layout::Rows => out.as_chunks_mut().0[index * (cols / 32) + at] = block,
                Layout::Tiles => put_q8_0(out, cols, index, at, &block),
            }
        }
    }
    Ok(1.0 / up)
}
