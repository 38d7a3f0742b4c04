#!/usr/bin/env python3
"""Makes the golden data of the tokenizer tests that is not llama.cpp's own.

    pip install gguf numpy regex xllamacpp requests
    python3 make.py vocabulary SmolLM2-135M-Instruct.gguf    # ggml-vocab-smollm2.gguf
    python3 make.py golden                                   # texts.json, ids.json, splits.json

ids.json: what llama.cpp says. Its tokenizer reads a vocabulary with another pre-tokenizer's name put in,
beside a tiny model without meaning, so that one vocabulary tests many pre-tokenizers.
splits.json: what the regular expressions of the models' tokenizer.json say, matched by the module `regex`.
"""

import json
import pathlib
import random
import sys
import tempfile
import unicodedata

import gguf
import numpy
import regex

HERE = pathlib.Path(__file__).parent
# Vocabulary, name put into tokenizer.ggml.pre, whether control tokens in the text are read.
ORACLES = [
    ("smollm2", "smollm", False),
    ("smollm2", "smollm", True),
    ("gpt-2", "gpt-2", False),
    ("gpt-2", "default", False),
    ("gpt-2", "llama-bpe", False),
    ("gpt-2", "qwen2", False),
]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# From tokenizer.json of gpt2 (ByteLevel), SmolLM2 (Digits, then ByteLevel), Meta-Llama-3-8B, Qwen2-0.5B.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}|[^\p{N}]+", GPT2],
    "llama-bpe": [CL100K % "{1,3}"],
    "qwen2": [CL100K % ""],
}
HAND_WRITTEN = [
    "", " ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", " a", "  a", "a ", "a  ", "\na", "a\n",
    "The capital of France is", "Once upon a time, in 1984, there were 12345 sheep.",
    "I'm, you'RE, he'S, WE'LL, they'd've; don't 'quote' 's't 'x ' '",
    "fn main() {\n    println!(\"{:>8.3}\", x[0] as f64 / 3.0e-7);\n\t\treturn;\n}\n",
    "def f(x, *args):\r\n    return {k: v for k, v in x.items() if k != 'a'}\r\n\r\n\r\n",
    "https://example.com/a?b=c&d=%20#e  user@example.org", "$1,234.56 + €7 = £8 ± ½ × ¾ ≠ ∞",
    "北京是中国的首都，人口2154万。東京は日本の首都です。서울은 대한민국의 수도이다.",
    "Привет, мир! Γειά σου Κόσμε! שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "e\u0301 a\u0308 o\u0302\u0323 n\u0303 Z̸̡̢a̶l̷g̵o̴", "👩‍👩‍👧‍👦🏳️‍🌈🇫🇷 ☺️ ✅ 🦙.cpp 🤷🏽‍♀️",
    "①②③ ⅷ ٣٤٥ १२३ 𝟘𝟙𝟚 ²³", "\u3000全角　スペース\u00a0nbsp\u2003em\u2028line\u2029para\u0085next",
    "a\u200bb\u200cc\u200dd\ufeffe", "\x00\x01\x7f\x1b[0m\x1c\x1f", "\U0010ffff\ue000\ufffd\ufffe\U000e0100\U000e01ef",
    "x" * 100, " " * 100, "\n" * 50, "ab" * 60, "=" * 77, "1" * 40, "é" * 40, "界" * 50,
    "antidisestablishmentarianismpneumonoultramicroscopicsilicovolcanoconiosis" * 2,
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|><|endoftext|> <|endoftext", "<<|im_end|>>",
    "  <|im_end|>  ", "<|im_end|", "im_end|>", "<repo_name><reponame><file_sep>x<filename>", "<|im_start|><|im_start|",
]
CLUSTERS = ["'s", "'T", "'re", "'LL", "'", " '", "\r\n", "\n", "\n\n", " ", "  ", "   ", "\t", "!", "?!", "...", "(", "_", "-",
            "$", "+", "|", "the", "The", "ing", "é", "e\u0301", "2", "2024", "½", "٣", "Ⅷ", "漢", "字", "の", "한", "Ж", "ß", "ا",
            "ि", "ก", "😀", "👍🏽", "\u00a0", "\u3000", "\u2009", "\u200b", "\x00", "\x7f", "\ufffd", "<|im_end|>"]


def random_texts(count):
    """Seeded mixtures of clusters and of code points that every Unicode version since 14 knows.

    Without U+017F and U+212A, which `(?i:'s)` of tokenizer.json matches by case folding and llama.cpp,
    whose ids count here, does not."""
    rng = random.Random(20240607)
    known = [chr(point) for point in range(1, 0x110000)
             if unicodedata.category(chr(point)) not in ("Cn", "Cs") and point not in (0x17F, 0x212A)]
    low = [char for char in known if ord(char) < 0x3000]
    for _ in range(count):
        yield "".join(rng.choice(rng.choice((CLUSTERS, CLUSTERS, low, known))) for _ in range(rng.randint(1, 24)))


def contents(path):
    fields = gguf.GGUFReader(path).fields
    return {key: (field.contents(), field.types) for key, field in fields.items() if not key.startswith("GGUF.")}


def write_vocabulary(writer, fields, pre=None):
    for key, (value, types) in fields.items():
        if key == "general.architecture" or not key.startswith("tokenizer."):
            continue
        if key == "tokenizer.ggml.pre" and pre:
            value = pre
        writer.add_key_value(key, value, types[0], types[1] if len(types) > 1 else None)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vocabulary(model):
    fields = contents(model)
    writer = gguf.GGUFWriter(HERE / "ggml-vocab-smollm2.gguf", "llama")
    writer.add_name("SmolLM2-135M-Instruct, vocabulary only")
    writer.add_license("apache-2.0")
    write_vocabulary(writer, fields)
    finish(writer)


def tiny_model(path, fields, pre):
    """A llama of one layer and 32 dimensions, all zeros, with the vocabulary in `fields`."""
    writer = gguf.GGUFWriter(path, "llama")
    tokens = len(fields["tokenizer.ggml.tokens"][0])
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    write_vocabulary(writer, fields, pre)
    writer.add_tensor("token_embd.weight", numpy.zeros((tokens, 32), numpy.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(name + ".weight", numpy.zeros(32, numpy.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", numpy.zeros((32, 32), numpy.float16))
    finish(writer)


def llama_cpp(vocabulary_name, pre, special, texts):
    import requests
    import xllamacpp

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        tiny_model(file.name, contents(HERE / f"ggml-vocab-{vocabulary_name}.gguf"), pre)
        params = xllamacpp.CommonParams()
        params.model.path = file.name
        params.n_ctx = 64
        params.warmup = False
        server = xllamacpp.Server(params)
        with requests.Session() as session:
            ids = []
            for text in texts:
                body = {"content": text, "add_special": False, "parse_special": special}
                answer = session.post(server.listening_address + "/tokenize", json=body, timeout=60)
                answer.raise_for_status()
                ids.append(answer.json()["tokens"])
    return {"vocabulary": vocabulary_name, "pre": pre, "parse_special": special, "ids": ids}


def split(patterns, text):
    """Lengths in UTF-8 bytes of the pieces; what a pattern leaves out stays a piece, as in `Split`."""
    pieces = [text]
    for pattern in patterns:
        cut = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[at:match.start()], match.group()]
                at = match.end()
            cut.append(piece[at:])
        pieces = [piece for piece in cut if piece]
    return [len(piece.encode()) for piece in pieces]


def dump(name, value):
    (HERE / name).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def golden():
    texts = HAND_WRITTEN + list(random_texts(400))
    dump("texts.json", texts)
    dump("splits.json", {name: [split(patterns, text) for text in texts] for name, patterns in PATTERNS.items()})
    dump("ids.json", [llama_cpp(*oracle, texts) for oracle in ORACLES])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["vocabulary", model]:
            vocabulary(model)
        case ["golden"]:
            golden()
        case _:
            sys.exit(__doc__)
