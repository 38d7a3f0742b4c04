//! A zero-copy reader of GGUF (versions 2 and 3, little-endian).
//!
//! [`Gguf::parse`] walks the whole header once and checks every length, shape and offset against the
//! file; afterwards look-ups walk it again but can no longer fail. It never trusts a count: each entry
//! must be paid for with bytes that are really there, so the walk ends with the file.

use super::edgepack::{self, PACK_HEADER_BYTES, Pack};
use super::tiled_bytes;
use super::{DType, Layout};
use crate::{Code, Error, Result};
use edge_models::Config;

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
const MAX_DIMS: u32 = 4;
const MAX_NESTING: u32 = 4;
const MAX_KEY: usize = 65_535;
const MAX_ALIGNMENT: u64 = 1 << 16;
/// Lists of metadata whose ends are remembered: tokens, merges, scores and types of a vocabulary.
const LONG_LISTS: usize = 4;
/// Bytes from which on that is worth it.
const LONG: usize = 4096;

/// A checked GGUF file.
#[derive(Clone, Copy, Debug)]
pub struct Gguf<'a> {
    bytes: &'a [u8],
    version: u32,
    kv_count: u64,
    kv_start: usize,
    tensor_count: u64,
    tensor_start: usize,
    data_start: usize,
    alignment: usize,
    /// The pack around it.
    pack: Option<Pack<'a>>,
    /// Where the values of long lists start, and the lists: look-ups need not walk them.
    long: [Option<(usize, Array<'a>)>; LONG_LISTS],
}

/// Kind of a metadata value. The numbers are GGUF's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

/// A metadata value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Any unsigned integer.
    Uint(u64),
    /// Any signed integer.
    Int(i64),
    /// `f32` or `f64`.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// Bytes that should be UTF-8; vocabularies hold some that are not.
    String(&'a [u8]),
    /// A list.
    Array(Array<'a>),
}

/// A list of metadata values of one kind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    count: usize,
    bytes: &'a [u8],
}

/// A tensor: its name, shape, type and bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// GGUF's number of the type.
    pub type_id: u32,
    /// The type, if it is one that is read here and its rows follow one another.
    pub dtype: Option<DType>,
    /// The type, if the rows are in tiles.
    pub tiles: Option<DType>,
    /// Elements along each axis, fastest first; unused axes are 1.
    pub dims: [u64; 4],
    /// Number of axes that the file names.
    pub n_dims: usize,
    /// Byte offset in the file.
    pub offset: usize,
    /// The elements; empty where the type is unknown.
    pub data: &'a [u8],
}

impl TensorInfo<'_> {
    /// The type and how the rows lie; `None` for a type that is not read here.
    pub fn weights(&self) -> Option<(DType, Layout)> {
        match (self.dtype, self.tiles) {
            (Some(dtype), _) => Some((dtype, Layout::Rows)),
            (None, Some(dtype)) => Some((dtype, Layout::Tiles)),
            (None, None) => None,
        }
    }

    /// Elements in a row.
    pub fn cols(&self) -> usize {
        self.dims[0] as usize
    }

    /// Rows, all further axes folded.
    pub fn rows(&self) -> usize {
        // Cannot overflow: the product of all axes was checked in `parse`.
        (self.dims[1] * self.dims[2] * self.dims[3]) as usize
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    #[inline]
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let rest = self.bytes.len() - self.at;
        if count > rest {
            return Err(Error::new(Code::Truncated, "").at(self.at).found(rest as u64, count as u64));
        }
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    /// A little-endian number of at most 8 bytes.
    fn number(&mut self, bytes: usize) -> Result<u64> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(self.number(4)? as u32)
    }

    fn u64(&mut self) -> Result<u64> {
        self.number(8)
    }

    /// A length, refused if it exceeds what is left of the file at `unit` bytes each.
    fn length(&mut self, unit: usize) -> Result<usize> {
        let at = self.at;
        let length = self.u64()?;
        let most = ((self.bytes.len() - self.at) / unit) as u64;
        if length > most {
            return Err(Error::new(Code::BadLength, "").at(at).found(length, most));
        }
        Ok(length as usize)
    }

    #[inline]
    fn string(&mut self) -> Result<&'a [u8]> {
        let length = self.length(1)?;
        self.take(length)
    }

    /// Steps over that many strings.
    fn skip_strings(&mut self, mut count: usize) -> Result<()> {
        let mut rest = &self.bytes[self.at..];
        while count > 0
            && let Some((_, behind)) = split_string(rest)
        {
            (rest, count) = (behind, count - 1);
        }
        self.at = self.bytes.len() - rest.len();
        // What stopped the walk is refused here.
        if count > 0 { self.string().map(drop) } else { Ok(()) }
    }

    fn name(&mut self) -> Result<&'a str> {
        let at = self.at;
        let bytes = self.string()?;
        if bytes.len() > MAX_KEY {
            return Err(Error::new(Code::BadLength, "").at(at).found(bytes.len() as u64, MAX_KEY as u64));
        }
        core::str::from_utf8(bytes).map_err(|_| Error::new(Code::BadText, "").at(at))
    }

    fn value_type(&mut self) -> Result<ValueType> {
        let at = self.at;
        let id = self.u32()?;
        ValueType::from_gguf(id)
            .ok_or_else(|| Error::new(Code::BadValueType, "").at(at).found(u64::from(id), 12))
    }

    fn value(&mut self, kind: ValueType, depth: u32) -> Result<Value<'a>> {
        if let Some(bytes) = kind.fixed_bytes() {
            let number = self.number(bytes)?;
            let unused = 64 - 8 * bytes;
            return Ok(match kind {
                ValueType::I8 | ValueType::I16 | ValueType::I32 | ValueType::I64 => {
                    Value::Int((number << unused) as i64 >> unused)
                }
                ValueType::F32 => Value::Float(f64::from(f32::from_bits(number as u32))),
                ValueType::F64 => Value::Float(f64::from_bits(number)),
                ValueType::Bool => Value::Bool(number != 0),
                _ => Value::Uint(number),
            });
        }
        if kind == ValueType::String {
            return Ok(Value::String(self.string()?));
        }
        let at = self.at;
        if depth == MAX_NESTING {
            return Err(Error::new(Code::BadLength, "")
                .at(at)
                .found(u64::from(depth) + 1, u64::from(MAX_NESTING))
                .hint("arrays nested too deeply"));
        }
        let element = self.value_type()?;
        let count = self.length(element.min_bytes())?;
        let start = self.at;
        if let Some(size) = element.fixed_bytes() {
            // `length` proved that count * size bytes are left.
            self.take(count * size)?;
        } else if element == ValueType::String {
            self.skip_strings(count)?;
        } else {
            (0..count).try_for_each(|_| self.value(element, depth + 1).map(drop))?;
        }
        Ok(Value::Array(Array { element, count, bytes: &self.bytes[start..self.at] }))
    }
}

/// The string at the start of `bytes`, and what follows it. Vocabularies have hundreds of thousands.
fn split_string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

impl ValueType {
    fn from_gguf(id: u32) -> Option<Self> {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].get(id as usize).copied()
    }

    /// Bytes of a value, where it is the same for all.
    fn fixed_bytes(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }

    fn min_bytes(self) -> usize {
        match self {
            Self::Array => 12,
            _ => self.fixed_bytes().unwrap_or(8),
        }
    }
}

impl<'a> Value<'a> {
    /// A non-negative integer of any width.
    pub fn as_uint(&self) -> Option<u64> {
        match *self {
            Self::Uint(value) => Some(value),
            Self::Int(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            Self::Uint(value) => Some(value as f64),
            Self::Int(value) => Some(value as f64),
            _ => None,
        }
    }

    /// A truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    /// Text, if it is UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Self::String(bytes) => core::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// A list.
    pub fn as_array(&self) -> Option<Array<'a>> {
        match *self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.count
    }

    /// It has no elements.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Kind of its elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// Its elements in order. Strings are found by walking, so keep the iterator.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let element = self.element;
        let mut cursor = Cursor { bytes: self.bytes, at: 0 };
        (0..self.count).map_while(move |_| cursor.value(element, 1).ok())
    }

    /// Its elements as bytes of strings, in order; `None` if it holds something else.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a [u8]> + use<'a>> {
        (self.element == ValueType::String).then_some(self.texts())
    }

    /// As [`Array::strings`], of an array that is known to hold strings.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut rest = self.bytes;
        core::iter::from_fn(move || {
            let text;
            (text, rest) = split_string(rest)?;
            Some(text)
        })
    }

    /// The raw bytes of its elements.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl<'a> Gguf<'a> {
    /// Checks a whole file, a GGUF or a pack. Afterwards every look-up is safe.
    ///
    /// # Errors
    /// The first thing that is wrong, with its byte offset.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        match edgepack::open(bytes)? {
            None => Self::parse_gguf(bytes, None),
            Some(pack) => Self::parse_gguf(pack.body, Some(pack))
                .map_err(|error| Error { at: error.at.map(|at| at + PACK_HEADER_BYTES as u64), ..error }),
        }
    }

    fn parse_gguf(bytes: &'a [u8], pack: Option<Pack<'a>>) -> Result<Self> {
        let mut cursor = Cursor { bytes, at: 0 };
        let magic = cursor.u32()?;
        if magic != MAGIC {
            return Err(Error::new(Code::BadMagic, "").at(0).found(u64::from(magic), u64::from(MAGIC)));
        }
        let version = cursor.u32()?;
        if !(2..=3).contains(&version) {
            return Err(Error::new(Code::UnsupportedVersion, "")
                .at(4)
                .found(u64::from(version), 3)
                .hint("GGUF, 2 or 3"));
        }
        // The smallest tensor entry has 32 bytes, the smallest key-value pair 13.
        let tensor_count = cursor.length(32)? as u64;
        let kv_count = cursor.length(13)? as u64;
        let mut file = Self {
            bytes,
            version,
            kv_count,
            kv_start: cursor.at,
            tensor_count,
            tensor_start: 0,
            data_start: 0,
            alignment: 32,
            pack,
            long: [None; LONG_LISTS],
        };
        let mut lists = file.long.iter_mut();
        for _ in 0..kv_count {
            let at = cursor.at;
            let (key, kind, start) = read_key(&mut cursor)?;
            let value =
                cursor.value(kind, 0).map_err(|error| Error { name: crate::Name::new(key), ..error })?;
            if let Some(list) = value.as_array().filter(|list| list.bytes.len() >= LONG)
                && let Some(long) = lists.next()
            {
                *long = Some((start, list));
            }
            if key == "general.alignment" {
                let alignment = value.as_uint().unwrap_or(0);
                if !alignment.is_power_of_two() || !(8..=MAX_ALIGNMENT).contains(&alignment) {
                    return Err(Error::new(Code::BadAlignment, key)
                        .at(at)
                        .found(alignment, 8)
                        .hint("a power of two up to 65536"));
                }
                file.alignment = alignment as usize;
            }
        }
        file.tensor_start = cursor.at;
        for _ in 0..tensor_count {
            read_tensor_header(&mut cursor)?;
        }
        let data_start = cursor.at.next_multiple_of(file.alignment);
        if data_start > bytes.len() && tensor_count > 0 {
            return Err(Error::new(Code::Truncated, "tensor data")
                .at(cursor.at)
                .found(bytes.len() as u64, data_start as u64));
        }
        file.data_start = data_start.min(bytes.len());
        let mut cursor = Cursor { bytes, at: file.tensor_start };
        for _ in 0..tensor_count {
            let at = cursor.at;
            let header = read_tensor_header(&mut cursor)?;
            file.locate(&header).map_err(|error| error.at(at))?;
        }
        Ok(file)
    }

    /// Version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// SHA-256 of the file that this pack was made from; `None` for a GGUF file.
    pub fn packed_from(&self) -> Option<&'a [u8; 32]> {
        self.pack.map(|pack| pack.source)
    }

    /// The index of the tokenizer that a pack brings, which nothing has checked.
    pub fn tokenizer_index(&self) -> Option<&'a [u8]> {
        self.pack.map(|pack| pack.index).filter(|index| !index.is_empty())
    }

    /// The whole GGUF file; in a pack, the one within.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Everything before the first tensor entry: with its tensor count at bytes 8 to 15 set to 0 it is a
    /// whole file that holds the metadata alone.
    pub fn header_bytes(&self) -> &'a [u8] {
        &self.bytes[..self.tensor_start]
    }

    /// Every metadata entry in order.
    pub fn metadata(&self) -> impl Iterator<Item = (&'a str, Value<'a>)> + use<'a> {
        let mut cursor = Cursor { bytes: self.bytes, at: self.kv_start };
        let long = self.long;
        (0..self.kv_count).map_while(move |_| {
            let (key, kind, start) = read_key(&mut cursor).ok()?;
            if let Some((_, list)) = long.into_iter().flatten().find(|(at, _)| *at == start) {
                // Type and number of the elements, then the elements.
                cursor.at = start + 12 + list.bytes.len();
                return Some((key, Value::Array(list)));
            }
            Some((key, cursor.value(kind, 0).ok()?))
        })
    }

    /// Every tensor in order.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'a>> + use<'a> {
        let file = *self;
        let mut cursor = Cursor { bytes: self.bytes, at: self.tensor_start };
        (0..self.tensor_count).map_while(move |_| {
            let header = read_tensor_header(&mut cursor).ok()?;
            file.locate(&header).ok()
        })
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        self.metadata().find(|(found, _)| *found == key).map(|(_, value)| value)
    }

    /// A metadata value that must be there.
    pub fn require(&self, key: &str) -> Result<Value<'a>> {
        self.get(key).ok_or_else(|| Error::new(Code::MissingKey, key))
    }

    /// A tensor.
    pub fn tensor(&self, name: &str) -> Option<TensorInfo<'a>> {
        let mut entry = &self.bytes[self.tensor_start..];
        (0..self.tensor_count).find_map(|_| {
            let at = self.bytes.len() - entry.len();
            let (found, rest) = split_string(entry)?;
            // Names are compared before anything else of an entry is looked at.
            if found == name.as_bytes() {
                let header = read_tensor_header(&mut Cursor { bytes: self.bytes, at }).ok()?;
                return self.locate(&header).ok();
            }
            // Number of axes, axes, type and offset.
            entry = rest.get(16 + 8 * usize::from(*rest.first()?)..)?;
            None
        })
    }

    /// `general.architecture`.
    pub fn architecture(&self) -> Result<&'a str> {
        let key = "general.architecture";
        self.require(key)?.as_str().ok_or_else(|| Error::new(Code::WrongKeyType, key).hint("text"))
    }

    fn locate(&self, header: &TensorHeader<'a>) -> Result<TensorInfo<'a>> {
        let error = |code| Error::new(code, header.name);
        let dtype = DType::from_gguf(header.type_id);
        let tiles = self.pack.and_then(|_| edgepack::tiled_type(header.type_id));
        let mut elements: u64 = 1;
        for dim in header.dims {
            elements = match elements.checked_mul(dim) {
                Some(product) if dim > 0 && product <= 1 << 48 => product,
                _ => return Err(error(Code::BadShape).found(dim, 1 << 48).hint("elements")),
            };
        }
        if !header.offset.is_multiple_of(self.alignment as u64) {
            return Err(error(Code::BadAlignment).found(header.offset, self.alignment as u64));
        }
        let size = match (dtype, tiles) {
            (None, None) => 0,
            (None, Some(dtype)) => {
                let rows = usize::try_from(elements / header.dims[0]);
                let cols = usize::try_from(header.dims[0]);
                match rows.ok().zip(cols.ok()).and_then(|(rows, cols)| tiled_bytes(dtype, rows, cols)) {
                    Some(bytes) => bytes as u64,
                    None => return Err(error(Code::BadShape).found(header.dims[0], dtype.block_len() as u64)),
                }
            }
            (Some(dtype), _) => {
                let block = dtype.block_len() as u64;
                if !header.dims[0].is_multiple_of(block) {
                    return Err(error(Code::BadShape)
                        .found(header.dims[0], block)
                        .hint("a row is a whole number of blocks"));
                }
                // At most 2^48 elements of at most 4 bytes: no overflow.
                elements / block * dtype.block_bytes() as u64
            }
        };
        let room = self.bytes.len() as u64;
        let start = (self.data_start as u64).checked_add(header.offset);
        let end = start.and_then(|start| start.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= room => Ok(TensorInfo {
                name: header.name,
                type_id: header.type_id,
                dtype,
                tiles,
                dims: header.dims,
                n_dims: header.n_dims,
                offset: start as usize,
                data: &self.bytes[start as usize..end as usize],
            }),
            _ => Err(error(Code::TensorOutOfBounds).found(room, end.unwrap_or(u64::MAX))),
        }
    }
}

struct TensorHeader<'a> {
    name: &'a str,
    n_dims: usize,
    dims: [u64; 4],
    type_id: u32,
    offset: u64,
}

/// The key and the type of a metadata entry, and where its value starts.
fn read_key<'a>(cursor: &mut Cursor<'a>) -> Result<(&'a str, ValueType, usize)> {
    let key = cursor.name()?;
    let kind = cursor.value_type().map_err(|error| Error { name: crate::Name::new(key), ..error })?;
    Ok((key, kind, cursor.at))
}

fn read_tensor_header<'a>(cursor: &mut Cursor<'a>) -> Result<TensorHeader<'a>> {
    let name = cursor.name()?;
    let at = cursor.at;
    let n_dims = cursor.u32()?;
    if n_dims == 0 || n_dims > MAX_DIMS {
        return Err(Error::new(Code::BadShape, name)
            .at(at)
            .found(u64::from(n_dims), u64::from(MAX_DIMS))
            .hint("axes"));
    }
    let mut dims = [1; 4];
    for dim in &mut dims[..n_dims as usize] {
        *dim = cursor.u64()?;
    }
    Ok(TensorHeader { name, n_dims: n_dims as usize, dims, type_id: cursor.u32()?, offset: cursor.u64()? })
}

/// GGUF metadata as the hyper-parameters of its own architecture.
#[derive(Clone, Copy, Debug)]
pub struct GgufConfig<'a> {
    file: Gguf<'a>,
    architecture: &'a str,
}

impl<'a> GgufConfig<'a> {
    /// The hyper-parameters of `file`.
    pub fn new(file: Gguf<'a>) -> Result<Self> {
        Ok(Self { file, architecture: file.architecture()? })
    }

    /// The value of `key`, or the element of the list that `key` names with a number behind a last dot.
    fn value(&self, key: &str) -> Option<Value<'a>> {
        if let Some(value) = self.entry(key) {
            return Some(value);
        }
        let (list, index) = key.rsplit_once('.')?;
        self.entry(list)?.as_array()?.iter().nth(index.parse().ok()?)
    }

    fn entry(&self, key: &str) -> Option<Value<'a>> {
        self.file
            .metadata()
            .find(|(found, _)| {
                found.strip_prefix(self.architecture).and_then(|rest| rest.strip_prefix('.')) == Some(key)
            })
            .map(|(_, value)| value)
    }
}

impl Config for GgufConfig<'_> {
    fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    fn uint(&self, key: &str) -> Option<u64> {
        self.value(key)?.as_uint()
    }

    fn float(&self, key: &str) -> Option<f64> {
        self.value(key)?.as_float()
    }

    fn bool(&self, key: &str) -> Option<bool> {
        self.value(key)?.as_bool()
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.value(key)?.as_str()
    }

    fn tensor_shape(&self, name: &str) -> Option<[u64; 2]> {
        let tensor = self.file.tensor(name)?;
        Some([tensor.dims[1], tensor.dims[0]])
    }
}
