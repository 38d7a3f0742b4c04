//! Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): of a block only its input is kept, and the
//! backward pass computes the block once more.
//!
//! The memory of activations falls from that of all blocks to that of one, for a third more arithmetic. The
//! gradients have the same bits, because the same operations run on the same values in the same order; only where
//! hidden states have losses of their own are the parts of a block's gradient added in another order.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, Var, bail};

use super::gradients::{absorb, under_way};
use super::graph::Decoder;
use super::ops::values;

/// What a block makes of its input: the second argument of the operation, which passes it on.
struct Recomputed {
    decoder: Decoder,
    layer: usize,
    batch: usize,
    length: usize,
}

/// [`Decoder::block`] that forgets everything between its input and its output.
///
/// # Errors
/// The shapes do not fit; in the backward pass, if the gradients of the block's weights have no
/// [buffers](super::gradients::Gradients) to go to.
pub(super) fn block(
    decoder: &Decoder,
    layer: usize,
    x: &Tensor,
    batch: usize,
    length: usize,
) -> Result<Tensor> {
    // Where nothing before the block is trained, candle would not come back to it.
    let x = if x.track_op() { x.clone() } else { Var::from_tensor(x)?.into_inner() };
    // Its graph goes with the last reference to it.
    let y = decoder.compute_block(layer, &x, batch, length)?.detach();
    x.apply_op2(&y, Recomputed { decoder: decoder.clone(), layer, batch, length })
}

impl CustomOp2 for Recomputed {
    fn name(&self) -> &'static str {
        "recomputed-block"
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        _x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(values(y, y_layout, self.name())?.to_vec()), y_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        _y: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if !under_way() {
            bail!("{}: the gradients of its weights have nowhere to go", self.name());
        }
        let x = Var::from_tensor(&x.detach())?;
        let y = self.decoder.compute_block(self.layer, &x, self.batch, self.length)?;
        let mut store = y.apply_op1(Seed { grad: grad.clone() })?.backward()?;
        let dx = store.remove(&x);
        absorb(store)?;
        Ok((dx, None))
    }
}

/// A scalar whose gradient is a given one.
struct Seed {
    grad: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        if layout.shape() != self.grad.shape() {
            bail!("seed: gradient {:?} of {:?}", self.grad.shape(), layout.shape());
        }
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.grad.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::TrainConfig;
    use super::super::fixture::{text, tiny};
    use super::super::gradients::Gradients;
    use super::super::loss::{Objective, Target, loss};
    use super::super::optimizer::Parameter;
    use super::super::trainee::full;
    use super::*;
    use crate::model::Weights;

    fn bits(decoder: &Decoder, parameters: &[Parameter]) -> (u64, Vec<Vec<u32>>) {
        let (tokens, targets) = (text(24), text(25)[1..].to_vec());
        let objective = Objective { alpha: 0.0, ..Objective::default() };
        let mut gradients = Gradients::new(parameters);
        let mut value = 0.0;
        for _ in 0..2 {
            let hidden = decoder.hidden(&tokens, 2, 12).unwrap();
            let head = decoder.head().unwrap();
            let (loss, parts) = loss(&hidden, &head, Target::Text, &targets, &objective, 0.5).unwrap();
            gradients.add(&loss).unwrap();
            value = parts.loss;
        }
        let sums = gradients.sums(parameters).unwrap();
        (value.to_bits(), sums.iter().map(|sum| sum.iter().map(|x| x.to_bits()).collect()).collect())
    }

    #[test]
    fn gradients_have_the_same_bits() {
        let mut trainee = full(tiny(3, 1), &TrainConfig::default()).unwrap();
        let kept = bits(&trainee.decoder, &trainee.parameters);
        assert!(kept.1.iter().all(|sum| sum.iter().any(|bits| *bits != 0)));
        trainee.decoder.recompute(true);
        assert!(kept == bits(&trainee.decoder, &trainee.parameters));
    }

    /// With a frozen table of embeddings nothing before the first block is trained.
    #[test]
    fn blocks_behind_frozen_embeddings_are_reached() {
        let model = tiny(2, 2);
        let mut weights = Weights::default();
        let mut parameters = Vec::new();
        for (role, layer, tensor) in model.weights.iter() {
            let tensor = tensor.detach();
            if role.per_layer() {
                let var = Var::from_tensor(&tensor).unwrap();
                weights.insert(role, layer, var.as_tensor().clone());
                parameters.push(Parameter { name: format!("{role:?}.{layer}"), var, decay: false });
            } else {
                weights.insert(role, layer, tensor);
            }
        }
        let mut decoder = Decoder::new(&model.spec, &weights).unwrap();
        let kept = bits(&decoder, &parameters);
        decoder.recompute(true);
        assert!(kept == bits(&decoder, &parameters));
    }

    #[test]
    fn without_buffers_the_backward_pass_refuses() {
        let mut trainee = full(tiny(1, 1), &TrainConfig::default()).unwrap();
        trainee.decoder.recompute(true);
        let loss = trainee.decoder.hidden(&[1, 2], 1, 2).unwrap().sum_all().unwrap();
        assert!(loss.backward().unwrap_err().to_string().contains("nowhere to go"));
    }
}
