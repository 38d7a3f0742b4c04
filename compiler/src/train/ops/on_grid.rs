//! Weights as the blocks of a file hold them: `y = scale * clamp(round((x - offset) / scale)) + offset`, with the
//! straight-through gradient (Bengio et al. 2013) for `x` and that of LSQ (Esser et al. 2020) for the scale.
//!
//! The forward pass is [`Grid`](crate::quantize::grid::Grid)'s arithmetic, operation by operation.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use edge_runtime::format::{f16_to_f32, f32_to_f16};
use rayon::prelude::*;

use super::{apply3, matrix, rows_cols, tensor, values, with_values};
use crate::quantize::grid::{Spacing, inverse};

/// Groups that one task takes.
const GROUPS: usize = 1 << 9;

/// The integers of a grid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Levels {
    /// Weights that share a scale and an offset.
    pub group: usize,
    /// Smallest integer.
    pub low: f32,
    /// Largest integer.
    pub high: f32,
    /// Which of the integers between there are.
    pub spacing: Spacing,
    /// With `Some(reach)`, scales are `1 / reach` of what they are given as, rounded to half precision as in a
    /// file, and trained; otherwise they are as given.
    pub reach: Option<f32>,
}

impl Levels {
    fn scale(&self, given: f32) -> f32 {
        match self.reach {
            Some(reach) => f16_to_f32(f32_to_f16(given / reach)),
            None => given,
        }
    }
}

/// `x` `[rows, cols]` on the grid of `scales` and `offsets` `[rows, cols / group]`.
///
/// # Errors
/// The shapes do not fit.
pub fn on_grid(x: &Tensor, scales: &Tensor, offsets: &Tensor, levels: Levels) -> Result<Tensor> {
    apply3([x, scales, offsets], OnGrid { levels })
}

struct OnGrid {
    levels: Levels,
}

impl OnGrid {
    fn forward(&self, x: &[f32], scales: &[f32], offsets: &[f32]) -> Vec<f32> {
        let Levels { group, low, high, spacing, .. } = self.levels;
        let mut out = vec![0.0; x.len()];
        let tasks = out.par_chunks_mut(GROUPS * group).zip(x.par_chunks(GROUPS * group));
        tasks.zip(scales.par_chunks(GROUPS)).zip(offsets.par_chunks(GROUPS)).for_each(
            |(((out, x), scales), offsets)| {
                let groups = out.chunks_exact_mut(group).zip(x.chunks_exact(group));
                for ((out, x), (given, offset)) in groups.zip(scales.iter().zip(offsets)) {
                    let (scale, offset) = (self.levels.scale(*given), *offset);
                    let inverse = inverse(scale);
                    for (out, x) in out.iter_mut().zip(x) {
                        *out = scale * spacing.nearest(((x - offset) * inverse).clamp(low, high)) + offset;
                    }
                }
            },
        );
        out
    }

    /// The gradient of the scales as they are given: `sum(grad * (q - (x - offset) / scale))`, the fraction left out
    /// where it lies beyond the integers.
    fn scales_gradient(&self, x: &[f32], scales: &[f32], offsets: &[f32], grad: &[f32]) -> Vec<f32> {
        let Levels { group, low, high, spacing, reach } = self.levels;
        let unit = 1.0 / reach.unwrap_or(1.0);
        let mut out = vec![0.0; scales.len()];
        let groups = x.par_chunks(group).zip(grad.par_chunks(group)).with_min_len(GROUPS);
        out.par_iter_mut().zip(scales.par_iter().zip(offsets)).zip(groups).for_each(
            |((out, (given, offset)), (x, grad))| {
                let inverse = inverse(self.levels.scale(*given));
                let term = |(x, grad): (&f32, &f32)| {
                    let exact = (x - offset) * inverse;
                    let inside = exact.clamp(low, high);
                    let slope = if inside == exact { spacing.nearest(exact) - exact } else { inside };
                    grad * slope
                };
                *out = unit * x.iter().zip(grad).map(term).sum::<f32>();
            },
        );
        out
    }
}

impl CustomOp3 for OnGrid {
    fn name(&self) -> &'static str {
        "on-grid"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        scales: &CpuStorage,
        scales_layout: &Layout,
        offsets: &CpuStorage,
        offsets_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (rows, cols) = rows_cols(x_layout, "on-grid")?;
        let groups = (rows, cols / self.levels.group);
        let found = (rows_cols(scales_layout, "on-grid")?, rows_cols(offsets_layout, "on-grid")?);
        if found != (groups, groups) || !cols.is_multiple_of(self.levels.group) {
            bail!("on-grid: scales and offsets {found:?}, expected {groups:?} twice for [{rows}, {cols}]");
        }
        let out = self.forward(
            values(x, x_layout, "on-grid")?,
            values(scales, scales_layout, "on-grid")?,
            values(offsets, offsets_layout, "on-grid")?,
        );
        Ok(matrix(out, rows, cols))
    }

    fn bwd(
        &self,
        x: &Tensor,
        scales: &Tensor,
        offsets: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let scales_gradient = || {
            let (rows, groups) = scales.dims2()?;
            let grad = grad.contiguous()?;
            with_values(x, |x| {
                with_values(scales, |scales| {
                    with_values(offsets, |offsets| {
                        with_values(&grad, |grad| {
                            tensor(self.scales_gradient(x, scales, offsets, grad), rows, groups)
                        })
                    })
                })
            })
        };
        // Rounding has slope 0 almost everywhere; the straight-through estimator takes it for 1.
        Ok((x.track_op().then(|| grad.clone()), scales.track_op().then(scales_gradient).transpose()?, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;
    use candle_core::{Device, Var};

    const LEVELS: Levels =
        Levels { group: 32, low: -8.0, high: 7.0, spacing: Spacing::Even, reach: Some(8.0) };

    fn constant(value: f32) -> Tensor {
        Tensor::full(value, (3, 2), &Device::Cpu).unwrap()
    }

    fn flat(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn rounds_and_clamps() {
        let x = (check::matrix(1, 3, 64) * 10.0).unwrap();
        let y = on_grid(&x, &constant(8.0), &constant(-0.0), LEVELS).unwrap();
        for (x, y) in flat(&x).iter().zip(flat(&y)) {
            assert_eq!(y, x.round_ties_even().clamp(-8.0, 7.0));
        }
        assert!(on_grid(&x, &constant(8.0), &check::matrix(1, 3, 1), LEVELS).is_err());
    }

    /// Within the integers, `y - x` repeats with the scale, so only the gradient's definition can be its test: the
    /// integers held fixed, `y` is linear in the scale, and `x` goes straight through: `y = s q + (x - s x0 / s0)`.
    #[test]
    fn gradients_are_those_of_the_linear_stand_in() {
        let x = Var::from_tensor(&(check::matrix(1, 3, 64) * 10.0).unwrap()).unwrap();
        let scales = Var::from_tensor(&constant(8.0)).unwrap();
        let weights = check::matrix(9, 3, 64);
        let y = on_grid(x.as_tensor(), scales.as_tensor(), &constant(-0.0), LEVELS).unwrap();
        let grads = (y * &weights).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(flat(grads.get(x.as_tensor()).unwrap()), flat(&weights));
        let found = flat(grads.get(scales.as_tensor()).unwrap());
        // With the integers q and the places z = x / s held fixed: sum(w (s q + (inside ? x - s z : 0))).
        let stand_in = |scale: f64, group: usize| -> f64 {
            let at =
                |i: usize| (f64::from(flat(&x)[group * 32 + i]), f64::from(flat(&weights)[group * 32 + i]));
            let term = |(x, w): (f64, f64)| {
                let q = x.round_ties_even().clamp(-8.0, 7.0);
                let rest = if (-8.0..=7.0).contains(&x) { x - scale * x } else { 0.0 };
                w * (scale * q + rest)
            };
            (0..32).map(|i| term(at(i))).sum()
        };
        for (group, found) in found.iter().enumerate() {
            // In the units of the given scale, an eighth.
            let numeric = (stand_in(1.01, group) - stand_in(0.99, group)) / 0.02 / 8.0;
            assert!((numeric - f64::from(*found)).abs() < 1e-4, "{numeric} {found}");
        }
    }

    #[test]
    fn what_is_frozen_gets_no_gradient() {
        let x = Var::from_tensor(&check::matrix(1, 3, 64)).unwrap();
        let op = OnGrid { levels: Levels { reach: None, ..LEVELS } };
        let scales = constant(0.5);
        let (dx, dscales, doffsets) =
            op.bwd(&x, &scales, &scales, &scales, &check::matrix(2, 3, 64)).unwrap();
        assert_eq!((dx.is_some(), dscales.is_some(), doffsets.is_some()), (true, false, false));
    }
}
