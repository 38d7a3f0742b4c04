#!/usr/bin/env python3
"""Makes the golden data of the quantizer's tests.

    pip install gguf numpy xllamacpp
    python3 make.py blocks                                # *.bin
    python3 make.py mixes LLAMA_QUANTIZE SMOLLM2.gguf     # mixes.json; llama.cpp's llama-quantize

values.bin: float32, rows of 32. TYPE.bin: what ggml makes of them, and gguf-py alike.
rows.bin: float32, rows of 256, eight of each KIND; importance.bin: 256 float32. TYPE.rows.bin and
TYPE.importance.bin: the rows quantized by ggml (the library inside xllamacpp) without and with importance.
mixes.json: `general.file_type` of each mix, and the types that llama-quantize gives the tensors, by model and mix: for each name, [type, layers in a row] from the first layer on.
"""

import ctypes
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

HERE = pathlib.Path(__file__).parent
PLAIN = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
K_TYPES = ["Q4_K", "Q5_K", "Q6_K"]
# Later ones, so that the others stay as they are.
LOW_BIT = ["Q2_K", "Q3_K", "IQ4_NL"]
WEIGHTED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", *K_TYPES]
KINDS = ["gaussian", "heavy", "outlier", "offset", "sparse", "constant"]


def library(distribution, pattern):
    files = importlib.metadata.distribution(distribution).files
    return ctypes.CDLL(str(next(file for file in files if re.search(pattern, str(file))).locate()))


def ggml_chunk(ggml, name, rows, importance=None):
    rows = np.ascontiguousarray(rows, np.float32)
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[Type[name]]
    out = np.zeros(rows.size // block_len * block_bytes, np.uint8)
    pointer = lambda array: None if array is None else ctypes.c_void_p(array.ctypes.data)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    written = ggml.ggml_quantize_chunk(
        int(Type[name]), pointer(rows), pointer(out), 0, *rows.shape, pointer(importance)
    )
    assert written == out.size, name
    return out


def plain_values(rng):
    gaussian = rng.standard_normal
    rows = [gaussian(32) * 10.0**exponent for exponent in range(-10, 4) for _ in range(2)]
    rows += [rng.standard_t(2, 32) * 0.05 for _ in range(8)] + [rng.uniform(0.5, 0.6, 32) for _ in range(2)]
    rows += [np.zeros(32), -np.zeros(32), np.full(32, 0.37), np.full(32, -0.37)]
    spike = np.zeros(32)
    spike[17] = -3.25
    # The largest magnitude with both signs: the first one counts.
    both = gaussian(32).clip(-1, 1)
    both[[3, 9]] = [2.5, -2.5]
    rows += [spike, both, -both]
    # Halves of a step that is a power of two, for every number of levels.
    k = np.arange(32)
    for step in [2.0**-7, 1.0]:
        for first, last in [(-8, 7), (0, 15), (-16, 15), (0, 31), (-127, 126)]:
            ties = first + 0.5 + k % (last - first)
            ties[[0, 31]] = [first, last]
            rows += [ties * step, -ties * step]
    # Ties of float16 and bfloat16, their subnormal numbers, and float32's.
    rows += [1 + (2 * k + 1) * 2.0**-12, 1 + (2 * k + 1) * 2.0**-9, (k - 16) * 2.0**-25, (2 * k + 1) * 2.0**-134]
    rows[-1][0] = 1e-34
    edge = gaussian(32) * 9000
    edge[[1, 30]] = [32752.0, -32752.0]
    rows.append(edge.clip(-32752, 32752))
    return np.array(rows, np.float32)


def weight_rows(rng):
    rows = {
        "gaussian": rng.standard_normal((8, 256)) * 0.02,
        "heavy": rng.standard_t(3, (8, 256)) * 0.02,
        "outlier": rng.standard_normal((8, 256)) * 0.02,
        "offset": rng.standard_normal((8, 256)) * 0.02 + rng.uniform(-0.1, 0.1, (8, 1)),
        "sparse": rng.standard_normal((8, 256)) * (rng.uniform(size=(8, 256)) < 0.1),
        "constant": np.repeat([0.013, -0.013, 1, -1, 100, -100, 1e-4, 0], 256),
    }
    rows["outlier"][:, rng.integers(0, 256, 3)] *= 40
    return np.concatenate([rows[kind].reshape(8, 256) for kind in KINDS]).astype(np.float32)


def blocks():
    ggml = library("xllamacpp", r"xllamacpp.*\.so$")
    rng = np.random.default_rng(1)
    write = lambda name, array: (HERE / f"{name}.bin").write_bytes(array.tobytes())
    values, rows = plain_values(rng), weight_rows(rng)
    importance = (rng.standard_normal(256) * 2).astype(np.float32)
    importance = np.exp(importance)
    write("values", values), write("rows", rows), write("importance", importance)
    for name in PLAIN:
        found = ggml_chunk(ggml, name, values)
        # gguf-py gives a row of negative zeros a positive scale, ggml does not.
        differ = (gguf.quants.quantize(values, Type[name]).view(np.uint8).reshape(-1) != found).reshape(len(values), -1)
        assert not differ[(values != 0).any(1) | ~np.signbit(values).any(1)].any(), name
        write(name.lower(), found)
    for name in K_TYPES:
        write(f"{name.lower()}.rows", ggml_chunk(ggml, name, rows))
    for name in LOW_BIT:
        write(f"{name.lower()}.rows", ggml_chunk(ggml, name, rows))
    for name in WEIGHTED + LOW_BIT:
        write(f"{name.lower()}.importance", ggml_chunk(ggml, name, rows, importance))


# Tensors with rows that are whole super-blocks, whole blocks of 32, neither; layer counts on both sides
# of the rules; the 80 layers that make llama.cpp say '70B'. llama.cpp refuses a head without whole blocks.
def model(arch, layers, hidden, heads, kv_heads, ffn, tied, mixes):
    return dict(arch=arch, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn, tied=tied, mixes=mixes)


FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_S": 14, "Q4_K_M": 15,
    "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "IQ4_NL": 25,
}
ALL = list(FILE_TYPES)
LOW_MIXES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_NL"]
K_MIXES = ["Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", *LOW_MIXES]
DEEP = ["Q4_K_S", "Q4_K_M", "Q5_K_M", *LOW_MIXES]
MODELS = {
    "smollm2": model("llama", 30, 576, 9, 3, 1536, True, ALL),
    "wide": model("llama", 30, 256, 4, 2, 512, False, ALL),
    "wide tied": model("llama", 30, 256, 4, 2, 512, True, ALL),
    "narrow": model("llama", 30, 96, 3, 1, 256, False, ALL),
    "shallow": model("llama", 7, 256, 4, 4, 256, False, K_MIXES),
    "odd": model("llama", 9, 64, 2, 2, 208, False, K_MIXES),
    "deep": model("llama", 80, 256, 4, 2, 256, False, DEEP),
    "deep, as many key heads": model("llama", 80, 256, 4, 4, 256, False, DEEP),
    "deep qwen2": model("qwen2", 80, 256, 4, 4, 256, False, DEEP),
}
VOCAB = 64


def write_model(path, spec):
    hidden, ffn, kv = spec["hidden"], spec["ffn"], spec["hidden"] // spec["heads"] * spec["kv_heads"]
    writer = gguf.GGUFWriter(path, spec["arch"])
    writer.add_block_count(spec["layers"]), writer.add_context_length(64), writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn), writer.add_head_count(spec["heads"]), writer.add_head_count_kv(spec["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(hidden // spec["heads"])
    writer.add_vocab_size(VOCAB), writer.add_tokenizer_model("none"), writer.add_file_type(1)
    rng = np.random.default_rng(2)
    add = lambda name, *shape: writer.add_tensor(
        name, rng.standard_normal(shape, np.float32).astype(np.float32 if len(shape) == 1 else np.float16)
    )
    add("token_embd.weight", VOCAB, hidden), add("output_norm.weight", hidden)
    if not spec["tied"]:
        add("output.weight", VOCAB, hidden)
    for layer in range(spec["layers"]):
        for name, *shape in [
            ("attn_norm", hidden), ("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden),
            ("attn_output", hidden, hidden), ("ffn_norm", hidden), ("ffn_gate", ffn, hidden),
            ("ffn_up", ffn, hidden), ("ffn_down", hidden, ffn),
        ]:
            add(f"blk.{layer}.{name}.weight", *shape)
        if spec["arch"] == "qwen2":
            add(f"blk.{layer}.attn_q.bias", hidden), add(f"blk.{layer}.attn_k.bias", kv), add(f"blk.{layer}.attn_v.bias", kv)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) .*type = *(\S+), size = *\S+ MiB(?: -> *\S+ MiB \((\S+)\))?")


def quantized_types(quantize, source, mix):
    said = subprocess.run([quantize, "--allow-requantize", "--dry-run", source, mix], capture_output=True, text=True)
    assert said.returncode == 0 and f" as {mix}" in said.stdout + said.stderr, said.stderr
    layer = lambda tensor: int((re.search(r"blk\.(\d+)", tensor[0]) or [0, 0])[1])
    runs = {}
    for name, before, after in sorted(LINE.findall(said.stdout + said.stderr), key=layer):
        dtype = (after or before).upper()
        of = runs.setdefault(re.sub(r"blk\.\d+", "blk.{}", name), [])
        if of and of[-1][0] == dtype:
            of[-1][1] += 1
        else:
            of.append([dtype, 1])
    return runs


def mixes(quantize, smollm2):
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for name, spec in MODELS.items():
            source = pathlib.Path(smollm2) if name == "smollm2" else scratch / "source.gguf"
            if name != "smollm2":
                write_model(source, spec)
            types = {mix: quantized_types(quantize, source, mix) for mix in spec["mixes"]}
            found[name] = {key: value for key, value in spec.items() if key != "mixes"} | {"types": types}
    text = json.dumps({"file_types": FILE_TYPES, "models": found}, separators=(",", ":"))
    # One line for each mix.
    text = re.sub(r'("(?:%s)":\{)' % "|".join(ALL), r"\n\1", text)
    (HERE / "mixes.json").write_text(text + "\n")


if __name__ == "__main__":
    {"blocks": blocks, "mixes": mixes}[sys.argv[1]](*sys.argv[2:])
