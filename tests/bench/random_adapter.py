#!/usr/bin/env python3
"""Makes a LoRA adapter with random numbers for all linear layers of a model: what it costs is a real one's.

    pip install gguf numpy
    python3 random_adapter.py model.gguf adapter.gguf [RANK]          (16)
"""

import sys

import gguf
import numpy

source, target = sys.argv[1:3]
rank = int(sys.argv[3]) if len(sys.argv) > 3 else 16
model = gguf.GGUFReader(source)
architecture = model.get_field("general.architecture").contents()
random = numpy.random.default_rng(1)
writer = gguf.GGUFWriter(target, architecture)
writer.add_type("adapter")
writer.add_string("adapter.type", "lora")
writer.add_float32("adapter.lora.alpha", float(rank))
for tensor in model.tensors:
    if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
        columns, rows = map(int, tensor.shape)
        for name, shape in [("lora_a", (rank, columns)), ("lora_b", (rows, rank))]:
            numbers = random.normal(scale=0.01, size=shape).astype(numpy.float32)
            writer.add_tensor(f"{tensor.name}.{name}", numbers)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
