"""Writes one file per tensor type: the blocks of 512 random weights, then the 512 values (f32, little-endian)
that gguf-py makes of them. Needs the PyPI packages gguf and numpy; run it in this folder."""

import numpy as np
from gguf import GGMLQuantizationType as Type, quants
from gguf.constants import GGML_QUANT_SIZES

# Byte offsets of the half-precision numbers in a block.
FACTORS = {
    "F32": [], "F16": [0], "BF16": [],
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "Q2_K": [80, 82], "Q3_K": [108], "IQ4_NL": [0],
}
VALUES = 512

rng = np.random.default_rng(1)
for name, factors in FACTORS.items():
    block_len, block_bytes = GGML_QUANT_SIZES[Type[name]]
    count = VALUES // block_len
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for at in factors:
        # Any finite half, normal or subnormal.
        halves = rng.integers(0, 0x7C00, count) | rng.integers(0, 2, count) << 15
        blocks[:, at : at + 2] = halves.astype("<u2").view(np.uint8).reshape(count, 2)
    if name == "F32":
        blocks = rng.standard_normal(VALUES).astype("<f4").view(np.uint8)
    if name == "BF16":
        blocks = rng.standard_normal(VALUES).astype("<f4").view("<u2")[1::2].copy().view(np.uint8)
    blocks = blocks.reshape(-1)
    values = quants.dequantize(blocks, Type[name]).astype("<f4").reshape(-1)
    assert values.shape == (VALUES,) and np.isfinite(values).all(), name
    with open(f"{name.lower()}.bin", "wb") as file:
        file.write(blocks.tobytes() + values.tobytes())
