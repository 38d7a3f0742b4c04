//! A frozen model with an adapter beside it: what `edgec tune` trains.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use edge_models::{DecoderSpec, Role, TensorRow};
use sha2::{Digest, Sha256};

use super::checkpoint::Recipe;
use super::error::TrainError;
use super::graph::Decoder;
use super::low_rank::{Lengths, LowRank, row_squares};
use super::ops::{Frozen, Scratch, with_values};
use super::optimizer::Parameter;
use super::precision::{Count, Precision};
use super::projection::{Matrices, Projection};
use super::random::SplitMix64;
use super::trainee::Trainee;
use crate::adapter::{Adapter, Pair, Settings, module};
use crate::model::{Model, Weights};
use crate::pack::hex;
use crate::quantize::HeldModel;

/// A model that is not trained.
pub struct Base {
    spec: DecoderSpec,
    vectors: Weights,
    matrices: BTreeMap<(Role, usize), Frozen>,
    fingerprint: String,
    /// In what numbers it is multiplied with, as a user is told.
    numbers: String,
}

impl Base {
    /// A model in f32, whose weights are shared, to be multiplied with in `precision`.
    ///
    /// # Errors
    /// A weight that is not contiguous f32 on the CPU, or that `precision` cannot hold.
    pub fn dense(model: &Model, precision: Precision) -> Result<Self, TrainError> {
        let (mut vectors, mut matrices) = (Weights::default(), BTreeMap::new());
        let (tied, mut count) = (model.spec.tied_embeddings, Count::default());
        for (role, layer, tensor) in model.weights.iter() {
            if role.is_vector() {
                vectors.insert(role, layer, tensor.clone());
            } else {
                let frozen = precision.frozen(role, layer, tensor, tied, true, &mut count)?;
                matrices.insert((role, layer), frozen);
            }
        }
        let numbers = match precision {
            Precision::F32 => precision.to_string(),
            Precision::Int8 => format!("{precision} {count}"),
        };
        Ok(Self { spec: model.spec, vectors, matrices, fingerprint: precision.fingerprint(model)?, numbers })
    }

    /// A model in blocks, which are shared; one buffer serves all of them.
    ///
    /// # Errors
    /// A vector that is not contiguous f32 on the CPU.
    pub fn held(model: &HeldModel) -> Result<Self, TrainError> {
        let scratch = Scratch::default();
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", model.spec));
        let mut matrices = BTreeMap::new();
        for (place, blocks) in &model.matrices {
            hash.update(format!("{place:?} {:?}", blocks.dtype()));
            hash.update(blocks.bytes());
            matrices.insert(*place, Frozen::Blocks(blocks.clone(), scratch.clone()));
        }
        for (role, layer, tensor) in model.vectors.iter() {
            hash.update(format!("{role:?} {layer}"));
            with_values(tensor, |values| {
                values.iter().for_each(|value| hash.update(value.to_le_bytes()));
                Ok(())
            })?;
        }
        let fingerprint = hex(&hash.finalize());
        let (vectors, numbers) = (model.vectors.clone(), Precision::F32.to_string());
        Ok(Self { spec: model.spec, vectors, matrices, fingerprint, numbers })
    }

    /// In what numbers products with it are made.
    pub fn numbers(&self) -> &str {
        &self.numbers
    }

    /// Bytes that all its weights take, and those that they would take in f32.
    pub fn bytes(&self) -> [u64; 2] {
        let vectors: usize = self.vectors.iter().map(|(.., tensor)| 4 * tensor.elem_count()).sum();
        let held: usize = self.matrices.values().map(Frozen::bytes).sum();
        let values: usize =
            self.matrices.values().map(|matrix| matrix.dims().iter().product::<usize>()).sum();
        [(vectors + held) as u64, (vectors + 4 * values) as u64]
    }

    /// The same model with `adapter` beside its matrices.
    ///
    /// # Errors
    /// The adapter is one for another model.
    pub fn with(&self, adapter: &Adapter) -> Result<Decoder, TrainError> {
        let pairs = adapter.pairs.iter().map(|pair| Factors::of(pair, &self.spec));
        self.decoder(&pairs.collect::<Result<Vec<_>, _>>()?, None)
    }

    /// The frozen matrix of `role`, of which it is known that it is there.
    fn matrix(&self, role: Role, layer: usize) -> candle_core::Result<&Frozen> {
        let missing = || candle_core::Error::Msg(format!("weight {role:?} of layer {layer} is missing"));
        self.matrices.get(&(role, layer)).ok_or_else(missing)
    }

    fn decoder(&self, factors: &[Factors], dropout: Option<(f32, u64)>) -> Result<Decoder, TrainError> {
        let frozen = self.matrices.iter();
        let mut matrices: Matrices =
            frozen.map(|(place, matrix)| (*place, Projection::Frozen(matrix.clone()))).collect();
        for (index, factors) in factors.iter().enumerate() {
            for (&role, part) in factors.row.members().iter().zip(&factors.parts) {
                let base = self.matrix(role, factors.layer)?;
                let lengths =
                    part.magnitude.clone().map(|magnitude| Lengths::new(base, magnitude)).transpose()?;
                let matrix = LowRank {
                    base: base.clone(),
                    down: factors.down.clone(),
                    up: part.up.clone(),
                    scale: factors.scale,
                    lengths,
                    dropout: dropout.map(|(rate, seed)| (rate, seed.wrapping_add(index as u64))),
                };
                matrices.insert((role, factors.layer), Projection::LowRank(Box::new(matrix)));
            }
        }
        Ok(Decoder::assemble(&self.spec, matrices, self.vectors.clone())?)
    }
}

/// The factors of one matrix of a file: `A` is shared by the roles that are fused in it, each of which has
/// its rows of `B`.
#[derive(Clone)]
struct Factors {
    row: &'static TensorRow,
    layer: usize,
    scale: f32,
    down: Tensor,
    parts: Vec<Part>,
}

/// The rows of one role.
#[derive(Clone)]
struct Part {
    up: Tensor,
    magnitude: Option<Tensor>,
}

impl Factors {
    /// Those of a pair, as constants.
    fn of(pair: &Pair, spec: &DecoderSpec) -> candle_core::Result<Self> {
        let down = Tensor::from_slice(&pair.down, (pair.rank, pair.down.len() / pair.rank), &Device::Cpu)?;
        let mut before = 0;
        let mut parts = Vec::new();
        for role in pair.row.members() {
            let rows = role.shape(spec)[0];
            let values = pair.up.get(before * pair.rank..(before + rows) * pair.rank).unwrap_or_default();
            let up = Tensor::from_slice(values, (rows, pair.rank), &Device::Cpu)?;
            let magnitude = pair.magnitude.as_ref().map(|lengths| {
                Tensor::from_slice(lengths.get(before..before + rows).unwrap_or_default(), rows, &Device::Cpu)
            });
            parts.push(Part { up, magnitude: magnitude.transpose()? });
            before += rows;
        }
        Ok(Self { row: pair.row, layer: pair.layer, scale: pair.scale, down, parts })
    }

    /// The values, as they are now.
    fn pair(&self) -> candle_core::Result<Pair> {
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let all = |parts: Vec<candle_core::Result<Vec<f32>>>| -> candle_core::Result<Vec<f32>> {
            Ok(parts.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
        };
        let up = all(self.parts.iter().map(|part| values(&part.up)).collect())?;
        let lengths: Vec<_> =
            self.parts.iter().filter_map(|part| part.magnitude.as_ref()).map(values).collect();
        let magnitude = if lengths.is_empty() { None } else { Some(all(lengths)?) };
        let (row, layer, scale) = (self.row, self.layer, self.scale);
        Ok(Pair { row, layer, rank: self.down.dim(0)?, down: values(&self.down)?, up, scale, magnitude })
    }
}

/// How an adapter begins and is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Start {
    /// Share of the inputs of `A` that is dropped.
    pub dropout: f32,
    /// Seed of `A` and of what is dropped.
    pub seed: u64,
}

/// A new adapter of `targets` beside `base` is trained, and the result is the adapter, called `path`.
///
/// It begins as PEFT's do: `A` uniform within `1 / sqrt(in)` (Kaiming with slope `sqrt(5)`), `B` zero, and DoRA's lengths
/// those of the rows, so that the first step starts from the base itself. Weight decay acts on `A` and `B` alone.
///
/// # Errors
/// The base lacks a weight, or a setting makes no sense.
pub fn adapter(
    base: &Base,
    settings: &Settings,
    targets: &[(&'static TensorRow, usize)],
    start: Start,
    path: &Path,
) -> Result<Trainee<Adapter>, TrainError> {
    check(settings, start)?;
    let mut parameters = Vec::new();
    let mut all = Vec::new();
    for (row, layer) in targets {
        all.push(fresh(base, settings, row, *layer, start.seed, &mut parameters)?);
    }
    let dropout = (start.dropout > 0.0).then_some((start.dropout, start.seed));
    let decoder = base.decoder(&all, dropout)?;
    let adapter = format!("{settings:?}, dropout {}, {} modules", start.dropout, targets.len());
    let recipe = Recipe::from([
        ("base".to_owned(), base.fingerprint.clone()),
        ("adapter".to_owned(), adapter),
        ("adapter seed".to_owned(), start.seed.to_string()),
    ]);
    let (path, rs) = (path.to_owned(), settings.rs);
    Ok(Trainee::new(decoder, parameters, recipe, move || {
        let pairs = all.iter().map(Factors::pair).collect::<Result<_, _>>()?;
        Ok(Adapter { path, pairs, rs })
    }))
}

/// Largest rank that the runtime takes.
const MAX_RANK: usize = edge_runtime::session::Limits::MAX_ADAPTER_RANK;

fn check(settings: &Settings, start: Start) -> Result<(), TrainError> {
    let refuse = |setting, found: String, expected| Err(TrainError::Setting { setting, found, expected });
    let ranks = settings.ranks.iter().map(|(_, rank)| *rank).chain([settings.rank]);
    let alphas = settings.alphas.iter().map(|(_, alpha)| *alpha).chain([settings.alpha]);
    if let Some(rank) = ranks.into_iter().find(|rank| !(1..=MAX_RANK).contains(rank)) {
        return refuse("rank", rank.to_string(), "1 to 256, which is what devices take");
    }
    if let Some(alpha) = alphas.into_iter().find(|alpha| !(*alpha > 0.0 && *alpha < 1e9)) {
        return refuse("adapter's alpha", alpha.to_string(), "a number above 0");
    }
    if !(0.0..1.0).contains(&start.dropout) {
        return refuse("dropout", start.dropout.to_string(), "a share from 0 to below 1");
    }
    Ok(())
}

/// The factors of a matrix as variables, which are added to `parameters`.
fn fresh(
    base: &Base,
    settings: &Settings,
    row: &'static TensorRow,
    layer: usize,
    seed: u64,
    parameters: &mut Vec<Parameter>,
) -> Result<Factors, TrainError> {
    let module = module(row, layer);
    let (rank, scale) = settings.rank_and_scale(&module);
    let cols = row.file_shape(&base.spec)[1];
    let mut variable = |part: String, values: Vec<f32>, shape: &[usize], decay: bool| {
        let var = Var::from_vec(values, shape, &Device::Cpu)?;
        let tensor = var.as_tensor().clone();
        parameters.push(Parameter { name: format!("{module}.{part}"), var, decay });
        candle_core::Result::Ok(tensor)
    };
    // A stream of its own for each matrix: another choice of targets does not change the others.
    let mut random = SplitMix64::new(seed, 1 << 63 | (row.role as u64) << 32 | layer as u64);
    let bound = 1.0 / (cols as f64).sqrt();
    let down = (0..rank * cols).map(|_| ((2.0 * random.unit() - 1.0) * bound) as f32).collect();
    let down = variable("lora_A".into(), down, &[rank, cols], true)?;
    let mut parts = Vec::new();
    for &role in row.members() {
        let rows = role.shape(&base.spec)[0];
        // Roles that are fused in a file have names of their own here.
        let of = if row.fused.is_empty() { String::new() } else { format!(".{role:?}") };
        let up = variable(format!("lora_B{of}"), vec![0.0; rows * rank], &[rows, rank], true)?;
        let magnitude = if settings.dora {
            let lengths = row_squares(base.matrix(role, layer)?)?;
            let lengths = lengths.iter().map(|square| square.sqrt() as f32).collect();
            Some(variable(format!("lora_magnitude_vector{of}"), lengths, &[rows], false)?)
        } else {
            None
        };
        parts.push(Part { up, magnitude });
    }
    Ok(Factors { row, layer, scale, down, parts })
}

#[cfg(test)]
mod tests;
