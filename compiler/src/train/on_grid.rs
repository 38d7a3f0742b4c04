//! Quantization-aware training: a model that computes with the weights of the file that it will become.
//!
//! Matrices are trained behind the grids of blocks: each forward pass rounds them as the file does, bit for bit, and
//! the gradient goes straight through. Scales that a file holds one for each group of weights (Q8_0, Q5_x, Q4_x) are
//! trained with the weights; those of super-blocks stay as their search chose them.

use candle_core::{Device, Tensor, Var};
use edge_models::{NameBuf, Role};
use edge_runtime::format::f32_to_f16;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::checkpoint::Recipe;
use super::error::TrainError;
use super::graph::Decoder;
use super::ops::{Levels, with_values};
use super::optimizer::Parameter;
use super::projection::{Matrices, OnGrid, Projection};
use super::trainee::Trainee;
use crate::model::{Model, Weights};
use crate::quantize::calibrate::RoundedModel;
use crate::quantize::grid::{Grid, Spacing, geometry, store};
use crate::quantize::{Blocks, Encoding};

/// A trained model with the blocks that its last forward pass computed with.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Weights as the blocks hold them.
    pub model: Model,
    /// The blocks.
    pub encoding: Encoding,
}

/// One matrix behind its grid.
struct Matrix {
    role: Role,
    layer: usize,
    /// Blocks with the scales to begin with.
    blocks: Blocks,
    grid: OnGrid,
    /// Latent weights, and scales if they are trained.
    parameters: Vec<Parameter>,
}

/// Everything in `model` is trained, its matrices behind the blocks of `start`.
///
/// # Errors
/// The weights are not those of the model's specification.
pub fn quantized(model: Model, start: RoundedModel) -> Result<Trainee<Quantized>, TrainError> {
    let spec = model.spec;
    let recipe = Recipe::from([("student".to_owned(), fingerprint(&start)?)]);
    let (mut matrices, mut vectors) = (Matrices::new(), Weights::default());
    let (mut parameters, mut behind) = (Vec::new(), Vec::new());
    for (role, layer, weight) in start.latent.iter() {
        let name = spec.family.tensor(role).filter(|row| row.fused.is_empty()).map_or_else(
            || format!("{role:?}.{layer}"),
            |row| NameBuf::new(row.hf, layer).as_str().to_owned(),
        );
        let blocks = start.encoding.iter().find(|(r, l, _)| (*r, *l) == (role, layer));
        match blocks {
            Some((.., blocks)) => {
                let matrix = Matrix::new(role, layer, &name, weight, blocks.clone())?;
                parameters.extend(matrix.parameters.iter().cloned());
                matrices.insert((role, layer), Projection::OnGrid(matrix.grid.clone()));
                behind.push(matrix);
            }
            None if role.is_rope_table() => vectors.insert(role, layer, weight.clone()),
            None => {
                let var = Var::from_tensor(&weight.detach())?;
                let tensor = var.as_tensor().clone();
                if role.is_vector() {
                    vectors.insert(role, layer, tensor);
                } else {
                    matrices.insert((role, layer), Projection::Dense(tensor));
                }
                parameters.push(Parameter { name, var, decay: false });
            }
        }
    }
    let rest: Vec<_> = matrices
        .iter()
        .filter_map(|(place, matrix)| match matrix {
            Projection::Dense(tensor) => Some((*place, tensor.clone())),
            Projection::OnGrid(_) | Projection::Frozen(_) | Projection::LowRank(_) => None,
        })
        .chain(vectors.iter().map(|(role, layer, tensor)| ((role, layer), tensor.clone())))
        .collect();
    let decoder = Decoder::assemble(&spec, matrices, vectors)?;
    let mut encoding = start.encoding;
    Ok(Trainee::new(decoder, parameters, recipe, move || {
        let mut model = model;
        for ((role, layer), tensor) in rest {
            model.weights.insert(role, layer, tensor.detach());
        }
        for matrix in behind {
            let blocks = matrix.blocks()?;
            model.weights.insert(matrix.role, matrix.layer, blocks.tensor()?);
            encoding.insert(matrix.role, matrix.layer, blocks);
        }
        Ok(Quantized { model, encoding })
    }))
}

impl Matrix {
    fn new(
        role: Role,
        layer: usize,
        name: &str,
        latent: &Tensor,
        blocks: Blocks,
    ) -> Result<Self, TrainError> {
        let dtype = blocks.dtype();
        let Some((group, low, high)) = geometry(dtype) else {
            let message = format!("{name} is {}, expected blocks", dtype.name());
            return Err(candle_core::Error::msg(message).into());
        };
        let (rows, cols) = latent.dims2()?;
        let reach = (dtype.block_len() == 32).then_some(high.max(-low));
        let per_block = dtype.block_len() / group;
        let steps: Vec<(f32, f32)> = blocks
            .bytes()
            .par_chunks(dtype.block_bytes())
            .flat_map_iter(|block| {
                let grid = Grid::of(dtype, block);
                (0..per_block).map(move |group| grid.map_or((0.0, 0.0), |grid| grid.step(group)))
            })
            .collect();
        let shape = (rows, cols / group);
        let scales = steps.iter().map(|(scale, _)| scale * reach.unwrap_or(1.0)).collect();
        let offsets = steps.iter().map(|(_, offset)| *offset).collect();
        let scales = Tensor::from_vec(scales, shape, &Device::Cpu)?;
        let offsets = Tensor::from_vec(offsets, shape, &Device::Cpu)?;
        let parameter = |name: String, tensor: &Tensor| -> Result<Parameter, TrainError> {
            Ok(Parameter { name, var: Var::from_tensor(&tensor.detach())?, decay: false })
        };
        let mut parameters = vec![parameter(name.to_owned(), latent)?];
        if reach.is_some() {
            parameters.push(parameter(format!("{name}.scales"), &scales)?);
        }
        let scales = parameters.get(1).map_or(scales, |trained| trained.var.as_tensor().clone());
        let latent = parameters[0].var.as_tensor().clone();
        let grid = OnGrid {
            latent,
            scales,
            offsets,
            levels: Levels { group, low, high, spacing: Spacing::of(dtype), reach },
        };
        Ok(Self { role, layer, blocks, grid, parameters })
    }

    /// The blocks that a forward pass computes with.
    fn blocks(&self) -> candle_core::Result<Blocks> {
        let dtype = self.blocks.dtype();
        let (len, size) = (dtype.block_len(), dtype.block_bytes());
        let Levels { group, reach, .. } = self.grid.levels;
        let mut bytes = self.blocks.bytes().to_vec();
        with_values(&self.grid.latent, |latent| {
            with_values(&self.grid.scales, |scales| {
                let blocks = bytes.par_chunks_mut(size).zip(latent.par_chunks(len));
                blocks.zip(scales.par_chunks(len / group)).for_each(|((block, latent), scales)| {
                    if let Some(reach) = reach {
                        block[..2].copy_from_slice(&f32_to_f16(scales[0] / reach).to_le_bytes());
                    }
                    if let Some(grid) = Grid::of(dtype, block) {
                        let mut q = [0.0; 256];
                        for (i, x) in latent.iter().enumerate() {
                            q[i] = grid.nearest(i, *x);
                        }
                        store(dtype, &q[..len], block);
                    }
                });
                Ok(())
            })
        })?;
        Blocks::new(dtype, *self.blocks.dims(), bytes).map_err(candle_core::Error::wrap)
    }
}

/// SHA-256 of everything that training starts from, hexadecimal.
fn fingerprint(start: &RoundedModel) -> Result<String, TrainError> {
    let mut hash = Sha256::new();
    for (role, layer, tensor) in start.latent.iter() {
        hash.update(format!("{role:?} {layer} {:?}", tensor.dims()));
        with_values(&tensor.contiguous()?, |values| {
            let mut bytes = Vec::with_capacity(4 << 12);
            for values in values.chunks(1 << 12) {
                bytes.clear();
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                hash.update(&bytes);
            }
            Ok(())
        })?;
    }
    for (role, layer, blocks) in start.encoding.iter() {
        hash.update(format!("{role:?} {layer} {}", blocks.dtype().name()));
        hash.update(blocks.bytes());
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use edge_runtime::format::{DType, Gguf};

    use super::*;
    use crate::export::gguf::encoded_to_vec;
    use crate::quantize::Mix;
    use crate::quantize::calibrate::{Rounding, Sample, round_model};
    use crate::teacher;
    use crate::train::fixture::{text, tiny_in_blocks};
    use crate::train::ops::check;
    use crate::train::trainer::{Progress, StepReport, Text, train};
    use crate::train::{RunFolder, TrainConfig};

    fn bits(tensor: &Tensor) -> Vec<u32> {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// Whatever training makes of latent weights and scales, the file holds what the forward pass computed with.
    #[test]
    fn forward_passes_see_the_file_bit_for_bit() {
        for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
            let latent = (check::matrix(1, 6, 512) * 0.3).unwrap();
            let values = latent.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let blocks = Blocks::quantize(dtype, [6, 512], &values, None).unwrap();
            let matrix = Matrix::new(Role::FfnDown, 0, "w", &latent, blocks).unwrap();
            let compare = || {
                let seen = matrix.grid.rounded().unwrap();
                let held = matrix.blocks().unwrap().tensor().unwrap();
                assert_eq!(bits(&seen), bits(&held), "{}", dtype.name());
                let ids = Tensor::new(&[4u32, 0], &Device::Cpu).unwrap();
                let rows = Projection::OnGrid(matrix.grid.clone()).rows(&[4, 0]).unwrap();
                assert_eq!(bits(&rows), bits(&held.index_select(&ids, 0).unwrap()));
            };
            compare();
            for parameter in &matrix.parameters {
                let (rows, cols) = parameter.var.dims2().unwrap();
                let moved =
                    (parameter.var.as_tensor() + (check::matrix(2, rows, cols) * 0.05).unwrap()).unwrap();
                parameter.var.set(&moved).unwrap();
            }
            compare();
            assert_eq!(matrix.parameters.len(), if dtype.block_len() == 32 { 2 } else { 1 });
        }
    }

    struct Losses(Vec<f64>);

    impl Progress for Losses {
        fn step(&mut self, report: &StepReport) -> std::ops::ControlFlow<()> {
            self.0.push(report.row.kl);
            std::ops::ControlFlow::Continue(())
        }

        fn note(&mut self, _: &str) {}
    }

    /// A block that is computed again rounds its matrices again.
    #[test]
    fn recomputed_blocks_have_the_same_gradients() {
        let teacher = tiny_in_blocks(2, 9);
        let ids = text(100);
        let sample = Sample { ids: &ids[..64], length: 16, bos: None };
        let rounded = || {
            round_model(&teacher, Mix::Q4_0.into(), sample, Rounding::default(), &mut |_, _, _| {}).unwrap()
        };
        let trained = |checkpoint_activations| {
            let student = quantized(teacher.clone(), rounded()).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let config =
                TrainConfig { tokens: 64 * 3, length: 16, batch: 4, lr: 1e-3, ..TrainConfig::default() };
            let run = RunFolder { checkpoint_activations, ..RunFolder::new(folder.path(), false, None) };
            let text = Text { ids: &ids, scored: &vec![true; ids.len()] };
            let trained = train(None, student, text, &config, &run, &mut Losses(Vec::new())).unwrap();
            trained.model.weights.iter().flat_map(|(_, _, weight)| bits(weight)).collect::<Vec<u32>>()
        };
        assert!(trained(false) == trained(true));
    }

    #[test]
    fn training_behind_blocks_lowers_the_divergence_of_the_file() {
        let teacher = tiny_in_blocks(2, 9);
        let ids = text(3000);
        let sample = Sample { ids: &ids[..512], length: 16, bos: None };
        let start =
            round_model(&teacher, Mix::Q4_0.into(), sample, Rounding::default(), &mut |_, _, _| {}).unwrap();
        let student = quantized(teacher.clone(), start).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let config = TrainConfig {
            tokens: 64 * 80,
            length: 16,
            batch: 4,
            lr: 1e-3,
            warmup: 0.05,
            ..TrainConfig::default()
        };
        let scored = vec![true; ids.len()];
        let mut losses = Losses(Vec::new());
        let run = RunFolder::new(folder.path(), false, None);
        let text = Text { ids: &ids, scored: &scored };
        let trained = train(Some(&teacher), student, text, &config, &run, &mut losses).unwrap();
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, last) = (mean(&losses.0[..8]), mean(&losses.0[64..]));
        assert!(last < 0.95 * first, "{first} {last}");
        let bytes = encoded_to_vec(&trained.model, &trained.encoding).unwrap();
        let read = teacher::from_gguf(&Gguf::parse(&bytes).unwrap(), Path::new("test")).unwrap();
        for (role, layer, weight) in trained.model.weights.iter() {
            assert_eq!(bits(weight), bits(read.weights.get(role, layer).unwrap()), "{role:?} {layer}");
            assert!(
                !bits(weight).eq(&bits(teacher.weights.get(role, layer).unwrap())),
                "{role:?} was not trained"
            );
        }
    }
}
