#!/usr/bin/env bash
# Perplexity through every kernel path beside the f32 path of the same weights: they must agree within 0.5 %.
#
#   tests/bench/perplexity.sh TEXT MODEL.gguf [HOST_WINDOWS [QEMU_WINDOWS]]      16 and 16 windows of 256 tokens
#
# MODEL.gguf is quantized. Its f32 path is the same file dequantized to F32, whose activations and KV cache stay f32.
# The others run its pack: the tables of this processor, and under qemu those of 64-bit ARM processors with and without
# dot product and matrix instructions, each for a quarter of an hour or more. With few windows the figure says little:
# roundings that fall otherwise move it by some tenths of a percent. EDGEC names another edgec.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
text=$1 model=$2 context=256
host_windows=${3:-16} qemu_windows=${4:-16}
target=${CARGO_TARGET_DIR:-target}
musl=aarch64-unknown-linux-musl
command -v qemu-aarch64 > /dev/null || { echo "$0: qemu-aarch64 is missing" >&2; exit 1; }
if [ -z "${EDGEC:-}" ]; then
    cargo build --quiet --release --package edgec
    EDGEC=$target/release/edgec
fi
cargo build --quiet --release --package edge-run --example perplexity
cargo build --quiet --release --package edge-run --example perplexity --target $musl
host=$target/release/examples/perplexity arm=$target/$musl/release/examples/perplexity
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$EDGEC" quantize "$model" --type F32 --out "$work/f32.gguf" 2> "$work/said" || { cat "$work/said" >&2; exit 1; }
"$EDGEC" pack "$model" --out "$work/model.edgepack" 2> "$work/said" || { cat "$work/said" >&2; exit 1; }

failed=0
# path NAME WINDOWS PROGRAM...: a row of the table; `exact` is the perplexity of the f32 path.
path() {
    local name=$1 windows=$2 found
    shift 2
    found=$("$@" | cut -d ' ' -f 2)
    awk -v name="$name" -v n="$windows" -v a="$found" -v b="$exact" 'BEGIN {
        r = 100 * (a / b - 1)
        printf "| %s | %d | %.4f | %.4f | %+.3f %% |\n", name, n, b, a, r
        exit !(r < 0.5 && r > -0.5)
    }' || failed=1
}

echo "| $(basename "$model") | windows | f32 path | this path | difference |"
echo "|---|---:|---:|---:|---:|"
exact=$("$host" "$work/f32.gguf" "$text" "$host_windows" $context | cut -d ' ' -f 2)
for kernels in generic avx2 avx512; do
    run=("$host" "$work/model.edgepack" "$text" "$host_windows" $context $kernels)
    if "$host" "$work/model.edgepack" "$text" 1 8 $kernels > /dev/null 2> "$work/said"; then
        path "$kernels" "$host_windows" "${run[@]}"
    elif grep -q "no kernels" "$work/said"; then
        echo "$0: this processor cannot run $kernels" >&2
    else
        cat "$work/said" >&2
        exit 1
    fi
done
exact=$("$host" "$work/f32.gguf" "$text" "$qemu_windows" $context | cut -d ' ' -f 2)
for cpu in cortex-a53 cortex-a76 max; do
    run=(qemu-aarch64 -cpu $cpu "$arm" "$work/model.edgepack" "$text" "$qemu_windows" $context)
    path "$cpu" "$qemu_windows" "${run[@]}"
done
exit $failed
