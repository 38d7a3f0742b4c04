"""Logits of Hugging Face folders with PEFT adapters (PyPI: peft, transformers, torch).

Reads a JSON object: `base` (a folder), `adapters` (folders) and `ids`. Writes a JSON array: for each adapter the
logits after every token, row after row, and the number of modules that have one.
"""

import json
import sys

import peft
import torch
import transformers

task = json.load(sys.stdin)
answers = []
for folder in task["adapters"]:
    base = transformers.AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([task["ids"]])).logits[0]
    modules = sum(hasattr(module, "lora_A") for module in model.modules())
    answers.append({"logits": logits.flatten().tolist(), "modules": modules})
json.dump(answers, sys.stdout)
