//! The training loop as a whole, on tiny models.

use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;

use super::checkpoint;
use super::config::{RunFolder, TrainConfig};
use super::error::TrainError;
use super::fixture::{text, tiny, tiny_in_blocks};
use super::loss::Objective;
use super::parallel::{Communicator, Threads};
use super::precision::Precision;
use super::trainee::full;
use super::trainer::{Progress, StepReport, Text, distill, train};
use crate::model::Model;
use crate::student;

/// Collects the reports and calls `each` after every step.
struct Watch<'a> {
    losses: Vec<f64>,
    notes: Vec<String>,
    each: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
}

impl Progress for Watch<'_> {
    fn step(&mut self, report: &StepReport) -> ControlFlow<()> {
        self.losses.push(report.row.loss);
        (self.each)(report.row.step)
    }

    fn note(&mut self, message: &str) {
        self.notes.push(message.into());
    }
}

fn config(steps: u64) -> TrainConfig {
    TrainConfig {
        tokens: steps * 2 * 2 * 8,
        batch: 2,
        length: 8,
        accumulate: 2,
        lr: 1e-2,
        weight_decay: 0.1,
        objective: Objective { alpha: 0.9, temperature: 1.5, ..Objective::default() },
        ..TrainConfig::default()
    }
}

type Outcome = Result<(Model, Vec<f64>, Vec<String>), TrainError>;

fn run(
    config: &TrainConfig,
    folder: &Path,
    resume: bool,
    each: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Outcome {
    run_saving(4, config, folder, resume, each)
}

fn run_saving(
    every: u64,
    config: &TrainConfig,
    folder: &Path,
    resume: bool,
    each: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Outcome {
    run_in(config, &RunFolder::new(folder, resume, Some(every)), each)
}

fn run_in(config: &TrainConfig, folder: &RunFolder, each: &mut dyn FnMut(u64) -> ControlFlow<()>) -> Outcome {
    run_under(&tiny(4, 1), config, folder, each)
}

fn run_under(
    teacher: &Model,
    config: &TrainConfig,
    folder: &RunFolder,
    each: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Outcome {
    let student = student::cut(teacher, &[0, 3]).unwrap();
    let ids = text(700);
    let scored: Vec<bool> = (0..ids.len()).map(|i| i % 7 != 0).collect();
    let mut watch = Watch { losses: vec![], notes: vec![], each };
    let text = Text { ids: &ids, scored: &scored };
    let before = super::trainer::fingerprint(teacher).unwrap();
    let model = distill(teacher, student, text, config, folder, &mut watch)?;
    assert_eq!(before, super::trainer::fingerprint(teacher).unwrap(), "the teacher must not change");
    Ok((model, watch.losses, watch.notes))
}

fn bits(model: &Model) -> Vec<u32> {
    let flat = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    model.weights.iter().flat_map(|(_, _, tensor)| flat(tensor)).map(f32::to_bits).collect()
}

fn steps_in(folder: &Path) -> Vec<u64> {
    let rows = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let step = |row: &str| serde_json::from_str::<serde_json::Value>(row).unwrap()["step"].as_u64().unwrap();
    rows.lines().map(step).collect()
}

#[test]
fn distillation_brings_the_student_nearer() {
    let folder = tempfile::tempdir().unwrap();
    let (model, losses, _) =
        run(&config(300), folder.path(), false, &mut |_| ControlFlow::Continue(())).unwrap();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[290..]));
    assert!(last < 0.7 * first, "{first} {last}");
    assert!(model.weights.iter().all(|(_, _, tensor)| !tensor.is_variable()));
    assert_eq!(steps_in(folder.path()), (1..=300).collect::<Vec<_>>());
}

#[test]
fn frozen_embeddings_stay_and_everything_else_moves() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig { embeddings: false, ..config(2) };
    let (model, ..) = run(&config, folder.path(), false, &mut |_| ControlFlow::Continue(())).unwrap();
    let before = student::cut(&tiny(4, 1), &[0, 3]).unwrap();
    for (role, layer, tensor) in model.weights.iter() {
        let old = before.weights.get(role, layer).unwrap();
        let moved = (tensor - old).unwrap().abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(moved > 0.0, role != edge_models::Role::TokenEmbedding, "{role:?} {layer}: {moved}");
    }
}

#[test]
fn a_resumed_run_ends_bit_identical() {
    let straight = tempfile::tempdir().unwrap();
    let killed = tempfile::tempdir().unwrap();
    let config = config(12);
    // What a process killed after step 6 leaves: the checkpoint of step 4 and rows up to step 6.
    let mut leave = |step| {
        if step == 6 {
            for name in [checkpoint::FILE, "metrics.jsonl", "metrics.csv"] {
                std::fs::copy(straight.path().join(name), killed.path().join(name)).unwrap();
            }
        }
        ControlFlow::Continue(())
    };
    let (expected, ..) = run(&config, straight.path(), false, &mut leave).unwrap();
    assert_eq!(checkpoint::peek(killed.path()).unwrap().unwrap().step, 4);
    let (resumed, losses, notes) =
        run(&config, killed.path(), true, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(losses.len(), 8, "{notes:?}");
    assert!(bits(&expected) == bits(&resumed));
    assert_eq!(steps_in(killed.path()), (1..=12).collect::<Vec<_>>());

    // Stopped by its caller, and resumed once more after its end.
    let stopped = tempfile::tempdir().unwrap();
    let mut stop = |step| if step == 6 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    let outcome = run(&config, stopped.path(), false, &mut stop);
    assert!(matches!(outcome, Err(TrainError::Stopped { step: 6 })));
    for steps in [6, 0] {
        let (resumed, losses, _) =
            run(&config, stopped.path(), true, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(losses.len(), steps);
        assert!(bits(&expected) == bits(&resumed));
    }
}

#[test]
fn another_recipe_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut go_on = |_| ControlFlow::Continue(());
    let first = config(4);
    run(&first, folder.path(), false, &mut go_on).unwrap();
    let other = TrainConfig { lr: 2e-2, seed: 9, ..first };
    let error = run(&other, folder.path(), true, &mut go_on).unwrap_err().to_string();
    assert!(error.contains("lr was 0.01, now 0.02") && error.contains("seed was 0, now 9"), "{error}");
    assert!(!error.contains("teacher") && !error.contains("beta"), "{error}");

    let ids = text(701);
    let scored = vec![true; ids.len()];
    let mut watch = Watch { losses: vec![], notes: vec![], each: &mut go_on };
    let text = Text { ids: &ids, scored: &scored };
    let folder = RunFolder::new(folder.path(), true, None);
    let error = distill(&tiny(4, 2), tiny(2, 3), text, &first, &folder, &mut watch).unwrap_err().to_string();
    for name in ["teacher was", "student was", "text was"] {
        assert!(error.contains(name), "{error}");
    }
}

fn go_on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Every loss brings the student nearer to its teacher, as `kl` in the metrics says.
#[test]
fn every_loss_teaches() {
    for soft in ["rkl", "jsd", "skl", "srkl", "tvd", "fkl=0.5,tvd=0.5"] {
        let folder = tempfile::tempdir().unwrap();
        let objective = Objective { soft: soft.parse().unwrap(), ..Objective::default() };
        let config = TrainConfig { objective, ..config(200) };
        let losses = run(&config, folder.path(), false, &mut go_on).unwrap().1;
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (first, last) = (mean(&losses[..10]), mean(&losses[190..]));
        assert!(last < 0.8 * first, "{soft}: {first} {last}");
    }
}

/// With all of the vocabulary kept the cache says what the teacher does, up to the precision of its file; with
/// some of it a run learns nearly as well. The teacher is asked once.
#[test]
fn a_cache_takes_the_place_of_the_teacher() {
    let objective = Objective { alpha: 0.9, temperature: 1.5, ..Objective::default() };
    let online = TrainConfig { objective, ..config(60) };
    let folder = tempfile::tempdir().unwrap();
    let (_, expected, _) = run(&online, folder.path(), false, &mut go_on).unwrap();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    for (form, within) in [("top-k=61", 0.02), ("top-k=20", 0.2), ("sampled=60", 0.2)] {
        let folder = tempfile::tempdir().unwrap();
        let config = TrainConfig { cache: Some(form.parse().unwrap()), ..online };
        let (model, found, _) = run(&config, folder.path(), false, &mut go_on).unwrap();
        let (found_mean, expected_mean) = (mean(&found), mean(&expected));
        assert!(
            (found_mean - expected_mean).abs() < within * expected_mean,
            "{form}: {found_mean} {expected_mean}"
        );
        // Resumed at its end it finds everything that it needs.
        let (again, losses, notes) = run(&config, folder.path(), true, &mut go_on).unwrap();
        assert!(losses.is_empty() && bits(&again) == bits(&model));
        assert!(
            notes.iter().any(|note| note.contains("windows of the teacher were in the cache")),
            "{notes:?}"
        );
    }
}

#[test]
fn what_a_cache_cannot_give_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let fails = |config: TrainConfig, expected: &str| {
        let error = run(&config, folder.path(), false, &mut go_on).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let cached = |form: &str| TrainConfig { cache: Some(form.parse().unwrap()), ..config(4) };
    fails(
        TrainConfig { hidden: "mse=0.1".parse().unwrap(), ..cached("top-k=5") },
        "hidden-state term is mse=0.1",
    );
    let objective = Objective { soft: "rkl".parse().unwrap(), ..Objective::default() };
    fails(TrainConfig { objective, ..cached("sampled=5") }, "loss is rkl");
    fails(cached("top-k=62"), "62");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Hidden-state terms bring the states nearer, and a resumed run keeps its projections.
#[test]
fn hidden_states_are_learned_and_resumed() {
    let hidden = "mse=0.5,cos=0.1".parse().unwrap();
    let config = TrainConfig { hidden, ..config(12) };
    let wide = tiny(4, 1);
    let narrow = || {
        let spec = edge_models::DecoderSpec { hidden: 12, layers: 2, ..wide.spec };
        let weights = super::pretrain::initialize(&spec, 3).unwrap();
        Model { spec, weights, vocabulary: None, name: "narrow".into() }
    };
    let ids = text(700);
    let scored = vec![true; ids.len()];
    let go = |folder: &Path, resume, each: &mut dyn FnMut(u64) -> ControlFlow<()>| {
        let text = Text { ids: &ids, scored: &scored };
        let mut watch = Watch { losses: vec![], notes: vec![], each };
        let folder = RunFolder::new(folder, resume, Some(4));
        let model = distill(&wide, narrow(), text, &config, &folder, &mut watch);
        model.map(|model| (bits(&model), watch.losses))
    };
    let straight = tempfile::tempdir().unwrap();
    let (expected, losses) = go(straight.path(), false, &mut go_on).unwrap();
    assert!(losses[11] < losses[0], "{losses:?}");
    let stopped = tempfile::tempdir().unwrap();
    let mut stop = |step| if step == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    assert!(matches!(go(stopped.path(), false, &mut stop), Err(TrainError::Stopped { step: 5 })));
    assert!(go(stopped.path(), true, &mut go_on).unwrap().0 == expected);
}

/// On its own text the student learns by reverse KL, and a resumed run writes the same text.
#[test]
fn on_policy_text_teaches_and_resumes() {
    let objective = Objective { soft: "rkl".parse().unwrap(), ..Objective::default() };
    let config = TrainConfig { objective, on_policy: 0.5, ..config(100) };
    let folder = tempfile::tempdir().unwrap();
    let (expected, losses, _) = run(&config, folder.path(), false, &mut go_on).unwrap();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..10]), mean(&losses[90..]));
    assert!(last < 0.9 * first, "{first} {last}");
    let stopped = tempfile::tempdir().unwrap();
    let mut stop = |step| if step == 50 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    assert!(run(&config, stopped.path(), false, &mut stop).is_err());
    let resumed = run(&config, stopped.path(), true, &mut go_on).unwrap().0;
    assert!(bits(&resumed) == bits(&expected));
    let hard = TrainConfig { objective: Objective { alpha: 0.5, ..objective }, ..config };
    let error = run(&hard, folder.path(), false, &mut go_on).unwrap_err().to_string();
    assert!(error.contains("alpha is 0.5"), "{error}");
}

/// Asked in int8 a teacher says nearly what it says in f32, however it is asked; runs are the same each time, and so are
/// those that are resumed.
#[test]
fn a_teacher_in_int8_teaches_and_resumes() {
    let teacher = tiny_in_blocks(4, 1);
    let go = |config: &TrainConfig, folder: &Path, resume, each: &mut dyn FnMut(u64) -> ControlFlow<()>| {
        run_under(&teacher, config, &RunFolder::new(folder, resume, Some(4)), each)
    };
    let soft = Objective { soft: "rkl".parse().unwrap(), ..Objective::default() };
    let asked = [
        config(8),
        TrainConfig { hidden: "mse=0.1".parse().unwrap(), ..config(8) },
        TrainConfig { on_policy: 0.5, objective: soft, ..config(8) },
        TrainConfig { cache: Some("top-k=61".parse().unwrap()), ..config(8) },
    ];
    for exact in asked {
        let [floats, folder, again, stopped] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
        let config = TrainConfig { teacher_precision: Precision::Int8, ..exact };
        let (_, expected, _) = go(&exact, floats.path(), false, &mut go_on).unwrap();
        let (model, losses, notes) = go(&config, folder.path(), false, &mut go_on).unwrap();
        assert!(notes.iter().any(|note| note.contains("int8") && note.contains("29 of 29")), "{notes:?}");
        let (found, expected) = (losses[0], expected[0]);
        assert!(found != expected && (found - expected).abs() < 0.02 * expected, "{found} {expected}");
        let (twin, ..) = go(&config, again.path(), false, &mut go_on).unwrap();
        assert!(bits(&twin) == bits(&model));
        let mut stop = |step| if step == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        assert!(go(&config, stopped.path(), false, &mut stop).is_err());
        // Its answers in other numbers are none of this run's.
        let error = go(&exact, stopped.path(), true, &mut go_on).unwrap_err().to_string();
        let named =
            if exact.cache.is_some() { "teacher cache" } else { "teacher_precision was int8, now f32" };
        assert!(error.contains(named), "{error}");
        let (resumed, losses, _) = go(&config, stopped.path(), true, &mut go_on).unwrap();
        assert!(losses.len() == 3 && bits(&resumed) == bits(&model));
    }
}

/// What has no whole blocks stays as it is, and the run says so.
#[test]
fn a_teacher_without_blocks_stays_in_f32() {
    let (floats, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (expected, ..) = run(&config(2), floats.path(), false, &mut go_on).unwrap();
    let config = TrainConfig { teacher_precision: Precision::Int8, ..config(2) };
    let (model, _, notes) = run(&config, folder.path(), false, &mut go_on).unwrap();
    assert!(notes.iter().any(|note| note.contains("0 of 29 matrices, the others")), "{notes:?}");
    assert!(bits(&model) == bits(&expected));
}

#[test]
fn a_diverging_run_stops_and_keeps_its_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig { lr: 1e38, warmup: 0.0, weight_decay: 0.0, ..config(12) };
    let error = run_saving(1, &config, folder.path(), false, &mut |_| ControlFlow::Continue(())).unwrap_err();
    let TrainError::Diverged { step, checkpoint, .. } = error else { panic!("{error}") };
    assert!(step > 1 && checkpoint == step - 1, "{error}");
    assert_eq!(checkpoint::peek(folder.path()).unwrap().unwrap().step, checkpoint);
    assert_eq!(steps_in(folder.path()).len() as u64, step - 1);
}

#[test]
fn accumulation_equals_a_larger_batch() {
    let parts = |accumulate, batch| {
        let folder = tempfile::tempdir().unwrap();
        let config = TrainConfig { accumulate, batch, ..config(5) };
        let (model, losses, _) =
            run(&config, folder.path(), false, &mut |_| ControlFlow::Continue(())).unwrap();
        (bits(&model), losses)
    };
    let (split, split_losses) = parts(4, 1);
    let (whole, whole_losses) = parts(1, 4);
    for (a, b) in split_losses.iter().zip(&whole_losses) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    for (a, b) in split.into_iter().zip(whole) {
        let (a, b) = (f32::from_bits(a), f32::from_bits(b));
        assert!((a - b).abs() < 2e-3, "{a} {b}");
    }
}

/// A run of several processes; the second one stops it after step `stop`, if that is given.
fn together(
    size: usize,
    config: &TrainConfig,
    folder: &Path,
    resume: bool,
    stop: Option<u64>,
) -> Vec<(Vec<u32>, Vec<f64>)> {
    Threads::run(size, |processes| {
        let stops = |step| processes.rank() == 1 && stop == Some(step);
        let mut each = |step| if stops(step) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let folder = RunFolder { processes: processes.clone(), ..RunFolder::new(folder, resume, Some(4)) };
        match run_in(config, &folder, &mut each) {
            Ok((model, losses, _)) => (bits(&model), losses),
            Err(TrainError::Stopped { step }) if stop == Some(step) => (vec![], vec![]),
            Err(error) => panic!("{error}"),
        }
    })
}

#[test]
fn several_processes_train_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let (_, expected, _) =
        run(&config(50), folder.path(), false, &mut |_| ControlFlow::Continue(())).unwrap();
    // A step has four windows: two each; one, one and two.
    for size in [2, 3] {
        let folder = tempfile::tempdir().unwrap();
        let processes = together(size, &config(50), folder.path(), false, None);
        for (bits, losses) in &processes {
            assert!(*bits == processes[0].0, "the parameters are not the same everywhere");
            for (loss, expected) in losses.iter().zip(&expected) {
                assert!((loss - expected).abs() < 1e-4, "{size} processes: {loss}, one: {expected}");
            }
        }
        assert_eq!(steps_in(folder.path()), (1..=50).collect::<Vec<_>>());
    }
}

#[test]
fn several_processes_stop_and_resume_together() {
    let (straight, stopped) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let config = config(50);
    let expected = together(2, &config, straight.path(), false, None);
    together(2, &config, stopped.path(), false, Some(6));
    assert_eq!(checkpoint::peek(stopped.path()).unwrap().unwrap().step, 6);
    let resumed = together(2, &config, stopped.path(), true, None);
    for ((expected, _), (bits, losses)) in expected.iter().zip(&resumed) {
        assert!(bits == expected && losses.len() == 44);
    }
    assert_eq!(steps_in(stopped.path()), (1..=50).collect::<Vec<_>>());
}

/// Hidden-state terms, and windows that each process has its student write.
#[test]
fn several_processes_share_every_objective() {
    let soft = Objective { soft: "rkl".parse().unwrap(), ..Objective::default() };
    let hidden = "mse=0.5,cos=0.1".parse().unwrap();
    let config = TrainConfig { hidden, objective: soft, on_policy: 0.5, ..config(3) };
    let alone = tempfile::tempdir().unwrap();
    let (_, expected, _) = run(&config, alone.path(), false, &mut go_on).unwrap();
    let shared = tempfile::tempdir().unwrap();
    let processes = together(3, &config, shared.path(), false, None);
    for (bits, losses) in &processes {
        assert!(*bits == processes[0].0, "the parameters are not the same everywhere");
        // Later a rounding may change what is drawn.
        assert!((losses[0] - expected[0]).abs() < 1e-4, "{losses:?} {expected:?}");
    }
}

#[test]
fn processes_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let attempt = |config: TrainConfig, processes: Threads| {
        let folder =
            RunFolder { processes: Rc::new(processes), ..RunFolder::new(folder.path(), false, None) };
        run_in(&config, &folder, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string()
    };
    for processes in Threads::group(5) {
        assert!(attempt(config(2), processes).contains("4 windows"), "a process would have nothing to do");
    }
    let cached = TrainConfig { cache: Some("top-k=5".parse().unwrap()), ..config(2) };
    for process in Threads::group(2) {
        assert!(attempt(cached, process).contains("number of processes is 2"));
    }
    let other = TrainConfig { lr: 0.5, ..config(2) };
    let mut group = Threads::group(2);
    let (second, first) = (group.pop().unwrap(), group.pop().unwrap());
    std::thread::scope(|scope| {
        // The first one finds nobody to go on with.
        let first = scope.spawn(|| attempt(config(2), first));
        let error = attempt(other, second);
        assert!(error.contains("process 1") && error.contains("lr was 0.01, now 0.5"), "{error}");
        assert!(first.join().is_err());
    });
}

#[test]
fn a_run_that_recomputes_activations_ends_bit_identical() {
    let ends = |checkpoint_activations, config: &TrainConfig| {
        let folder = tempfile::tempdir().unwrap();
        let folder = RunFolder { checkpoint_activations, ..RunFolder::new(folder.path(), false, None) };
        let (model, losses, _) = run_in(config, &folder, &mut go_on).unwrap();
        (bits(&model), losses)
    };
    assert!(ends(false, &config(5)) == ends(true, &config(5)));
    let inside = TrainConfig { hidden: "mse=0.5,cos=0.1".parse().unwrap(), ..config(5) };
    assert!(ends(false, &inside) == ends(true, &inside));
}

#[test]
fn a_language_model_learns_from_text_alone() {
    let folder = tempfile::tempdir().unwrap();
    let ids = text(3000);
    let scored = vec![true; ids.len()];
    let mut go_on = |_| ControlFlow::Continue(());
    let mut watch = Watch { losses: vec![], notes: vec![], each: &mut go_on };
    let mut model = tiny(2, 5);
    model.weights = super::pretrain::initialize(&model.spec, 5).unwrap();
    let config =
        TrainConfig { tokens: 150 * 8 * 16, batch: 8, length: 16, lr: 1e-2, ..TrainConfig::default() };
    let text = Text { ids: &ids, scored: &scored };
    let folder = RunFolder::new(folder.path(), false, None);
    train(None, full(model, &config).unwrap(), text, &config, &folder, &mut watch).unwrap();
    let (first, last) = (watch.losses[0], watch.losses[149]);
    // Fresh weights know nothing; the walk's entropy is about 1.3 nats.
    assert!((first - 61f64.ln()).abs() < 0.05, "{first}");
    assert!(last < 2.2, "{last}");
}

#[test]
fn bad_input_is_refused_before_anything_is_written() {
    let mut go_on = |_| ControlFlow::Continue(());
    let mut watch = Watch { losses: vec![], notes: vec![], each: &mut go_on };
    let folder = tempfile::tempdir().unwrap();
    let run_folder = RunFolder::new(folder.path(), false, None);
    let good = TrainConfig { length: 8, ..TrainConfig::default() };
    let mut fails = |ids: &[u32], config: TrainConfig, expected: &str| {
        let scored = vec![true; ids.len()];
        let text = Text { ids, scored: &scored };
        let model = full(tiny(1, 1), &TrainConfig::default()).unwrap();
        let error = train(None, model, text, &config, &run_folder, &mut watch).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    let ids = text(40);
    fails(&ids[..8], good, "8 tokens");
    fails(&[&ids[..], &[61][..]].concat(), good, "token 61 at position 40");
    fails(&ids, TrainConfig { batch: 0, ..good }, "batch is 0");
    fails(&ids, TrainConfig { lr: f64::NAN, ..good }, "learning rate is NaN");
    fails(&ids, TrainConfig { clip: -1.0, ..good }, "clip is -1");
    let objective = Objective { alpha: 1.5, ..Objective::default() };
    fails(&ids, TrainConfig { objective, ..good }, "alpha is 1.5");
    let objective = Objective { temperature: 0.0, ..Objective::default() };
    fails(&ids, TrainConfig { objective, ..good }, "temperature is 0");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
