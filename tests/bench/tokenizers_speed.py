"""Speed of the `tokenizers` library beside ours: best of five encodings of a whole text, one thread.

    pip install tokenizers
    edgec export MODEL.gguf --format hf --out FOLDER
    python3 tokenizers_speed.py FOLDER/tokenizer.json TEXT
    cargo run --release -p edge-runtime --example tokenizer_speed -- MODEL.gguf TEXT     # ours
"""

import sys
import time

import tokenizers


def main(path, text):
    tokenizer = tokenizers.Tokenizer.from_file(path)
    with open(text, newline="", encoding="utf-8") as file:
        text = file.read()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        best = min(best, time.perf_counter() - start)
    size = len(text.encode())
    print(f"{size} bytes, {len(ids)} tokens, {best * 1e3:.1f} ms, {size / best / 1e6:.2f} MB/s")


main(*sys.argv[1:])
