//! The one dispatch table, and which of the tables a CPU can run.

use super::activations::{Activations, ActivationsMut};
use super::attention::{Cache, Elements, KeyValues, MAX_WIDTH, Q8Block, Query, Ring, Scores};
use super::low_rank::{LowRank, Precision};
use super::matmul::{self, ByType, Kernel, Matrix, Product, RowsKernel};
use super::tiles::{RUN, TileKernels};
use crate::format::{DType, Layout};
use crate::workers::Workers;
use crate::{Result, kernels::generic};
use edge_models::RopePairing;

/// CPU features that kernels need beyond what the build assumes.
///
/// Safe code can only learn the truth ([`Features::detect`]) or less, so a kernel that the CPU lacks
/// is never reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// x86-64: AVX2, FMA and F16C.
    avx2: bool,
    /// x86-64: AVX-512 F, BW, VL and VNNI besides.
    avx512: bool,
    /// 64-bit ARM: FEAT_DotProd.
    dotprod: bool,
    /// 64-bit ARM: FEAT_I8MM besides.
    i8mm: bool,
}

impl Features {
    /// Nothing beyond the build's baseline.
    pub const NONE: Self = Self { avx2: false, avx512: false, dotprod: false, i8mm: false };

    /// What this CPU and its operating system offer. On 64-bit ARM only an operating system can tell, and the
    /// answer is [`Features::NONE`]: see [`Features::from_hwcap`] and [`Features::told`].
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        let (avx2, avx512) = super::x86_64::features();
        #[cfg(target_arch = "x86_64")]
        return Self { avx2, avx512, ..Self::NONE };
        #[cfg(all(target_arch = "aarch64", feature = "std"))]
        return Self {
            dotprod: std::arch::is_aarch64_feature_detected!("dotprod"),
            i8mm: std::arch::is_aarch64_feature_detected!("dotprod")
                && std::arch::is_aarch64_feature_detected!("i8mm"),
            ..Self::NONE
        };
        #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", feature = "std"))))]
        Self::NONE
    }

    /// What Linux or Android say of a 64-bit ARM CPU: `getauxval(AT_HWCAP)` and `getauxval(AT_HWCAP2)`
    /// (Linux `arch/arm64/include/uapi/asm/hwcap.h`).
    ///
    /// # Safety
    /// The numbers must be those of the CPU that kernels will run on, or have fewer bits set.
    pub unsafe fn from_hwcap(hwcap: u64, hwcap2: u64) -> Self {
        const ASIMDDP: u64 = 1 << 20;
        const I8MM: u64 = 1 << 13;
        // SAFETY: the caller's promise.
        unsafe { Self::told(hwcap & ASIMDDP != 0, hwcap2 & I8MM != 0) }
    }

    /// What a caller knows of a 64-bit ARM CPU: FEAT_DotProd, and FEAT_I8MM, which counts only besides.
    ///
    /// # Safety
    /// The CPU that kernels will run on must have what is said here.
    pub unsafe fn told(dotprod: bool, i8mm: bool) -> Self {
        Self { dotprod, i8mm: dotprod && i8mm, ..Self::NONE }
    }
}

/// Attention of query heads over a cache of floats.
type Attend = unsafe fn(&[f32], &[Query], Cache<Elements>, Scores, &mut [f32]);
/// Attention of query heads over a cache of blocks.
type AttendBlocks = unsafe fn(&[f32], &[Query], Cache<&[Q8Block]>, Scores, &mut [f32]);

/// The kernels of one instruction set.
///
/// All tables agree bit for bit with [`Kernels::generic`], except for the payload and sign of NaNs, and large batches
/// ([`Kernels::quantize_for`]).
/// A table can only be had on a CPU that can run it: that is what every call through one relies on.
pub struct Kernels {
    pub(super) name: &'static str,
    pub(super) quantize: unsafe fn(&mut ActivationsMut),
    pub(super) quantize_tiles: unsafe fn(&mut ActivationsMut, usize),
    pub(super) dot: unsafe fn(&[f32], &[f32]) -> f32,
    pub(super) axpy: unsafe fn(f32, &[f32], &mut [f32]),
    pub(super) to_half: unsafe fn(&[f32], &mut [u16]),
    pub(super) round_to_half: unsafe fn(&mut [f32]),
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) rms_norm_in_place: unsafe fn(&mut [f32], &[f32], f32),
    pub(super) swiglu: unsafe fn(&mut [f32], &[f32]),
    pub(super) geglu: unsafe fn(&mut [f32], &[f32]),
    pub(super) soft_cap: unsafe fn(&mut [f32], f32),
    pub(super) rope: unsafe fn(&mut [f32], &[f32], &[f32], RopePairing),
    pub(super) attend: Attend,
    pub(super) attend_blocks: AttendBlocks,
    pub(super) add_floats: unsafe fn(&LowRank, &[f32], &mut [f32]),
    pub(super) add_integers: unsafe fn(&LowRank, &[f32], &mut [f32]),
    pub(super) f32_rows: RowsKernel,
    pub(super) f16_rows: RowsKernel,
    pub(super) bf16_rows: RowsKernel,
    #[cfg(feature = "low-bit")]
    pub(super) q2_k_rows: RowsKernel,
    #[cfg(feature = "low-bit")]
    pub(super) q3_k_rows: RowsKernel,
    #[cfg(feature = "low-bit")]
    pub(super) iq4_nl_rows: RowsKernel,
    pub(super) rows: &'static ByType<RowsKernel>,
    pub(super) tiles: &'static TileKernels,
}

impl core::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Kernels({})", self.name)
    }
}

impl Kernels {
    /// Portable kernels, for every CPU.
    pub fn generic() -> &'static Self {
        &generic::TABLE
    }

    /// The fastest kernels for a CPU with `features`.
    pub fn select(features: Features) -> &'static Self {
        Self::beyond_baseline(features).into_iter().flatten().next().unwrap_or(Self::baseline())
    }

    /// What every CPU that this build is for can run, fast: where NEON is there, a library need not have the
    /// portable kernels.
    fn baseline() -> &'static Self {
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        return &super::aarch64::neon::TABLE;
        #[cfg(not(all(target_arch = "aarch64", target_feature = "neon")))]
        Self::generic()
    }

    /// The tables for `features`, the fastest first.
    fn beyond_baseline(features: Features) -> [Option<&'static Self>; 2] {
        #[cfg(target_arch = "x86_64")]
        return [
            features.avx512.then_some(&super::x86_64::avx512::TABLE),
            features.avx2.then_some(&super::x86_64::avx2::TABLE),
        ];
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        return [
            features.i8mm.then_some(&super::aarch64::i8mm::TABLE),
            features.dotprod.then_some(&super::aarch64::dotprod::TABLE),
        ];
        #[cfg(not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_feature = "neon"))))]
        {
            let _ = features;
            [None; 2]
        }
    }

    /// All tables that this build has and this CPU can run, the fastest first.
    pub fn available() -> impl Iterator<Item = &'static Self> {
        let baseline = Some(Self::baseline()).filter(|kernels| kernels.name != Self::generic().name);
        let tables = Self::beyond_baseline(Features::detect()).into_iter().chain([baseline]);
        tables.flatten().chain([Self::generic()])
    }

    /// The table of that name; `None` if this build or this CPU has none.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        Self::available().find(|kernels| kernels.name == name)
    }

    /// Name of the instruction set.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Fills the quantized twin of all rows for weights that lie as `layout` says; nothing to do for a width
    /// that is not a multiple of 32.
    pub fn quantize<'a>(&self, acts: &'a mut ActivationsMut, layout: Layout) -> Activations<'a> {
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe {
            match layout {
                Layout::Rows => (self.quantize)(acts),
                Layout::Tiles => (self.quantize_tiles)(acts, 1),
            }
        }
        acts.quantized(layout)
    }

    /// Makes the rows ready for products with `weights`, which lie alike: [`Kernels::quantize`], unless all of them are
    /// floats. Some kernels let several blocks of a row share a scale where a batch has at least 32 tokens and no
    /// matrix has minimums or super-blocks, which is the one case in which a token's results depend on the batch.
    pub fn quantize_for<'a>(&self, acts: &'a mut ActivationsMut, weights: &[&Matrix]) -> Activations<'a> {
        let layout = match weights.iter().find(|weight| !weight.dtype().is_float()) {
            Some(weight) => weight.layout(),
            None => return acts.unquantized(),
        };
        let types = weights.iter().map(|weight| weight.dtype());
        if layout == Layout::Rows || !self.tiles.takes_wide(acts.tokens(), types) {
            return self.quantize(acts, layout);
        }
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.quantize_tiles)(acts, RUN) }
        acts.quantized_wide()
    }

    /// `out[token][row] = weight[row] . acts[token]`; the rows are shared among `workers`.
    ///
    /// # Errors
    /// [`Code::WrongShape`](crate::Code::WrongShape) if the widths differ or `out` is not `[tokens, rows]`;
    /// [`Code::BadArgument`](crate::Code::BadArgument) if the weights are quantized and `acts` are not, or
    /// for weights that lie otherwise.
    pub fn matmul(
        &self,
        workers: &dyn Workers,
        weight: &Matrix,
        acts: &Activations,
        out: &mut [f32],
    ) -> Result<()> {
        self.matmuls(workers, acts, [(weight, out)])
    }

    /// [`Kernels::matmul`] of several matrices with the same activations, as one job: threads meet once.
    ///
    /// # Errors
    /// As [`Kernels::matmul`].
    pub fn matmuls<const N: usize>(
        &self,
        workers: &dyn Workers,
        acts: &Activations,
        products: [(&Matrix, &mut [f32]); N],
    ) -> Result<()> {
        let products = products.map(|(weight, out)| Product { kernel: self.kernel(weight), weight, out });
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { matmul::run(workers, acts, products) }
    }

    /// The kernel for a matrix.
    fn kernel(&self, weight: &Matrix) -> Kernel {
        let quantized = match weight.layout() {
            Layout::Rows => self.rows.of(weight.dtype()).map(Kernel::Rows),
            Layout::Tiles => self.tiles.of(weight.dtype()).map(Kernel::Tiles),
        };
        quantized.unwrap_or(Kernel::Rows(match weight.dtype() {
            DType::F16 => self.f16_rows,
            DType::BF16 => self.bf16_rows,
            #[cfg(feature = "low-bit")]
            DType::Q2K => self.q2_k_rows,
            #[cfg(feature = "low-bit")]
            DType::Q3K => self.q3_k_rows,
            #[cfg(feature = "low-bit")]
            DType::IQ4NL => self.iq4_nl_rows,
            _ => self.f32_rows,
        }))
    }

    /// The dot product of `x` and `y`; of slices that differ in length the shorter one counts, here and below.
    pub fn dot(&self, x: &[f32], y: &[f32]) -> f32 {
        debug_assert_eq!(x.len(), y.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.dot)(x, y) }
    }

    /// `y += a * x`.
    pub fn axpy(&self, a: f32, x: &[f32], y: &mut [f32]) {
        debug_assert_eq!(x.len(), y.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.axpy)(a, x, y) }
    }

    /// `out = x` as the bits of half-precision numbers.
    pub fn to_half(&self, x: &[f32], out: &mut [u16]) {
        debug_assert_eq!(x.len(), out.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.to_half)(x, out) }
    }

    /// Rounds to half precision.
    pub fn round_to_half(&self, x: &mut [f32]) {
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.round_to_half)(x) }
    }

    /// `out = x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, arXiv 1910.07467).
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        debug_assert!(x.len() == weight.len() && x.len() == out.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.rms_norm)(x, weight, eps, out) }
    }

    /// [`Kernels::rms_norm`] of `x` into itself.
    pub fn rms_norm_in_place(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        debug_assert_eq!(x.len(), weight.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.rms_norm_in_place)(x, weight, eps) }
    }

    /// `gate = gate * sigmoid(gate) * up` (Shazeer 2020, arXiv 2002.05202).
    pub fn swiglu(&self, gate: &mut [f32], up: &[f32]) {
        debug_assert_eq!(gate.len(), up.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.swiglu)(gate, up) }
    }

    /// `gate = gelu(gate) * up` with `gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`
    /// (Hendrycks and Gimpel 2016, arXiv 1606.08415; Shazeer 2020, arXiv 2002.05202).
    pub fn geglu(&self, gate: &mut [f32], up: &[f32]) {
        debug_assert_eq!(gate.len(), up.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.geglu)(gate, up) }
    }

    /// `x = cap * tanh(x / cap)` for a `cap` above 0 (Gemma Team 2024, arXiv 2408.00118, section 2).
    pub fn soft_cap(&self, x: &mut [f32], cap: f32) {
        debug_assert!(cap > 0.0);
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.soft_cap)(x, cap) }
    }

    /// Rotates pair `i` of one head by the angle with cosine `cos[i]` and sine `sin[i]`, each
    /// `head.len() / 2` long (Su et al. 2021, arXiv 2104.09864).
    pub fn rope(&self, head: &mut [f32], cos: &[f32], sin: &[f32], pairing: RopePairing) {
        debug_assert!(head.len() == 2 * cos.len() && head.len() == 2 * sin.len());
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.rope)(head, cos, sin, pairing) }
    }

    /// `y += B u`; as many rows as `y` has.
    pub fn add_low_rank(&self, b: &LowRank, u: &[f32], y: &mut [f32]) {
        let add = match b.precision() {
            Precision::Exact => self.add_floats,
            Precision::Integers => self.add_integers,
        };
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { add(b, u, y) }
    }

    /// `out = softmax(scores(q K^T)) V` of query heads that share a key-value head. Each head is `width` values of
    /// `queries` and of `out`, for a cache of blocks a multiple of 32; row `r` of the keys starts at element
    /// `r * stride` of the cache, as do its values. Nothing is computed if a head or a row that is seen lies
    /// outside its slice, or a head is wider than 1024.
    #[expect(clippy::too_many_arguments, reason = "what attention is made of")]
    pub fn attention(
        &self,
        queries: &[f32],
        width: usize,
        lanes: &[Query],
        cache: KeyValues,
        Ring { stride, rows }: Ring,
        scores: Scores,
        out: &mut [f32],
    ) {
        let room = queries.len().min(out.len());
        let fits = |lane: &Query| lane.at.checked_add(width).is_some_and(|end| end <= room);
        let fit = width <= MAX_WIDTH && lanes.iter().all(fits);
        let width_in = |len: usize, elements: usize| {
            Cache { keys: (), values: (), stride, rows, width }.holds(lanes, len, elements)
        };
        let floats = |keys: Elements, values: Elements, out: &mut [f32]| {
            let cache = Cache { keys, values, stride, rows, width };
            // SAFETY: whoever holds this table has a CPU that can run it.
            unsafe { (self.attend)(queries, lanes, cache, scores, out) }
        };
        let held = match cache {
            KeyValues::Half { keys, values } => width_in(width, keys.len().min(values.len())),
            KeyValues::Full { keys, values } => width_in(width, keys.len().min(values.len())),
            KeyValues::Blocks { keys, values } => {
                width.is_multiple_of(32) && width_in(width / 32, keys.len().min(values.len()))
            }
        };
        match cache {
            _ if !fit || !held => {}
            KeyValues::Half { keys, values } => floats(Elements::Half(keys), Elements::Half(values), out),
            KeyValues::Full { keys, values } => floats(Elements::Full(keys), Elements::Full(values), out),
            KeyValues::Blocks { keys, values } => {
                let cache = Cache { keys, values, stride, rows, width };
                // SAFETY: as above.
                unsafe { (self.attend_blocks)(queries, lanes, cache, scores, out) }
            }
        }
        debug_assert!(fit && held, "attention outside its slices");
    }
}
