//! Llama 2, 3 and 3.x, TinyLlama, SmolLM2 and whatever else says `LlamaForCausalLM`.

use super::{Family, LLAMA_TENSORS, llama_like_from_gguf, llama_like_from_hf};
use crate::RopePairing;

pub(super) static LLAMA: Family = Family {
    name: "llama",
    hf_model_type: "llama",
    hf_architecture: "LlamaForCausalLM",
    gguf_rope: RopePairing::Interleaved,
    tensors: LLAMA_TENSORS,
    from_hf: |config| llama_like_from_hf(&LLAMA, config)?.validate(),
    from_gguf: |config| llama_like_from_gguf(&LLAMA, config)?.validate(),
};
