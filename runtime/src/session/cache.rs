//! The keys and values of all tokens so far, position-major in each layer.
//!
//! They are as precise as the weights: half precision, unless the file keeps its matrices in `f32`. Such
//! files are there to be exact, and too large for a device anyway.

use super::arena::Arena;
use crate::Result;
use crate::format::{DType, f16_to_f32, f32_to_f16};
use crate::kernels::KeyValues;

/// Keys and values, each `[layers, context, kv_heads * head_dim]`.
pub(super) struct Cache<'a> {
    rows: Rows<'a>,
    /// Elements of one layer, `context * kv_heads * head_dim`.
    layer: usize,
}

/// Keys, then values.
enum Rows<'a> {
    /// The bits of half-precision numbers.
    Half([&'a mut [u16]; 2]),
    Full([&'a mut [f32]; 2]),
}

/// The keys and values of one layer, each `[context, kv_heads * head_dim]`.
pub(super) struct LayerCache<'a>(Rows<'a>);

/// Which of the two.
#[derive(Clone, Copy)]
pub(super) enum Part {
    Keys = 0,
    Values = 1,
}

impl<'a> Cache<'a> {
    /// The type of the elements beside matrices of type `weights`.
    pub(super) fn dtype(weights: DType) -> DType {
        if weights == DType::F32 { DType::F32 } else { DType::F16 }
    }

    /// Room for `elements` keys and as many values, `layer` of them in each layer.
    pub(super) fn new(arena: &mut Arena<'a>, dtype: DType, elements: usize, layer: usize) -> Result<Self> {
        let rows = match dtype {
            DType::F32 => Rows::Full([arena.take(elements)?, arena.take(elements)?]),
            _ => Rows::Half([arena.take(elements)?, arena.take(elements)?]),
        };
        Ok(Self { rows, layer })
    }

    /// One layer.
    pub(super) fn layer(&mut self, index: usize) -> LayerCache<'_> {
        let range = index * self.layer..(index + 1) * self.layer;
        LayerCache(match &mut self.rows {
            Rows::Half(rows) => Rows::Half(rows.each_mut().map(|rows| &mut rows[range.clone()])),
            Rows::Full(rows) => Rows::Full(rows.each_mut().map(|rows| &mut rows[range.clone()])),
        })
    }
}

impl LayerCache<'_> {
    /// Writes new rows from element `start` on.
    pub(super) fn store(&mut self, part: Part, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        match &mut self.0 {
            Rows::Half(rows) => {
                for (bits, value) in rows[part as usize][range].iter_mut().zip(values) {
                    *bits = f32_to_f16(*value);
                }
            }
            Rows::Full(rows) => rows[part as usize][range].copy_from_slice(values),
        }
    }

    /// Makes queries as precise as the keys that they meet, as ggml does: close choices then fall as there.
    pub(super) fn round(&self, queries: &mut [f32]) {
        if let Rows::Half(_) = self.0 {
            queries.iter_mut().for_each(|x| *x = f16_to_f32(f32_to_f16(*x)));
        }
    }

    /// The rows from element `start` on.
    pub(super) fn view(&self, start: usize) -> KeyValues<'_> {
        match &self.0 {
            Rows::Half([keys, values]) => KeyValues::Half { keys: &keys[start..], values: &values[start..] },
            Rows::Full([keys, values]) => KeyValues::Full { keys: &keys[start..], values: &values[start..] },
        }
    }
}
