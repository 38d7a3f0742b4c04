"""llama.cpp's OpenAI-compatible server (PyPI: xllamacpp) with the model `argv[1]` on port `argv[2]` of this machine.

Writes its address when it listens and ends with its standard input.
"""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[2])
params.n_ctx = 1024
params.n_parallel = 2
params.warmup = False
params.cpuparams.n_threads = 2
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
