//! Mistral: Llama with a sliding window in every layer, where `config.json` has one.
//!
//! llama.cpp reads Mistral as architecture `llama` and knows no window there, so its answers are those of
//! the model up to as many tokens as the window has. Our files carry the window as
//! `llama.attention.sliding_window`, which llama.cpp ignores and this runtime keeps to; a file without that
//! key, whoever wrote it, is a Llama.

use super::{Family, FromHf, hf};
use crate::LayerSet;

pub(super) static MISTRAL: Family = Family {
    name: "mistral",
    hf_model_type: "mistral",
    hf_architecture: "MistralForCausalLM",
    from_hf: FromHf::new(|config| {
        let spec = hf::read(&MISTRAL, config)?;
        spec.with_windows(hf::window(config, 4096)?, LayerSet::periodic(spec.layers, 0)).validate()
    }),
    ..Family::BASE
};
