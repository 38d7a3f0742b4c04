//! A transformer block as one operation of candle's graph, with the [`Tape`] of what is inside.
//!
//! With activation checkpointing (Chen et al. 2016, arXiv 1604.06174) of a block only its input is kept, and the backward
//! pass computes the block once more: the memory of activations falls from that of all blocks to that of one, for a
//! third more arithmetic. The gradients have the same bits, because the same operations run on the same values in the
//! same order.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, Var, bail};

use super::gradients::{absorb, under_way};
use super::graph::Decoder;
use super::ops::values;
use super::tape::{Tape, record};

/// What a block makes of `x`: the second argument of the operation, which passes it on. The first leads candle back.
struct Block {
    decoder: Decoder,
    layer: usize,
    x: Tensor,
    shape: (usize, usize),
    /// The result with the tape that led to it, unless that is to be made again.
    recorded: Mutex<Option<(Tensor, Tape)>>,
}

/// [`Decoder::block`].
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
    let (y, tape) = record(|| decoder.compute_block(layer, x, batch, length))?;
    if tape.is_empty() {
        return Ok(y);
    }
    let result = y.detach();
    // Where nothing before the block is trained, candle would not come back to it.
    let way = if x.track_op() { x.clone() } else { Var::zeros(1, DType::F32, &Device::Cpu)?.into_inner() };
    let recorded = Mutex::new((!decoder.recomputes()).then_some((y, tape)));
    let block = Block { decoder: decoder.clone(), layer, x: x.clone(), shape: (batch, length), recorded };
    way.apply_op2(&result, block)
}

impl CustomOp2 for Block {
    fn name(&self) -> &'static str {
        "block"
    }

    fn cpu_fwd(
        &self,
        _way: &CpuStorage,
        _way_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(values(y, y_layout, self.name())?.to_vec()), y_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _way: &Tensor,
        _y: &Tensor,
        _result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        if !under_way() {
            bail!("{}: the gradients of its weights have nowhere to go", self.name());
        }
        let (batch, length) = self.shape;
        let recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (y, tape) = match recorded {
            Some(recorded) => recorded,
            None => record(|| self.decoder.compute_block(self.layer, &self.x, batch, length))?,
        };
        let mut grads = tape.backward(&y, grad)?;
        let dx = grads.remove(&self.x.id());
        absorb(grads)?;
        Ok((dx, None))
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
