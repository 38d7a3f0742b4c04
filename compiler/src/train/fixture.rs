//! Tiny models for tests.

use edge_models::{DecoderSpec, family_by_gguf_name};

use super::pretrain::initialize;
use crate::model::Model;

/// A random Llama of about 20,000 parameters whose layers all matter.
pub(crate) fn tiny(layers: usize, seed: u64) -> Model {
    random(layers, seed, 4, 24)
}

/// The same, whose rows are whole blocks of 32.
pub(crate) fn tiny_in_blocks(layers: usize, seed: u64) -> Model {
    random(layers, seed, 16, 96)
}

/// Four query heads of width `head_dim`, two for keys and values.
fn random(layers: usize, seed: u64, head_dim: usize, ffn: usize) -> Model {
    let spec = DecoderSpec {
        layers,
        hidden: 4 * head_dim,
        heads: 4,
        kv_heads: 2,
        head_dim,
        rope_dims: head_dim,
        ffn,
        vocab: 61,
        context: 64,
        norm_eps: 1e-5,
        tied_embeddings: true,
        ..DecoderSpec::plain(family_by_gguf_name("llama").unwrap())
    };
    let mut weights = initialize(&spec, seed).unwrap();
    // Fresh weights are so small that every output is nearly uniform; ten times larger ones say something.
    let larger: Vec<_> = weights
        .iter()
        .filter(|(role, ..)| !role.is_vector())
        .map(|(role, layer, tensor)| (role, layer, (tensor * 10.0).unwrap()))
        .collect();
    for (role, layer, tensor) in larger {
        weights.insert(role, layer, tensor);
    }
    Model { spec, weights, vocabulary: None, name: "tiny".into() }
}

/// Tokens with structure to be learned: a walk over the vocabulary with seeded jumps.
pub(crate) fn text(tokens: usize) -> Vec<u32> {
    let mut random = super::random::SplitMix64::new(11, 0);
    let mut token = 0u32;
    (0..tokens)
        .map(|_| {
            token = if random.below(5) == 0 { random.below(61) as u32 } else { (token * 7 + 3) % 61 };
            token
        })
        .collect()
}
