//! The one dispatch table, and which of the tables a CPU can run.

use super::activations::{Activations, ActivationsMut};
use super::attention::{Cache, KeyValues, Q8Block, Scores, Span};
use super::low_rank::LowRank;
use super::matmul::{self, Matrix, RowsKernel};
use crate::format::DType;
use crate::workers::Workers;
use crate::{Result, kernels::generic};
use edge_models::RopePairing;

/// CPU features that kernels need beyond what the build assumes.
///
/// Safe code can only learn the truth ([`Features::detect`]) or less, so a kernel that the CPU lacks
/// is never reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    avx2: bool,
}

impl Features {
    /// Nothing beyond the build's baseline.
    pub const NONE: Self = Self { avx2: false };

    /// What this CPU and its operating system offer.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        return Self { avx2: super::x86_64::has_avx2() };
        #[cfg(not(target_arch = "x86_64"))]
        Self::NONE
    }
}

/// One kernel for each weight type.
pub(super) struct RowsKernels {
    pub f32: RowsKernel,
    pub f16: RowsKernel,
    pub bf16: RowsKernel,
    pub q8_0: RowsKernel,
    pub q4_0: RowsKernel,
    pub q4_1: RowsKernel,
    pub q5_0: RowsKernel,
    pub q5_1: RowsKernel,
    pub q4_k: RowsKernel,
    pub q5_k: RowsKernel,
    pub q6_k: RowsKernel,
}

/// The kernels of one instruction set.
///
/// All tables agree bit for bit with [`Kernels::generic`], except for the payload and sign of NaNs.
/// A table can only be had on a CPU that can run it: that is what every call through one relies on.
pub struct Kernels {
    pub(super) name: &'static str,
    pub(super) quantize: unsafe fn(&mut ActivationsMut),
    pub(super) dot: unsafe fn(&[f32], &[f32]) -> f32,
    pub(super) axpy: unsafe fn(f32, &[f32], &mut [f32]),
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) rms_norm_in_place: unsafe fn(&mut [f32], &[f32], f32),
    pub(super) swiglu: unsafe fn(&mut [f32], &[f32]),
    pub(super) geglu: unsafe fn(&mut [f32], &[f32]),
    pub(super) soft_cap: unsafe fn(&mut [f32], f32),
    pub(super) rope: unsafe fn(&mut [f32], &[f32], &[f32], RopePairing),
    pub(super) attend_half: unsafe fn(&[f32], Cache<u16>, Scores, &mut [f32]),
    pub(super) attend_full: unsafe fn(&[f32], Cache<f32>, Scores, &mut [f32]),
    pub(super) attend_blocks: unsafe fn(&[f32], Cache<Q8Block>, Scores, &mut [f32]),
    pub(super) add_low_rank: unsafe fn(&LowRank, &[f32], &mut [f32]),
    pub(super) rows: RowsKernels,
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
        #[cfg(target_arch = "x86_64")]
        if features.avx2 {
            return &super::x86_64::avx2::TABLE;
        }
        #[cfg(all(target_arch = "aarch64", target_feature = "neon"))]
        if features == Features::NONE {
            return &super::aarch64::neon::TABLE;
        }
        let _ = features;
        Self::generic()
    }

    /// All tables that this build has and this CPU can run, the fastest first.
    pub fn available() -> impl Iterator<Item = &'static Self> {
        let (fastest, generic) = (Self::select(Features::detect()), Self::generic());
        core::iter::once(fastest).chain((fastest.name != generic.name).then_some(generic))
    }

    /// The table called `generic`, `avx2` or `neon`; `None` if this build or this CPU has none.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        Self::available().find(|kernels| kernels.name == name)
    }

    /// Name of the instruction set.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Fills the quantized twin of all rows; nothing to do for a width that is not a multiple of 32.
    pub fn quantize<'a>(&self, acts: &'a mut ActivationsMut) -> Activations<'a> {
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.quantize)(acts) }
        acts.quantized()
    }

    /// `out[token][row] = weight[row] . acts[token]`; the rows are shared among `workers`.
    ///
    /// # Errors
    /// [`Code::WrongShape`](crate::Code::WrongShape) if the widths differ or `out` is not `[tokens, rows]`;
    /// [`Code::BadArgument`](crate::Code::BadArgument) if the weights are quantized and `acts` are not.
    pub fn matmul(
        &self,
        workers: &dyn Workers,
        weight: &Matrix,
        acts: &Activations,
        out: &mut [f32],
    ) -> Result<()> {
        let kernel = match weight.dtype() {
            DType::F32 => self.rows.f32,
            DType::F16 => self.rows.f16,
            DType::BF16 => self.rows.bf16,
            DType::Q8_0 => self.rows.q8_0,
            DType::Q4_0 => self.rows.q4_0,
            DType::Q4_1 => self.rows.q4_1,
            DType::Q5_0 => self.rows.q5_0,
            DType::Q5_1 => self.rows.q5_1,
            DType::Q4K => self.rows.q4_k,
            DType::Q5K => self.rows.q5_k,
            DType::Q6K => self.rows.q6_k,
        };
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { matmul::run(kernel, workers, weight, acts, out) }
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
    pub(crate) fn add_low_rank(&self, b: &LowRank, u: &[f32], y: &mut [f32]) {
        // SAFETY: whoever holds this table has a CPU that can run it.
        unsafe { (self.add_low_rank)(b, u, y) }
    }

    /// `out = softmax(scores(q K^T)) V` of one query head over the cached positions of `span`. Row `r` of this
    /// head's keys starts at element `r * stride`, as do its values; both are as wide as `q` and `out`, for a
    /// cache of blocks a multiple of 32. Rows that do not lie within both slices are not attended to.
    pub fn attention(&self, q: &[f32], cache: KeyValues, span: Span, scores: Scores, out: &mut [f32]) {
        debug_assert_eq!(q.len(), out.len());
        let width = q.len().max(out.len());
        match cache {
            KeyValues::Half { keys, values } => {
                let cache = Cache::new(keys, values, span, width);
                // SAFETY: whoever holds this table has a CPU that can run it.
                unsafe { (self.attend_half)(q, cache, scores, out) }
            }
            KeyValues::Full { keys, values } => {
                let cache = Cache::new(keys, values, span, width);
                // SAFETY: whoever holds this table has a CPU that can run it.
                unsafe { (self.attend_full)(q, cache, scores, out) }
            }
            KeyValues::Blocks { keys, values } => {
                debug_assert_eq!(width % 32, 0);
                let cache = Cache::new(keys, values, span, width / 32);
                // SAFETY: whoever holds this table has a CPU that can run it.
                unsafe { (self.attend_blocks)(q, cache, scores, out) }
            }
        }
    }
}
