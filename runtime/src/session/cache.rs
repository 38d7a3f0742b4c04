//! The keys and values of all tokens so far, position-major in each layer.
//!
//! A layer that sees everything has a row for every token of the context. One with a window is a ring: the
//! row of position `p` is `p % rows`, and there are as many as the window and a batch that is being computed
//! need.

use super::arena::{Arena, padded_bytes};
use super::plan::Limits;
use crate::format::{DType, f16_to_f32};
use crate::kernels::{Kernels, KeyValues, Q8Block, Ring, dequantize_row, q8_0_block};
use crate::{Code, Error, Result};
use edge_models::DecoderSpec;

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheType {
    /// As precise as the weights: `F32` if the file keeps its matrices so, otherwise `F16`. Files with `f32`
    /// are there to be exact, and too large for a device anyway.
    #[default]
    Auto,
    /// Half precision.
    F16,
    /// `f32`.
    F32,
    /// Blocks of 32 integers of 8 bits with a half-precision scale: 17/32 of the memory of half precision.
    /// Heads must be a multiple of 32 wide.
    Q8_0,
}

impl CacheType {
    /// The type called `auto`, `f16`, `f32` or `q8_0`.
    pub fn by_name(name: &str) -> Option<Self> {
        [Self::Auto, Self::F16, Self::F32, Self::Q8_0].into_iter().find(|kind| kind.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Q8_0 => "q8_0",
        }
    }

    /// Refuses heads that are not whole blocks.
    pub(super) fn check(self, spec: &DecoderSpec) -> Result<()> {
        if self == Self::Q8_0 && !spec.head_dim.is_multiple_of(32) {
            return Err(Error::new(Code::Unsupported, "attention.key_length")
                .found(spec.head_dim as u64, 32)
                .hint("a q8_0 cache needs heads of a multiple of 32"));
        }
        Ok(())
    }

    /// Values in an element, and its bytes.
    pub(super) fn element(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::Q8_0 => (32, 34),
            Self::Auto | Self::F16 => (1, 2),
        }
    }
}

/// Rows of the cache of a layer.
pub(super) fn layer_rows(spec: &DecoderSpec, limits: &Limits, layer: usize) -> usize {
    match spec.window_of(layer) {
        0 => limits.context,
        window => limits.context.min(window.saturating_add(limits.batch)),
    }
}

/// What the cache needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheSizes {
    /// Never `Auto`.
    pub(super) kind: CacheType,
    /// Elements of the keys of all layers; there are as many values.
    elements: usize,
}

impl CacheSizes {
    /// `None` beyond the address space.
    pub(super) fn new(spec: &DecoderSpec, limits: &Limits, kind: CacheType) -> Option<Self> {
        let row = spec.kv_width() / kind.element().0;
        let rows = (0..spec.layers)
            .try_fold(0usize, |sum, layer| sum.checked_add(layer_rows(spec, limits, layer)))?;
        Some(Self { kind, elements: rows.checked_mul(row)? })
    }

    /// Bytes of keys and values.
    pub(super) fn bytes(&self) -> Option<usize> {
        self.elements.checked_mul(2 * self.kind.element().1)
    }

    /// Bytes in the arena.
    pub(super) fn arena_bytes(&self) -> Option<usize> {
        let part = match self.kind {
            CacheType::F32 => padded_bytes::<f32>(self.elements)?,
            CacheType::Q8_0 => padded_bytes::<Q8Block>(self.elements)?,
            CacheType::Auto | CacheType::F16 => padded_bytes::<u16>(self.elements)?,
        };
        part.checked_mul(2)
    }
}

/// Keys and values of all layers.
pub(super) struct Cache<'a> {
    rows: Rows<'a>,
    /// Elements of a row.
    row: usize,
}

/// Keys, then values.
enum Rows<'a> {
    /// The bits of half-precision numbers.
    Half([&'a mut [u16]; 2]),
    Full([&'a mut [f32]; 2]),
    Blocks([&'a mut [Q8Block]; 2]),
}

/// The keys and values of one layer, each `[count, kv_heads * head_dim]`.
pub(super) struct LayerCache<'a> {
    rows: Rows<'a>,
    row: usize,
    count: usize,
}

/// Which of the two.
#[derive(Clone, Copy)]
pub(super) enum Part {
    Keys = 0,
    Values = 1,
}

impl<'a> Cache<'a> {
    pub(super) fn new(arena: &mut Arena<'a>, sizes: &CacheSizes, spec: &DecoderSpec) -> Result<Self> {
        let count = sizes.elements;
        let rows = match sizes.kind {
            CacheType::F32 => Rows::Full([arena.take(count)?, arena.take(count)?]),
            CacheType::Q8_0 => Rows::Blocks([arena.take(count)?, arena.take(count)?]),
            CacheType::Auto | CacheType::F16 => Rows::Half([arena.take(count)?, arena.take(count)?]),
        };
        Ok(Self { rows, row: spec.kv_width() / sizes.kind.element().0 })
    }

    /// How they are kept; never `Auto`.
    pub(super) fn kind(&self) -> CacheType {
        match self.rows {
            Rows::Half(_) => CacheType::F16,
            Rows::Full(_) => CacheType::F32,
            Rows::Blocks(_) => CacheType::Q8_0,
        }
    }

    /// One layer.
    pub(super) fn layer(&mut self, spec: &DecoderSpec, limits: &Limits, layer: usize) -> LayerCache<'_> {
        let before: usize = (0..layer).map(|layer| layer_rows(spec, limits, layer)).sum();
        let (row, count) = (self.row, layer_rows(spec, limits, layer));
        let range = before * row..(before + count) * row;
        let rows = match &mut self.rows {
            Rows::Half(rows) => Rows::Half(rows.each_mut().map(|rows| &mut rows[range.clone()])),
            Rows::Full(rows) => Rows::Full(rows.each_mut().map(|rows| &mut rows[range.clone()])),
            Rows::Blocks(rows) => Rows::Blocks(rows.each_mut().map(|rows| &mut rows[range.clone()])),
        };
        LayerCache { rows, row, count }
    }
}

impl LayerCache<'_> {
    /// Writes the rows of the positions from `position` on, `[tokens, kv_heads * head_dim]`.
    pub(super) fn store(
        &mut self,
        kernels: &Kernels,
        part: Part,
        position: usize,
        values: &[f32],
        width: usize,
    ) {
        for (token, values) in values.chunks_exact(width).enumerate() {
            let start = (position + token) % self.count * self.row;
            let range = start..start + self.row;
            match &mut self.rows {
                Rows::Half(rows) => kernels.to_half(values, &mut rows[part as usize][range]),
                Rows::Full(rows) => rows[part as usize][range].copy_from_slice(values),
                Rows::Blocks(rows) => {
                    let blocks = rows[part as usize][range].iter_mut();
                    blocks.zip(values.as_chunks().0).for_each(|(block, values)| *block = q8_0_block(values));
                }
            }
        }
    }

    /// Makes queries as precise as the keys that they meet, as ggml does: close choices then fall as there.
    /// (A cache of blocks does it itself.)
    pub(super) fn round(&self, kernels: &Kernels, queries: &mut [f32]) {
        if let Rows::Half(_) = self.rows {
            kernels.round_to_half(queries);
        }
    }

    /// The rows of one head that begins at value `start` of a row.
    pub(super) fn view(&self, start: usize) -> (KeyValues<'_>, Ring) {
        let ring = Ring { stride: self.row, rows: self.count };
        let values = match &self.rows {
            Rows::Half([keys, values]) => KeyValues::Half { keys: &keys[start..], values: &values[start..] },
            Rows::Full([keys, values]) => KeyValues::Full { keys: &keys[start..], values: &values[start..] },
            Rows::Blocks([keys, values]) => {
                KeyValues::Blocks { keys: &keys[start / 32..], values: &values[start / 32..] }
            }
        };
        (values, ring)
    }

    /// Reads the row of a position, `[kv_heads * head_dim]`.
    pub(super) fn load(&self, part: Part, position: usize, out: &mut [f32]) -> Result<()> {
        let start = position % self.count * self.row;
        let range = start..start + self.row;
        match &self.rows {
            Rows::Half(rows) => {
                let row = rows[part as usize][range].iter();
                out.iter_mut().zip(row).for_each(|(out, x)| *out = f16_to_f32(*x));
            }
            Rows::Full(rows) => out.copy_from_slice(&rows[part as usize][range]),
            Rows::Blocks(rows) => {
                dequantize_row(DType::Q8_0, rows[part as usize][range].as_flattened(), out)?;
            }
        }
        Ok(())
    }

    /// Copies the row of a position to another.
    pub(super) fn copy(&mut self, part: Part, from: usize, to: usize) {
        let [from, to] = [from, to].map(|position| position % self.count * self.row);
        let range = from..from + self.row;
        match &mut self.rows {
            Rows::Half(rows) => rows[part as usize].copy_within(range, to),
            Rows::Full(rows) => rows[part as usize].copy_within(range, to),
            Rows::Blocks(rows) => rows[part as usize].copy_within(range, to),
        }
    }

    /// Writes the row of a position as little-endian bytes, of which there must be exactly as many.
    pub(super) fn save(&self, part: usize, position: usize, out: &mut [u8]) {
        let start = position % self.count * self.row;
        let range = start..start + self.row;
        match &self.rows {
            Rows::Half(rows) => {
                let rows = rows[part][range].iter();
                out.as_chunks_mut().0.iter_mut().zip(rows).for_each(|(out, x)| *out = x.to_le_bytes());
            }
            Rows::Full(rows) => {
                let rows = rows[part][range].iter();
                out.as_chunks_mut().0.iter_mut().zip(rows).for_each(|(out, x)| *out = x.to_le_bytes());
            }
            Rows::Blocks(rows) => out.copy_from_slice(rows[part][range].as_flattened()),
        }
    }

    /// Reads what [`LayerCache::save`] wrote.
    pub(super) fn restore(&mut self, part: usize, position: usize, from: &[u8]) {
        let start = position % self.count * self.row;
        let range = start..start + self.row;
        match &mut self.rows {
            Rows::Half(rows) => {
                let rows = rows[part][range].iter_mut();
                rows.zip(from.as_chunks().0).for_each(|(x, bytes)| *x = u16::from_le_bytes(*bytes));
            }
            Rows::Full(rows) => {
                let rows = rows[part][range].iter_mut();
                rows.zip(from.as_chunks().0).for_each(|(x, bytes)| *x = f32::from_le_bytes(*bytes));
            }
            Rows::Blocks(rows) => rows[part][range].as_flattened_mut().copy_from_slice(from),
        }
    }
}
