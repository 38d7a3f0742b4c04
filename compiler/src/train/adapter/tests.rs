//! Adapters beside frozen bases: what they begin as, what trains them, and what stays as it was.

use std::ops::ControlFlow;

use candle_core::Tensor;
use edge_models::family_by_gguf_name;

use super::*;
use crate::adapter::Targets;
use crate::export::gguf::{Mix, export_to_vec};
use crate::teacher::held_from_gguf;
use crate::train::fixture::{text, tiny};
use crate::train::gradients::Gradients;
use crate::train::loss::{Objective, Target, loss};
use crate::train::ops::check::{self, noise};
use crate::train::pretrain::initialize;
use crate::train::trainer::{Progress, StepReport, Text, fingerprint, train};
use crate::train::{RunFolder, TrainConfig};
use edge_runtime::format::Gguf;

const SETTINGS: Settings =
    Settings { rank: 4, alpha: 8.0, ranks: Vec::new(), alphas: Vec::new(), rs: false, dora: false };
const START: Start = Start { dropout: 0.0, seed: 3 };

/// A model wide enough for blocks of 32.
fn model(family: &str) -> Model {
    let spec = DecoderSpec {
        hidden: 32,
        head_dim: 8,
        rope_dims: 8,
        ffn: 64,
        family: family_by_gguf_name(family).unwrap(),
        ..tiny(2, 0).spec
    };
    let mut weights = initialize(&spec, 7).unwrap();
    let larger: Vec<_> = weights
        .iter()
        .filter(|(role, ..)| !role.is_vector())
        .map(|(role, layer, tensor)| (role, layer, (tensor * 8.0).unwrap()))
        .collect();
    larger.into_iter().for_each(|(role, layer, tensor)| weights.insert(role, layer, tensor));
    Model { spec, weights, vocabulary: None, name: "wide".into() }
}

fn held(model: &Model, mix: Mix) -> HeldModel {
    let bytes = export_to_vec(model, Mix::F32).unwrap();
    held_from_gguf(&Gguf::parse(&bytes).unwrap(), Path::new("memory"), mix).unwrap()
}

fn bases(family: &str) -> [Base; 2] {
    let model = model(family);
    [Base::dense(&model, Precision::F32).unwrap(), Base::held(&held(&model, Mix::Q4_0)).unwrap()]
}

fn trainee(
    base: &Base,
    settings: &Settings,
    targets: &str,
    start: Start,
) -> Result<Trainee<Adapter>, TrainError> {
    let targets = targets.parse::<Targets>().unwrap().choose(&base.spec).unwrap();
    adapter(base, settings, &targets, start, Path::new("adapter"))
}

struct Quiet(Vec<f64>, u64);

impl Progress for Quiet {
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.0.push(report.row.loss);
        if report.row.step == self.1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn note(&mut self, _: &str) {}
}

/// Trains for `steps` in `folder`, stopped by itself after step `stop`; the adapter and the losses.
fn tuned(
    base: &Base,
    settings: &Settings,
    start: Start,
    steps: u64,
    (folder, resume, stop): (&Path, bool, u64),
) -> Result<(Adapter, Vec<f64>), TrainError> {
    let config = TrainConfig {
        tokens: steps * 4 * 16,
        batch: 4,
        length: 16,
        lr: 1e-2,
        weight_decay: 0.0,
        ..TrainConfig::default()
    };
    let ids = text(3000);
    let scored = vec![true; ids.len()];
    let mut watch = Quiet(vec![], stop);
    let trainee = trainee(base, settings, "all-linear", start)?;
    let folder = RunFolder::new(folder, resume, Some(3));
    let text = Text { ids: &ids, scored: &scored };
    let adapter = train(None, trainee, text, &config, &folder, &mut watch)?;
    Ok((adapter, watch.0))
}

fn logits(decoder: &Decoder) -> Vec<f32> {
    let tokens: Vec<u32> = (0..12).map(|i| i * 7 % 61).collect();
    decoder.logits(&tokens, 1, 12).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_new_adapter_changes_nothing() {
    for family in ["llama", "phi3"] {
        for base in bases(family) {
            let plain = logits(&base.decoder(&[], None).unwrap());
            for settings in [SETTINGS, Settings { dora: true, rs: true, ..SETTINGS }] {
                let trainee = trainee(&base, &settings, "all-linear", START).unwrap();
                assert!(distance(&logits(&trainee.decoder), &plain) < 1e-4);
                let adapter = trainee.finish().unwrap();
                let pair = &adapter.pairs[0];
                let bound = 1.0 / (pair.down.len() as f32 / 4.0).sqrt();
                let largest = pair.down.iter().map(|x| x.abs()).fold(0.0, f32::max);
                assert!(largest <= bound && largest > 0.8 * bound && pair.up.iter().all(|x| *x == 0.0));
                assert_eq!(pair.scale, if settings.rs { 4.0 } else { 2.0 });
            }
        }
    }
}

/// Every variable has the slope that finite differences find, through the whole model. A DoRA's lengths are
/// constants to its gradient, so there only the magnitudes are compared; the rest is checked beside the operation.
#[test]
fn every_parameter_has_the_gradient_of_the_loss() {
    let tokens: Vec<u32> = (0..10).map(|i| i * 7 % 61).collect();
    let targets: Vec<u32> = (0..10).map(|i| i * 5 % 61).collect();
    let objective = Objective::default();
    for (family, dora) in [("llama", false), ("phi3", false), ("llama", true)] {
        for base in bases(family) {
            let settings = Settings { dora, ..SETTINGS };
            let trainee = trainee(&base, &settings, "all-linear", START).unwrap();
            // Where B is zero, so is the gradient of A.
            for (index, parameter) in trainee.parameters.iter().enumerate() {
                let count = parameter.var.elem_count();
                if parameter.name.contains("lora_B") {
                    let values: Vec<f32> = noise(index as u64, count).iter().map(|x| x * 0.1).collect();
                    let values = Tensor::from_vec(values, parameter.var.shape(), &Device::Cpu).unwrap();
                    parameter.var.set(&values).unwrap();
                }
            }
            let evaluate = || {
                let states = trainee.decoder.hidden(&tokens, 2, 5).unwrap();
                loss(&states, &trainee.decoder.head().unwrap(), Target::Text, &targets, &objective, 1.0)
                    .unwrap()
            };
            let mut gradients = Gradients::new(&trainee.parameters);
            gradients.add(&evaluate().0).unwrap();
            let sums = gradients.sums(&trainee.parameters).unwrap();
            for (Parameter { name, var, .. }, grad) in trainee.parameters.iter().zip(sums) {
                if dora && !name.contains("magnitude") {
                    continue;
                }
                let grad = Tensor::from_slice(grad, var.shape(), &Device::Cpu).unwrap();
                check::slope(var, &grad, &format!("{family}: {name}"), || evaluate().1.loss);
            }
        }
    }
}

/// Multiplied in int8, a base says and passes back nearly what it does in f32; what is no whole blocks stays in f32.
#[test]
fn a_base_in_int8_has_nearly_the_same_gradients() {
    let model = model("llama");
    let tokens: Vec<u32> = (0..48).map(|i| i * 7 % 61).collect();
    let targets: Vec<u32> = (0..48).map(|i| i * 5 % 61).collect();
    let gradients = |base: &Base| {
        let trainee = trainee(base, &SETTINGS, "all-linear", START).unwrap();
        for (index, Parameter { name, var, .. }) in trainee.parameters.iter().enumerate() {
            if name.contains("lora_B") {
                let values = noise(index as u64, var.elem_count()).iter().map(|x| x * 0.1).collect();
                var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).unwrap()).unwrap();
            }
        }
        let states = trainee.decoder.hidden(&tokens, 2, 24).unwrap();
        let head = trainee.decoder.head().unwrap();
        // Gradients as small as those of many tokens.
        let (loss, parts) =
            loss(&states, &head, Target::Text, &targets, &Objective::default(), 1e-6).unwrap();
        let mut gradients = Gradients::new(&trainee.parameters);
        gradients.add(&loss).unwrap();
        let sums = gradients.sums(&trainee.parameters).unwrap();
        (parts.loss, sums.iter().map(|sum| sum.to_vec()).collect::<Vec<_>>())
    };
    let bases = [Precision::F32, Precision::Int8].map(|precision| Base::dense(&model, precision).unwrap());
    assert!(bases[1].numbers().contains("11 of 15 matrices, the others"), "{}", bases[1].numbers());
    assert!(bases[1].bytes()[0] > bases[0].bytes()[0] && bases[0].fingerprint != bases[1].fingerprint);
    let [(exact_loss, exact), (found_loss, found)] = bases.each_ref().map(gradients);
    assert!(found_loss != exact_loss && (found_loss - exact_loss).abs() < 0.01 * exact_loss);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    for (exact, found) in exact.iter().zip(&found) {
        let cosine = dot(exact, found) / (dot(exact, exact) * dot(found, found)).sqrt();
        assert!(cosine > 0.995 && cosine < 1.0 - 1e-9, "{cosine}");
    }
}

#[test]
fn training_learns_and_leaves_the_base_alone() {
    let model = model("llama");
    let before = fingerprint(&model).unwrap();
    let blocks = held(&model, Mix::Q4_0);
    let bytes =
        |held: &HeldModel| held.matrices.values().flat_map(|b| b.bytes().to_vec()).collect::<Vec<u8>>();
    let bytes_before = bytes(&blocks);
    let [dense, held] = [Base::dense(&model, Precision::F32).unwrap(), Base::held(&blocks).unwrap()];
    let int8 = Base::dense(&model, Precision::Int8).unwrap();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let dropped = Start { dropout: 0.1, ..START };
    for (base, settings, start) in [
        (&dense, SETTINGS, START),
        (&dense, Settings { rs: true, ..SETTINGS }, dropped),
        (&dense, Settings { dora: true, ..SETTINGS }, START),
        (&int8, SETTINGS, START),
        (&int8, Settings { dora: true, ..SETTINGS }, dropped),
        (&held, SETTINGS, START),
        (&held, Settings { dora: true, ..SETTINGS }, START),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (adapter, losses) = tuned(base, &settings, start, 60, (folder.path(), false, 0)).unwrap();
        let (first, last) = (mean(&losses[..5]), mean(&losses[55..]));
        assert!(last < first - 0.3, "{settings:?}: {first} {last}");
        assert!(adapter.pairs.iter().all(|pair| pair.up.iter().any(|x| *x != 0.0)));
        assert_eq!((adapter.is_dora(), adapter.rs), (settings.dora, settings.rs));
        // What comes out says what was trained.
        let found = logits(&base.with(&adapter).unwrap());
        assert!(distance(&found, &logits(&base.decoder(&[], None).unwrap())) > 0.1);
    }
    assert_eq!(fingerprint(&model).unwrap(), before);
    assert!(bytes(&blocks) == bytes_before);
}

#[test]
fn a_resumed_run_ends_bit_identical() {
    let [dense, held] = bases("llama");
    let start = Start { dropout: 0.2, ..START };
    let dora = Settings { dora: true, ..SETTINGS };
    for (base, other_base, settings) in [(&dense, &held, dora), (&held, &dense, SETTINGS)] {
        let (straight, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (wanted, _) = tuned(base, &settings, start, 9, (straight.path(), false, 0)).unwrap();
        let error = tuned(base, &settings, start, 9, (stopped.path(), false, 4)).unwrap_err();
        assert!(matches!(error, TrainError::Stopped { step: 4 }));
        let (found, losses) = tuned(base, &settings, start, 9, (stopped.path(), true, 0)).unwrap();
        assert_eq!(losses.len(), 5);
        for (found, wanted) in found.pairs.iter().zip(&wanted.pairs) {
            assert!(
                (&found.down, &found.up, &found.magnitude) == (&wanted.down, &wanted.up, &wanted.magnitude)
            );
        }
        // Another adapter, and another base, are other runs.
        let other = Settings { rank: 5, ..settings.clone() };
        let error = tuned(base, &other, start, 9, (stopped.path(), true, 0)).unwrap_err().to_string();
        assert!(error.contains("adapter was") && !error.contains("base was"), "{error}");
        let error =
            tuned(other_base, &settings, start, 9, (stopped.path(), true, 0)).unwrap_err().to_string();
        assert!(error.contains("base was") && !error.contains("adapter was"), "{error}");
    }
}

/// Blocks of a file are held as they are, and say what the model says that is made of them.
#[test]
fn a_quantized_file_is_held_as_it_is() {
    for family in ["llama", "phi3"] {
        let model = model(family);
        let bytes = export_to_vec(&model, Mix::Q4_0).unwrap();
        let file = Gguf::parse(&bytes).unwrap();
        let held = held_from_gguf(&file, Path::new("memory"), Mix::Q8_0).unwrap();
        assert!(held.as_in_file && held.types().contains("14 Q4_0"), "{}", held.types());
        let base = Base::held(&held).unwrap();
        let dense = crate::teacher::from_gguf(&file, Path::new("memory")).unwrap();
        let dense = Base::dense(&dense, Precision::F32).unwrap();
        let said = |base: &Base| logits(&base.decoder(&[], None).unwrap());
        assert_eq!(said(&base), said(&dense));
        let [held, f32] = base.bytes();
        assert_eq!(f32, dense.bytes()[0]);
        assert!((held as f64) < 0.4 * f32 as f64, "{held} of {f32}");
    }
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let [base, _] = bases("llama");
    let refused = |settings: Settings, start: Start, part: &str| {
        let error = trainee(&base, &settings, "all-linear", start).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(Settings { rank: 0, ..SETTINGS }, START, "rank is 0");
    refused(Settings { ranks: vec![("q_proj".into(), 257)], ..SETTINGS }, START, "rank is 257");
    refused(Settings { alpha: f64::NAN, ..SETTINGS }, START, "alpha is NaN");
    refused(Settings { alphas: vec![("q_proj".into(), -1.0)], ..SETTINGS }, START, "alpha is -1");
    refused(SETTINGS, Start { dropout: 1.0, seed: 0 }, "dropout is 1");
}
