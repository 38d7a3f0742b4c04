#!/usr/bin/env python3
"""The same distillation in PyTorch, for a comparison of speed and quality in one run.

    pip install torch transformers safetensors numpy
    edgec export TEACHER.gguf --format hf --out teacher
    edgec tokenize TEACHER.gguf --no-bos < TEXT > ids.json
    python3 pytorch_distill.py teacher ids.json --layers 0,1,2,8,9,10,11,19,21,22,23,24,27,28,29 --steps 20

Prints the speed of the steps after the first two. Forward KL over the whole vocabulary, AdamW, warm-up and
cosine, as `edgec distill` does it.
"""

import argparse
import json
import math
import random
import time

import torch
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("ids")
    parser.add_argument("--layers", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)

    teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.float32)
    kept = [int(layer) for layer in arguments.layers.split(",")]
    student.model.layers = torch.nn.ModuleList(student.model.layers[layer] for layer in kept)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = len(kept)
    optimizer = torch.optim.AdamW(student.parameters(), lr=arguments.lr, weight_decay=0.0)
    with open(arguments.ids) as file:
        ids = torch.tensor(json.load(file))

    warm_up = max(1, arguments.steps // 20)
    times = []
    for step in range(arguments.steps):
        start = time.perf_counter()
        starts = [random.randrange(len(ids) - arguments.length) for _ in range(arguments.batch)]
        inputs = torch.stack([ids[at : at + arguments.length] for at in starts])
        with torch.no_grad():
            wanted = teacher(inputs, use_cache=False).logits.log_softmax(-1)
        found = student(inputs, use_cache=False).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum") / inputs.numel()
        progress = min(1.0, (step + 1) / warm_up)
        cosine = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * progress * cosine
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
        print(f"step {step + 1} loss {loss.item():.4f} {inputs.numel() / times[-1]:.1f} tok/s", flush=True)
    counted = times[2:]
    tokens = arguments.batch * arguments.length
    print(f"{tokens * len(counted) / sum(counted):.1f} tok/s over {len(counted)} steps")


main()
