//! Instantiates every algorithm for one instruction set.

/// Defines `TABLE`, the kernels of the instruction set whose token is `$token`, compiled with `$features`.
macro_rules! kernel_table {
    ($name:literal, $token:expr, $(#[$features:meta])*) => {
        use $crate::kernels::activations::{Activations, ActivationsMut};
        use $crate::kernels::output::Columns;
        use $crate::kernels::matmul::{self, Matrix};
        use $crate::kernels::{attention, blocks, dispatch, float, low_rank, tiles};
        use $crate::kernels::attention::{Cache, Elements, Q8Block, Query, Scores};
        use edge_models::RopePairing;

        $crate::kernels::table::entries! {
            [$token, $(#[$features])*]
            fn quantize(acts: &mut ActivationsMut) = float::quantize;
            fn quantize_tiles(acts: &mut ActivationsMut, run: usize) = tiles::quantize;
            fn dot(x: &[f32], y: &[f32]) -> f32 = float::dot;
            fn axpy(a: f32, x: &[f32], y: &mut [f32]) = float::axpy;
            fn to_half(x: &[f32], out: &mut [u16]) = float::to_half;
            fn round_to_half(x: &mut [f32]) = float::round_to_half;
            fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = float::rms_norm;
            fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) = float::rms_norm_in_place;
            fn swiglu(gate: &mut [f32], up: &[f32]) = float::swiglu;
            fn geglu(gate: &mut [f32], up: &[f32]) = float::geglu;
            fn soft_cap(x: &mut [f32], cap: f32) = float::soft_cap;
            fn rope(head: &mut [f32], cos: &[f32], sin: &[f32], pairing: RopePairing) = float::rope;
            fn attend(q: &[f32], lanes: &[Query], cache: Cache<Elements>, scores: Scores, out: &mut [f32])
                = attention::attention;
            fn attend_blocks(q: &[f32], lanes: &[Query], cache: Cache<&[Q8Block]>, scores: Scores, out: &mut [f32])
                = attention::attention_blocks;
            fn add_floats(b: &low_rank::LowRank, u: &[f32], y: &mut [f32]) = low_rank::add_floats;
            fn add_integers(b: &low_rank::LowRank, u: &[f32], y: &mut [f32]) = low_rank::add_integers;
            fn f32_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::float_rows::<_, matmul::F32>;
            fn f16_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::float_rows::<_, matmul::F16>;
            fn bf16_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::float_rows::<_, matmul::BF16>;
        }

        #[cfg(feature = "low-bit")]
        $crate::kernels::table::low_bit_entries! { [$token, $(#[$features])*] }

        /// The kernels of this instruction set, for CPUs that have it.
        pub(crate) static TABLE: dispatch::Kernels = dispatch::Kernels {
            name: $name,
            quantize, quantize_tiles, dot, axpy, to_half, round_to_half, rms_norm, rms_norm_in_place, swiglu, geglu, soft_cap, rope,
            attend, attend_blocks, add_floats, add_integers,
            f32_rows, f16_rows, bf16_rows,
            #[cfg(feature = "low-bit")]
            q2_k_rows,
            #[cfg(feature = "low-bit")]
            q3_k_rows,
            #[cfg(feature = "low-bit")]
            iq4_nl_rows,
            rows: &ROWS,
            tiles: &TILES,
        };

        $crate::kernels::table::block_entries! {
            [$token, $(#[$features])*]
            /// The kernels for quantized weights in rows.
            static ROWS: fn(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows, blocks;
        }
        $crate::kernels::table::tile_tables! { [$token, $(#[$features])*] ONE_TOKEN FILL MULTIPLY }

        /// The kernels for quantized weights in tiles.
        pub(crate) static TILES: tiles::TileKernels = tiles::TileKernels {
            one_token: &ONE_TOKEN,
            fill: &FILL,
            multiply: &MULTIPLY,
            #[cfg(target_arch = "x86_64")]
            pair: None,
            wide: None,
        };
    };
}

/// The kernels for types that are read in rows alone.
#[cfg(feature = "low-bit")]
macro_rules! low_bit_entries {
    ($context:tt) => {
        $crate::kernels::table::entries! {
            $context
            fn q2_k_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<blocks::Q2K>;
            fn q3_k_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<blocks::Q3K>;
            fn iq4_nl_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<blocks::IQ4NL>;
        }
    };
}

/// Defines the tables of [`TileKernels`](super::tiles::TileKernels) that are named: an instruction set takes those
/// that it has no better functions for from another one.
macro_rules! tile_tables {
    ($context:tt) => {};
    ($context:tt ONE_TOKEN $($rest:tt)*) => {
        $crate::kernels::table::block_entries! {
            $context
            /// Products with one token.
            static ONE_TOKEN: fn(
                w: &$crate::kernels::matmul::Matrix,
                x: &$crate::kernels::activations::Activations,
                out: &mut $crate::kernels::output::Columns
            ) = tiles::one_token, tiles;
        }
        $crate::kernels::table::tile_tables! { $context $($rest)* }
    };
    ($context:tt FILL $($rest:tt)*) => {
        $crate::kernels::table::block_entries! {
            $context
            /// Unpacks weights for many tokens.
            static FILL: fn(panel: &mut tiles::Panel, tile: &[u8], first: usize, count: usize) = tiles::fill, tiles;
        }
        $crate::kernels::table::tile_tables! { $context $($rest)* }
    };
    ($context:tt MULTIPLY_PAIR $($rest:tt)*) => {
        $crate::kernels::table::block_entries! {
            $context
            /// Products of unpacked weights of two tiles with four tokens.
            static MULTIPLY_PAIR: fn(panels: &[tiles::Panel; 2], x: tiles::Quad, out: [&mut [f32; 32]; 4])
                = tiles::multiply_pair, tiles;
        }
        $crate::kernels::table::tile_tables! { $context $($rest)* }
    };
    ($context:tt MULTIPLY $($rest:tt)*) => {
        $crate::kernels::table::block_entries! {
            $context
            /// Products of unpacked weights with four tokens.
            static MULTIPLY: fn(panel: &tiles::Panel, x: tiles::Quad, out: [&mut [f32; 16]; 4])
                = tiles::multiply, tiles;
        }
        $crate::kernels::table::tile_tables! { $context $($rest)* }
    };
}

/// One function for each quantized type, whose formats are in the module `$formats`, and the table of them.
macro_rules! block_entries {
    ($context:tt $(#[$doc:meta])*
     static $table:ident: fn $signature:tt = $module:ident::$algorithm:ident, $formats:ident;) => {
        $crate::kernels::table::block_entries! {
            $context $(#[$doc])* static $table: fn $signature = $module::$algorithm, $formats:
            q8_0 Q8_0, q4_0 Q4_0, q4_1 Q4_1, q5_0 Q5_0, q5_1 Q5_1, q4_k Q4K, q5_k Q5K, q6_k Q6K,
        }
    };
    ($context:tt $(#[$doc:meta])*
     static $table:ident: fn $signature:tt = $module:ident::$algorithm:ident, $formats:ident:
     $($name:ident $format:ident,)*) => {
        $(#[$doc])*
        pub(crate) static $table: $crate::kernels::matmul::ByType<unsafe fn $signature> = {
            $($crate::kernels::table::entries! {
                $context fn $name $signature = $module::$algorithm::<$formats::$format>;
            })*
            $crate::kernels::matmul::ByType { $($name,)* }
        };
    };
}

/// Functions that call an algorithm with the token of an instruction set.
macro_rules! entries {
    ([$token:expr, $($features:tt)*]) => {};
    ([$token:expr, $($features:tt)*]
     fn $name:ident($($arg:ident: $type:ty),*) $(-> $result:ty)? = $algorithm:expr; $($rest:tt)*) => {
        $($features)*
        fn $name($($arg: $type),*) $(-> $result)? {
            $algorithm($token, $($arg),*)
        }
        $crate::kernels::table::entries! { [$token, $($features)*] $($rest)* }
    };
}

#[cfg(feature = "low-bit")]
pub(crate) use low_bit_entries;
pub(crate) use {block_entries, entries, kernel_table, tile_tables};
