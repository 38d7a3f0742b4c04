//! Tensor types of GGUF and the size of their blocks.

/// How the elements of a tensor are stored. The numbers are GGUF's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum DType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    #[cfg(feature = "low-bit")]
    Q2K = 10,
    #[cfg(feature = "low-bit")]
    Q3K = 11,
    Q4K = 12,
    Q5K = 13,
    Q6K = 14,
    #[cfg(feature = "low-bit")]
    IQ4NL = 20,
    BF16 = 30,
}

impl DType {
    /// Every type that this build reads and runs.
    #[cfg(feature = "low-bit")]
    pub const ALL: [Self; 14] = {
        let [a, b, c, d, e, f, g, h, i, j, k] = Self::CORE;
        [a, b, c, d, e, f, g, h, i, j, k, Self::Q2K, Self::Q3K, Self::IQ4NL]
    };
    /// Every type that this build reads and runs.
    #[cfg(not(feature = "low-bit"))]
    pub const ALL: [Self; 11] = Self::CORE;

    /// The types that every build reads and runs.
    pub const CORE: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// The type with GGUF's number `id`.
    pub fn from_gguf(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| *dtype as u32 == id)
    }

    /// Elements in one block; a row is a whole number of blocks.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            #[cfg(feature = "low-bit")]
            Self::Q2K | Self::Q3K => 256,
            #[cfg(feature = "low-bit")]
            Self::IQ4NL => 32,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            #[cfg(feature = "low-bit")]
            Self::Q2K => 84,
            #[cfg(feature = "low-bit")]
            Self::Q3K => 110,
            #[cfg(feature = "low-bit")]
            Self::IQ4NL => 18,
        }
    }

    /// Bytes of a row with `cols` elements; `None` if it is not a whole number of blocks or too long.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Elements are stored as floating-point numbers, not as quantized blocks.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// The name that users see, as llama.cpp spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            #[cfg(feature = "low-bit")]
            Self::Q2K => "Q2_K",
            #[cfg(feature = "low-bit")]
            Self::Q3K => "Q3_K",
            #[cfg(feature = "low-bit")]
            Self::IQ4NL => "IQ4_NL",
        }
    }
}
