//! AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) in one pass over memory.
//!
//! candle's own optimizer makes half a dozen temporary tensors for each parameter; here one loop reads
//! the gradient once and updates weight and both moments in place. The results do not depend on the
//! number of threads. Never computes a gradient and knows no schedule: the caller gives the rate.

use candle_core::Var;

use super::ops::{threads, widest, with_values_mut};

/// Elements that one thread works on at a time. Also the unit of the norm's summation order.
pub(super) const CHUNK: usize = 1 << 14;

/// A tensor that is trained.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its name in messages and checkpoints.
    pub name: String,
    /// Its value; f32 on the CPU, contiguous, shared with the graph that computes with it.
    pub var: Var,
    /// Weight decay acts on it.
    pub decay: bool,
}

/// What AdamW is asked to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
}

/// Both moments of one parameter, laid out as the parameter.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Vec<f32>,
    /// Running mean of its square.
    pub second: Vec<f32>,
}

/// The optimizer and the parameters that it trains.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    parameters: Vec<Parameter>,
    moments: Vec<Moments>,
    steps: u64,
}

impl AdamW {
    /// An optimizer with zero moments.
    pub fn new(parameters: Vec<Parameter>, config: AdamWConfig) -> Self {
        let moments = parameters
            .iter()
            .map(|parameter| {
                let zeros = vec![0f32; parameter.var.elem_count()];
                Moments { first: zeros.clone(), second: zeros }
            })
            .collect();
        Self { config, parameters, moments, steps: 0 }
    }

    /// The parameters, in the order in which gradients are given.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The moments of each parameter.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// The moments of each parameter, to be restored together with [`Self::set_steps`].
    pub(super) fn moments_mut(&mut self) -> &mut [Moments] {
        &mut self.moments
    }

    /// Updates made so far; the bias correction depends on it.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Sets the number of updates made, when a run is resumed.
    pub(super) fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// One update with learning rate `lr` and every gradient (one for each parameter, laid out as it)
    /// multiplied by `scale`.
    ///
    /// # Errors
    /// A parameter that is not contiguous f32 on the CPU.
    pub fn step(&mut self, gradients: &[&[f32]], lr: f64, scale: f64) -> candle_core::Result<()> {
        self.steps += 1;
        let (beta1, beta2) = self.config.betas;
        let exponent = self.steps as i32;
        let bias1 = 1.0 - beta1.powi(exponent);
        let bias2 = 1.0 - beta2.powi(exponent);
        for ((parameter, moments), gradient) in self.parameters.iter().zip(&mut self.moments).zip(gradients) {
            let decay = if parameter.decay { self.config.weight_decay } else { 0.0 };
            let rule = Rule {
                scale: scale as f32,
                keep: (1.0 - lr * decay) as f32,
                first_rate: (1.0 - beta1) as f32,
                second_keep: beta2 as f32,
                second_rate: (1.0 - beta2) as f32,
                step_size: (lr / bias1) as f32,
                root_scale: (1.0 / bias2.sqrt()) as f32,
                eps: self.config.eps as f32,
            };
            let Moments { first, second } = moments;
            with_values_mut(&parameter.var, |weights| {
                let moments = first.chunks_mut(CHUNK).zip(second.chunks_mut(CHUNK));
                let tasks = weights.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK)).zip(moments).collect();
                threads::map(tasks, |((weights, gradients), (first, second))| {
                    widest!(rule.apply(weights, gradients, first, second));
                });
            })?;
        }
        Ok(())
    }
}

/// One update with all scalars worked out.
#[derive(Clone, Copy)]
struct Rule {
    scale: f32,
    keep: f32,
    first_rate: f32,
    second_keep: f32,
    second_rate: f32,
    step_size: f32,
    root_scale: f32,
    eps: f32,
}

impl Rule {
    #[inline(always)]
    fn apply(&self, weights: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32]) {
        for (((weight, gradient), first), second) in weights.iter_mut().zip(gradients).zip(first).zip(second)
        {
            let gradient = gradient * self.scale;
            *first += (gradient - *first) * self.first_rate;
            *second = *second * self.second_keep + gradient * gradient * self.second_rate;
            let denominator = second.sqrt() * self.root_scale + self.eps;
            *weight = *weight * self.keep - self.step_size * *first / denominator;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gradients::{Gradients, norm};
    use super::*;
    use candle_core::{Device, Tensor};

    fn parameter(name: &str, values: &[f32], decay: bool) -> Parameter {
        let var = Var::from_slice(values, values.len(), &Device::Cpu).unwrap();
        Parameter { name: name.into(), var, decay }
    }

    fn gradients(optimizer: &AdamW, loss: &Tensor) -> Gradients {
        let mut gradients = Gradients::new(optimizer.parameters());
        gradients.add(loss).unwrap();
        gradients
    }

    /// tests/golden/adamw.py makes these numbers with torch.optim.AdamW: minimises
    /// sum((w - t)^4) + sum((b - 1)^2), decay on `w` only, gradients clipped to norm 1 in every step.
    #[test]
    fn follows_pytorch() {
        const EXPECTED_W: [f32; 4] = [0.319_569_7, -1.395_964_6, 0.755_820_5, 2.187_832_8];
        const EXPECTED_B: [f32; 2] = [0.970_389_7, 3.232_747_3];
        let config = AdamWConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1 };
        let w = parameter("w", &[1.0, -2.0, 0.5, 3.0], true);
        let b = parameter("b", &[0.25, 4.0], false);
        let mut optimizer = AdamW::new(vec![w.clone(), b.clone()], config);
        let target = Tensor::new(&[0.1f32, -1.5, 0.7, 2.0], &Device::Cpu).unwrap();
        for step in 0..20 {
            let powers =
                (w.var.as_tensor() - &target).unwrap().sqr().unwrap().sqr().unwrap().sum_all().unwrap();
            let squares = (b.var.as_tensor() - 1.0).unwrap().sqr().unwrap().sum_all().unwrap();
            let gradients = gradients(&optimizer, &(powers + squares).unwrap());
            let sums = gradients.sums(optimizer.parameters()).unwrap();
            let scale = (1.0 / (norm(&sums) + 1e-6)).min(1.0);
            optimizer.step(&sums, 0.05 * (1.0 - f64::from(step) / 40.0), scale).unwrap();
        }
        for (found, expected) in w.var.to_vec1::<f32>().unwrap().iter().zip(EXPECTED_W) {
            assert!((found - expected).abs() < 2e-6, "{found} {expected}");
        }
        for (found, expected) in b.var.to_vec1::<f32>().unwrap().iter().zip(EXPECTED_B) {
            assert!((found - expected).abs() < 2e-6, "{found} {expected}");
        }
    }

    /// The textbook algorithm in f64, on a tensor that spans several chunks.
    #[test]
    fn follows_a_scalar_reference() {
        let n = 2 * CHUNK + 77;
        let start: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let slope: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
        let config = AdamWConfig { betas: (0.8, 0.99), eps: 1e-6, weight_decay: 0.2 };
        let p = parameter("p", &start, true);
        let mut optimizer = AdamW::new(vec![p.clone()], config);
        let slope_tensor = Tensor::new(slope.as_slice(), &Device::Cpu).unwrap();
        for _ in 0..3 {
            let loss = (p.var.as_tensor() * &slope_tensor).unwrap().sum_all().unwrap();
            let gradients = gradients(&optimizer, &loss);
            let sums = gradients.sums(optimizer.parameters()).unwrap();
            optimizer.step(&sums, 0.01, 0.5).unwrap();
        }
        let found = p.var.to_vec1::<f32>().unwrap();
        for i in 0..n {
            let (mut w, mut m, mut v) = (f64::from(start[i]), 0f64, 0f64);
            let g = f64::from(slope[i]) * 0.5;
            for t in 1..=3 {
                w *= 1.0 - 0.01 * 0.2;
                m = 0.8 * m + 0.2 * g;
                v = 0.99 * v + 0.01 * g * g;
                w -= 0.01 * (m / (1.0 - 0.8f64.powi(t))) / ((v / (1.0 - 0.99f64.powi(t))).sqrt() + 1e-6);
            }
            assert!((f64::from(found[i]) - w).abs() < 2e-6, "{i}: {} {w}", found[i]);
        }
    }
}
