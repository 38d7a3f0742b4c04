//! The byte layout of GGUF (version 3, little-endian).
//!
//! [`GgufWriter`] collects the header first and streams the tensors afterwards, so a file larger than
//! memory can be written. It never invents an entry and never reorders one: same input, same bytes.

use std::borrow::Cow;
use std::collections::HashSet;
use std::io::{self, Write};
use std::path::Path;

use edge_runtime::format::{DType, ValueType};

use super::MetaValue;

const VERSION: u32 = 3;
/// Every tensor starts at a multiple of this many bytes, where nothing else is said (GGUF's default).
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";
/// Longest key of an entry and longest name of a tensor, in bytes (GGUF specification; ggml's limit).
const MAX_KEY: usize = 65_535;
const MAX_TENSOR_NAME: usize = 63;
const MAX_DIMS: usize = 4;

impl MetaValue {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::U8(v) => scalar(out, ValueType::U8, v.to_le_bytes()),
            Self::I8(v) => scalar(out, ValueType::I8, v.to_le_bytes()),
            Self::U16(v) => scalar(out, ValueType::U16, v.to_le_bytes()),
            Self::I16(v) => scalar(out, ValueType::I16, v.to_le_bytes()),
            Self::U32(v) => scalar(out, ValueType::U32, v.to_le_bytes()),
            Self::I32(v) => scalar(out, ValueType::I32, v.to_le_bytes()),
            Self::F32(v) => scalar(out, ValueType::F32, v.to_le_bytes()),
            Self::Bool(v) => scalar(out, ValueType::Bool, [u8::from(*v)]),
            Self::U64(v) => scalar(out, ValueType::U64, v.to_le_bytes()),
            Self::I64(v) => scalar(out, ValueType::I64, v.to_le_bytes()),
            Self::F64(v) => scalar(out, ValueType::F64, v.to_le_bytes()),
            Self::String(v) => {
                put_u32(out, ValueType::String as u32);
                put_bytes(out, v);
            }
            Self::Strings(list) => {
                array_header(out, ValueType::String, list.len());
                list.iter().for_each(|text| put_bytes(out, text));
            }
            Self::I32s(list) => array(out, ValueType::I32, list, |v| v.to_le_bytes()),
            Self::U32s(list) => array(out, ValueType::U32, list, |v| v.to_le_bytes()),
            Self::F32s(list) => array(out, ValueType::F32, list, |v| v.to_le_bytes()),
            Self::Bools(list) => array(out, ValueType::Bool, list, |v| [u8::from(*v)]),
        }
    }
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend(value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend(value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u64(out, bytes.len() as u64);
    out.extend(bytes);
}

fn scalar<const N: usize>(out: &mut Vec<u8>, kind: ValueType, bytes: [u8; N]) {
    put_u32(out, kind as u32);
    out.extend(bytes);
}

fn array_header(out: &mut Vec<u8>, element: ValueType, count: usize) {
    put_u32(out, ValueType::Array as u32);
    put_u32(out, element as u32);
    put_u64(out, count as u64);
}

fn array<T, const N: usize>(
    out: &mut Vec<u8>,
    element: ValueType,
    list: &[T],
    bytes: impl Fn(&T) -> [u8; N],
) {
    array_header(out, element, list.len());
    list.iter().for_each(|value| out.extend(bytes(value)));
}

/// Why a GGUF file could not be put together or written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum GgufWriteError {
    /// Two entries with one key, or two tensors with one name.
    #[error("`{name}` is there twice")]
    Duplicate { name: String },
    /// A key or tensor name that readers refuse.
    #[error("name `{name}` has {found} bytes, expected 1 to {max}")]
    NameLength { name: String, found: usize, max: usize },
    /// A shape that the format cannot hold.
    #[error("tensor `{name}` has shape {dims:?} (fastest axis first), expected {expected}")]
    Shape { name: String, dims: Vec<u64>, expected: String },
    /// The bytes do not fit the shape and type.
    #[error("tensor `{name}` came with {found} bytes, expected {expected}")]
    Size { name: String, found: u64, expected: u64 },
    /// The file system refused.
    #[error("{path}: {source}")]
    Io { path: String, source: io::Error },
}

/// Writes the bytes of one tensor; called once for each time that the file is written.
pub type Producer<'a> = Box<dyn Fn(&mut dyn Write) -> io::Result<()> + 'a>;

enum Source<'a> {
    Bytes(Cow<'a, [u8]>),
    Producer(Producer<'a>),
}

struct TensorEntry<'a> {
    name: String,
    dims: Vec<u64>,
    type_id: u32,
    bytes: u64,
    source: Source<'a>,
}

/// A GGUF file being put together: metadata and tensors, in the order in which they are added.
pub struct GgufWriter<'a> {
    alignment: u64,
    metadata: Vec<u8>,
    metadata_count: u64,
    tensors: Vec<TensorEntry<'a>>,
    names: HashSet<String>,
}

impl Default for GgufWriter<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> GgufWriter<'a> {
    /// An empty file.
    pub fn new() -> Self {
        Self {
            alignment: ALIGNMENT,
            metadata: Vec::new(),
            metadata_count: 0,
            tensors: Vec::new(),
            names: HashSet::new(),
        }
    }

    /// An empty file whose tensors start at multiples of `alignment` bytes, which its first entry says.
    ///
    /// # Errors
    /// As [`GgufWriter::meta`].
    pub fn aligned(alignment: u32) -> Result<Self, GgufWriteError> {
        let mut writer = Self { alignment: alignment.into(), ..Self::new() };
        writer.meta(ALIGNMENT_KEY, &MetaValue::U32(alignment))?;
        Ok(writer)
    }

    /// Adds a metadata entry.
    ///
    /// # Errors
    /// [`GgufWriteError::Duplicate`] or [`GgufWriteError::NameLength`].
    pub fn meta(&mut self, key: &str, value: &MetaValue) -> Result<(), GgufWriteError> {
        self.claim(key, MAX_KEY)?;
        put_bytes(&mut self.metadata, key.as_bytes());
        value.encode(&mut self.metadata);
        self.metadata_count += 1;
        Ok(())
    }

    /// Adds a tensor whose bytes exist already.
    ///
    /// `dims` are the elements along each axis, fastest first (`[columns, rows]`).
    ///
    /// # Errors
    /// As [`GgufWriter::tensor_from`], and [`GgufWriteError::Size`] if `bytes` has another length than
    /// the shape asks for.
    pub fn tensor(
        &mut self,
        name: &str,
        dims: &[u64],
        dtype: DType,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<(), GgufWriteError> {
        let bytes = bytes.into();
        let expected = tensor_bytes(name, dims, dtype)?;
        if bytes.len() as u64 != expected {
            return Err(GgufWriteError::Size { name: name.into(), found: bytes.len() as u64, expected });
        }
        self.push(name, dims, dtype as u32, expected, Source::Bytes(bytes))
    }

    /// Adds a tensor whose bytes `produce` makes when the file is written.
    ///
    /// # Errors
    /// [`GgufWriteError::Duplicate`], [`GgufWriteError::NameLength`], or [`GgufWriteError::Shape`] for
    /// no axis, more than 4 axes, an empty axis or a row that is not a whole number of blocks.
    pub fn tensor_from(
        &mut self,
        name: &str,
        dims: &[u64],
        dtype: DType,
        produce: impl Fn(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Result<(), GgufWriteError> {
        let bytes = tensor_bytes(name, dims, dtype)?;
        self.push(name, dims, dtype as u32, bytes, Source::Producer(Box::new(produce)))
    }

    /// Adds a tensor of a type that is not GGUF's, with the number `type_id` and `bytes` bytes, which
    /// `produce` makes when the file is written.
    ///
    /// # Errors
    /// [`GgufWriteError::Duplicate`] or [`GgufWriteError::NameLength`].
    pub fn private_tensor(
        &mut self,
        name: &str,
        dims: &[u64],
        type_id: u32,
        bytes: u64,
        produce: impl Fn(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Result<(), GgufWriteError> {
        self.push(name, dims, type_id, bytes, Source::Producer(Box::new(produce)))
    }

    fn push(
        &mut self,
        name: &str,
        dims: &[u64],
        type_id: u32,
        bytes: u64,
        source: Source<'a>,
    ) -> Result<(), GgufWriteError> {
        self.claim(name, MAX_TENSOR_NAME)?;
        self.tensors.push(TensorEntry { name: name.into(), dims: dims.to_vec(), type_id, bytes, source });
        Ok(())
    }

    fn claim(&mut self, name: &str, max: usize) -> Result<(), GgufWriteError> {
        if name.is_empty() || name.len() > max {
            return Err(GgufWriteError::NameLength { name: name.into(), found: name.len(), max });
        }
        if !self.names.insert(name.into()) {
            return Err(GgufWriteError::Duplicate { name: name.into() });
        }
        Ok(())
    }

    /// Bytes of the whole file.
    pub fn file_bytes(&self) -> u64 {
        let data = self.tensors.iter().map(|tensor| tensor.bytes.next_multiple_of(self.alignment));
        self.header().len() as u64 + data.sum::<u64>()
    }

    /// Bytes of the tensors' data, without padding.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// Everything before the tensors' data, padded to the alignment.
    fn header(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.metadata.len() + 128 * self.tensors.len() + 64);
        out.extend(b"GGUF");
        put_u32(&mut out, VERSION);
        put_u64(&mut out, self.tensors.len() as u64);
        put_u64(&mut out, self.metadata_count);
        out.extend(&self.metadata);
        let mut offset = 0;
        for tensor in &self.tensors {
            put_bytes(&mut out, tensor.name.as_bytes());
            put_u32(&mut out, tensor.dims.len() as u32);
            tensor.dims.iter().for_each(|dim| put_u64(&mut out, *dim));
            put_u32(&mut out, tensor.type_id);
            put_u64(&mut out, offset);
            offset += tensor.bytes.next_multiple_of(self.alignment);
        }
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out
    }

    /// Streams the file; answers how many bytes it has.
    ///
    /// # Errors
    /// Whatever `out` or a producer answers; a producer that writes another number of bytes than its
    /// shape asks for is an error that names the tensor.
    pub fn write_to(&self, out: &mut dyn Write) -> io::Result<u64> {
        let header = self.header();
        out.write_all(&header)?;
        let mut total = header.len() as u64;
        for tensor in &self.tensors {
            let mut counted = Counted { out, name: &tensor.name, written: 0, expected: tensor.bytes };
            match &tensor.source {
                Source::Bytes(bytes) => counted.write_all(bytes)?,
                Source::Producer(produce) => produce(&mut counted)?,
            }
            counted.finish()?;
            let padded = tensor.bytes.next_multiple_of(self.alignment);
            out.write_all(&vec![0; (padded - tensor.bytes) as usize])?;
            total += padded;
        }
        Ok(total)
    }

    /// Writes the file through [`crate::atomic::write`]; answers how many bytes it has.
    ///
    /// # Errors
    /// [`GgufWriteError::Io`] with the path; then nothing is left behind.
    pub fn write_atomic(&self, path: &Path) -> Result<u64, GgufWriteError> {
        let mut total = 0;
        crate::atomic::write(path, |out| {
            total = self.write_to(out)?;
            Ok(())
        })
        .map_err(|source| GgufWriteError::Io { path: path.display().to_string(), source })?;
        Ok(total)
    }

    /// The file in memory.
    ///
    /// # Errors
    /// As [`GgufWriter::write_to`].
    pub fn to_vec(&self) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write_to(&mut out)?;
        Ok(out)
    }
}

/// Bytes of a tensor, if the format can hold its shape.
fn tensor_bytes(name: &str, dims: &[u64], dtype: DType) -> Result<u64, GgufWriteError> {
    let refuse = |expected: String| GgufWriteError::Shape { name: name.into(), dims: dims.into(), expected };
    if dims.is_empty() || dims.len() > MAX_DIMS || dims.contains(&0) {
        return Err(refuse(format!("1 to {MAX_DIMS} axes, none of them empty")));
    }
    let block = dtype.block_len() as u64;
    if !dims[0].is_multiple_of(block) {
        return Err(refuse(format!("rows of a multiple of {block} elements for {}", dtype.name())));
    }
    dims[1..]
        .iter()
        .try_fold(dims[0] / block * dtype.block_bytes() as u64, |product, dim| product.checked_mul(*dim))
        .filter(|bytes| *bytes < 1 << 60)
        .ok_or_else(|| refuse("less than 2^60 bytes".into()))
}

/// Passes bytes on and holds a producer to what it promised.
struct Counted<'o> {
    out: &'o mut dyn Write,
    name: &'o str,
    written: u64,
    expected: u64,
}

impl Counted<'_> {
    fn mismatch(&self, found: u64) -> io::Error {
        let (name, expected) = (self.name, self.expected);
        io::Error::other(format!("tensor `{name}`: {found} bytes were produced, expected {expected}"))
    }

    fn finish(self) -> io::Result<()> {
        if self.written == self.expected { Ok(()) } else { Err(self.mismatch(self.written)) }
    }
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let end = self.written + bytes.len() as u64;
        if end > self.expected {
            return Err(self.mismatch(end));
        }
        let taken = self.out.write(bytes)?;
        self.written += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use edge_runtime::format::Gguf;

    fn every_kind() -> Vec<(&'static str, MetaValue)> {
        vec![
            ("general.architecture", "llama".into()),
            ("a.u8", MetaValue::U8(200)),
            ("a.i8", MetaValue::I8(-7)),
            ("a.u16", MetaValue::U16(60_000)),
            ("a.i16", MetaValue::I16(-300)),
            ("a.u32", MetaValue::U32(7)),
            ("a.i32", MetaValue::I32(-70_000)),
            ("a.f32", MetaValue::F32(0.1)),
            ("a.bool", MetaValue::Bool(true)),
            ("a.u64", MetaValue::U64(1 << 40)),
            ("a.i64", MetaValue::I64(-(1 << 40))),
            ("a.f64", MetaValue::F64(0.1)),
            ("a.strings", MetaValue::Strings(vec![b"<s>".to_vec(), b"\xc3\xa9".to_vec(), Vec::new()])),
            ("a.i32s", MetaValue::I32s(vec![1, -2, 3])),
            ("a.u32s", MetaValue::U32s(vec![4, 5])),
            ("a.f32s", MetaValue::F32s(vec![1.5, -2.25])),
            ("a.bools", MetaValue::Bools(vec![true, false])),
            ("a.empty", MetaValue::Strings(Vec::new())),
        ]
    }

    fn sample() -> Vec<u8> {
        let mut file = GgufWriter::new();
        for (key, value) in every_kind() {
            file.meta(key, &value).unwrap();
        }
        file.tensor("odd.weight", &[3], DType::F32, [1.0f32, 2.0, 3.0].map(f32::to_le_bytes).concat())
            .unwrap();
        file.tensor_from("late.weight", &[32, 2], DType::Q8_0, |out| out.write_all(&[7; 68])).unwrap();
        file.tensor("cube.weight", &[2, 3, 2], DType::F16, vec![9; 24]).unwrap();
        file.to_vec().unwrap()
    }

    #[test]
    fn our_reader_reads_it_back() {
        let bytes = sample();
        let file = Gguf::parse(&bytes).unwrap();
        assert_eq!(file.version(), 3);
        let keys: Vec<&str> = file.metadata().map(|(key, _)| key).collect();
        assert_eq!(keys, every_kind().iter().map(|(key, _)| *key).collect::<Vec<_>>());
        assert_eq!(file.get("a.u8").unwrap().as_uint(), Some(200));
        assert_eq!(file.get("a.i32").unwrap().as_float(), Some(-70_000.0));
        assert_eq!(file.get("a.f32").unwrap().as_float(), Some(f64::from(0.1f32)));
        assert_eq!(file.get("a.f64").unwrap().as_float(), Some(0.1));
        assert_eq!(file.get("a.bool").unwrap().as_bool(), Some(true));
        let strings = file.get("a.strings").unwrap().as_array().unwrap();
        assert_eq!(strings.strings().unwrap().collect::<Vec<_>>(), [&b"<s>"[..], b"\xc3\xa9", b""]);
        let names: Vec<_> = file.tensors().map(|t| (t.name, t.dtype.unwrap(), t.dims, t.n_dims)).collect();
        assert_eq!(names[0], ("odd.weight", DType::F32, [3, 1, 1, 1], 1));
        assert_eq!(names[1], ("late.weight", DType::Q8_0, [32, 2, 1, 1], 2));
        assert_eq!(names[2], ("cube.weight", DType::F16, [2, 3, 2, 1], 3));
        assert_eq!(file.tensor("late.weight").unwrap().data, [7; 68]);
        assert_eq!(file.tensor("cube.weight").unwrap().data, [9; 24]);
        assert!(file.tensors().all(|tensor| tensor.offset % 32 == 0));
    }

    #[test]
    fn a_reader_by_others_reads_it_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sample.gguf");
        std::fs::write(&path, sample()).unwrap();
        let mut container = gguf_rs::get_gguf_container(path.to_str().unwrap()).unwrap();
        let model = container.decode().unwrap();
        assert_eq!(model.num_kv(), every_kind().len() as u64);
        assert_eq!(model.metadata()["a.i64"], -(1i64 << 40));
        assert_eq!(model.metadata()["a.bools"], serde_json::json!([true, false]));
        assert_eq!(model.metadata()["general.architecture"], "llama");
        let tensors: Vec<_> = model.tensors().iter().map(|t| (t.name.as_str(), t.kind, t.offset)).collect();
        assert_eq!(tensors, [("odd.weight", 0, 0), ("late.weight", 8, 32), ("cube.weight", 1, 128)]);
    }

    #[test]
    fn refuses_what_readers_would_refuse() {
        let mut file = GgufWriter::new();
        file.meta("k", &MetaValue::Bool(true)).unwrap();
        assert!(matches!(file.meta("k", &MetaValue::U8(1)), Err(GgufWriteError::Duplicate { .. })));
        assert!(matches!(file.meta("", &MetaValue::U8(1)), Err(GgufWriteError::NameLength { .. })));
        let long = "x".repeat(64);
        let cases: [(&str, &[u64], usize); 6] = [
            ("t", &[], 0),
            ("t", &[0, 3], 0),
            ("t", &[33], 34),
            ("t", &[32], 33),
            (&long, &[32], 34),
            ("t", &[1 << 40, 1 << 40], 0),
        ];
        for (name, dims, bytes) in cases {
            assert!(file.tensor(name, dims, DType::Q8_0, vec![0; bytes]).is_err(), "{name} {dims:?}");
        }
    }

    #[test]
    fn holds_producers_to_their_size_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        for produced in [15usize, 17] {
            let mut file = GgufWriter::new();
            file.tensor_from("t", &[4], DType::F32, move |out| out.write_all(&vec![0; produced])).unwrap();
            let error = file.write_atomic(&folder.path().join("x.gguf")).unwrap_err().to_string();
            assert!(error.contains("`t`") && error.contains("expected 16"), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
