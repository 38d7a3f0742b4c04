//! Llama 2, 3 and 3.x, TinyLlama, SmolLM2 and whatever else says `LlamaForCausalLM`.

use super::{Family, gguf, mistral};

pub(super) static LLAMA: Family = Family {
    // Mistral's GGUF files have Llama's architecture; a window tells them apart.
    from_gguf: |config| {
        let windowed = config.uint("attention.sliding_window").is_some_and(|window| window > 0);
        gguf::read(if windowed { &mistral::MISTRAL } else { &LLAMA }, config)?.validate()
    },
    ..Family::BASE
};
