#!/usr/bin/env python3
"""Makes a llama, mistral or qwen folder that says the same with weights on no grid.

    pip install numpy safetensors
    edgec export MODEL.gguf --format hf --out model
    python3 off_grid.py model moved

A model that is known as blocks alone, as SmolLM2 in Q4_1 here, lies on the grid of their type: it comes back whole in that
type, and training moves few weights off it, so a comparison of types would say little about checkpoints. Here channels
are scaled at random by a tenth or so, and what feeds them the other way: norms before the matrices that read them, up
before down projections, values before attention's outputs.
"""

import json
import pathlib
import shutil
import sys

import numpy
from safetensors.numpy import load_file, save_file

source, target = map(pathlib.Path, sys.argv[1:3])
shutil.copytree(source, target)
config = json.loads((source / "config.json").read_text())
heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
weights = load_file(source / "model.safetensors")
random = numpy.random.default_rng(1)


def factors(count):
    return numpy.exp(random.normal(scale=0.1, size=count)).astype(numpy.float32)


def scale(name, rows=numpy.float32(1), columns=numpy.float32(1)):
    """Multiplies the rows of a matrix and its bias, or a vector, and the matrix's columns."""
    matrix = weights[name + ".weight"]
    is_matrix = matrix.ndim == 2
    weights[name + ".weight"] = matrix * (numpy.reshape(rows, (-1, 1)) * columns if is_matrix else rows)
    if name + ".bias" in weights:
        weights[name + ".bias"] = weights[name + ".bias"] * rows


for layer in range(config["num_hidden_layers"]):
    block = f"model.layers.{layer}."
    for norm, readers in [
        ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
    ]:
        by = factors(config["hidden_size"])
        scale(block + norm, rows=1 / by)
        for reader in readers:
            scale(block + reader, columns=by)
    by = factors(config["intermediate_size"])
    scale(block + "mlp.up_proj", rows=1 / by)
    scale(block + "mlp.down_proj", columns=by)
    by = factors(weights[block + "self_attn.v_proj.weight"].shape[0])
    scale(block + "self_attn.v_proj", rows=1 / by)
    # Several heads read the same values.
    shared = numpy.repeat(by.reshape(groups, -1), heads // groups, axis=0).reshape(-1)
    scale(block + "self_attn.o_proj", columns=shared)
save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
