//! Activations times a weight matrix.
//!
//! A row of weights is unpacked once for a tile of up to 8 tokens. The sums of one output element are formed
//! in the same order whatever the tile, the number of tokens and the number of threads, so prefill and
//! decode agree bit for bit. For quantized weights, with `v` the exact integer sum of block `b`:
//!
//! `lane[b % 8] += (scale_w[b] * (v - BIAS * sum_a[b]) + min_w[b] * sum_a[b]) * scale_a[b]`

use super::activations::{Activations, QuantizedRow};
use super::blocks::Format;
use super::dequantize_row;
use super::float::load16;
use super::output::{Columns, Output};
use super::simd::Simd;
use super::tiles::{TileKernel, dequantize_tile_row};
use crate::format::{DType, Geometry, Layout, TILE_ROWS as ROWS};
use crate::workers::Workers;
use crate::{Code, Error, Result};

/// Tokens that share one unpacking of quantized weights.
const TILE: usize = 8;
/// Bytes of eight blocks of Q8_0; no group has more.
const LARGEST_GROUP: usize = 8 * 34;
/// Bytes of weights that stay in the cache while all tokens pass over them.
const WEIGHT_BYTES: usize = 32 * 1024;
/// Multiplications below which other threads are not worth waking.
const WORTH_SHARING: usize = 1 << 15;

/// A weight matrix in the model's bytes, at any address.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    dtype: DType,
    layout: Layout,
    rows: usize,
    cols: usize,
    /// Bytes of a row, or of a tile.
    unit_bytes: usize,
    data: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `cols` elements of `dtype`, one after another.
    ///
    /// # Errors
    /// [`Code::WrongShape`] if a row is empty or not a whole number of blocks, or if `data` has not exactly
    /// the bytes of all rows.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self> {
        Self::with(Layout::Rows, dtype, rows, cols, data)
    }

    /// `rows` rows of `cols` elements of `dtype`, laid out as `layout` says.
    ///
    /// # Errors
    /// As [`Matrix::new`]; [`Code::UnsupportedType`] for tiles of a floating-point type.
    pub fn with(layout: Layout, dtype: DType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self> {
        let (unit_bytes, units) = match layout {
            Layout::Rows => (dtype.row_bytes(cols), rows),
            Layout::Tiles => {
                let geometry = Geometry::of(dtype)
                    .ok_or_else(|| Error::new(Code::UnsupportedType, dtype.name()).hint("in tiles"))?;
                (geometry.tile_bytes(cols), rows.div_ceil(ROWS))
            }
        };
        let unit_bytes = match unit_bytes {
            Some(bytes) if bytes > 0 => bytes,
            _ => {
                return Err(
                    Error::new(Code::WrongShape, dtype.name()).found(cols as u64, dtype.block_len() as u64)
                );
            }
        };
        match unit_bytes.checked_mul(units) {
            Some(bytes) if bytes == data.len() => Ok(Self { dtype, layout, rows, cols, unit_bytes, data }),
            bytes => Err(Error::new(Code::WrongShape, dtype.name())
                .found(data.len() as u64, bytes.unwrap_or(usize::MAX) as u64)
                .hint("bytes of a weight matrix")),
        }
    }

    /// How the elements are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// How the rows lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of rows, the outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns, the inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Decodes row `row` to `out`, which is as long as a row.
    ///
    /// # Errors
    /// [`Code::WrongShape`] if it is not, or there is no such row.
    pub fn dequantize(&self, row: usize, out: &mut [f32]) -> Result<()> {
        if row >= self.rows || out.len() != self.cols {
            return Err(Error::new(Code::WrongShape, self.dtype.name()).found(row as u64, self.rows as u64));
        }
        match self.layout {
            Layout::Rows => dequantize_row(self.dtype, self.row(row).unwrap_or(&[]), out),
            Layout::Tiles => dequantize_tile_row(self.dtype, self.data, row, out),
        }
    }

    /// The bytes of one row; `None` beyond the last, and in tiles.
    #[inline]
    pub fn row(&self, row: usize) -> Option<&'a [u8]> {
        if row < self.rows && self.layout == Layout::Rows {
            self.data.get(row * self.unit_bytes..)?.get(..self.unit_bytes)
        } else {
            None
        }
    }

    /// The shares of the tile that `row` is in; `None` beyond the last, and in rows.
    #[inline(always)]
    pub(crate) fn tile(&self, row: usize) -> Option<&'a [u8]> {
        if self.layout == Layout::Tiles {
            self.data.get(row / ROWS * self.unit_bytes..)?.get(..self.unit_bytes)
        } else {
            None
        }
    }

    /// Rows whose weights stay in the cache, at least 1.
    fn rows_in_cache(&self) -> usize {
        (WEIGHT_BYTES / self.unit_bytes).max(1)
    }
}

/// One kernel: computes the rows of one part for all tokens.
pub(crate) type RowsKernel = unsafe fn(&Matrix, &Activations, &mut Columns);

/// One function for each quantized type.
pub(crate) struct ByType<F> {
    pub q8_0: F,
    pub q4_0: F,
    pub q4_1: F,
    pub q5_0: F,
    pub q5_1: F,
    pub q4_k: F,
    pub q5_k: F,
    pub q6_k: F,
}

impl<F: Copy> ByType<F> {
    /// The function for a type; `None` for those that have no table of this kind.
    pub fn of(&self, dtype: DType) -> Option<F> {
        Some(match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return None,
            DType::Q8_0 => self.q8_0,
            DType::Q4_0 => self.q4_0,
            DType::Q4_1 => self.q4_1,
            DType::Q5_0 => self.q5_0,
            DType::Q5_1 => self.q5_1,
            DType::Q4K => self.q4_k,
            DType::Q5K => self.q5_k,
            DType::Q6K => self.q6_k,
            #[cfg(feature = "low-bit")]
            DType::Q2K | DType::Q3K | DType::IQ4NL => return None,
        })
    }
}

/// What multiplies with one matrix.
#[derive(Clone, Copy)]
pub(crate) enum Kernel {
    /// Weights in rows.
    Rows(RowsKernel),
    /// Weights in tiles.
    Tiles(TileKernel),
}

impl Kernel {
    /// Computes the rows of one part for all tokens.
    ///
    /// # Safety
    /// The CPU must be able to run the kernel.
    unsafe fn run(self, weight: &Matrix, acts: &Activations, out: &mut Columns) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Rows(kernel) => kernel(weight, acts, out),
                Self::Tiles(kernel) => kernel.run(weight, acts, out),
            }
        }
    }
}

/// A weight matrix, the kernel for it, and where the product goes, `[tokens, rows]`.
pub(crate) struct Product<'p, 'a> {
    pub kernel: Kernel,
    pub weight: &'p Matrix<'a>,
    pub out: &'p mut [f32],
}

/// Checks the shapes and computes all products of `acts`, their rows shared among all threads.
///
/// # Safety
/// The CPU must be able to run the kernels.
pub(crate) unsafe fn run<const N: usize>(
    workers: &dyn Workers,
    acts: &Activations,
    products: [Product; N],
) -> Result<()> {
    let tokens = acts.tokens();
    let mut work = 0usize;
    for Product { weight, out, .. } in &products {
        if weight.cols != acts.cols() {
            return Err(Error::new(Code::WrongShape, "matmul").found(acts.cols() as u64, weight.cols as u64));
        }
        if !weight.dtype.is_float() && acts.quantized_for() != Some(weight.layout) {
            return Err(Error::new(Code::BadArgument, "matmul").hint("activations quantized for this layout"));
        }
        let expected = tokens.saturating_mul(weight.rows);
        if out.len() != expected {
            return Err(
                Error::new(Code::WrongShape, "matmul output").found(out.len() as u64, expected as u64)
            );
        }
        work = work.saturating_add(expected.saturating_mul(weight.cols));
    }
    let threads = if work < WORTH_SHARING { 1 } else { workers.count().max(1) };
    let shared = products.map(|Product { kernel, weight, out }| {
        // Two tiles, which some kernels take at once; of one token, parts as equal as can be.
        let unit = if tokens > 1 { 2 * ROWS } else { ROWS };
        (kernel, weight, Output::new(out, tokens, weight.rows, unit, threads))
    });
    let job = || {
        for (kernel, weight, output) in &shared {
            // The lengths were checked, so every product has its output.
            while let Some(mut part) = output.as_ref().and_then(Output::take) {
                // SAFETY: the caller's promise.
                unsafe { kernel.run(weight, acts, &mut part) }
            }
        }
    };
    if threads > 1 {
        workers.run(&job);
    }
    // Whatever is left: everything with one thread, nothing if the workers kept their contract.
    job();
    Ok(())
}

/// The rows of one part, for quantized weights.
#[inline(always)]
pub(crate) fn quantized_rows<W: Format>(
    s: impl Simd,
    weight: &Matrix,
    acts: &Activations,
    out: &mut Columns,
) {
    let (rows, tokens) = (out.rows(), acts.tokens());
    let mut first = rows.start;
    while first < rows.end {
        let last = rows.end.min(first + weight.rows_in_cache());
        let mut token = 0;
        while token < tokens {
            let n = (tokens - token).min(TILE);
            let mut x = [acts.quantized_row(token); TILE];
            for (i, x) in x[..n].iter_mut().enumerate() {
                *x = acts.quantized_row(token + i);
            }
            for row in first..last {
                let Some(bytes) = weight.row(row) else { return };
                let lanes = tile::<_, W>(s, bytes, &x[..n]);
                if n == 1 {
                    out.set(token, row, s.sum(lanes[0]));
                } else {
                    let mut sums = [0.0; TILE];
                    s.store(s.sums(lanes), &mut sums);
                    for (i, sum) in sums[..n].iter().enumerate() {
                        out.set(token + i, row, *sum);
                    }
                }
            }
            token += n;
        }
        first = last;
    }
}

/// The lanes of the dot products of one row with at most [`TILE`] tokens.
#[inline(always)]
fn tile<S: Simd, W: Format>(s: S, bytes: &[u8], x: &[QuantizedRow]) -> [S::F; TILE] {
    let mut lanes = [s.splat(0.0); TILE];
    for (index, bytes) in bytes.chunks(W::GROUP_BYTES).enumerate() {
        let last;
        let bytes = if bytes.len() == W::GROUP_BYTES {
            bytes
        } else {
            last = filled_up(bytes);
            &last[..W::GROUP_BYTES]
        };
        let group = W::group(s, bytes);
        for (row, lanes) in x.iter().zip(&mut lanes) {
            let mut products = [s.no_products(); 4];
            for ((product, pair), a) in
                products.iter_mut().zip(group.pairs).zip(row.quants[index].as_chunks::<64>().0)
            {
                *product = W::dot(s, pair, a);
            }
            let (scale, sum) = (s.load(&row.scales[index]), s.load(&row.sums[index]));
            let mut x = s.totals(products);
            if W::BIAS != 0.0 {
                x = s.sub(x, s.mul(s.splat(W::BIAS), sum));
            }
            x = s.mul(group.scale, x);
            if W::HAS_MIN {
                x = s.add(x, s.mul(group.min, sum));
            }
            #[cfg(feature = "low-bit")]
            if W::HAS_HALF_MINS {
                let mut mins = [s.no_products(); 4];
                for ((product, pair), a) in
                    mins.iter_mut().zip(group.pairs).zip(row.quants[index].as_chunks::<64>().0)
                {
                    *product = W::mins(s, pair, a);
                }
                x = s.add(x, s.mul(group.min, s.totals(mins)));
            }
            *lanes = s.add(*lanes, s.mul(x, scale));
        }
    }
    lanes
}

/// The last blocks of a row, fewer than a group has, and blocks of zeros: so there is one loop, not a second one for
/// what is left.
#[inline(always)]
fn filled_up(bytes: &[u8]) -> [u8; LARGEST_GROUP] {
    let mut group = [0; LARGEST_GROUP];
    for (to, from) in group.iter_mut().zip(bytes) {
        *to = *from;
    }
    group
}

/// A floating-point weight type.
pub(crate) trait FloatFormat {
    /// Bytes of one weight.
    const BYTES: usize;
    /// The 16 weights in the first bytes of `bytes`.
    fn load16<S: Simd>(s: S, bytes: &[u8]) -> [S::F; 2];
}

/// Implements [`FloatFormat`] with the function that widens `$bytes` bytes of 8 weights.
macro_rules! float_format {
    ($name:ident, $bytes:literal, $load:ident) => {
        #[doc = concat!($bytes, " bytes hold 8 weights.")]
        pub(crate) struct $name;

        impl FloatFormat for $name {
            const BYTES: usize = $bytes / 8;

            #[inline(always)]
            fn load16<S: Simd>(s: S, bytes: &[u8]) -> [S::F; 2] {
                let ([a, b, ..], _) = bytes.as_chunks::<$bytes>() else { return [s.splat(0.0); 2] };
                [s.$load(a), s.$load(b)]
            }
        }
    };
}

float_format!(F32, 32, f32_bytes);
float_format!(F16, 16, f16_bytes);
float_format!(BF16, 16, bf16_bytes);

/// The rows of one part, for float weights.
#[inline(always)]
pub(crate) fn float_rows<S: Simd, W: FloatFormat>(
    s: S,
    weight: &Matrix,
    acts: &Activations,
    out: &mut Columns,
) {
    let (rows, tokens) = (out.rows(), acts.tokens());
    let mut first = rows.start;
    while first < rows.end {
        let last = rows.end.min(first + weight.rows_in_cache());
        let mut token = 0;
        while token < tokens {
            let n = if tokens - token >= 4 { 4 } else { 1 };
            for row in first..last {
                let Some(bytes) = weight.row(row) else { return };
                if n == 4 {
                    float_tile::<S, W, 4>(s, bytes, acts, token, row, out);
                } else {
                    float_tile::<S, W, 1>(s, bytes, acts, token, row, out);
                }
            }
            token += n;
        }
        first = last;
    }
}

/// The dot products of one row with `N` tokens; the order of the sums is [`super::float::dot`]'s.
#[inline(always)]
fn float_tile<S: Simd, W: FloatFormat, const N: usize>(
    s: S,
    bytes: &[u8],
    acts: &Activations,
    token: usize,
    row: usize,
    out: &mut Columns,
) {
    let mut x: [&[f32]; N] = [&[]; N];
    for (i, x) in x.iter_mut().enumerate() {
        *x = acts.row(token + i);
    }
    let mut sums = [[s.splat(0.0); 2]; N];
    let chunk = 16 * W::BYTES;
    // The last numbers, filled up with zeros: so there is one loop, not a second one for what is left.
    let whole = acts.cols() / 16 * 16;
    let mut last = [[0.0; 16]; N];
    for (last, x) in last.iter_mut().zip(x) {
        last[..x.len() - whole].copy_from_slice(&x[whole..]);
    }
    let mut last_weights = [0; 64];
    for (index, mut bytes) in bytes.chunks(chunk).enumerate() {
        let is_last = bytes.len() < chunk;
        if is_last {
            last_weights[..bytes.len()].copy_from_slice(bytes);
            bytes = &last_weights;
        }
        let w = W::load16(s, bytes);
        for ((x, last), sums) in x.iter().zip(&last).zip(&mut sums) {
            add_products(s, w, if is_last { last } else { &x[index * 16..] }, sums);
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        out.set(token + i, row, s.sum(s.add(sums[0], sums[1])));
    }
}

/// Adds 16 products to 16 sums.
#[inline(always)]
fn add_products<S: Simd>(s: S, w: [S::F; 2], x: &[f32], sums: &mut [S::F; 2]) {
    if let Some(x) = x.first_chunk() {
        let x = load16(s, x);
        *sums = [s.fma(w[0], x[0], sums[0]), s.fma(w[1], x[1], sums[1])];
    }
}
