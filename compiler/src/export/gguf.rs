//! Writes GGUF files that llama.cpp and candle load.
//!
//! [`GgufWriter`] knows the container and nothing of models; [`export`] and [`export_to_vec`] know what a
//! decoder model looks like inside. Only plain GGUF comes from here: private layouts go into packs.

mod model;
mod writer;

pub use crate::quantize::Mix;
pub(crate) use model::NO_VOCABULARY;
pub(crate) use model::source_row;
pub use model::{
    ExportError, Summary, encoded_to_vec, export, export_encoded, export_to_vec, measure, vocabulary_file,
};
pub use writer::{GgufWriteError, GgufWriter, Producer};

/// A metadata value to be written.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum MetaValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(Vec<u8>),
    U64(u64),
    I64(i64),
    F64(f64),
    Strings(Vec<Vec<u8>>),
    I32s(Vec<i32>),
    U32s(Vec<u32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
}

impl From<&str> for MetaValue {
    fn from(text: &str) -> Self {
        Self::String(text.as_bytes().to_vec())
    }
}

#[cfg(test)]
mod tests;
