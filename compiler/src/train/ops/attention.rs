//! Causal attention with grouped queries, fused: the probabilities live for one block of rows and are
//! computed again in the backward pass, so no `[heads, length, length]` is ever kept.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::{Matrix, exp, gemm, matrix, rows_cols, tensor, values, with_values};

/// Query rows of one block. Keys after its last row are masked for all of it and never touched.
const BLOCK: usize = 64;

/// The shape of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens of a sequence.
    pub length: usize,
}

struct Attention {
    shape: Heads,
}

/// `softmax(q k^T / sqrt(head_dim)) v` for each sequence and head, each position seeing itself and those
/// before it. `q` is `[batch * length, heads * head_dim]`, `k` and `v` `[batch * length, kv_heads *
/// head_dim]`.
///
/// # Errors
/// The shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: Heads) -> Result<Tensor> {
    q.apply_op3(k, v, Attention { shape })
}

/// One sequence and one key/value head: what a task works on.
#[derive(Clone, Copy)]
struct Group<'a> {
    shape: Heads,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    sequence: usize,
    kv_head: usize,
}

impl<'a> Group<'a> {
    fn group_size(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Rows `rows` of a head inside a `[batch * length, heads * head_dim]` matrix.
    fn view(
        &self,
        values: &'a [f32],
        heads: usize,
        head: usize,
        rows: core::ops::Range<usize>,
    ) -> Matrix<'a> {
        let Heads { head_dim, length, .. } = self.shape;
        let stride = heads * head_dim;
        let start = (self.sequence * length + rows.start) * stride + head * head_dim;
        Matrix::strided(&values[start..], rows.len(), head_dim, stride)
    }

    fn query_view(&self, values: &'a [f32], member: usize, rows: core::ops::Range<usize>) -> Matrix<'a> {
        let head = self.kv_head * self.group_size() + member;
        self.view(values, self.shape.heads, head, rows)
    }

    fn keys(&self, end: usize) -> Matrix<'a> {
        self.view(self.k, self.shape.kv_heads, self.kv_head, 0..end)
    }

    fn values(&self, end: usize) -> Matrix<'a> {
        self.view(self.v, self.shape.kv_heads, self.kv_head, 0..end)
    }

    /// Probabilities `[rows.len(), rows.end]` of a block of rows of one query head.
    fn probabilities(&self, member: usize, rows: core::ops::Range<usize>) -> Vec<f32> {
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        let end = rows.end;
        let mut p = vec![0.0; rows.len() * end];
        gemm(&mut p, self.query_view(self.q, member, rows.clone()), self.keys(end).t(), scale, false, false);
        for (row, position) in p.chunks_exact_mut(end).zip(rows) {
            let (seen, masked) = row.split_at_mut(position + 1);
            masked.fill(0.0);
            let max = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            seen.iter_mut().for_each(|x| *x = exp(*x - max));
            let inverse = 1.0 / seen.iter().sum::<f32>();
            seen.iter_mut().for_each(|x| *x *= inverse);
        }
        p
    }

    /// The outputs of the group's query heads, `[group, length, head_dim]`.
    fn forward(&self) -> Vec<f32> {
        let Heads { head_dim, length, .. } = self.shape;
        let mut out = vec![0.0; self.group_size() * length * head_dim];
        for member in 0..self.group_size() {
            for rows in blocks(length) {
                let p = self.probabilities(member, rows.clone());
                let p = Matrix::new(&p, rows.len(), rows.end);
                let out = &mut out[(member * length + rows.start) * head_dim..][..rows.len() * head_dim];
                gemm(out, p, self.values(rows.end), 1.0, false, false);
            }
        }
        out
    }

    /// Gradients of the queries `[group, length, head_dim]`, keys and values `[length, head_dim]`.
    ///
    /// dV = P^T dO; dP = dO V^T; dS = P * (dP - rowsum(P * dP)); dQ = dS K * scale; dK = dS^T Q * scale.
    fn backward(&self, grad: &'a [f32]) -> [Vec<f32>; 3] {
        let Heads { head_dim, length, .. } = self.shape;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut dq = vec![0.0; self.group_size() * length * head_dim];
        let mut dk = vec![0.0; length * head_dim];
        let mut dv = vec![0.0; length * head_dim];
        for member in 0..self.group_size() {
            for rows in blocks(length) {
                let (count, end) = (rows.len(), rows.end);
                let p = self.probabilities(member, rows.clone());
                let grad = self.query_view(grad, member, rows.clone());
                let reached = end * head_dim;
                gemm(&mut dv[..reached], Matrix::new(&p, count, end).t(), grad, 1.0, true, false);
                let mut ds = vec![0.0; count * end];
                gemm(&mut ds, grad, self.values(end).t(), 1.0, false, false);
                for (ds, p) in ds.chunks_exact_mut(end).zip(p.chunks_exact(end)) {
                    let dot: f32 = ds.iter().zip(p).map(|(ds, p)| ds * p).sum();
                    ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - dot));
                }
                let ds = Matrix::new(&ds, count, end);
                let dq = &mut dq[(member * length + rows.start) * head_dim..][..count * head_dim];
                gemm(dq, ds, self.keys(end), scale, false, false);
                gemm(&mut dk[..reached], ds.t(), self.query_view(self.q, member, rows), scale, true, false);
            }
        }
        [dq, dk, dv]
    }
}

fn blocks(length: usize) -> impl Iterator<Item = core::ops::Range<usize>> {
    (0..length).step_by(BLOCK).map(move |start| start..(start + BLOCK).min(length))
}

impl Attention {
    /// Every group of a batch of `n` rows.
    fn groups<'a>(&self, q: &'a [f32], k: &'a [f32], v: &'a [f32], n: usize) -> Vec<Group<'a>> {
        let shape = self.shape;
        (0..n / shape.length)
            .flat_map(|sequence| (0..shape.kv_heads).map(move |kv_head| (sequence, kv_head)))
            .map(|(sequence, kv_head)| Group { shape, q, k, v, sequence, kv_head })
            .collect()
    }

    /// Puts the heads of all groups, `[per_group, length, head_dim]` each, side by side into rows.
    fn gather(&self, groups: &[&[f32]], per_group: usize, n: usize) -> Vec<f32> {
        let Heads { kv_heads, head_dim, length, .. } = self.shape;
        let width = kv_heads * per_group * head_dim;
        let mut out = vec![0.0; n * width];
        out.par_chunks_mut(width).enumerate().with_min_len(16).for_each(|(row, out)| {
            let (sequence, position) = (row / length, row % length);
            for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let group = groups[sequence * kv_heads + head / per_group];
                let start = (head % per_group * length + position) * head_dim;
                out.copy_from_slice(&group[start..][..head_dim]);
            }
        });
        out
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Heads { heads, kv_heads, head_dim, length } = self.shape;
        let (n, width) = rows_cols(q_layout, "attention")?;
        let kv = (n, kv_heads * head_dim);
        if width != heads * head_dim
            || n % length != 0
            || rows_cols(k_layout, "attention")? != kv
            || rows_cols(v_layout, "attention")? != kv
        {
            bail!(
                "attention: q {:?}, k {:?}, v {:?} do not fit {:?}",
                q_layout.shape(),
                k_layout.shape(),
                v_layout.shape(),
                self.shape
            );
        }
        let q = values(q, q_layout, "attention")?;
        let (k, v) = (values(k, k_layout, "attention")?, values(v, v_layout, "attention")?);
        let outputs: Vec<Vec<f32>> = self.groups(q, k, v, n).par_iter().map(Group::forward).collect();
        let outputs: Vec<&[f32]> = outputs.iter().map(Vec::as_slice).collect();
        Ok(matrix(self.gather(&outputs, heads / kv_heads, n), n, width))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _o: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let ((n, width), (_, kv_width)) = (q.dims2()?, k.dims2()?);
        let grad = grad.contiguous()?;
        let gradients: Vec<[Vec<f32>; 3]> = with_values(q, |q| {
            with_values(k, |k| {
                with_values(v, |v| {
                    with_values(&grad, |grad| {
                        Ok(self.groups(q, k, v, n).par_iter().map(|group| group.backward(grad)).collect())
                    })
                })
            })
        })?;
        let part = |index: usize| -> Vec<&[f32]> {
            gradients.iter().map(|gradients| gradients[index].as_slice()).collect()
        };
        let group = self.shape.heads / self.shape.kv_heads;
        Ok((
            Some(tensor(self.gather(&part(0), group, n), n, width)?),
            Some(tensor(self.gather(&part(1), 1, n), n, kv_width)?),
            Some(tensor(self.gather(&part(2), 1, n), n, kv_width)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    const SHAPE: Heads = Heads { heads: 4, kv_heads: 2, head_dim: 6, length: 70 };

    fn inputs() -> [Tensor; 3] {
        [check::matrix(1, 140, 24), check::matrix(2, 140, 12), check::matrix(3, 140, 12)]
    }

    #[test]
    fn gradient() {
        check::gradients(&inputs(), |x| attention(&x[0], &x[1], &x[2], SHAPE));
    }

    #[test]
    fn agrees_with_the_definition_and_is_causal() {
        let [q, k, v] = inputs();
        let found = attention(&q, &k, &v, SHAPE).unwrap().to_vec2::<f32>().unwrap();
        let [q, k, v] = [q, k, v].map(|x| x.to_vec2::<f32>().unwrap());
        for (row, head) in [(0, 0), (64, 1), (69, 3), (70, 2), (139, 3)] {
            let first = row / 70 * 70;
            let (hq, hk) = (head * 6, head / 2 * 6);
            let score = |j: usize| -> f64 {
                (0..6).map(|i| f64::from(q[row][hq + i] * k[j][hk + i])).sum::<f64>() / 6f64.sqrt()
            };
            let sum: f64 = (first..=row).map(|j| score(j).exp()).sum();
            for i in 0..6 {
                let expected: f64 =
                    (first..=row).map(|j| score(j).exp() / sum * f64::from(v[j][hk + i])).sum();
                assert!((f64::from(found[row][hq + i]) - expected).abs() < 1e-5, "row {row} head {head}");
            }
        }
    }
}
