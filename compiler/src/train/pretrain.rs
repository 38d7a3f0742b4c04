//! A model from nothing: random weights and a vocabulary learned from text.
//!
//! Made for the small default teacher, which is then trained as any other model by
//! [`train`](super::trainer::train) without a teacher. Knows no file and picks no hyper-parameter.

use candle_core::{Device, Tensor};
use edge_models::{DecoderSpec, Role};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::tokenizer::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer};

use super::random::SplitMix64;
use crate::export::gguf::MetaValue;
use crate::model::{Vocabulary, Weights};

/// The token between documents; it begins and ends a text.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Standard deviation of fresh weights.
const DEVIATION: f64 = 0.02;

/// Why no vocabulary could be learned.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    /// Every byte and the end of text need a token.
    #[error("a vocabulary of {0} tokens, expected at least 257 (256 bytes and {END_OF_TEXT})")]
    TooSmall(usize),
    /// The text has too few different words for so many tokens.
    #[error("the text gives {found} tokens, expected {asked}; give more text or ask for fewer tokens")]
    TooLittleText {
        /// Tokens that the text gives.
        found: usize,
        /// Tokens asked for.
        asked: usize,
    },
    /// The `tokenizers` library refused.
    #[error("learning a vocabulary: {0}")]
    Library(#[from] tokenizers::Error),
}

/// Fresh weights for `spec`, the same for the same seed.
///
/// Matrices are normal with deviation 0.02, those that write into the residual stream (attention output,
/// feed-forward down) divided by `sqrt(2 * layers)` so that its variance does not grow with depth
/// (Radford et al., "Language models are unsupervised multitask learners", 2019, section 2.3). Norm
/// weights are 1 and biases 0.
///
/// # Errors
/// A specification whose sizes cannot be allocated, or whose rotary divisors come from a file.
pub fn initialize(spec: &DecoderSpec, seed: u64) -> candle_core::Result<Weights> {
    let mut weights = Weights::default();
    for row in spec.family.tensors {
        if !row.role.required(spec) {
            continue;
        }
        if row.role.is_rope_table() {
            candle_core::bail!("a fresh model has no table of rotary divisors; choose another rope scaling");
        }
        for layer in 0..if row.role.per_layer() { spec.layers } else { 1 } {
            // A stream of its own for each tensor: adding a layer does not change the others.
            let mut random = SplitMix64::new(seed, ((row.role as u64) << 32) | layer as u64);
            weights.insert(row.role, layer, fresh(row.role, spec, &mut random)?);
        }
    }
    Ok(weights)
}

fn fresh(role: Role, spec: &DecoderSpec, random: &mut SplitMix64) -> candle_core::Result<Tensor> {
    let [rows, columns] = role.shape(spec);
    let value = match role {
        _ if role.is_norm() => 1f32,
        _ if role.is_bias() => 0f32,
        Role::AttnOut | Role::FfnDown => {
            let deviation = DEVIATION / (2.0 * spec.layers as f64).sqrt();
            return normal(rows, columns, deviation, random);
        }
        _ => return normal(rows, columns, DEVIATION, random),
    };
    Tensor::full(value, columns, &Device::Cpu)
}

fn normal(
    rows: usize,
    columns: usize,
    deviation: f64,
    random: &mut SplitMix64,
) -> candle_core::Result<Tensor> {
    let mut values = vec![0f32; rows * columns];
    random.fill_normal(&mut values, deviation);
    Tensor::from_vec(values, (rows, columns), &Device::Cpu)
}

/// Learns a byte-level BPE vocabulary of exactly `size` tokens from `documents`, in GPT-2's manner.
///
/// Token 0 is [`END_OF_TEXT`], the 256 bytes follow, then the merges. Equal input gives equal output.
///
/// # Errors
/// See [`VocabularyError`].
pub fn learn_vocabulary(documents: &[&str], size: usize) -> Result<Vocabulary, VocabularyError> {
    let alphabet = ByteLevel::alphabet();
    if size < alphabet.len() + 1 {
        return Err(VocabularyError::TooSmall(size));
    }
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(size)
        .min_frequency(2)
        .special_tokens(vec![tokenizers::AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(alphabet.into_iter().collect())
        .build();
    let splitter = ByteLevel::new(false, false, true);
    trainer.feed(documents.iter(), |document| {
        let mut text = PreTokenizedString::from(document);
        splitter.pre_tokenize(&mut text)?;
        let words = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(words.into_iter().map(|(word, _, _)| word.to_owned()).collect())
    })?;
    let mut model = BPE::default();
    trainer.train(&mut model)?;
    entries(&model, size)
}

/// The vocabulary as GGUF's `tokenizer.ggml.*` entries.
fn entries(model: &BPE, size: usize) -> Result<Vocabulary, VocabularyError> {
    // The library shows merges only in its serialized form.
    let json = serde_json::to_value(model).map_err(|error| tokenizers::Error::from(error.to_string()))?;
    let merge = |pair: &serde_json::Value| match (pair[0].as_str(), pair[1].as_str()) {
        (Some(left), Some(right)) => Ok(format!("{left} {right}").into_bytes()),
        _ => Err(tokenizers::Error::from(format!("merge {pair}, expected two tokens"))),
    };
    let merges: Vec<Vec<u8>> =
        json["merges"].as_array().into_iter().flatten().map(merge).collect::<Result<_, _>>()?;
    let mut tokens: Vec<(u32, String)> =
        tokenizers::Model::get_vocab(model).into_iter().map(|(token, id)| (id, token)).collect();
    tokens.sort_unstable();
    if tokens.len() != size {
        return Err(VocabularyError::TooLittleText { found: tokens.len(), asked: size });
    }
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    let kind = |(_, token): &(u32, String)| if token == END_OF_TEXT { CONTROL } else { NORMAL };
    let kinds = tokens.iter().map(kind).collect();
    let text = |text: &str| MetaValue::String(text.as_bytes().to_vec());
    let entries = [
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("gpt-2")),
        (
            "tokenizer.ggml.tokens",
            MetaValue::Strings(tokens.into_iter().map(|(_, t)| t.into_bytes()).collect()),
        ),
        ("tokenizer.ggml.token_type", MetaValue::I32s(kinds)),
        ("tokenizer.ggml.merges", MetaValue::Strings(merges)),
        ("tokenizer.ggml.bos_token_id", MetaValue::U32(0)),
        ("tokenizer.ggml.eos_token_id", MetaValue::U32(0)),
        ("tokenizer.ggml.add_bos_token", MetaValue::Bool(false)),
    ];
    Ok(Vocabulary { entries: entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::tiny;
    use super::*;

    const DOCUMENTS: [&str; 2] = [
        "The cat sat on the mat. The cat sat on the hat.",
        "A cat that sat on the mat's hat — again and again.",
    ];

    fn strings<'a>(vocabulary: &'a Vocabulary, key: &str) -> &'a [Vec<u8>] {
        match vocabulary.entries.iter().find(|(name, _)| name == key) {
            Some((_, MetaValue::Strings(strings))) => strings,
            other => panic!("{key}: {other:?}"),
        }
    }

    #[test]
    fn a_vocabulary_has_the_size_asked_for_and_is_reproducible() {
        let vocabulary = learn_vocabulary(&DOCUMENTS, 270).unwrap();
        assert_eq!(vocabulary, learn_vocabulary(&DOCUMENTS, 270).unwrap());
        let tokens = strings(&vocabulary, "tokenizer.ggml.tokens");
        let merges = strings(&vocabulary, "tokenizer.ggml.merges");
        assert_eq!((tokens.len(), merges.len()), (270, 13));
        assert_eq!(tokens[0], END_OF_TEXT.as_bytes());
        // "at" occurs eleven times, more often than any other pair.
        assert_eq!(merges[0], b"a t");
        for (merge, token) in merges.iter().zip(&tokens[257..]) {
            let joined: Vec<u8> = merge.iter().copied().filter(|&byte| byte != b' ').collect();
            assert_eq!(&joined, token);
        }
        let Some((_, MetaValue::I32s(kinds))) =
            vocabulary.entries.iter().find(|(key, _)| key == "tokenizer.ggml.token_type")
        else {
            panic!("no token types");
        };
        assert_eq!((kinds[0], kinds[1], kinds.len()), (3, 1, 270));
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(matches!(learn_vocabulary(&DOCUMENTS, 256), Err(VocabularyError::TooSmall(256))));
        let error = learn_vocabulary(&DOCUMENTS, 5000).unwrap_err();
        assert!(matches!(error, VocabularyError::TooLittleText { asked: 5000, .. }), "{error}");
    }

    #[test]
    fn fresh_weights_are_complete_scaled_and_reproducible() {
        let spec =
            DecoderSpec { hidden: 64, ffn: 128, qkv_bias: true, tied_embeddings: false, ..tiny(8, 0).spec };
        let weights = initialize(&spec, 3).unwrap();
        let deviation = |role, layer| {
            let values = weights.get(role, layer).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (values.iter().map(|x| f64::from(x * x)).sum::<f64>() / values.len() as f64).sqrt()
        };
        assert!((deviation(Role::FfnUp, 2) - 0.02).abs() < 1e-3);
        assert!((deviation(Role::FfnDown, 2) - 0.005).abs() < 3e-4);
        assert_eq!((deviation(Role::AttnNorm, 7), deviation(Role::AttnKBias, 0)), (1.0, 0.0));
        let again = initialize(&DecoderSpec { layers: 9, ..spec }, 3).unwrap();
        let values = |weights: &Weights| weights.get(Role::AttnQ, 5).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(values(&weights), values(&again));
        assert_ne!(values(&weights), weights.get(Role::AttnQ, 4).unwrap().to_vec2::<f32>().unwrap());
        let count: usize = weights.iter().map(|(.., tensor)| tensor.elem_count()).sum();
        assert_eq!(count as u64, spec.parameters());
    }
}
