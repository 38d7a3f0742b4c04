"""What llama.cpp (PyPI: xllamacpp) says about a GGUF file.

Reads one JSON object: `model`, `context`; `prompts` (texts) and `tokens` for greedy continuations;
`windows` (lists of ids) for perplexity as llama.cpp's own tool defines it: in each window, the
predictions made from its second half count. Writes `greedy`, the ids, and `ppl`.
"""

import json
import math
import sys
import urllib.request

import xllamacpp


def server(model, context):
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 2
    return xllamacpp.Server(params)


def complete(address, **body):
    body = json.dumps({"temperature": 0, "return_tokens": True, **body}).encode()
    request = urllib.request.Request(address + "/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def log_probability(address, prefix, token):
    """The token is forced by a bias that its reported probability does not include."""
    answer = complete(
        address, prompt=prefix, n_predict=1, n_probs=1, logit_bias=[[token, 1000.0]], cache_prompt=True
    )
    found = answer["completion_probabilities"][0]
    assert found["id"] == token, (found, token)
    return found["logprob"]


def main():
    task = json.load(sys.stdin)
    running = server(task["model"], task["context"])
    address = running.listening_address
    greedy = [
        complete(address, prompt=prompt, n_predict=task["tokens"], cache_prompt=False)["tokens"]
        for prompt in task.get("prompts", [])
    ]
    sums = [
        log_probability(address, window[:at], window[at])
        for window in task.get("windows", [])
        for at in range(len(window) // 2 + 1, len(window))
    ]
    ppl = math.exp(-sum(sums) / len(sums)) if sums else None
    json.dump({"greedy": greedy, "ppl": ppl, "tokens": len(sums)}, sys.stdout)


main()
