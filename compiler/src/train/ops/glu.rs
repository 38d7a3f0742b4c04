//! The gate of the feed-forward network, `activation(gate) * up` (Shazeer 2020, arXiv 2002.05202).
//!
//! Both activations are `x s(x)` with `s(x) = 1 / (1 + exp(-u(x)))`: `u = x` is SiLU, and because
//! `(1 + tanh(t)) / 2 = 1 / (1 + exp(-2t))`, `u = 2 sqrt(2 / pi) (x + 0.044715 x^3)` is GELU's approximation
//! by tanh. The slope is `s (1 + (1 - s) x u')`.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use edge_models::Activation;

use super::{apply2, exp, fresh, fresh_with, matrix, rows_cols, tensor, values, widest, with_values};

/// Elements that one task takes.
const CHUNK: usize = 1 << 13;

struct Glu {
    activation: Activation,
}

/// `activation(gate) * up`, both `[n, width]`.
///
/// # Errors
/// The shapes differ.
pub fn glu(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    apply2(gate, up, Glu { activation })
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `s(x)` and `x u'(x)`.
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    (sigmoid(x), x)
}

/// `s(x)` and `x u'(x)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    /// `2 sqrt(2 / pi)`.
    const SLOPE: f32 = 1.595_769_2;
    const CUBE: f32 = 0.044_715;
    let (line, square) = (SLOPE * x, x * x);
    (sigmoid(line * (1.0 + CUBE * square)), line * (1.0 + 3.0 * CUBE * square))
}

/// `y = gate s(gate) up`.
fn forward(gate: &[f32], up: &[f32], parts: impl Fn(f32) -> (f32, f32) + Sync) -> Vec<f32> {
    fresh(gate.len(), CHUNK, |start, y| {
        widest!({
            for ((y, gate), up) in y.iter_mut().zip(&gate[start..]).zip(&up[start..]) {
                *y = gate * parts(*gate).0 * up;
            }
        });
    })
}

/// Gradients of the gate and of `up`.
fn backward([gate, up, grad]: [&[f32]; 3], parts: impl Fn(f32) -> (f32, f32) + Sync) -> [Vec<f32>; 2] {
    let (grads, _) = fresh_with(gate.len(), CHUNK, |start, [dgate, dup]| {
        let [gate, up, grad] = [gate, up, grad].map(|values| &values[start..]);
        widest!({
            let rows = dgate.iter_mut().zip(dup).zip(gate.iter().zip(up).zip(grad));
            for ((dgate, dup), ((gate, up), grad)) in rows {
                let (s, slope) = parts(*gate);
                *dup = grad * gate * s;
                *dgate = grad * up * s * (1.0 + slope * (1.0 - s));
            }
        });
    });
    grads
}

impl CustomOp2 for Glu {
    fn name(&self) -> &'static str {
        "glu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, width) = rows_cols(gate_layout, "glu")?;
        let (gate, up) = (values(gate, gate_layout, "glu")?, values(up, up_layout, "glu")?);
        if gate.len() != up.len() {
            bail!("glu: gate {:?}, up {:?}", gate_layout.shape(), up_layout.shape());
        }
        let y = match self.activation {
            Activation::Silu => forward(gate, up, silu),
            Activation::GeluTanh => forward(gate, up, gelu_tanh),
        };
        Ok(matrix(y, n, width))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, width) = gate.dims2()?;
        let grad = grad.contiguous()?;
        let [dgate, dup] = with_values(gate, |gate| {
            with_values(up, |up| {
                with_values(&grad, |grad| {
                    Ok(match self.activation {
                        Activation::Silu => backward([gate, up, grad], silu),
                        Activation::GeluTanh => backward([gate, up, grad], gelu_tanh),
                    })
                })
            })
        })?;
        Ok((Some(tensor(dgate, n, width)?), Some(tensor(dup, n, width)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::check;

    #[test]
    fn gradient() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let gate = (check::matrix(1, 6, 10) * 3.0).unwrap();
            check::gradients(&[gate, check::matrix(2, 6, 10)], |x| glu(&x[0], &x[1], activation));
        }
    }

    #[test]
    fn agrees_with_the_definition() {
        let (gate, up) = ((check::matrix(1, 3, 8) * 4.0).unwrap(), check::matrix(2, 3, 8));
        let found = glu(&gate, &up, Activation::GeluTanh).unwrap().to_vec2::<f32>().unwrap().concat();
        let [gate, up] = [gate, up].map(|x| x.to_vec2::<f32>().unwrap().concat());
        for ((found, x), up) in found.iter().zip(gate).zip(up) {
            let (x, up) = (f64::from(x), f64::from(up));
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            assert!((f64::from(*found) - 0.5 * x * (1.0 + inner.tanh()) * up).abs() < 2e-6);
        }
    }
}
