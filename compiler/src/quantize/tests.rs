//! Blocks against ggml's and gguf-py's, mixes against llama.cpp's (tests/golden/quantize), and bounds that
//! hold for every input.

use std::collections::BTreeMap;
use std::ops::Range;

use edge_models::{DecoderSpec, family_by_gguf_name};
use edge_runtime::kernels::dequantize_row;
use proptest::prelude::*;
use serde::Deserialize;

use super::*;

const PLAIN: [DType; 7] =
    [DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1];
const SEARCHED: [DType; 4] = [DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1];
/// Searched with and without importance.
const ALWAYS: [DType; 6] = [DType::Q2K, DType::Q3K, DType::Q4K, DType::Q5K, DType::Q6K, DType::IQ4NL];
/// Rows of `rows.bin`, eight of each kind.
const KINDS: [&str; 6] = ["gaussian", "heavy", "outlier", "offset", "sparse", "constant"];

macro_rules! golden {
    ($name:literal) => {
        include_bytes!(concat!("../../../tests/golden/quantize/", $name))
    };
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The blocks that ggml makes of `values.bin`.
fn plain_blocks(dtype: DType) -> &'static [u8] {
    match dtype {
        DType::F16 => golden!("f16.bin"),
        DType::BF16 => golden!("bf16.bin"),
        DType::Q8_0 => golden!("q8_0.bin"),
        DType::Q4_0 => golden!("q4_0.bin"),
        DType::Q4_1 => golden!("q4_1.bin"),
        DType::Q5_0 => golden!("q5_0.bin"),
        DType::Q5_1 => golden!("q5_1.bin"),
        other => panic!("{}", other.name()),
    }
}

/// The blocks that ggml makes of `rows.bin`.
fn row_blocks(dtype: DType, importance: bool) -> &'static [u8] {
    match (dtype, importance) {
        (DType::Q2K, false) => golden!("q2_k.rows.bin"),
        (DType::Q3K, false) => golden!("q3_k.rows.bin"),
        (DType::IQ4NL, false) => golden!("iq4_nl.rows.bin"),
        (DType::Q2K, true) => golden!("q2_k.importance.bin"),
        (DType::Q3K, true) => golden!("q3_k.importance.bin"),
        (DType::IQ4NL, true) => golden!("iq4_nl.importance.bin"),
        (DType::Q4K, false) => golden!("q4_k.rows.bin"),
        (DType::Q5K, false) => golden!("q5_k.rows.bin"),
        (DType::Q6K, false) => golden!("q6_k.rows.bin"),
        (DType::Q4_0, true) => golden!("q4_0.importance.bin"),
        (DType::Q4_1, true) => golden!("q4_1.importance.bin"),
        (DType::Q5_0, true) => golden!("q5_0.importance.bin"),
        (DType::Q5_1, true) => golden!("q5_1.importance.bin"),
        (DType::Q4K, true) => golden!("q4_k.importance.bin"),
        (DType::Q5K, true) => golden!("q5_k.importance.bin"),
        (DType::Q6K, true) => golden!("q6_k.importance.bin"),
        (other, _) => panic!("{}", other.name()),
    }
}

/// The values that whole blocks stand for.
fn values_of(dtype: DType, blocks: &[u8]) -> Vec<f32> {
    let mut values = vec![f32::NAN; blocks.len() / dtype.block_bytes() * dtype.block_len()];
    dequantize_row(dtype, blocks, &mut values).unwrap();
    values
}

/// `sum(weight * (x - y)^2)`.
fn error(x: &[f32], y: &[f32], weights: &[f32]) -> f64 {
    assert_eq!([x.len(); 2], [y.len(), weights.len()]);
    let pairs = x.iter().zip(y).zip(weights);
    pairs.map(|((x, y), w)| f64::from(*w) * (f64::from(*x) - f64::from(*y)).powi(2)).sum()
}

/// `(ours, ggml's)` error for each kind of row, `weights` being one for each value of `rows.bin`.
fn errors_by_kind(dtype: DType, importance: Option<&[f32]>, weights: &[f32]) -> Vec<(f64, f64)> {
    let rows = floats(golden!("rows.bin"));
    let ours = values_of(dtype, &quantize_rows(dtype, &rows, 256, importance).unwrap());
    let theirs = values_of(dtype, row_blocks(dtype, importance.is_some()));
    let of = |at: Range<usize>| {
        let error = |values: &[f32]| error(&rows[at.clone()], &values[at.clone()], &weights[at.clone()]);
        (error(&ours), error(&theirs))
    };
    KINDS.iter().enumerate().map(|(kind, _)| of(kind_range(kind))).collect()
}

/// Where the rows of a kind are in `rows.bin`.
fn kind_range(kind: usize) -> Range<usize> {
    kind * 8 * 256..(kind + 1) * 8 * 256
}

#[test]
fn plain_types_are_ggmls_bit_for_bit() {
    let values = floats(golden!("values.bin"));
    for dtype in PLAIN {
        let found = quantize_rows(dtype, &values, 32, None).unwrap();
        let row_bytes = dtype.row_bytes(32).unwrap();
        let rows = found.chunks(row_bytes).zip(plain_blocks(dtype).chunks(row_bytes));
        for (row, (found, expected)) in rows.enumerate() {
            let values = &values[row * 32..][..32];
            assert_eq!(found, expected, "{} of row {row}: {values:?}", dtype.name());
        }
        assert_eq!(found.len(), plain_blocks(dtype).len());
    }
    let f32s = quantize_rows(DType::F32, &values, 32, None).unwrap();
    assert_eq!(f32s, golden!("values.bin"));
}

/// Holds our error to ggml's, kind by kind. What rounding one scale to a half costs (2^-11 of a value,
/// squared) is chance, and all there is in constant rows.
fn no_worse(dtype: DType, importance: Option<&[f32]>, weights: &[f32]) {
    let rows = floats(golden!("rows.bin"));
    let errors = errors_by_kind(dtype, importance, weights);
    for (kind, (ours, theirs)) in errors.iter().enumerate() {
        let (rows, weights) = (&rows[kind_range(kind)], &weights[kind_range(kind)]);
        let chance = 2f64.powi(-22) * error(rows, &vec![0.0; rows.len()], weights);
        let name = (dtype.name(), KINDS[kind]);
        assert!(*ours <= theirs + chance, "{name:?}: {ours} against {theirs}");
    }
}

#[test]
fn searched_types_leave_no_more_error_than_ggmls() {
    let rows = floats(golden!("rows.bin"));
    // What the searches of Q4_K and Q5_K weigh by, here and in ggml.
    let by_magnitude = rows.as_chunks::<32>().0.iter().flat_map(|group| {
        let rms = (group.iter().map(|v| v * v).sum::<f32>() / 32.0).sqrt();
        group.map(|v| rms + v.abs())
    });
    let by_magnitude: Vec<f32> = by_magnitude.collect();
    for dtype in ALWAYS {
        no_worse(dtype, None, &by_magnitude);
        no_worse(dtype, None, &vec![1.0; rows.len()]);
    }
}

#[test]
fn importance_serves_as_well_as_in_ggml() {
    let importance = floats(golden!("importance.bin"));
    for dtype in SEARCHED.into_iter().chain(ALWAYS) {
        no_worse(dtype, Some(&importance), &importance.repeat(8 * KINDS.len()));
    }
}

#[test]
fn importance_lowers_the_error_that_it_weighs() {
    let rows = floats(golden!("rows.bin"));
    let rows = &rows[..kind_range(KINDS.len() - 1).start];
    let weights = floats(golden!("importance.bin"));
    for dtype in DType::ALL {
        let [with, without] = [Some(&weights[..]), None].map(|importance| {
            let blocks = quantize_rows(dtype, rows, 256, importance).unwrap();
            // Each row alone: a mean over rows of different size would only be about the largest.
            let values = values_of(dtype, &blocks);
            let rows = rows.chunks(256).zip(values.chunks(256));
            rows.map(|(row, values)| error(row, values, &weights)).collect::<Vec<_>>()
        });
        let ratios = with.iter().zip(&without).map(|(with, without)| with / without);
        let mean = ratios.sum::<f64>() / with.len() as f64;
        if SEARCHED.contains(&dtype) || ALWAYS.contains(&dtype) {
            assert!(mean < 0.95, "{}: {mean}", dtype.name());
        } else {
            assert_eq!(with, without, "{}", dtype.name());
        }
    }
}

#[derive(Deserialize)]
struct Lists {
    file_types: BTreeMap<String, u32>,
    models: BTreeMap<String, Listed>,
}

#[derive(Deserialize)]
struct Listed {
    arch: String,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    tied: bool,
    /// By mix and name: `(type, layers in a row)`.
    types: BTreeMap<String, BTreeMap<String, Vec<(String, usize)>>>,
}

impl Listed {
    fn spec(&self) -> DecoderSpec {
        let family = family_by_gguf_name(&self.arch).unwrap();
        DecoderSpec {
            layers: self.layers,
            hidden: self.hidden,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.hidden / self.heads,
            rope_dims: self.hidden / self.heads,
            ffn: self.ffn,
            vocab: 64,
            context: 64,
            norm_eps: 1e-5,
            qkv_bias: family.name == "qwen2",
            tied_embeddings: self.tied,
            ..DecoderSpec::plain(family)
        }
    }
}

#[test]
fn mixes_are_llama_cpps() {
    let lists: Lists = serde_json::from_slice(golden!("mixes.json")).unwrap();
    for mix in Mix::ALL {
        assert_eq!(lists.file_types[mix.name()], mix.file_type());
        assert!(lists.models.values().any(|model| model.types.contains_key(mix.name())), "{mix}");
    }
    for (model, listed) in &lists.models {
        let spec = listed.spec();
        let required = || spec.family.tensors.iter().filter(|row| row.role.required(&spec));
        for (mix, tensors) in &listed.types {
            let mix: Mix = mix.parse().unwrap();
            assert_eq!(tensors.len(), required().count(), "{model}");
            for row in required() {
                let runs = tensors[row.gguf].iter();
                let expected: Vec<&str> =
                    runs.flat_map(|(name, count)| std::iter::repeat_n(name.as_str(), *count)).collect();
                let layers = if row.role.per_layer() { spec.layers } else { 1 };
                let found: Vec<&str> =
                    (0..layers).map(|layer| mix.dtype(row.role, layer, &spec).name()).collect();
                assert_eq!(found, expected, "{} of {model} as {mix}", row.gguf);
            }
        }
    }
}

#[test]
fn names_are_read_in_any_case() {
    for mix in Mix::ALL {
        let name = mix.to_string();
        assert_eq!(name.parse(), Ok(mix));
        assert_eq!(name.to_lowercase().parse(), Ok(mix));
    }
    assert_eq!("q4_K".parse(), Ok(Mix::Q4_K_M));
    assert_eq!("Q5_k".parse(), Ok(Mix::Q5_K_M));
    assert_eq!("q3_k".parse(), Ok(Mix::Q3_K_M));
    let error = "IQ2_XS".parse::<Mix>().unwrap_err().to_string();
    assert!(error.contains("`IQ2_XS`"), "{error}");
    assert!(Mix::ALL.iter().all(|mix| error.contains(mix.name())), "{error}");
}

#[test]
fn refuses_values_by_row_and_column() {
    for dtype in DType::ALL {
        let cols = 2 * dtype.block_len();
        let limit = largest_magnitude(dtype);
        let above = f32::from_bits(limit.to_bits() + 1);
        for found in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, above, -above] {
            let mut values = vec![0.5; 3 * cols];
            values[2 * cols + 1] = f32::NAN;
            values[cols + 1] = found;
            let error = quantize_rows(dtype, &values, cols, None).unwrap_err();
            assert!(
                matches!(error, QuantizeError::Value { row: 1, col: 1, found: f, .. } if f.to_bits() == found.to_bits()),
                "{error}"
            );
            assert!(error.below(5).to_string().starts_with("row 6, column 1 "));
        }
        for found in [limit, -limit] {
            let mut values = vec![0.0; cols];
            values[1] = found;
            let blocks = quantize_rows(dtype, &values, cols, None).unwrap();
            let error = (values_of(dtype, &blocks)[1] - found).abs();
            assert!(error <= limit / 100.0, "{}: {error}", dtype.name());
        }
    }
}

#[test]
fn refuses_other_shapes_and_importances() {
    let refused = |dtype, values: usize, cols, importance: Option<&[f32]>| {
        quantize_rows(dtype, &vec![0.5; values], cols, importance).unwrap_err()
    };
    for dtype in DType::ALL {
        let len = dtype.block_len();
        let shapes = [(len, 0), (3 * len, 2 * len), (0, 0)].into_iter();
        for (values, cols) in shapes.chain((len > 1).then_some((len + 1, len + 1))) {
            let error = refused(dtype, values, cols, None);
            let expected = QuantizeError::Shape { values, cols, dtype: dtype.name() };
            assert_eq!(error, expected);
        }
        assert_eq!(quantize_rows(dtype, &[], len, None), Ok(Vec::new()));
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let mut importance = vec![1.0; len];
            importance[len - 1] = bad;
            let expected = QuantizeError::Importance { found: len - 1, expected: len };
            assert_eq!(refused(dtype, 2 * len, len, Some(&importance)), expected);
        }
        let expected = QuantizeError::Importance { found: len + 1, expected: len };
        assert_eq!(refused(dtype, 2 * len, len, Some(&vec![1.0; len + 1])), expected);
    }
}

/// 256 values of about one size, some rows with outliers, zeros, or all on one side.
fn weights() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![8 => -1f32..1.0, 1 => -30f32..30.0, 1 => Just(0.0)];
    (proptest::collection::vec(value, 256), -12f32..3.0, prop_oneof![2 => Just(0f32), 1 => -2f32..2.0])
        .prop_map(|(row, size, offset)| row.iter().map(|v| (v + offset) * 10f32.powf(size)).collect())
}

/// Importances of all sizes, and none.
fn importances() -> impl Strategy<Value = Vec<f32>> {
    let any = (0f32..3e38, -76f32..0.0).prop_map(|(v, size)| v * 10f32.powf(size));
    proptest::collection::vec(prop_oneof![1 => Just(0.0), 4 => 0f32..1.0, 4 => any], 256)
}

/// How far a value may be from `x`, which lies in a block of values in `low..=high`.
///
/// Half a step of the scale; what rounding scale and minimum to halves adds (2^-11 of each, or half of the
/// smallest half); the type's shorter side, which may be one step short.
fn bound(dtype: DType, x: f64, low: f64, high: f64) -> f64 {
    let largest = high.max(-low);
    let half = |x: f64| (x.abs() * 2f64.powi(-11)).max(2f64.powi(-25));
    let short = if x.signum() == (low + high).signum() && low != -high { 0.5 } else { 1.0 };
    let error = match dtype {
        DType::F32 => 0.0,
        DType::F16 => half(x),
        DType::BF16 => x.abs() * 2f64.powi(-8),
        DType::Q8_0 => 0.5 * largest / 127.0 + 127.0 * half(largest / 127.0),
        DType::Q4_0 => short * largest / 8.0 + 8.0 * half(largest / 8.0),
        DType::Q5_0 => short * largest / 16.0 + 16.0 * half(largest / 16.0),
        DType::Q4_1 => 0.5 * (high - low) / 15.0 + 15.0 * half((high - low) / 15.0) + half(low),
        DType::Q5_1 => 0.5 * (high - low) / 31.0 + 31.0 * half((high - low) / 31.0) + half(low),
        // Not their contract, but what the search keeps to: one step of the widest sub-block.
        DType::Q4K => (high.max(0.0) - low.min(0.0)) / 15.0 + 63.0 * 15.0 * half(0.0),
        DType::Q5K => (high.max(0.0) - low.min(0.0)) / 31.0 + 63.0 * 31.0 * half(0.0),
        DType::Q6K => largest / 32.0 + 128.0 * 32.0 * half(0.0),
        DType::Q2K => (high.max(0.0) - low.min(0.0)) / 3.0 + 15.0 * 3.0 * half(0.0),
        DType::Q3K => largest / 3.0 + 32.0 * 4.0 * half(0.0),
        DType::IQ4NL => largest / 4.0 + 127.0 * half(0.0),
    };
    // Single precision on the way.
    error + 1e-5 * largest + 1e-7
}

fn limits(x: &[f32]) -> (f64, f64) {
    x.iter().map(|v| f64::from(*v)).fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)))
}

proptest! {
    #[test]
    fn values_come_back_within_the_bound_of_their_type(row in weights()) {
        for dtype in DType::ALL {
            let blocks = quantize_rows(dtype, &row, 256, None).unwrap();
            let back = values_of(dtype, &blocks);
            let len = dtype.block_len();
            for (x, y) in row.chunks(len).zip(back.chunks(len)) {
                let (low, high) = limits(x);
                for (x, y) in x.iter().zip(y) {
                    let bound = bound(dtype, f64::from(*x), low, high);
                    let error = (f64::from(*x) - f64::from(*y)).abs();
                    prop_assert!(error <= bound, "{}: {x} became {y}, more than {bound}", dtype.name());
                }
            }
        }
    }

    #[test]
    fn importance_never_costs_more_than_it_weighs(row in weights(), importance in importances()) {
        for dtype in SEARCHED {
            let with = quantize_rows(dtype, &row, 256, Some(&importance)).unwrap();
            let without = quantize_rows(dtype, &row, 256, None).unwrap();
            let [with, without] = [with, without].map(|blocks| values_of(dtype, &blocks));
            let [with, without] =
                [with, without].map(|values| error(&row, &values, &importance));
            prop_assert!(with <= without * 1.0001, "{}: {with} against {without}", dtype.name());
        }
    }

    #[test]
    fn any_bits_are_refused_or_give_finite_blocks(
        bits in proptest::collection::vec(prop_oneof![2 => any::<u32>(), 1 => 0x4700_0000u32..0x4800_0000], 256),
        keep in 0f32..1.0,
        importance in importances(),
    ) {
        for dtype in DType::ALL {
            let limit = largest_magnitude(dtype);
            let mut row: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
            let first_bad = row.iter().position(|v| v.is_nan() || v.abs() > limit);
            let error = quantize_rows(dtype, &row, 256, None).err();
            let found = error.map(|error| match error {
                QuantizeError::Value { row: 0, col, .. } => col,
                other => panic!("{other}"),
            });
            prop_assert_eq!(found, first_bad);
            // The rest of the way: the same row, brought within the limit.
            for v in &mut row {
                let inside = v.clamp(-limit, limit);
                *v = if v.is_nan() || inside.abs() < keep { limit.copysign(*v) } else { inside };
            }
            for importance in [None, Some(&importance[..])] {
                let blocks = quantize_rows(dtype, &row, 256, importance).unwrap();
                let back = values_of(dtype, &blocks);
                prop_assert!(back.iter().all(|v| v.is_finite()), "{}: {row:?}", dtype.name());
            }
        }
    }

    #[test]
    fn rows_do_not_look_at_each_other(row in weights(), other in weights(), importance in importances()) {
        for dtype in DType::ALL {
            let both = [&row[..], &other].concat();
            let both = quantize_rows(dtype, &both, 256, Some(&importance)).unwrap();
            let alone = quantize_rows(dtype, &row, 256, Some(&importance)).unwrap();
            prop_assert_eq!(&both[..alone.len()], &alone[..]);
        }
    }
}
