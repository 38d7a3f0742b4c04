//! From a GGUF file to a pack: the same weights, laid out ahead of time as kernels read them.
//!
//! Nothing is quantized here and nothing is lost: a pack holds the integers and factors of its source. Only
//! quantized matrices move; vectors and floating-point matrices stay as they are. What has no tiles of its own lies in
//! those of a wider type with the same values: Q3_K in those of Q6_K, IQ4_NL in those of Q8_0. Nothing holds Q2_K: a file
//! with such matrices stays in rows, because matrices that share an input must lie alike.
//! The index of the tokenizer is built here, and holds what the merges say.

use std::collections::HashSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use edge_models::NameBuf;
use edge_runtime::format::{
    DType, Gguf, TILE_ROWS, TensorInfo, Value, pack_header, tiled_bytes, tiled_type_id,
};
use edge_runtime::kernels::pack_tiles;
use edge_runtime::session::{Limits, Plan};
use sha2::{Digest, Sha256};

use crate::atomic;
use crate::export::gguf::{GgufWriteError, GgufWriter, NO_VOCABULARY};
use crate::model::owned;
use crate::profile::ModelFile;
use crate::quantize::widen::{widen, wider};
use crate::text::tokenizer_index;

/// Name of a student's pack in a run's folder and beside a bundle.
pub const PACK_FILE: &str = "student.edgepack";
/// Tensors start at multiples of this: a cache line, and a register of any kernel.
const ALIGNMENT: u32 = 64;
/// Columns that are whole blocks of every type.
const LARGEST_BLOCK: usize = 256;
const TOKENIZER: &str = "tokenizer.ggml.model";
const MERGES: &str = "tokenizer.ggml.merges";

/// A hash as people read it.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why a file cannot be packed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PackError {
    /// The runtime cannot run the file.
    #[error("{path}: {reason}", path = .0.display(), reason = .1)]
    Refused(PathBuf, Box<edge_runtime::Error>),
    /// It is a pack already.
    #[error("{path}: is a pack already; pack the GGUF file that it was made from", path = .0.display())]
    Packed(PathBuf),
    /// The pack cannot be put together.
    #[error("{path}: {reason}", path = .0.display(), reason = .1)]
    Layout(PathBuf, GgufWriteError),
    /// The pack cannot be written.
    #[error("{path}: {reason}", path = .0.display(), reason = .1)]
    Io(PathBuf, io::Error),
}

/// What was packed.
#[derive(Clone, Copy, Debug)]
pub struct PackReport {
    /// Bytes of the pack.
    pub bytes: u64,
    /// Matrices in tiles.
    pub tiled: usize,
    /// Quantized matrices left in rows: parts of fused ones that do not start at a tile, and all of a file with Q2_K.
    pub left: usize,
}

/// Packs `source` to the file `out`.
///
/// # Errors
/// See [`PackError`]; then nothing is left behind.
pub fn pack(source: &ModelFile, out: &Path) -> Result<PackReport, PackError> {
    let refused = |error| PackError::Refused(source.path().into(), Box::new(error));
    let file = Gguf::parse(source.bytes()).map_err(refused)?;
    if file.packed_from().is_some() {
        return Err(PackError::Packed(source.path().into()));
    }
    let limits = Limits { context: 1, ..Limits::default() };
    let plan = Plan::new(&file, limits).map_err(refused)?;
    let (body, tiled, left) = body(&file, &plan).map_err(|error| PackError::Layout(out.into(), error))?;
    let index = match file.get(TOKENIZER).and_then(|model| model.as_str()) {
        None | Some(NO_VOCABULARY) => Vec::new(),
        Some(_) => tokenizer_index(&file).map_err(refused)?,
    };
    // At most 2^24 tokens and as many merges, 37 bytes each.
    let index_bytes = index.len() as u32;
    let header = pack_header(&Sha256::digest(source.bytes()).into(), body.file_bytes(), index_bytes);
    let mut bytes = header.len() as u64 + u64::from(index_bytes);
    atomic::write(out, |file| {
        file.write_all(&header)?;
        bytes += body.write_to(file)?;
        file.write_all(&index)
    })
    .map_err(|error| PackError::Io(out.into(), error))?;
    Ok(PackReport { bytes, tiled, left })
}

/// The GGUF file inside the pack, without what its tokenizer's index says, and how many quantized matrices are in
/// tiles and in rows.
fn body<'a>(file: &Gguf<'a>, plan: &Plan) -> Result<(GgufWriter<'a>, usize, usize), GgufWriteError> {
    let mut writer = GgufWriter::aligned(ALIGNMENT)?;
    // Look-ups walk the entries: long lists go last.
    let entries = || file.metadata().filter(|(key, _)| !["general.alignment", MERGES].contains(key));
    let is_list = |value: &Value| value.as_array().is_some();
    for (key, value) in entries().filter(|(_, value)| !is_list(value)) {
        writer.meta(key, &owned(&value))?;
    }
    for (key, value) in entries().filter(|(_, value)| is_list(value)) {
        writer.meta(key, &owned(&value))?;
    }
    let unaligned = parts_within_tiles(plan);
    let mut types = file.tensors().filter_map(|tensor| tensor.dtype).filter(|dtype| !dtype.is_float());
    let all_have_tiles = types.all(|dtype| tiled_bytes(tiled_as(dtype), TILE_ROWS, LARGEST_BLOCK).is_some());
    let (mut tiled, mut left) = (0, 0);
    for tensor in file.tensors() {
        let dims = &tensor.dims[..tensor.n_dims];
        let Some(dtype) = tensor.dtype else { continue };
        let tiles = tiled_as(dtype);
        match tiled_bytes(tiles, tensor.rows(), tensor.cols()) {
            Some(bytes) if all_have_tiles && !unaligned.contains(tensor.name) && tensor.rows() > 1 => {
                tiled += 1;
                let produce = move |out: &mut dyn Write| write_tiles(&tensor, dtype, out);
                writer.private_tensor(tensor.name, dims, tiled_type_id(tiles), bytes as u64, produce)?;
            }
            _ => {
                left += usize::from(!dtype.is_float());
                writer.tensor(tensor.name, dims, dtype, tensor.data)?;
            }
        }
    }
    Ok((writer, tiled, left))
}

/// The type in whose tiles a matrix of `dtype` lies.
fn tiled_as(dtype: DType) -> DType {
    wider(dtype).unwrap_or(dtype)
}

/// Names of fused tensors with a part that starts within a tile.
fn parts_within_tiles(plan: &Plan) -> HashSet<String> {
    let spec = plan.spec();
    let rows = spec.family.tensors.iter().filter(|row| row.role.required(spec));
    let within = rows.filter(|row| !row.span(spec).start.is_multiple_of(TILE_ROWS));
    within
        .flat_map(|row| (0..spec.layers).map(|layer| NameBuf::new(row.gguf, layer).as_str().to_owned()))
        .collect()
}

fn write_tiles(tensor: &TensorInfo<'_>, dtype: DType, out: &mut dyn Write) -> io::Result<()> {
    let (rows, cols) = (tensor.rows(), tensor.cols());
    let (dtype, data) = match wider(dtype) {
        Some(wide) => (wide, &*widen(dtype, tensor.data)),
        None => (dtype, tensor.data),
    };
    let mut tiles = vec![0; tiled_bytes(dtype, rows, cols).unwrap_or(0)];
    pack_tiles(dtype, rows, cols, data, &mut tiles)
        .map_err(|error| io::Error::other(format!("tensor `{}`: {error}", tensor.name)))?;
    out.write_all(&tiles)
}
