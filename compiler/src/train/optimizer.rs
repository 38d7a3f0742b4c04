//! AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) in one pass over memory.
//!
//! candle's own optimizer makes half a dozen temporary tensors for each parameter; here one loop reads
//! the gradient once and updates weight and both moments in place. The results do not depend on the
//! number of threads. Never computes a gradient and knows no schedule: the caller gives the rate.

use std::cell::RefCell;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor, Var, bail};
use rayon::prelude::*;

use super::error::TrainError;
use super::ops::with_values;

/// Elements that one thread works on at a time. Also the unit of the norm's summation order.
const CHUNK: usize = 1 << 14;

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

    /// One update with learning rate `lr` and every gradient multiplied by `scale`.
    ///
    /// # Errors
    /// A gradient whose shape is not its parameter's, or one that is not f32 on the CPU.
    pub fn step(&mut self, gradients: &Gradients, lr: f64, scale: f64) -> Result<(), TrainError> {
        self.steps += 1;
        let (beta1, beta2) = self.config.betas;
        let exponent = self.steps as i32;
        let bias1 = 1.0 - beta1.powi(exponent);
        let bias2 = 1.0 - beta2.powi(exponent);
        for ((parameter, moments), gradient) in
            self.parameters.iter().zip(&mut self.moments).zip(&gradients.sums)
        {
            let Some(gradient) = gradient else {
                return Err(TrainError::NoGradient { name: parameter.name.clone() });
            };
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
            let update = Update { rule, moments: RefCell::new(moments) };
            parameter.var.inplace_op2(gradient, &update)?;
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

/// [`Rule`] on one parameter and its moments; candle's in-place ops take `&self`, hence the cell.
struct Update<'a> {
    rule: Rule,
    moments: RefCell<&'a mut Moments>,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        weights: &mut CpuStorage,
        layout: &Layout,
        gradients: &CpuStorage,
        gradients_layout: &Layout,
    ) -> candle_core::Result<()> {
        if layout.shape() != gradients_layout.shape() {
            bail!("adamw: parameter {:?}, gradient {:?}", layout.shape(), gradients_layout.shape());
        }
        let (CpuStorage::F32(weights), CpuStorage::F32(gradients)) = (weights, gradients) else {
            bail!("adamw: parameter and gradient must be f32");
        };
        let (Some((start, end)), Some((gradients_start, gradients_end))) =
            (layout.contiguous_offsets(), gradients_layout.contiguous_offsets())
        else {
            bail!("adamw: parameter and gradient must be contiguous");
        };
        let rule = self.rule;
        let Moments { first, second } = &mut **self.moments.borrow_mut();
        weights[start..end]
            .par_chunks_mut(CHUNK)
            .zip(gradients[gradients_start..gradients_end].par_chunks(CHUNK))
            .zip(first.par_chunks_mut(CHUNK))
            .zip(second.par_chunks_mut(CHUNK))
            .for_each(|(((weights, gradients), first), second)| {
                rule.apply(weights, gradients, first, second)
            });
        Ok(())
    }
}

/// The gradients of one step, summed over its micro-batches.
#[derive(Debug)]
pub struct Gradients {
    sums: Vec<Option<Tensor>>,
}

impl Gradients {
    /// No gradient yet for each of `parameters` parameters.
    pub fn new(parameters: usize) -> Self {
        Self { sums: vec![None; parameters] }
    }

    /// Adds the gradients of one backward pass, taking them out of `store`.
    ///
    /// # Errors
    /// [`TrainError::NoGradient`] names a parameter that the loss does not reach: an operation without
    /// a backward pass would otherwise leave it untrained in silence.
    pub fn add(&mut self, parameters: &[Parameter], store: &mut GradStore) -> Result<(), TrainError> {
        for (parameter, sum) in parameters.iter().zip(&mut self.sums) {
            let gradient = store
                .remove(&parameter.var)
                .ok_or_else(|| TrainError::NoGradient { name: parameter.name.clone() })?
                .contiguous()?;
            *sum = Some(match sum.take() {
                Some(sum) => (sum + gradient)?,
                None => gradient,
            });
        }
        Ok(())
    }

    /// Euclidean norm over all gradients together.
    ///
    /// Sums in f64 over fixed chunks in a fixed order: the same on any number of threads.
    ///
    /// # Errors
    /// A gradient that is not f32 on the CPU.
    pub fn norm(&self) -> Result<f64, TrainError> {
        let mut total = 0f64;
        for gradient in self.sums.iter().flatten() {
            total += with_values(gradient, |values| {
                let partial: Vec<f64> = values.par_chunks(CHUNK).map(sum_of_squares).collect();
                Ok(partial.iter().sum::<f64>())
            })?;
        }
        Ok(total.sqrt())
    }
}

/// Sum of squares in eight independent f64 lanes, which the compiler turns into vector code.
fn sum_of_squares(values: &[f32]) -> f64 {
    let (blocks, tail) = values.as_chunks::<8>();
    let mut lanes = [0f64; 8];
    for block in blocks {
        for (lane, &value) in lanes.iter_mut().zip(block) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    lanes.iter().sum::<f64>() + tail.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn parameter(name: &str, values: &[f32], decay: bool) -> Parameter {
        let var = Var::from_slice(values, values.len(), &Device::Cpu).unwrap();
        Parameter { name: name.into(), var, decay }
    }

    fn gradients(optimizer: &AdamW, loss: &Tensor) -> Gradients {
        let mut gradients = Gradients::new(optimizer.parameters().len());
        gradients.add(optimizer.parameters(), &mut loss.backward().unwrap()).unwrap();
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
            let norm = gradients.norm().unwrap();
            let scale = (1.0 / (norm + 1e-6)).min(1.0);
            optimizer.step(&gradients, 0.05 * (1.0 - f64::from(step) / 40.0), scale).unwrap();
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
            optimizer.step(&gradients, 0.01, 0.5).unwrap();
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

    #[test]
    fn norm_and_accumulation() {
        let p = parameter("p", &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], true);
        let optimizer =
            AdamW::new(vec![p.clone()], AdamWConfig { betas: (0.9, 0.9), eps: 1e-8, weight_decay: 0.0 });
        let mut sum = Gradients::new(1);
        for factor in [1.0, 2.0] {
            let loss = (p.var.sqr().unwrap().sum_all().unwrap() * factor).unwrap();
            sum.add(optimizer.parameters(), &mut loss.backward().unwrap()).unwrap();
        }
        // d/dp 3 p^2 = 6 p; sum of squares of 1..=9 is 285.
        assert!((sum.norm().unwrap() - 6.0 * 285f64.sqrt()).abs() < 1e-4);
    }

    #[test]
    fn an_unreached_parameter_is_named() {
        let p = parameter("p", &[1.0], true);
        let lost = parameter("lost", &[1.0], true);
        let loss = p.var.sum_all().unwrap();
        let error = Gradients::new(2).add(&[p, lost], &mut loss.backward().unwrap()).unwrap_err();
        assert!(error.to_string().contains("`lost`"), "{error}");
    }
}
