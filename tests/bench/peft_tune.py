#!/usr/bin/env python3
"""The same LoRA training with PEFT on PyTorch, for a comparison of speed in one run.

    pip install torch transformers peft
    edgec export MODEL.gguf --format hf --out model
    edgec tokenize MODEL.gguf --no-bos < TEXT > ids.json
    python3 peft_tune.py model ids.json --steps 20
    edgec tune model --data TEXT --tokens 10240 --out run      # its last line has the speed

Rank 16, alpha 32, all linear layers, AdamW, cross-entropy, as `edgec tune` does it. Prints the speed of the steps after
the first two.
"""

import torch
from peft import LoraConfig, get_peft_model
from steps import begin, parser, run
from transformers import AutoModelForCausalLM


def main():
    arguments = parser(lr=5e-4).parse_args()
    begin(arguments)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    run(arguments, trained, lambda inputs: model(input_ids=inputs, labels=inputs, use_cache=False).loss)


main()
