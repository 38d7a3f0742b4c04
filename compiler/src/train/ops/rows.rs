//! Rows of a table by their numbers: embeddings.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{apply1, matrix, rows_cols, tensor, values, with_values};
use crate::train::gradients::into_buffer;

struct Rows {
    ids: Vec<u32>,
}

/// Rows `ids` of `table` `[vocab, width]`, `[ids.len(), width]`.
///
/// # Errors
/// There is no such row.
pub fn rows(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    apply1(table, Rows { ids: ids.to_vec() })
}

impl CustomOp1 for Rows {
    fn name(&self) -> &'static str {
        "rows"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (vocab, width) = rows_cols(layout, "rows")?;
        let table = values(table, layout, "rows")?;
        let mut picked = Vec::with_capacity(self.ids.len() * width);
        for &id in &self.ids {
            let Some(row) = table.get(id as usize * width..(id as usize + 1) * width) else {
                bail!("rows: row {id} of a table of {vocab}");
            };
            picked.extend_from_slice(row);
        }
        Ok(matrix(picked, self.ids.len(), width))
    }

    fn bwd(&self, table: &Tensor, _picked: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (vocab, width) = table.dims2()?;
        let grad = grad.contiguous()?;
        with_values(&grad, |grad| {
            let add_rows = |sum: &mut [f32]| {
                for (&id, grad) in self.ids.iter().zip(grad.chunks_exact(width)) {
                    let row = &mut sum[id as usize * width..][..width];
                    row.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
                }
            };
            let buffered = into_buffer(table, |sum, add| {
                if !add {
                    sum.fill(0.0);
                }
                add_rows(sum);
                Ok(())
            })?;
            if buffered {
                return Ok(None);
            }
            let mut sum = vec![0.0; vocab * width];
            add_rows(&mut sum);
            tensor(sum, vocab, width).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    #[test]
    fn gradient() {
        check::gradients(&[check::matrix(1, 7, 5)], |x| rows(&x[0], &[3, 0, 3, 6]));
    }

    #[test]
    fn picks_rows() {
        let table = check::matrix(1, 4, 3);
        let (all, picked) = (table.to_vec2::<f32>().unwrap(), rows(&table, &[2, 0]).unwrap());
        assert_eq!(picked.to_vec2::<f32>().unwrap(), [all[2].clone(), all[0].clone()]);
        assert!(rows(&table, &[4]).unwrap_err().to_string().contains("row 4 of a table of 4"));
    }
}
