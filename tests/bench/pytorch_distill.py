#!/usr/bin/env python3
"""The same distillation in PyTorch, for a comparison of speed and quality in one run.

    pip install torch transformers safetensors numpy
    edgec export TEACHER.gguf --format hf --out teacher
    edgec tokenize TEACHER.gguf --no-bos < TEXT > ids.json
    python3 pytorch_distill.py teacher ids.json --layers 0,1,2,8,9,10,11,19,21,22,23,24,27,28,29 --steps 20

Prints the speed of the steps after the first two. Forward KL over the whole vocabulary, AdamW, warm-up and
cosine, as `edgec distill` does it.
"""

import math

import torch
from steps import begin, parser, run
from transformers import AutoModelForCausalLM


def main():
    arguments = parser(lr=6e-4)
    arguments.add_argument("--layers", required=True)
    arguments = arguments.parse_args()
    begin(arguments)

    teacher = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    kept = [int(layer) for layer in arguments.layers.split(",")]
    student.model.layers = torch.nn.ModuleList(student.model.layers[layer] for layer in kept)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = len(kept)

    def loss_of(inputs):
        with torch.no_grad():
            wanted = teacher(inputs, use_cache=False).logits.log_softmax(-1)
        found = student(inputs, use_cache=False).logits.log_softmax(-1)
        return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / inputs.numel()

    warm_up = max(1, arguments.steps // 20)

    def lr_at(step):
        cosine = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        return arguments.lr * min(1.0, (step + 1) / warm_up) * cosine

    run(arguments, list(student.parameters()), loss_of, lr_at)


main()
