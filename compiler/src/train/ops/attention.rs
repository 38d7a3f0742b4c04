//! Causal attention with grouped queries, fused: the probabilities live for one block of rows and are
//! computed again in the backward pass, so no `[heads, length, length]` is ever kept.

use std::ops::Range;

use super::sums::{dot, exponentiate, max};
use super::{
    Matrix, apply3, capped, fresh, gemm, matrix, rows_cols, slope, tensor, threads, values, widest,
    with_values,
};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

/// Query rows of one block. Keys after its last row are masked for all of it and never touched.
const BLOCK: usize = 64;
/// Rows that one task puts together.
const ROWS: usize = 32;

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
    /// Tokens that one attends to, its own among them; 0 means all.
    pub window: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Scores `x` become `cap * tanh(x / cap)`; 0 if they stay as they are.
    pub soft_cap: f32,
}

impl Heads {
    /// The first position that `position` attends to.
    fn first(&self, position: usize) -> usize {
        if self.window == 0 { 0 } else { (position + 1).saturating_sub(self.window) }
    }
}

struct Attention {
    shape: Heads,
}

/// `softmax(soft_cap(scale * q k^T)) v` for each sequence and head, each position seeing itself and those
/// before it, as far as the window goes. `q` is `[batch * length, heads * head_dim]`, `k` and `v` `[batch * length, kv_heads *
/// head_dim]`.
///
/// # Errors
/// The shapes do not fit.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: Heads) -> Result<Tensor> {
    apply3([q, k, v], Attention { shape })
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
    fn view(&self, values: &'a [f32], heads: usize, head: usize, rows: Range<usize>) -> Matrix<'a> {
        let Heads { head_dim, length, .. } = self.shape;
        let stride = heads * head_dim;
        let start = (self.sequence * length + rows.start) * stride + head * head_dim;
        Matrix::strided(&values[start..], rows.len(), head_dim, stride)
    }

    fn query_view(&self, values: &'a [f32], member: usize, rows: Range<usize>) -> Matrix<'a> {
        let head = self.kv_head * self.group_size() + member;
        self.view(values, self.shape.heads, head, rows)
    }

    /// The positions that a block of rows attends to.
    fn reach(&self, rows: &Range<usize>) -> Range<usize> {
        self.shape.first(rows.start)..rows.end
    }

    fn keys(&self, reach: Range<usize>) -> Matrix<'a> {
        self.view(self.k, self.shape.kv_heads, self.kv_head, reach)
    }

    fn values(&self, reach: Range<usize>) -> Matrix<'a> {
        self.view(self.v, self.shape.kv_heads, self.kv_head, reach)
    }

    /// Scores `[rows.len(), reach.len()]` of a block of rows of one query head, masked ones too.
    fn scores(&self, member: usize, rows: Range<usize>) -> Vec<f32> {
        let Heads { scale, soft_cap, .. } = self.shape;
        let reach = self.reach(&rows);
        let mut scores = vec![0.0; rows.len() * reach.len()];
        gemm(&mut scores, self.query_view(self.q, member, rows), self.keys(reach).t(), scale, false, false);
        if soft_cap > 0.0 {
            scores.iter_mut().for_each(|x| *x = capped(*x, soft_cap));
        }
        scores
    }

    /// Turns the scores of a block of rows into probabilities.
    fn normalize(&self, scores: &mut [f32], rows: Range<usize>) {
        let reach = self.reach(&rows);
        for (row, position) in scores.chunks_exact_mut(reach.len()).zip(rows) {
            let (row, after) = row.split_at_mut(position + 1 - reach.start);
            let (before, seen) = row.split_at_mut(self.shape.first(position) - reach.start);
            before.fill(0.0);
            after.fill(0.0);
            let inverse = (1.0 / exponentiate(seen, max(seen), 1.0)) as f32;
            widest!(seen.iter_mut().for_each(|x| *x *= inverse));
        }
    }

    /// The outputs of the group's query heads, `[group, length, head_dim]`.
    fn forward(&self) -> Vec<f32> {
        let Heads { head_dim, length, .. } = self.shape;
        let mut out = vec![0.0; self.group_size() * length * head_dim];
        for member in 0..self.group_size() {
            for rows in blocks(length) {
                let mut p = self.scores(member, rows.clone());
                self.normalize(&mut p, rows.clone());
                let reach = self.reach(&rows);
                let p = Matrix::new(&p, rows.len(), reach.len());
                let out = &mut out[(member * length + rows.start) * head_dim..][..rows.len() * head_dim];
                gemm(out, p, self.values(reach), 1.0, false, false);
            }
        }
        out
    }

    /// Gradients of the queries `[group, length, head_dim]`, keys and values `[length, head_dim]`.
    ///
    /// dV = P^T dO; dP = dO V^T; dS = P * (dP - rowsum(P * dP)), times the slope of the soft cap;
    /// dQ = dS K * scale; dK = dS^T Q * scale.
    fn backward(&self, grad: &'a [f32]) -> [Vec<f32>; 3] {
        let Heads { head_dim, length, scale, soft_cap, .. } = self.shape;
        let mut dq = vec![0.0; self.group_size() * length * head_dim];
        let mut dk = vec![0.0; length * head_dim];
        let mut dv = vec![0.0; length * head_dim];
        for member in 0..self.group_size() {
            for rows in blocks(length) {
                let (count, reach) = (rows.len(), self.reach(&rows));
                let seen = reach.len();
                let mut p = self.scores(member, rows.clone());
                let scores = if soft_cap > 0.0 { p.clone() } else { Vec::new() };
                self.normalize(&mut p, rows.clone());
                let grad = self.query_view(grad, member, rows.clone());
                let reached = reach.start * head_dim..reach.end * head_dim;
                gemm(&mut dv[reached.clone()], Matrix::new(&p, count, seen).t(), grad, 1.0, true, false);
                let mut ds = vec![0.0; count * seen];
                gemm(&mut ds, grad, self.values(reach.clone()).t(), 1.0, false, false);
                for (ds, p) in ds.chunks_exact_mut(seen).zip(p.chunks_exact(seen)) {
                    let mean = dot(ds, p);
                    widest!(ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - mean)));
                }
                ds.iter_mut().zip(&scores).for_each(|(ds, score)| *ds *= slope(*score, soft_cap));
                let ds = Matrix::new(&ds, count, seen);
                let dq = &mut dq[(member * length + rows.start) * head_dim..][..count * head_dim];
                gemm(dq, ds, self.keys(reach), scale, false, false);
                gemm(&mut dk[reached], ds.t(), self.query_view(self.q, member, rows), scale, true, false);
            }
        }
        [dq, dk, dv]
    }
}

fn blocks(length: usize) -> impl Iterator<Item = Range<usize>> {
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
        fresh(n * width, ROWS * width, |first, out| {
            for (row, out) in (first / width..).zip(out.chunks_exact_mut(width)) {
                let (sequence, position) = (row / length, row % length);
                for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    let group = groups[sequence * kv_heads + head / per_group];
                    let start = (head % per_group * length + position) * head_dim;
                    out.copy_from_slice(&group[start..][..head_dim]);
                }
            }
        })
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
        let Heads { heads, kv_heads, head_dim, length, .. } = self.shape;
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
        let outputs: Vec<Vec<f32>> = threads::map(self.groups(q, k, v, n), |group| group.forward());
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
                        Ok(threads::map(self.groups(q, k, v, n), |group| group.backward(grad)))
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

    /// Everything seen, a window that begins in another block of rows, and a narrow one with a cap.
    const SHAPES: [Heads; 3] = {
        let all =
            Heads { heads: 4, kv_heads: 2, head_dim: 6, length: 70, window: 0, scale: 0.41, soft_cap: 0.0 };
        [all, Heads { window: 66, ..all }, Heads { window: 5, soft_cap: 0.6, scale: 1.0, ..all }]
    };

    fn inputs() -> [Tensor; 3] {
        [check::matrix(1, 140, 24), check::matrix(2, 140, 12), check::matrix(3, 140, 12)]
    }

    #[test]
    fn gradient() {
        for shape in SHAPES {
            check::gradients(&inputs(), |x| attention(&x[0], &x[1], &x[2], shape));
        }
    }

    #[test]
    fn agrees_with_the_definition_and_is_causal() {
        SHAPES.into_iter().for_each(agrees);
    }

    fn agrees(shape: Heads) {
        let [q, k, v] = inputs();
        let found = attention(&q, &k, &v, shape).unwrap().to_vec2::<f32>().unwrap();
        let [q, k, v] = [q, k, v].map(|x| x.to_vec2::<f32>().unwrap());
        for (row, head) in [(0usize, 0), (64, 1), (69, 3), (70, 2), (139, 3)] {
            let first = row / 70 * 70;
            let first =
                if shape.window == 0 { first } else { first.max((row + 1).saturating_sub(shape.window)) };
            let (hq, hk) = (head * 6, head / 2 * 6);
            let score = |j: usize| -> f64 {
                let dot = (0..6).map(|i| f64::from(q[row][hq + i] * k[j][hk + i])).sum::<f64>();
                let (score, cap) = (dot * f64::from(shape.scale), f64::from(shape.soft_cap));
                if cap > 0.0 { cap * (score / cap).tanh() } else { score }
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
