//! Instantiates every algorithm for one instruction set.

/// Defines `TABLE`, the kernels of the instruction set whose token is `$token`, compiled with `$features`.
macro_rules! kernel_table {
    ($name:literal, $token:expr, $(#[$features:meta])*) => {
        use $crate::kernels::activations::{Activations, ActivationsMut};
        use $crate::kernels::output::Columns;
        use $crate::kernels::matmul::{self, Matrix};
        use $crate::kernels::{attention, blocks, dispatch, float, low_rank, tiles};
        use $crate::kernels::attention::{Q8Block, Query, Scores};
        use edge_models::RopePairing;

        $crate::kernels::table::entries! {
            [$token, $(#[$features])*]
            fn quantize(acts: &mut ActivationsMut) = float::quantize;
            fn quantize_tiles(acts: &mut ActivationsMut) = tiles::quantize;
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
            fn attend_half(q: &[f32], lanes: &[Query], cache: attention::Cache<u16>, scores: Scores, out: &mut [f32])
                = attention::attention;
            fn attend_full(q: &[f32], lanes: &[Query], cache: attention::Cache<f32>, scores: Scores, out: &mut [f32])
                = attention::attention;
            fn attend_blocks(q: &[f32], lanes: &[Query], cache: attention::Cache<Q8Block>, scores: Scores, out: &mut [f32])
                = attention::attention_blocks;
            fn add_low_rank(b: &low_rank::LowRank, u: &[f32], y: &mut [f32]) = low_rank::add_low_rank;
            fn f32_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::float_rows::<_, matmul::F32>;
            fn f16_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::float_rows::<_, matmul::F16>;
            fn bf16_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::float_rows::<_, matmul::BF16>;
            fn q8_0_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q8_0>;
            fn q4_0_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q4_0>;
            fn q4_1_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q4_1>;
            fn q5_0_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q5_0>;
            fn q5_1_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q5_1>;
            fn q4_k_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q4K>;
            fn q5_k_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q5K>;
            fn q6_k_rows(w: &Matrix, x: &Activations, out: &mut Columns) = matmul::quantized_rows::<_, blocks::Q6K>;
        }

        /// The kernels of this instruction set, for CPUs that have it.
        pub(crate) static TABLE: dispatch::Kernels = dispatch::Kernels {
            name: $name,
            quantize, quantize_tiles, dot, axpy, to_half, round_to_half, rms_norm, rms_norm_in_place, swiglu, geglu, soft_cap, rope,
            attend_half, attend_full, attend_blocks, add_low_rank,
            rows: &matmul::RowsKernels {
                f32: f32_rows, f16: f16_rows, bf16: bf16_rows,
                q8_0: q8_0_rows, q4_0: q4_0_rows, q4_1: q4_1_rows, q5_0: q5_0_rows, q5_1: q5_1_rows,
                q4_k: q4_k_rows, q5_k: q5_k_rows, q6_k: q6_k_rows,
            },
            tiles: &TILES,
        };

        $crate::kernels::table::tile_table! { $token, $(#[$features])* }
    };
}

/// Defines `TILES`, the kernels for weights in tiles.
macro_rules! tile_table {
    ($token:expr, $(#[$features:meta])*) => {
        $crate::kernels::table::tile_entries! {
            [$token, $(#[$features])*]
            q8_0 Q8_0, q4_0 Q4_0, q4_1 Q4_1, q5_0 Q5_0, q5_1 Q5_1, q4_k Q4K, q5_k Q5K, q6_k Q6K,
        }
    };
}

/// One function for each quantized type, and the table of them.
macro_rules! tile_entries {
    ([$token:expr, $($features:tt)*] $($name:ident $format:ident,)*) => {
        pub(crate) static TILES: $crate::kernels::matmul::TileKernels = {
            use $crate::kernels::activations::Activations;
            use $crate::kernels::matmul::Matrix;
            use $crate::kernels::output::Columns;
            use $crate::kernels::tiles;
            $crate::kernels::table::entries! {
                [$token, $($features)*]
                $(fn $name(w: &Matrix, x: &Activations, out: &mut Columns) = tiles::multiply::<_, tiles::$format>;)*
            }
            $crate::kernels::matmul::TileKernels { $($name,)* }
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

pub(crate) use {entries, kernel_table, tile_entries, tile_table};
