//! Qwen2 and Qwen2.5: Llama with a bias on the query, key and value projections.

use super::{Family, FromHf, gguf, hf};
use crate::{Config, DecoderSpec, RopePairing, SpecError};

pub(super) static QWEN2: Family = Family {
    name: "qwen2",
    gguf_architecture: "qwen2",
    hf_model_type: "qwen2",
    hf_architecture: "Qwen2ForCausalLM",
    gguf_rope: RopePairing::Halves,
    from_hf: FromHf::new(|config| {
        refuse_windows(config)?;
        let spec = hf::read(&QWEN2, config)?;
        // The bias is part of the architecture; `config.json` does not mention it.
        DecoderSpec { qkv_bias: true, attn_out_bias: false, ..spec }.validate()
    }),
    from_gguf: |config| gguf::read(&QWEN2, config)?.validate(),
    ..Family::BASE
};

/// No published Qwen uses its windows, and llama.cpp cannot say them.
pub(super) fn refuse_windows(config: &dyn Config) -> Result<(), SpecError> {
    match config.bool("use_sliding_window") {
        Some(true) => Err(SpecError::Unsupported { key: "use_sliding_window", expected: "false" }),
        _ => Ok(()),
    }
}
