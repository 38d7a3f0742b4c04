#!/usr/bin/env bash
# Speed of `edge-run` on a pack beside llama.cpp on the GGUF that it was made from.
#
#   tests/bench/llama.sh LLAMA_BENCH MODEL.gguf [THREADS]      LLAMA_BENCH is llama.cpp's llama-bench; THREADS 2
#
# Prompt of 512, 128 tokens one after the other. The two programs alternate five times, each run once to warm up by
# itself; the ratios are those of the medians. Nothing else should run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
llama=$1 model=$2 threads=${3:-2}
target=${CARGO_TARGET_DIR:-target}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cargo build --quiet --release --package edgec --package edge-run
"$target/release/edgec" pack "$model" --out "$work/model.edgepack"

# speeds PROGRAM ARGUMENTS...: tok/s of the prompt and of single tokens, from llama-bench's JSON.
speeds() {
    "$@" -p 512 -n 128 -r 1 -t "$threads" -o json 2> "$work/said" > "$work/tests.json" ||
        { cat "$work/said" >&2; return 1; }
    awk -F '[:,]' '/"n_prompt"/ { prompt = $2 + 0 } /"avg_ts"/ { ts[prompt > 0 ? "p" : "n"] = $2 + 0 }
        END { print ts["p"], ts["n"] }' "$work/tests.json"
}

for round in 1 2 3 4 5; do
    speeds "$target/release/edge-run" bench "$work/model.edgepack" >> "$work/ours"
    speeds "$llama" -m "$model" >> "$work/theirs"
    echo "round $round: $(tail -n 1 "$work/ours"), llama.cpp $(tail -n 1 "$work/theirs")" >&2
done

# median FILE COLUMN
median() { cut -d ' ' -f "$2" "$1" | sort -g | sed -n 3p; }
echo "| tok/s, $threads threads | edge-run, pack | llama.cpp, GGUF | ratio |"
echo "|---|---:|---:|---:|"
for column in "1 prefill 512" "2 decode 128"; do
    set -- $column
    awk -v name="$2 $3" -v a="$(median "$work/ours" "$1")" -v b="$(median "$work/theirs" "$1")" \
        'BEGIN { printf "| %s | %.1f | %.1f | %.2f |\n", name, a, b, a / b }'
done
