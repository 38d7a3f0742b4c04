//! Narrower students: fewer feed-forward channels, fewer groups of heads, a narrower residual stream, by what each
//! one contributes on calibration text; what stays then makes up for what went. Never trains.
//!
//! A channel's importance is the energy that it adds to what its matrix puts out: the mean square of the activation
//! times the squared norm of its column (activation importance as in Muralidharan et al. 2024, "Compact Language
//! Models via Pruning and Knowledge Distillation", arXiv 2407.14679, weighted with the column; for a group of heads
//! `trace(W_g E[a_g a_g^T] W_g^T)`). The columns that stay become the ridge regression of the whole matrix's
//! outputs, in the order of the forward pass, so that a layer sees what the narrowed ones before it give.

use candle_core::{Device, Tensor};
use edge_models::{DecoderSpec, Role};

use super::StudentError;
use super::mend::{regress, replace_columns};
use crate::model::{Model, Weights};
use crate::quantize::moments::Moments;
use crate::train::Projection;
use crate::train::graph::Decoder;
use crate::train::ops::with_values;

/// Added to the diagonal of a Gram matrix, as a share of its mean: how firmly columns that stay hold on to the weights
/// that were there.
const DAMPING: f64 = 0.02;

/// How wide a student is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// Inner width of the feed-forward network.
    pub ffn: usize,
    /// Key/value heads, each with its query heads.
    pub kv_heads: usize,
    /// Width of the residual stream.
    pub hidden: usize,
}

impl Widths {
    /// Those of a model.
    pub fn of(spec: &DecoderSpec) -> Self {
        Self { ffn: spec.ffn, kv_heads: spec.kv_heads, hidden: spec.hidden }
    }

    fn check(&self, spec: &DecoderSpec) -> Result<(), StudentError> {
        let whole = Self::of(spec);
        for (what, found, most) in [
            ("feed-forward channels", self.ffn, whole.ffn),
            ("key/value heads", self.kv_heads, whole.kv_heads),
            ("channels of the residual stream", self.hidden, whole.hidden),
        ] {
            if found == 0 || found > most {
                return Err(StudentError::Width { what, found, most });
            }
        }
        // Both formats compute these families' scale from the width, so a narrower one would be another.
        if self.hidden < whole.hidden && (spec.embedding_scale != 1.0 || spec.post_norms) {
            return Err(StudentError::Hidden { family: spec.family.name });
        }
        Ok(())
    }
}

/// The model of `widths` that says most nearly what `model` says on the tokens `calibration`, cut into windows of
/// `length`; what does not fill a window is left out. `progress` is told how many of how many layers are done.
///
/// # Errors
/// A width is 0 or more than the model's, the family's residual stream cannot be narrowed, or the calibration text is
/// too short or not the model's.
pub fn narrow(
    model: &Model,
    widths: Widths,
    calibration: &[u32],
    length: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Model, StudentError> {
    widths.check(&model.spec)?;
    let ids = super::calibration_windows(&model.spec, calibration, length)?;
    let mut model = model.clone();
    if widths.ffn < model.spec.ffn || widths.kv_heads < model.spec.kv_heads {
        model = narrow_blocks(&model, widths, ids, length, progress)?;
    }
    if widths.hidden < model.spec.hidden {
        model = narrow_stream(&model, widths.hidden, ids, length, progress)?;
    }
    Ok(model)
}

/// Drops channels inside of blocks. Two streams walk through the layers side by side: that of the whole model says
/// what matrices are to put out, that of the narrowed one what they have to make it of.
fn narrow_blocks(
    model: &Model,
    widths: Widths,
    ids: &[u32],
    length: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Model, StudentError> {
    let spec = &model.spec;
    let whole = Decoder::new(spec, &model.weights)?;
    // Of full width, with zeros where columns went.
    let mut narrowed = Decoder::new(spec, &model.weights)?;
    let mut weights = model.weights.clone();
    let (mut wanted, mut state) = (whole.embed(ids)?, narrowed.embed(ids)?);
    for layer in 0..spec.layers {
        let mixed = whole.mix(layer, &whole.attention_input(layer, &wanted)?, length)?;
        let found = narrowed.mix(layer, &narrowed.attention_input(layer, &state)?, length)?;
        let group = spec.q_width() / spec.kv_heads;
        let target = whole.matrix(Role::AttnOut, layer)?.apply(&mixed)?;
        let kept = thin(&mut narrowed, (Role::AttnOut, layer), &found, &target, group, widths.kv_heads)?;
        wanted = whole.add_attention(layer, &wanted, &mixed)?;
        state = narrowed.add_attention(layer, &state, &found)?;
        keep_heads(&mut weights, &narrowed, spec, layer, &kept)?;

        let gated = whole.gate(layer, &whole.ffn_input(layer, &wanted)?)?;
        let found = narrowed.gate(layer, &narrowed.ffn_input(layer, &state)?)?;
        let target = whole.matrix(Role::FfnDown, layer)?.apply(&gated)?;
        let kept = thin(&mut narrowed, (Role::FfnDown, layer), &found, &target, 1, widths.ffn)?;
        wanted = whole.add_ffn(layer, &wanted, &gated)?;
        state = narrowed.add_ffn(layer, &state, &found)?;
        let kept = Tensor::new(kept, &Device::Cpu)?;
        for role in [Role::FfnGate, Role::FfnUp] {
            let rows = whole.matrix(role, layer)?.matrix()?.index_select(&kept, 0)?;
            weights.insert(role, layer, rows);
        }
        let down = narrowed.matrix(Role::FfnDown, layer)?.matrix()?.index_select(&kept, 1)?;
        weights.insert(Role::FfnDown, layer, down);
        progress(layer + 1, spec.layers);
    }
    let heads = spec.heads / spec.kv_heads * widths.kv_heads;
    let spec = DecoderSpec { ffn: widths.ffn, kv_heads: widths.kv_heads, heads, ..*spec };
    Ok(Model { spec, weights, ..model.clone() })
}

/// Leaves `keep` of the groups of `size` columns of a matrix, fitted to `target`, the others 0; answers which.
fn thin(
    decoder: &mut Decoder,
    (role, layer): (Role, usize),
    inputs: &Tensor,
    target: &Tensor,
    size: usize,
    keep: usize,
) -> Result<Vec<u32>, StudentError> {
    let weight = decoder.matrix(role, layer)?.matrix()?;
    let (rows, cols) = weight.dims2()?;
    if keep * size == cols {
        return Ok((0..keep as u32).collect());
    }
    let mut moments = Moments::new(cols, rows);
    moments.add(inputs, Some(target))?;
    let kept = most_important(energies(&weight, &moments.gram, size)?, keep)?;
    let columns: Vec<usize> =
        kept.iter().flat_map(|&group| (0..size).map(move |i| group as usize * size + i)).collect();
    let fitted = regress(&weight, &moments, &columns, DAMPING).ok_or(StudentError::NotFinite)??;
    decoder.replace(role, layer, Projection::Dense(replace_columns(&weight, &columns, &fitted)?))?;
    Ok(kept)
}

/// `trace(W_g G_gg W_g^T)` of each group of `size` columns.
fn energies(weight: &Tensor, gram: &[f64], size: usize) -> Result<Vec<f64>, StudentError> {
    let (rows, cols) = weight.dims2()?;
    Ok(with_values(weight, |weight| {
        let energy = |group: usize| {
            let mut sum = 0.0;
            for i in group * size..(group + 1) * size {
                for j in group * size..(group + 1) * size {
                    let product: f64 = (0..rows)
                        .map(|r| f64::from(weight[r * cols + i]) * f64::from(weight[r * cols + j]))
                        .sum();
                    sum += product * gram[i * cols + j];
                }
            }
            sum
        };
        Ok((0..cols / size).map(energy).collect())
    })?)
}

/// The `keep` of the largest, ascending; the first of equals.
fn most_important(importance: Vec<f64>, keep: usize) -> Result<Vec<u32>, StudentError> {
    if importance.iter().any(|value| !value.is_finite()) {
        return Err(StudentError::NotFinite);
    }
    let mut order: Vec<u32> = (0..importance.len() as u32).collect();
    order.sort_by(|&a, &b| importance[b as usize].total_cmp(&importance[a as usize]));
    order.truncate(keep);
    order.sort_unstable();
    Ok(order)
}

/// Takes the rows of the groups `kept` of queries, keys and values, and their columns of the output.
fn keep_heads(
    weights: &mut Weights,
    narrowed: &Decoder,
    spec: &DecoderSpec,
    layer: usize,
    kept: &[u32],
) -> Result<(), StudentError> {
    let rows = |size: usize| {
        let ids: Vec<u32> =
            kept.iter().flat_map(|&group| (0..size as u32).map(move |i| group * size as u32 + i)).collect();
        Tensor::new(ids, &Device::Cpu)
    };
    let queries = rows(spec.q_width() / spec.kv_heads)?;
    let keys = rows(spec.head_dim)?;
    for (role, rows) in [
        (Role::AttnQ, &queries),
        (Role::AttnQBias, &queries),
        (Role::AttnK, &keys),
        (Role::AttnKBias, &keys),
        (Role::AttnV, &keys),
        (Role::AttnVBias, &keys),
    ] {
        if let Some(weight) = weights.get(role, layer) {
            let chosen = weight.index_select(rows, 0)?;
            weights.insert(role, layer, chosen);
        }
    }
    let out = narrowed.matrix(Role::AttnOut, layer)?.matrix()?.index_select(&queries, 1)?;
    weights.insert(Role::AttnOut, layer, out);
    Ok(())
}

/// Drops channels of the residual stream: the same of every weight that reads or writes it. Norms are divided by the
/// root mean square of fewer channels; their weights take over the difference, as large as it is on average.
fn narrow_stream(
    model: &Model,
    hidden: usize,
    ids: &[u32],
    length: usize,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Model, StudentError> {
    let spec = &model.spec;
    let decoder = Decoder::new(spec, &model.weights)?;
    let mut importance = vec![0.0; spec.hidden];
    // Mean squares of what each norm reads, by role and layer.
    let mut squares = Vec::new();
    let mut x = decoder.embed(ids)?;
    for layer in 0..spec.layers {
        squares.push((Role::AttnNorm, layer, mean_squares(&x)?));
        let normed = decoder.attention_input(layer, &x)?;
        add_importance(&mut importance, &decoder, &normed, layer, &[Role::AttnQ, Role::AttnK, Role::AttnV])?;
        let mixed = decoder.mix(layer, &normed, length)?;
        x = decoder.add_attention(layer, &x, &mixed)?;
        squares.push((Role::FfnNorm, layer, mean_squares(&x)?));
        let normed = decoder.ffn_input(layer, &x)?;
        add_importance(&mut importance, &decoder, &normed, layer, &[Role::FfnGate, Role::FfnUp])?;
        let gated = decoder.gate(layer, &normed)?;
        x = decoder.add_ffn(layer, &x, &gated)?;
        progress(layer + 1, spec.layers);
    }
    squares.push((Role::OutputNorm, 0, mean_squares(&x)?));
    let head = if spec.tied_embeddings { Role::TokenEmbedding } else { Role::Output };
    add_importance(&mut importance, &decoder, &decoder.final_norm(&x)?, 0, &[head])?;

    let kept = most_important(importance, hidden)?;
    let channels = Tensor::new(kept.as_slice(), &Device::Cpu)?;
    let mut weights = model.weights.clone();
    for (role, layer, weight) in model.weights.iter() {
        let narrow = match role.shape(spec) {
            _ if role == Role::AttnQNorm || role == Role::AttnKNorm || role.is_rope_table() => continue,
            _ if role.is_norm() || role == Role::AttnOutBias => weight.index_select(&channels, 0)?,
            _ if role.is_bias() => continue,
            _ if role == Role::AttnOut || role == Role::FfnDown => weight.index_select(&channels, 0)?,
            _ => weight.index_select(&channels, 1)?,
        };
        weights.insert(role, layer, narrow);
    }
    for (role, layer, squares) in squares {
        let mean = |values: &mut dyn Iterator<Item = f64>, count: usize| values.sum::<f64>() / count as f64;
        let of_kept = mean(&mut kept.iter().map(|&channel| squares[channel as usize]), hidden);
        let of_all = mean(&mut squares.iter().copied(), spec.hidden);
        if let Some(weight) = weights.get(role, layer).filter(|_| of_all > 0.0) {
            let scaled = (weight * (of_kept / of_all).sqrt())?;
            weights.insert(role, layer, scaled);
        }
    }
    Ok(Model { spec: DecoderSpec { hidden, ..*spec }, weights, ..model.clone() })
}

/// Adds the share that each channel of `x` has in the energy of what matrices make of it.
fn add_importance(
    importance: &mut [f64],
    decoder: &Decoder,
    x: &Tensor,
    layer: usize,
    roles: &[Role],
) -> Result<(), StudentError> {
    let squares = mean_squares(x)?;
    for &role in roles {
        let columns = decoder.matrix(role, layer)?.matrix()?.sqr()?.sum(0)?;
        let energy: Vec<f64> = with_values(&columns, |columns| {
            Ok(columns.iter().zip(&squares).map(|(column, square)| f64::from(*column) * square).collect())
        })?;
        let total: f64 = energy.iter().sum();
        importance
            .iter_mut()
            .zip(energy)
            .for_each(|(sum, energy)| *sum += energy / total.max(f64::MIN_POSITIVE));
    }
    Ok(())
}

/// Mean of the square of each column.
fn mean_squares(x: &Tensor) -> Result<Vec<f64>, StudentError> {
    let means = x.sqr()?.mean(0)?;
    Ok(with_values(&means, |means| Ok(means.iter().map(|mean| f64::from(*mean)).collect()))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::fixture::{text, tiny};
    use crate::train::loss;

    fn divergence(teacher: &Model, student: &Model, ids: &[u32]) -> f64 {
        let side = |model: &Model| {
            let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
            (decoder.hidden(&ids[..64], 2, 32).unwrap(), decoder.head().unwrap())
        };
        let ((t, t_head), (s, s_head)) = (side(teacher), side(student));
        loss::divergence(&s, &s_head, &t, &t_head, &ids[1..65]).unwrap().kl
    }

    /// Channels that say nothing are the ones that go, and the model says the same without them.
    #[test]
    fn silent_channels_go_first() {
        let mut teacher = tiny(3, 1);
        let spec = teacher.spec;
        for layer in 0..spec.layers {
            for (role, silent) in [(Role::FfnDown, 5..17), (Role::AttnOut, 8..16)] {
                let down = teacher.weights.get(role, layer).unwrap();
                let cols = down.dim(1).unwrap();
                let mask: Vec<f32> = (0..cols).map(|col| f32::from(!silent.contains(&col))).collect();
                let mask = Tensor::from_vec(mask, (1, cols), &Device::Cpu).unwrap();
                teacher.weights.insert(role, layer, down.broadcast_mul(&mask).unwrap());
            }
        }
        let ids = text(128);
        let widths = Widths { ffn: 12, kv_heads: 1, hidden: 16 };
        let student = narrow(&teacher, widths, &ids, 32, &mut |_, _| {}).unwrap();
        assert_eq!((student.spec.ffn, student.spec.kv_heads, student.spec.heads), (12, 1, 2));
        assert_eq!(student.weights.get(Role::AttnQ, 1).unwrap().dims(), [8, 16]);
        let kl = divergence(&teacher, &student, &ids);
        assert!(kl.abs() < 1e-4, "{kl}");
    }

    /// Regression brings back some of what the columns that went had said.
    #[test]
    fn what_stays_makes_up_for_what_went() {
        let teacher = tiny(3, 1);
        let ids = text(512);
        let widths = Widths { ffn: 16, ..Widths::of(&teacher.spec) };
        let student = narrow(&teacher, widths, &ids, 32, &mut |_, _| {}).unwrap();
        // The same channels without regression.
        let mut plain = student.clone();
        for layer in 0..3 {
            let row = |model: &Model, i: usize| {
                let up = model.weights.get(Role::FfnUp, layer).unwrap();
                up.get(i).unwrap().to_vec1::<f32>().unwrap()
            };
            let kept: Vec<u32> = (0..16)
                .map(|i| (0..24).find(|&j| row(&teacher, j) == row(&student, i)).unwrap() as u32)
                .collect();
            let columns = Tensor::new(kept, &Device::Cpu).unwrap();
            let down = teacher.weights.get(Role::FfnDown, layer).unwrap().index_select(&columns, 1).unwrap();
            plain.weights.insert(Role::FfnDown, layer, down);
        }
        let (fitted, plain) = (divergence(&teacher, &student, &ids), divergence(&teacher, &plain, &ids));
        assert!(fitted < 0.9 * plain, "{fitted} with regression, {plain} without");
    }

    /// A residual stream whose dropped channels nobody reads or writes says the same without them.
    #[test]
    fn a_narrower_stream_keeps_its_scale() {
        let mut teacher = tiny(2, 3);
        let mask: Vec<f32> = (0..16).map(|channel| f32::from(channel % 4 != 1)).collect();
        let mask = Tensor::from_vec(mask, (16, 1), &Device::Cpu).unwrap();
        let weights: Vec<_> = teacher.weights.iter().map(|(r, l, w)| (r, l, w.clone())).collect();
        for (role, layer, weight) in weights {
            let masked = match role {
                Role::AttnOut | Role::FfnDown => weight.broadcast_mul(&mask).unwrap(),
                Role::TokenEmbedding => weight.broadcast_mul(&mask.t().unwrap()).unwrap(),
                _ => weight,
            };
            teacher.weights.insert(role, layer, masked);
        }
        let ids = text(128);
        let widths = Widths { hidden: 12, ..Widths::of(&teacher.spec) };
        let student = narrow(&teacher, widths, &ids, 32, &mut |_, _| {}).unwrap();
        assert_eq!(student.weights.get(Role::FfnDown, 0).unwrap().dims(), [12, 24]);
        let kl = divergence(&teacher, &student, &ids);
        assert!(kl.abs() < 1e-4, "{kl}");
    }

    #[test]
    fn widths_that_are_none_are_refused() {
        let teacher = tiny(1, 1);
        let whole = Widths::of(&teacher.spec);
        for widths in
            [Widths { ffn: 0, ..whole }, Widths { ffn: 25, ..whole }, Widths { kv_heads: 3, ..whole }]
        {
            let error = narrow(&teacher, widths, &text(64), 32, &mut |_, _| {}).unwrap_err();
            assert!(matches!(error, StudentError::Width { .. }), "{error}");
        }
        let short = narrow(&teacher, Widths { ffn: 12, ..whole }, &text(31), 32, &mut |_, _| {}).unwrap_err();
        assert!(matches!(short, StudentError::Calibration { .. }), "{short}");
    }
}
