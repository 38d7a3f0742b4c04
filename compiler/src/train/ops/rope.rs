//! Rotary position embedding of halves: elements `i` and `i + dims / 2` of the first `dims` elements of a
//! head are rotated together, what is behind them stays.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{apply1, fresh, matrix, rows_cols, tensor, values, widest, with_values};

/// Rows that one task takes.
const ROWS: usize = 32;

/// Cosines and sines of the angles at positions `0..length`.
#[derive(Clone)]
pub struct RopeTable {
    /// `[length, dims / 2]` pairs of cosine and sine.
    angles: Arc<Vec<[f32; 2]>>,
    length: usize,
    dims: usize,
    head_dim: usize,
}

impl RopeTable {
    /// The table for heads of `head_dim` elements and for inverse frequencies in radians per token, one for
    /// each pair that is rotated; cosines and sines are multiplied by `magnitude`.
    pub fn new(inverse_frequencies: &[f64], head_dim: usize, length: usize, magnitude: f32) -> Self {
        let angle = |position: usize, frequency: f64| {
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            [cos as f32 * magnitude, sin as f32 * magnitude]
        };
        let angles = (0..length)
            .flat_map(|position| inverse_frequencies.iter().map(move |&frequency| angle(position, frequency)))
            .collect();
        Self { angles: Arc::new(angles), length, dims: 2 * inverse_frequencies.len(), head_dim }
    }

    /// Rotates all rows; `turn` is 1 forward and -1 backward.
    fn rotate(&self, x: &[f32], width: usize, turn: f32) -> Vec<f32> {
        let half = self.dims / 2;
        fresh(x.len(), ROWS * width, |start, y| {
            let rows = y.chunks_exact_mut(width).zip(x[start..].chunks_exact(width));
            for (row, (y, x)) in (start / width..).zip(rows) {
                let angles = &self.angles[row % self.length * half..][..half];
                for (y, x) in y.chunks_exact_mut(self.head_dim).zip(x.chunks_exact(self.head_dim)) {
                    let ((y, y_rest), (x, x_rest)) = (y.split_at_mut(self.dims), x.split_at(self.dims));
                    y_rest.copy_from_slice(x_rest);
                    let ((low_y, high_y), (low_x, high_x)) = (y.split_at_mut(half), x.split_at(half));
                    widest!({
                        let (low, high) = (low_y.iter_mut().zip(low_x), high_y.iter_mut().zip(high_x));
                        for (((low_y, low_x), (high_y, high_x)), [cos, sin]) in low.zip(high).zip(angles) {
                            let sin = turn * sin;
                            *low_y = low_x * cos - high_x * sin;
                            *high_y = high_x * cos + low_x * sin;
                        }
                    });
                }
            }
        })
    }
}

struct Rope {
    table: RopeTable,
}

/// Rotates the heads in the rows of `x` `[batch * length, heads * head_dim]`; row `i` is at position
/// `i % length`.
///
/// # Errors
/// The shape does not fit the table.
pub fn rope(x: &Tensor, table: &RopeTable) -> Result<Tensor> {
    apply1(x, Rope { table: table.clone() })
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = rows_cols(layout, "rope")?;
        if width % self.table.head_dim != 0 || n % self.table.length != 0 {
            bail!(
                "rope: [{n}, {width}], expected whole sequences of {} and whole heads of {}",
                self.table.length,
                self.table.head_dim
            );
        }
        Ok(matrix(self.table.rotate(values(x, layout, "rope")?, width, 1.0), n, width))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (n, width) = x.dims2()?;
        let grad = grad.contiguous()?;
        let dx = with_values(&grad, |grad| Ok(self.table.rotate(grad, width, -1.0)))?;
        Ok(Some(tensor(dx, n, width)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    #[test]
    fn gradient() {
        for (head_dim, magnitude) in [(6, 1.0), (12, 1.3)] {
            let table = RopeTable::new(&[1.0, 0.3, 0.1], head_dim, 5, magnitude);
            check::gradients(&[check::matrix(1, 10, 12)], |x| rope(&x[0], &table));
        }
    }

    #[test]
    fn rotation_keeps_lengths_and_starts_at_zero() {
        let table = RopeTable::new(&[1.0, 0.25], 4, 3, 1.0);
        let x = check::matrix(2, 3, 4);
        let y = rope(&x, &table).unwrap().to_vec2::<f32>().unwrap();
        let x = x.to_vec2::<f32>().unwrap();
        assert_eq!(x[0], y[0]);
        for (x, y) in x.iter().zip(&y) {
            let norm = |a: f32, b: f32| a * a + b * b;
            assert!((norm(x[0], x[2]) - norm(y[0], y[2])).abs() < 1e-5);
        }
        let expected = x[2][0] * 2f32.cos() - x[2][2] * 2f32.sin();
        assert!((y[2][0] - expected).abs() < 1e-6);
    }
}
