#!/usr/bin/env bash
# Quality of `edgec quantize` beside llama.cpp's llama-quantize: same model, same calibration text.
#
#   tests/bench/quantize.sh LLAMA_BIN MODEL CALIBRATION.txt EVALUATION.txt [TYPE...]     TYPEs: Q4_0 Q4_K_M
#
# LLAMA_BIN is the folder of llama-imatrix and llama-quantize; calibration is the first WINDOWS (32) windows of 512 tokens
# or so of its text. Every file is judged by `edgec eval` over the first 16 windows of 256 tokens, every position, against
# MODEL. `llama.cpp's imatrix` is its importance file, the same for both; "under its bytes" is a file of mixed types that is
# no larger than the row's type makes it. Fails where that one diverges more than the type alone, rounded by the same
# method. With - for LLAMA_BIN rows that need llama.cpp are left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 4 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
llama=$1 model=$2 calibration=$3 evaluation=$4
shift 4
[ $# -gt 0 ] || set -- Q4_0 Q4_K_M
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${EDGEC:-}" ]; then
    cargo build --quiet --release --package edgec
    EDGEC=${CARGO_TARGET_DIR:-target}/release/edgec
fi

windows=${WINDOWS:-32}
head -c $((windows * 2800)) "$calibration" > "$work/text.txt"
calibrated=(--calibration "$work/text.txt" --calibration-tokens $((windows * 512)))
"$EDGEC" quantize "$model" --type F32 --out "$work/f32.gguf" 2> "$work/said" || { cat "$work/said" >&2; exit 1; }
[ "$llama" = - ] || "$llama/llama-imatrix" -m "$work/f32.gguf" -f "$work/text.txt" -c 512 --chunks "$windows" --process-output -o "$work/imatrix.gguf" \
    > "$work/said" 2>&1 || { cat "$work/said" >&2; exit 1; }

# row TYPE NAME: judges $work/out.gguf, leaves its divergence in `kl`.
row() {
    "$EDGEC" eval "$work/out.gguf" --teacher "$model" --data "$evaluation" --context 256 --windows 16 \
        --score all --json 2> "$work/said" > "$work/found.json" || { cat "$work/said" >&2; exit 1; }
    awk -v type="$1" -v name="$2" -v bytes="$(stat -c %s "$work/out.gguf")" -v exact="$work/kl" -F '[:,]' '
        { for (i = 1; i < NF; i++) { key = $i; gsub(/[" {}]/, "", key); value[key] = $(i + 1) + 0 } }
        END {
            printf "| %s, %s | %.1f | %.2f | %.4f |\n", type, name, bytes / 1048576, value["ppl"], value["kl"]
            print value["kl"] > exact
        }' <(tr '\n' ' ' < "$work/found.json")
    kl=$(< "$work/kl")
}
failed=0
# better A B: the first of two divergences is the smaller one.
better() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a < b) }' || failed=1; }
# ours ARGUMENTS...; theirs ARGUMENTS...
ours() { "$EDGEC" quantize "$work/f32.gguf" --out "$work/out.gguf" "$@" > "$work/said" 2>&1 || { cat "$work/said" >&2; exit 1; }; }
theirs() { "$llama/llama-quantize" "$@" > "$work/said" 2>&1 || { cat "$work/said" >&2; exit 1; }; }

echo "| | MiB | perplexity | KL (nats/token) |"
echo "|---|---:|---:|---:|"
for type in "$@"; do
    if [ "$llama" != - ]; then
        theirs "$work/f32.gguf" "$work/out.gguf" "$type"
        row "$type" "llama.cpp"
        theirs --imatrix "$work/imatrix.gguf" "$work/f32.gguf" "$work/out.gguf" "$type"
        row "$type" "llama.cpp, imatrix"
        ours --type "$type" --imatrix "$work/imatrix.gguf"
        row "$type" "edgec, llama.cpp's imatrix"
    fi
    ours --type "$type"
    row "$type" "edgec"
    for method in imatrix gptq; do
        ours --type "$type" "${calibrated[@]}" --method $method
        row "$type" "edgec, $method"
        uniform=$kl bytes=$(stat -c %s "$work/out.gguf")
        ours --budget-bytes "$bytes" "${calibrated[@]}" --method $method
        row "$type" "edgec, $method, types under its bytes"
        better "$kl" "$uniform"
    done
done
exit $failed
