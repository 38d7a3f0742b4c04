"""What llama.cpp (PyPI: xllamacpp) says about GGUF files.

Reads a JSON array of tasks, each of them `model` and `context`; `lora`, an adapter to run with; `prompts` (texts) and `tokens` for greedy
continuations; `windows` (lists of ids below `vocab`) for perplexity as llama.cpp's own tool defines it: in
each window, the predictions made from its second half count. Writes an array with an answer to each:
`greedy`, the ids, `ppl` and `tokens`, the number of predictions.
"""

import json
import math
import sys
import urllib.request

import xllamacpp


def server(model, context, lora):
    params = xllamacpp.CommonParams()
    params.model.path = model
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
    params.n_ctx = context
    params.n_parallel = 1
    params.warmup = False
    # Errors alone.
    params.verbosity = 1
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def complete(address, **body):
    body = json.dumps({"temperature": 0, "return_tokens": True, **body}).encode()
    request = urllib.request.Request(address + "/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def log_probabilities(address, window, vocab):
    """Of the second half of a window's tokens: all in one request, since each takes as long as a model."""
    places = range(len(window) // 2 + 1, len(window))
    prompts = [window[:at] for at in places]
    answers = complete(address, prompt=prompts, n_predict=1, n_probs=vocab, cache_prompt=True)
    answers.sort(key=lambda answer: answer["index"])
    for at, answer in zip(places, answers, strict=True):
        [found] = [
            row["logprob"]
            for row in answer["completion_probabilities"][0]["top_logprobs"]
            if row["id"] == window[at]
        ]
        yield found


def answer(task):
    running = server(task["model"], task["context"], task.get("lora"))
    address = running.listening_address
    greedy = [
        complete(address, prompt=prompt, n_predict=task["tokens"], cache_prompt=False)["tokens"]
        for prompt in task.get("prompts", [])
    ]
    sums = [
        found
        for window in task.get("windows", [])
        for found in log_probabilities(address, window, task["vocab"])
    ]
    ppl = math.exp(-sum(sums) / len(sums)) if sums else None
    return {"greedy": greedy, "ppl": ppl, "tokens": len(sums)}


if __name__ == "__main__":
    json.dump([answer(task) for task in json.load(sys.stdin)], sys.stdout)
