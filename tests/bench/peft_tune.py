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

import argparse
import json
import random
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("ids")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    random.seed(0)

    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.lr, weight_decay=0.0)
    with open(arguments.ids) as file:
        ids = torch.tensor(json.load(file))

    times = []
    for step in range(arguments.steps):
        start = time.perf_counter()
        starts = [random.randrange(len(ids) - arguments.length) for _ in range(arguments.batch)]
        inputs = torch.stack([ids[at : at + arguments.length] for at in starts])
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
        print(f"step {step + 1} loss {loss.item():.4f} {inputs.numel() / times[-1]:.1f} tok/s", flush=True)
    counted = times[2:]
    tokens = arguments.batch * arguments.length
    print(f"{tokens * len(counted) / sum(counted):.1f} tok/s over {len(counted)} steps")


main()
