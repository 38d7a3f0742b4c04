#!/usr/bin/env python3
"""Makes the golden models that are not others' work: tiny checkpoints and what transformers says of them.

    pip install torch transformers safetensors
    python3 make.py            # all of them, or: python3 make.py gemma3 gemma2 phi3-longrope

Weights are random, norm weights too, and large enough that every part of the model matters: attention
scores reach the soft caps, and windows are shorter than the input.
"""

import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
LENGTH, PROMPT = 32, 8
COMMON = dict(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="eager",
)
MODELS = {
    # Seven layers: one that sees all, the sixth. Of the rope of that one all wavelengths are stretched.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON, num_hidden_layers=7, head_dim=24, sliding_window=8, query_pre_attn_scalar=20,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **COMMON, num_hidden_layers=4, head_dim=24, sliding_window=8, query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    # A part of each head rotates. Every text is longer than the original context, so one list is used.
    "phi3-longrope": lambda: transformers.Phi3Config(
        **COMMON, num_hidden_layers=3, original_max_position_embeddings=4, sliding_window=24,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "long_factor": [1.0, 1.5, 2.25, 4.0, 9.0, 16.0],
            "short_factor": [1.0, 1.0, 1.1, 1.2, 1.4, 1.5],
        },
    ),
}


def make(name):
    config = MODELS[name]()
    torch.manual_seed(20240607)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 1:
                mean = 0.0 if name.startswith("gemma") else 1.0
                weight.normal_(mean, 0.2)
            else:
                weight.normal_(0.0, 0.12)
    ids = torch.randint(3, 256, (1, LENGTH))
    with torch.no_grad():
        logits = model(ids).logits[0]
        greedy = ids[:, :PROMPT]
        while greedy.shape[1] < LENGTH:
            # The whole text each time, without a cache: a longer context may change every rotation.
            following = model(greedy, use_cache=False).logits[0, -1].argmax()
            greedy = torch.cat([greedy, following.view(1, 1)], dim=1)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    save_file(
        {"input_ids": ids[0].to(torch.int32), "logits": logits, "greedy_ids": greedy[0].to(torch.int32)},
        HERE / name / "golden.safetensors",
    )
    for file in (HERE / name).iterdir():
        file.chmod(0o644)
    print(name, "logits within", logits.abs().max().item())


if __name__ == "__main__":
    for chosen in sys.argv[1:] or MODELS:
        make(chosen)
