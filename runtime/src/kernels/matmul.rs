//! Activations times a weight matrix.
//!
//! A row of weights is unpacked once for a tile of up to 8 tokens. The sums of one output element are formed
//! in the same order whatever the tile, the number of tokens and the number of threads, so prefill and
//! decode agree bit for bit. For quantized weights, with `v` the exact integer sum of block `b`:
//!
//! `lane[b % 8] += (scale_w[b] * (v - BIAS * sum_a[b]) + min_w[b] * sum_a[b]) * scale_a[b]`

use super::activations::{Activations, BLOCK, GROUP, GROUP_LEN, QuantizedRow};
use super::blocks::{Format, Group};
use super::float::load16;
use super::output::{Columns, Output};
use super::simd::Simd;
use crate::format::DType;
use crate::workers::Workers;
use crate::{Code, Error, Result};

/// Tokens that share one unpacking of quantized weights.
const TILE: usize = 8;
/// Bytes of weights that stay in the cache while all tokens pass over them.
const WEIGHT_BYTES: usize = 32 * 1024;
/// Multiplications below which other threads are not worth waking.
const WORTH_SHARING: usize = 1 << 15;

/// A weight matrix in the model's bytes, at any address.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    dtype: DType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    data: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// `rows` rows of `cols` elements of `dtype`, one after another.
    ///
    /// # Errors
    /// [`Code::WrongShape`] if a row is empty or not a whole number of blocks, or if `data` has not exactly
    /// the bytes of all rows.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self> {
        let row_bytes = match dtype.row_bytes(cols) {
            Some(bytes) if bytes > 0 => bytes,
            _ => {
                return Err(
                    Error::new(Code::WrongShape, dtype.name()).found(cols as u64, dtype.block_len() as u64)
                );
            }
        };
        match row_bytes.checked_mul(rows) {
            Some(bytes) if bytes == data.len() => Ok(Self { dtype, rows, cols, row_bytes, data }),
            bytes => Err(Error::new(Code::WrongShape, dtype.name())
                .found(data.len() as u64, bytes.unwrap_or(usize::MAX) as u64)
                .hint("bytes of a weight matrix")),
        }
    }

    /// How the elements are stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of rows, the outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns, the inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes of one row; `None` beyond the last.
    #[inline]
    pub fn row(&self, row: usize) -> Option<&'a [u8]> {
        if row < self.rows { self.data.get(row * self.row_bytes..)?.get(..self.row_bytes) } else { None }
    }

    /// Rows whose weights stay in the cache, at least 1.
    fn rows_in_cache(&self) -> usize {
        (WEIGHT_BYTES / self.row_bytes).max(1)
    }
}

/// One kernel: computes the rows of one part for all tokens.
pub(crate) type RowsKernel = unsafe fn(&Matrix, &Activations, &mut Columns);

/// Checks the shapes and runs `kernel` over all rows on all threads.
///
/// # Safety
/// The CPU must be able to run `kernel`.
pub(crate) unsafe fn run(
    kernel: RowsKernel,
    workers: &dyn Workers,
    weight: &Matrix,
    acts: &Activations,
    out: &mut [f32],
) -> Result<()> {
    let (tokens, len) = (acts.tokens(), out.len());
    if weight.cols != acts.cols() {
        return Err(Error::new(Code::WrongShape, "matmul").found(acts.cols() as u64, weight.cols as u64));
    }
    if !weight.dtype.is_float() && !acts.is_quantized() {
        return Err(
            Error::new(Code::BadArgument, "matmul").hint("quantized weights need quantized activations")
        );
    }
    let threads = if tokens.saturating_mul(weight.rows).saturating_mul(weight.cols) < WORTH_SHARING {
        1
    } else {
        workers.count().max(1)
    };
    // Several parts a thread, so that a thread that was held up leaves work to the others.
    let parts = if threads == 1 { 1 } else { threads * 4 };
    let step = weight.rows.div_ceil(parts).max(1);
    let Some(output) = Output::new(out, tokens, weight.rows, step) else {
        let expected = tokens.saturating_mul(weight.rows) as u64;
        return Err(Error::new(Code::WrongShape, "matmul output").found(len as u64, expected));
    };
    let job = |_: usize| {
        while let Some(mut part) = output.take() {
            // SAFETY: the caller's promise.
            unsafe { kernel(weight, acts, &mut part) }
        }
    };
    if threads > 1 {
        workers.run(&job);
    }
    // Whatever is left: everything with one thread, nothing if the workers kept their contract.
    job(0);
    Ok(())
}

/// The rows of one part, for quantized weights.
#[inline(always)]
pub(crate) fn quantized_rows<S: Simd, W: Format>(
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
            let n = (tokens - token).min(TILE);
            let mut x = [acts.quantized_row(token); TILE];
            for (i, x) in x[..n].iter_mut().enumerate() {
                *x = acts.quantized_row(token + i);
            }
            for row in first..last {
                let Some(bytes) = weight.row(row) else { return };
                if n == 1 {
                    let lanes = tile::<S, W, 1>(s, bytes, weight.cols, &x[..1]);
                    out.set(token, row, s.sum(lanes[0]));
                } else {
                    let lanes = tile::<S, W, TILE>(s, bytes, weight.cols, &x[..n]);
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

/// The lanes of the dot products of one row with at most `N` tokens.
#[inline(always)]
fn tile<S: Simd, W: Format, const N: usize>(
    s: S,
    bytes: &[u8],
    cols: usize,
    x: &[QuantizedRow],
) -> [S::F; N] {
    let mut lanes = [s.splat(0.0); N];
    let full = cols / GROUP_LEN;
    for index in 0..full {
        let group = W::group(s, bytes, index, GROUP);
        add_group(s, &group, GROUP, x, index, &mut lanes);
    }
    let rest = cols % GROUP_LEN / BLOCK;
    if rest > 0 {
        let group = W::group(s, bytes, full, rest);
        add_group(s, &group, rest, x, full, &mut lanes);
    }
    lanes
}

/// Adds the products of one group of blocks with every token's.
#[inline(always)]
fn add_group<S: Simd, W: Format>(
    s: S,
    group: &Group<S, W>,
    blocks: usize,
    x: &[QuantizedRow],
    index: usize,
    lanes: &mut [S::F],
) {
    for (row, lanes) in x.iter().zip(lanes) {
        let mut products = [s.no_products(); 4];
        let quants = row.quants[index].as_chunks::<64>().0;
        for (i, (product, a)) in products.iter_mut().zip(quants).enumerate() {
            if 2 * i < blocks {
                *product = W::dot(s, group.pairs[i], a);
            }
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
        *lanes = s.add(*lanes, s.mul(x, scale));
    }
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
    let blocks = acts.cols() / 16;
    for index in 0..blocks {
        let w = W::load16(s, &bytes[index * chunk..][..chunk]);
        for (x, sums) in x.iter().zip(&mut sums) {
            add_products(s, w, &x[index * 16..], sums);
        }
    }
    let rest = &bytes[blocks * chunk..];
    if !rest.is_empty() {
        let mut padded = [0; 64];
        padded[..rest.len()].copy_from_slice(rest);
        let w = W::load16(s, &padded);
        for (x, sums) in x.iter().zip(&mut sums) {
            let (from, mut padded) = (&x[blocks * 16..], [0.0; 16]);
            padded[..from.len()].copy_from_slice(from);
            add_products(s, w, &padded, sums);
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
        *sums = [s.add(sums[0], s.mul(w[0], x[0])), s.add(sums[1], s.mul(w[1], x[1]))];
    }
}
