#!/usr/bin/env python3
"""Perplexity of a model with adapters: `edgec eval --adapter` beside llama.cpp (`llama_adapter_lora_init`).

    pip install xllamacpp
    edgec tune MODEL.gguf --base-quant Q4_0 --data TEXT --tokens 8192 --out run     # leaves run/adapter.gguf
    python3 adapter_in_llama_cpp.py EDGEC MODEL.gguf TEXT run/adapter.gguf... [--context 512] [--windows 16]

The second halves of the same windows, as llama.cpp's own perplexity tool has them. A PEFT folder in an adapter's place
is merged first, both read the file: that is the way of a DoRA, which changes more than a GGUF LoRA can say. Fails where
the two are more than 0.5 % apart, and where an adapter moves perplexity by less than four times that: it might as well
do nothing.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

sys.path.append(str(pathlib.Path(__file__).parent.parent / "oracle"))
import llama

# Largest difference of a perplexity, as a share of it.
BOUND = 0.005
# No logit comes near it: with such a bias the next token is the one that the text has.
FORCE = 1e4


def edgec(arguments, *command, **streams):
    return subprocess.run([arguments.edgec, *command], check=True, stdout=subprocess.PIPE, **streams).stdout


def windows(arguments, model):
    """The windows that `edgec eval` reads, each of which begins with BOS where the vocabulary asks for it."""
    ids, plain = (
        json.loads(edgec(arguments, "tokenize", model, *options, stdin=arguments.text.open()))
        for options in [(), ("--no-bos",)]
    )
    ends = range(arguments.context, len(ids) + 1, arguments.context)
    found = [ids[end - arguments.context : end] for end in ends][: arguments.windows]
    if len(ids) > len(plain):
        for window in found:
            window[0] = ids[0]
    return found


def log_probability(address, before, token):
    """Of `token`, from the logits as they are: a bias moves what is sampled, not what is reported."""
    bias = [[token, FORCE]]
    answer = llama.complete(address, prompt=before, n_predict=1, n_probs=1, logit_bias=bias, cache_prompt=True)
    [found] = answer["completion_probabilities"]
    assert found["id"] == token, f"{found['id']} was generated, forced was {token}"
    return found["logprob"]


def llama_cpp(arguments, model, adapter, texts):
    running = llama.server(str(model), arguments.context, adapter and str(adapter))
    address = running.listening_address
    half = arguments.context // 2
    sums = [
        log_probability(address, window[:at], window[at])
        for window in texts
        for at in range(half + 1, arguments.context)
    ]
    return math.exp(-sum(sums) / len(sums)), len(sums)


def ours(arguments, model, adapter):
    command = ["eval", model, "--data", arguments.text, "--context", str(arguments.context), "--json"]
    command += ["--windows", str(arguments.windows)] + (["--adapter", adapter] if adapter else [])
    found = json.loads(edgec(arguments, *command))
    return found["ppl"], found["tokens"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("edgec")
    for name in ["model", "text"]:
        parser.add_argument(name, type=pathlib.Path)
    parser.add_argument("adapters", type=pathlib.Path, nargs="+")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    arguments = parser.parse_args()
    texts = windows(arguments, arguments.model)
    good, plain = True, None
    print("| adapter | edgec | llama.cpp | difference |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as work:
        for adapter in [None, *arguments.adapters]:
            name, model = adapter or "none", arguments.model
            if adapter and adapter.is_dir():
                model = pathlib.Path(work) / "merged.gguf"
                edgec(arguments, "merge", arguments.model, adapter, "--type", "F32", "--out", model)
                name, adapter = f"{name}, merged", None
            (found, tokens), (golden, counted) = (
                ours(arguments, model, adapter),
                llama_cpp(arguments, model, adapter, texts),
            )
            assert tokens == counted, f"edgec judged {tokens} tokens, llama.cpp {counted}"
            difference = found / golden - 1
            print(f"| {name} | {found:.4f} | {golden:.4f} | {difference:+.3%} |", flush=True)
            plain = plain or found
            moves = name == "none" or abs(found / plain - 1) >= 4 * BOUND
            good = good and abs(difference) < BOUND and moves
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
