#!/usr/bin/env python3
"""Makes the golden data of the tokenizer tests that is not llama.cpp's own.

    pip install gguf numpy regex xllamacpp requests
    python3 make.py vocabulary SmolLM2-135M-Instruct.gguf    # ggml-vocab-smollm2.gguf
    python3 make.py golden                                   # texts.json, ids.json, splits.json
    python3 make.py long                                     # long.json
    python3 make.py compare MODEL.gguf IDS                   # that model's ids of the long text, to a file

ids.json: what llama.cpp says. Its tokenizer reads a vocabulary with another pre-tokenizer's name put in,
beside a tiny model without meaning, so that one vocabulary tests many pre-tokenizers.
long.json: pieces from which a seeded generator makes a text of a megabyte, and how many ids llama.cpp makes
of it, the hash of all and the first of them. `compare` is for vocabularies too large to keep.
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
# Vocabulary, name put into tokenizer.ggml.pre if any, whether control tokens in the text are read.
LONG_ORACLES = [
    ("llama-spm", None, False),
    ("llama-spm", None, True),
    ("smollm2", "smollm", True),
    ("gpt-2", "gpt-2", False),
]
ORACLES = [
    ("llama-spm", None, True),
    ("smollm2", "smollm", False),
    ("smollm2", "smollm", True),
    ("gpt-2", "gpt-2", False),
    ("gpt-2", "default", False),
    ("gpt-2", "llama-bpe", False),
    ("gpt-2", "qwen2", False),
    ("gpt-2", "falcon", False),
    ("gpt-2", "deepseek-coder", False),
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
# What the long text is made of, beside the texts of texts.json.
LONG_WORDS = """the of and to a in is that for it with as was on be by this are or at from not have an which you but
they all one their there been has more when who will if no out so said what up its about into them can only other time new
some could these two may first then do any like my now over such our man me even most made after also did many off before
must through years where much your way well down should because long each just state people too here Mister between world
being day under never same another know while last might great old year come since go against came right used take three
himself few house use during without again place American around however home small found thought went say part
once general high upon school every don't does got united left number course war until always away something fact water
public less put think almost hand enough far took head yet government system better set told nothing night end why didn't
tokenization normalization SentencePiece internationalisation Constantinople antidisestablishmentarianism""".split()
LONG_HANZI = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种" \
    "事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情" \
    "漢語東京都水産機構龍飜譯𠀀𠮷かなカナ한국어조선말"
LONG_EMOJI = "😀 😂 🥲 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 🇯🇵 ☺️ ✅ 🦙 🤷🏽‍♀️ 🚀 🎉 ❤️ 🧑‍💻 🫠".split()
LONG_LINES = [
    "fn main() {\n    let mut total: u64 = 0;\n    for (i, x) in data.iter().enumerate() {\n", "        total += (*x as u64) << i;\n    }\n}\n\n",
    "def __init__(self, *args, **kwargs):\n", "\treturn {k: v for k, v in items if v is not None}\n", "#include <stdio.h>\n",
    "int *p = &a[i++];  // next\r\n", "SELECT * FROM `t` WHERE id >= 10 AND name LIKE '%x_';\n", "<div class=\"a b\">\n  <p>Text &amp; more</p>\n</div>\n",
    "if (x != y || !z) { return -1; }\n", "https://example.org/path/to?q=1&r=a%20b#top ", "{\"key\": [1, 2.5, -3e-7, null, true]}\n", "$ ls -la ~/src | grep '\\.rs$'\n",
    "It was a bright cold day in April, and the clocks were striking thirteen. ", "\"Well,\" she said, \"that's that -- isn't it?\" ",
    "Ceci n'est pas une pipe; ça va, déjà vu, naïve façade. ", "Größe, Straße, Übermut und 3,14 €. ", "Съешь же ещё этих мягких французских булок, да выпей чаю. ",
    "人人生而自由，在尊嚴和權利上一律平等。", "すべての人間は、生まれながらにして自由である。", "모든 인간은 태어날 때부터 자유롭다. ", "يولد جميع الناس أحرارا ", "सभी मनुष्यों को ", "<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "▁", "▁▁x",
]
LONG_SEED, LONG_BYTES = 20240607, 1_000_000


def long_pieces():
    rng = random.Random(LONG_SEED)
    words = [" " + word for word in LONG_WORDS] + [word.capitalize() + " " for word in LONG_WORDS[::4]]
    digits = ["".join(rng.choice("0123456789") for _ in range(rng.randint(1, 12))) for _ in range(40)]
    runs = [char * count for char in (" ", "\n", "\t", "\u3000") for count in (1, 1, 2, 3, 4, 5, 7, 8, 16, 31, 33, 70)] + ["\r\n", " \n ", "\u00a0"]
    return words + list(LONG_HANZI) * 2 + LONG_EMOJI * 2 + LONG_LINES * 3 + digits + runs + list(".,;:!?()-'\"") * 2


def long_text(pieces):
    """Pieces in the order of a linear congruential generator, until there are enough bytes."""
    state, size, text = LONG_SEED, 0, []
    while size < LONG_BYTES:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        text.append(pieces[(state >> 33) % len(pieces)])
        size += len(text[-1].encode())
    return "".join(text)


def fnv(ids):
    """FNV-1a of 64 bits over the ids as 32-bit numbers."""
    state = 0xCBF29CE484222325
    for id in ids:
        state = (state ^ id) * 0x100000001B3 % 2**64
    return f"{state:016x}"


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


def server(path):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = 64
    params.warmup = False
    return xllamacpp.Server(params)


def tokenize(address, special, texts):
    import requests

    with requests.Session() as session:
        for text in texts:
            body = {"content": text, "add_special": False, "parse_special": special}
            answer = session.post(address + "/tokenize", json=body, timeout=600)
            answer.raise_for_status()
            yield answer.json()["tokens"]


def llama_cpp(vocabulary_name, pre, special, texts):
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        tiny_model(file.name, contents(HERE / f"ggml-vocab-{vocabulary_name}.gguf"), pre)
        running = server(file.name)
        ids = list(tokenize(running.listening_address, special, texts))
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


def long():
    pieces = json.loads((HERE / "texts.json").read_text())[1:] + long_pieces()
    text = long_text(pieces)
    results = []
    for oracle in LONG_ORACLES:
        result = llama_cpp(*oracle, [text])
        [ids] = result.pop("ids")
        results.append(result | {"count": len(ids), "hash": fnv(ids), "first": ids[:64]})
    dump("long.json", {"seed": LONG_SEED, "bytes": LONG_BYTES, "pieces": long_pieces(), "ids": results})


def compare(model, out):
    pieces = json.loads((HERE / "texts.json").read_text())[1:] + long_pieces()
    running = server(model)
    [ids] = tokenize(running.listening_address, True, [long_text(pieces)])
    pathlib.Path(out).write_text(json.dumps(ids))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["vocabulary", model]:
            vocabulary(model)
        case ["golden"]:
            golden()
        case ["long"]:
            long()
        case ["compare", model, ids]:
            compare(model, ids)
        case _:
            sys.exit(__doc__)
