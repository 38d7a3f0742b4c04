//! Qwen2 and Qwen2.5: Llama with a bias on the query, key and value projections.

use super::{Family, LLAMA_TENSORS, llama_like_from_gguf, llama_like_from_hf};
use crate::{DecoderSpec, RopePairing, SpecError};

pub(super) static QWEN2: Family = Family {
    name: "qwen2",
    hf_model_type: "qwen2",
    hf_architecture: "Qwen2ForCausalLM",
    gguf_rope: RopePairing::Halves,
    tensors: LLAMA_TENSORS,
    from_hf: |config| {
        if config.bool("use_sliding_window") == Some(true) {
            return Err(SpecError::Unsupported { key: "use_sliding_window", expected: "false" });
        }
        let spec = llama_like_from_hf(&QWEN2, config)?;
        // The bias is part of the architecture; `config.json` does not mention it.
        DecoderSpec { qkv_bias: true, attn_out_bias: false, ..spec }.validate()
    },
    from_gguf: |config| llama_like_from_gguf(&QWEN2, config)?.validate(),
};
