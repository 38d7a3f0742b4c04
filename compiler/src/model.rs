//! A model in memory: what every step of the pipeline takes and gives.

use std::collections::BTreeMap;

use candle_core::Tensor;
use edge_models::{DecoderSpec, Role};

use edge_runtime::format::{Array, Gguf, Value, ValueType};

use crate::export::gguf::MetaValue;

/// A model in memory.
#[derive(Clone, Debug)]
pub struct Model {
    /// Hyper-parameters.
    pub spec: DecoderSpec,
    /// Weights, f32 on the CPU.
    pub weights: Weights,
    /// Vocabulary, if the source has one.
    pub vocabulary: Option<Vocabulary>,
    /// What users see as its name.
    pub name: String,
}

/// Weights by role and layer (0 for tensors that exist once).
///
/// Always f32 on the CPU and in Hugging Face's row order (heads rotate halves), whatever file they
/// came from. A linear weight is `[out, in]`, a vector `[n]`.
#[derive(Clone, Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<(usize, Role), Tensor>,
}

impl Weights {
    /// The tensor of `role` in `layer`, if it is there.
    pub fn get(&self, role: Role, layer: usize) -> Option<&Tensor> {
        self.tensors.get(&(layer, role))
    }

    /// Puts a tensor in, replacing one that was there.
    pub fn insert(&mut self, role: Role, layer: usize, tensor: Tensor) {
        self.tensors.insert((layer, role), tensor);
    }

    /// Takes a tensor out.
    pub fn remove(&mut self, role: Role, layer: usize) -> Option<Tensor> {
        self.tensors.remove(&(layer, role))
    }

    /// Every tensor, by layer and role.
    pub fn iter(&self) -> impl Iterator<Item = (Role, usize, &Tensor)> {
        self.tensors.iter().map(|((layer, role), tensor)| (*role, *layer, tensor))
    }
}

/// A vocabulary, as the `tokenizer.*` entries of a GGUF file (chat template included).
#[derive(Clone, Debug, PartialEq)]
pub struct Vocabulary {
    /// The entries, in order, with their full keys.
    pub entries: Vec<(String, MetaValue)>,
}

impl Vocabulary {
    /// The vocabulary of a GGUF file; `None` if it has none.
    pub fn from_gguf(file: &Gguf<'_>) -> Option<Self> {
        let entries: Vec<_> = file
            .metadata()
            .filter(|(key, _)| key.starts_with("tokenizer."))
            .map(|(key, value)| (key.to_owned(), owned(&value)))
            .collect();
        (!entries.is_empty()).then_some(Self { entries })
    }

    /// The entry of a full key.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.entries.iter().find(|(found, _)| found == key).map(|(_, value)| value)
    }

    /// Texts of the tokens, by id.
    pub fn tokens(&self) -> &[Vec<u8>] {
        match self.get("tokenizer.ggml.tokens") {
            Some(MetaValue::Strings(tokens)) => tokens,
            _ => &[],
        }
    }

    /// `Ok` if both give every id the same text; otherwise in what they differ.
    ///
    /// # Errors
    /// The first difference, in words.
    pub fn same_tokens(&self, other: &Self) -> Result<(), String> {
        let (mine, others) = (self.tokens(), other.tokens());
        let differing = mine.iter().zip(others).position(|(a, b)| a != b);
        if let Some(id) = differing {
            let text = |tokens: &[Vec<u8>]| String::from_utf8_lossy(&tokens[id]).into_owned();
            return Err(format!("token {id} is `{}` in one and `{}` in the other", text(mine), text(others)));
        }
        if mine.len() != others.len() {
            return Err(format!("one has {} tokens, the other {}", mine.len(), others.len()));
        }
        Ok(())
    }
}

/// A metadata value that no longer needs the file. Widths of integers beyond 32 bits are kept.
pub(crate) fn owned(value: &Value<'_>) -> MetaValue {
    match *value {
        Value::Uint(value) => u32::try_from(value).map_or(MetaValue::U64(value), MetaValue::U32),
        Value::Int(value) => i32::try_from(value).map_or(MetaValue::I64(value), MetaValue::I32),
        Value::Float(value) => MetaValue::F32(value as f32),
        Value::Bool(value) => MetaValue::Bool(value),
        Value::String(bytes) => MetaValue::String(bytes.to_vec()),
        Value::Array(array) => owned_array(&array),
    }
}

fn owned_array(array: &Array<'_>) -> MetaValue {
    let uints = || array.iter().filter_map(|value| value.as_uint()).map(|value| value as u32).collect();
    let ints = || {
        let int = |value: Value<'_>| match value {
            Value::Int(value) => value as i32,
            value => value.as_uint().unwrap_or(0) as i32,
        };
        array.iter().map(int).collect()
    };
    match array.element_type() {
        ValueType::String | ValueType::Array => {
            MetaValue::Strings(array.strings().map(|s| s.map(<[u8]>::to_vec).collect()).unwrap_or_default())
        }
        ValueType::F32 | ValueType::F64 => {
            MetaValue::F32s(array.iter().filter_map(|value| value.as_float()).map(|x| x as f32).collect())
        }
        ValueType::Bool => MetaValue::Bools(array.iter().filter_map(|value| value.as_bool()).collect()),
        ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => MetaValue::I32s(ints()),
        ValueType::U8 | ValueType::U16 | ValueType::U32 | ValueType::U64 => MetaValue::U32s(uints()),
    }
}
