use std::path::Path;

use edge_runtime::format::Gguf;

use super::*;
use crate::export::gguf::encoded_to_vec;
use crate::quantize::Mix;
use crate::teacher;
use crate::train::fixture::{text, tiny, tiny_in_blocks};

const LENGTH: usize = 16;

fn sample(ids: &[u32]) -> Sample<'_> {
    Sample { ids, length: LENGTH, bos: None }
}

/// The model in the file that an encoding makes of `model`.
pub(in crate::quantize) fn through_a_file(model: &Model, encoding: &Encoding) -> Model {
    let bytes = encoded_to_vec(model, encoding).unwrap();
    teacher::from_gguf(&Gguf::parse(&bytes).unwrap(), Path::new("test")).unwrap()
}

/// KL(model || other) in nats per token on text that nothing was calibrated on.
pub(in crate::quantize) fn divergence(model: &Model, other: &Model) -> f64 {
    let ids = &text(4096)[3072..];
    let side = |model: &Model| {
        let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
        (decoder.hidden(ids, ids.len() / LENGTH, LENGTH).unwrap(), decoder.head().unwrap())
    };
    let ((hidden, head), (other, other_head)) = (side(model), side(other));
    let targets = vec![0; ids.len()];
    crate::train::loss::divergence(&other, &other_head, &hidden, &head, &targets).unwrap().kl
}

#[test]
fn each_method_diverges_less_than_the_one_before() {
    let model = tiny_in_blocks(3, 5);
    let ids = &text(3072);
    let plain = through_a_file(&model, &Mix::Q4_0.into());
    let known = imatrix(&model, sample(ids), &mut |_, _, _| {}).unwrap();
    let spec = &model.spec;
    let weighed = weigh(&model, Mix::Q4_0.into(), |role, layer| known.importance(role, layer, spec)).unwrap();
    let weighed = through_a_file(&model, &weighed);
    let round = |propagation| {
        let rounding = Rounding { propagation, ..Rounding::default() };
        round_model(&model, Mix::Q4_0.into(), sample(ids), rounding, &mut |_, _, _| {}).unwrap()
    };
    let [alone, gptq] = [0.0, 1.0].map(|share| through_a_file(&model, &round(share).encoding));
    let [plain, weighed, alone, gptq] =
        [&plain, &weighed, &alone, &gptq].map(|other| divergence(&model, other));
    assert!(weighed < plain, "{weighed} {plain}");
    assert!(alone < 0.8 * weighed, "{alone} {weighed}");
    assert!(gptq < alone, "{gptq} {alone}");
}

/// Permuted rows, fused or not: what was rounded is what the file holds, bit for bit.
#[test]
fn the_file_holds_the_blocks() {
    let model = tiny_in_blocks(2, 6);
    let ids = &text(512);
    let mut last = (0, 0);
    let rounded =
        round_model(&model, Mix::Q4_0.into(), sample(ids), Rounding::default(), &mut |done, total, _| {
            assert!(done == last.0 + 1 && done <= total);
            last = (done, total);
        })
        .unwrap();
    assert_eq!(last.0, last.1);
    let read = through_a_file(&model, &rounded.encoding);
    let matrices = model.weights.iter().filter(|(role, ..)| !role.is_vector()).count();
    assert_eq!(rounded.encoding.iter().count(), matrices);
    for (role, layer, blocks) in rounded.encoding.iter() {
        let expected = blocks.tensor().unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(
            read.weights.get(role, layer).unwrap().to_vec2::<f32>().unwrap(),
            expected,
            "{role:?} {layer}"
        );
        assert_eq!(rounded.latent.get(role, layer).unwrap().dims(), role.shape(&model.spec));
        assert_eq!(blocks.dtype(), Mix::Q4_0.dtype(role, layer, &model.spec));
    }
}

#[test]
fn sums_of_squares_are_those_of_what_is_read() {
    let model = tiny(2, 5);
    // More than one chunk.
    let ids: Vec<u32> = text(3000);
    let found = imatrix(&model, Sample { bos: Some(7), ..sample(&ids) }, &mut |_, _, _| {}).unwrap();
    assert_eq!((found.windows, found.length), (3000 / 16, 16));
    let mut ids = ids[..3000 / 16 * 16].to_vec();
    ids.iter_mut().step_by(16).for_each(|id| *id = 7);
    let decoder = Decoder::new(&model.spec, &model.weights).unwrap();
    let normed = decoder.attention_input(0, &decoder.embed(&ids).unwrap()).unwrap();
    let hidden = decoder.hidden(&ids, ids.len() / 16, 16).unwrap();
    for (role, read) in [(Role::AttnK, normed), (Role::TokenEmbedding, hidden)] {
        let expected = read.sqr().unwrap().mean(0).unwrap().to_vec1::<f32>().unwrap();
        let found = found.importance(role, 0, &model.spec).unwrap();
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4 * expected, "{role:?}: {found} {expected}");
        }
    }
}

#[test]
fn text_that_will_not_do_is_refused() {
    let model = tiny_in_blocks(1, 5);
    let refuse = |ids: &[u32], length| {
        let sample = Sample { ids, length, bos: None };
        imatrix(&model, sample, &mut |_, _, _| {}).unwrap_err()
    };
    assert!(matches!(refuse(&[1; 15], 16), CalibrationError::TextTooShort { found: 15, needed: 16 }));
    assert!(matches!(refuse(&[1; 15], 0), CalibrationError::TextTooShort { .. }));
    let mut ids = [1; 32];
    ids[20] = 61;
    assert!(matches!(refuse(&ids, 16), CalibrationError::Token { token: 61, position: 20, vocab: 61 }));
    // Types without blocks are left alone.
    let same = round_model(&model, Mix::F16.into(), sample(&[1; 32]), Rounding::default(), &mut |_, _, _| {});
    assert_eq!(same.unwrap().encoding.iter().count(), 0);
}
