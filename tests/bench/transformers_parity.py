#!/usr/bin/env python3
"""Compares a Hugging Face folder in transformers with the same folder in edgec.

    pip install torch transformers safetensors numpy
    python3 transformers_parity.py target/release/edgec runs/smol/student "Once upon a time"
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

edgec, folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = tokenizer(text)["input_ids"]
ours = subprocess.run([edgec, "tokenize", folder], input=text.encode(), capture_output=True, check=True)
assert json.loads(ours.stdout) == ids, (ours.stdout, ids)
with tempfile.TemporaryDirectory() as temporary:
    out = pathlib.Path(temporary) / "logits.safetensors"
    listed = ",".join(map(str, ids))
    subprocess.run([edgec, "logits", folder, "--ids", listed, "--out", out], check=True)
    found = load_file(out)["logits"]
with torch.no_grad():
    expected = model(torch.tensor([ids])).logits[0]
    continued = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0]
print(f"{len(ids)} tokens, logits differ by at most {(found - expected).abs().max():.2e}")
print("transformers continues:", repr(tokenizer.decode(continued[len(ids):])))
