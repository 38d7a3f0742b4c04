#!/usr/bin/env bash
# Guest instructions of `edge-run` on a 64-bit ARM processor that qemu plays, one thread.
#
#   tests/bench/instructions.sh MODEL [CPU]...      CPU is one of `qemu-aarch64 -cpu help` (max)
#
# MODEL is a GGUF or a pack. Counts are exact; what a run does before its first token is taken off by differences.
# A prompt of 512 takes minutes.
#   decode      a token of 64 that follow one another from an empty context
#   prefill     a token of a prompt of 128, of 256 and of 512
#   start       from the process's start to the first token's forward pass, with a tokenizer: `edge-run generate` of a
#               prompt of one letter. A pack that takes more than 30 million is a failure
# EDGE_RUN names another program, EDGE_RUN_ARGS adds arguments (--kernels NAME). ADAPTER=FILE asks for something else:
# what a LoRA adapter adds to decode; random_adapter.py makes one. EDGE_LIBRARY names a libedge.so for Android, which
# is then counted in edge-run's place, without adapters; start is `edge_plan` and `edge_open`, and has the dynamic linker
# in it.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$1
shift
[ $# -gt 0 ] || set -- max
target=${CARGO_TARGET_DIR:-target}
musl=aarch64-unknown-linux-musl
for tool in qemu-aarch64 cc; do
    command -v "$tool" > /dev/null || { echo "$0: $tool is missing" >&2; exit 1; }
done

mkdir -p "$target/bench"
cc -O2 -Wall -Werror -shared -fPIC -o "$target/bench/count.so" tests/bench/instructions/count.c
if [ -n "${EDGE_LIBRARY:-}" ]; then
    EDGE_RUN=$target/bench/library
    export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu LD_LIBRARY_PATH=$target/bench
    cp "$EDGE_LIBRARY" "$target/bench/libedge.so"
    aarch64-linux-gnu-gcc -O2 -Wall -Werror -Iruntime/capi/include -o "$EDGE_RUN" tests/bench/instructions/library.c \
        "$target/bench/libedge.so"
elif [ -z "${EDGE_RUN:-}" ]; then
    cargo build --quiet --release --package edge-run --target $musl
    EDGE_RUN=$target/$musl/release/edge-run
fi

# count CPU ARGUMENTS...: instructions of one run.
count() {
    local cpu=$1 said
    shift
    # shellcheck disable=SC2086
    if ! said=$(qemu-aarch64 -cpu "$cpu" -plugin "$target/bench/count.so" -d plugin "$EDGE_RUN" "$@" \
        -t 1 ${EDGE_RUN_ARGS:-} 2>&1 > /dev/null); then
        echo "$0: $said" >&2
        return 1
    fi
    awk '$1 == "instructions" { print $2 }' <<< "$said"
}

# tokens CPU ARGUMENTS...: sets `before`, the instructions of a run before its first token, `token`, those of a first
# token, and `decode`, those of one of 64.
tokens() {
    local cpu=$1 two three
    shift
    # A test runs its tokens once to warm up and then as often as -r says.
    two=$(count "$cpu" bench "$model" -p 0 -n 1 -r 1 "$@")
    three=$(count "$cpu" bench "$model" -p 0 -n 1 -r 2 "$@")
    token=$((three - two))
    before=$((two - 2 * token))
    decode=$((($(count "$cpu" bench "$model" -p 0 -n 64 -r 1 "$@") - before) / 128))
}

if [ -n "${ADAPTER:-}" ]; then
    echo "| million instructions | decode | with the adapter | more |"
    echo "|---|---:|---:|---:|"
    for cpu in "$@"; do
        tokens "$cpu"
        alone=$decode
        tokens "$cpu" --adapter "$ADAPTER"
        awk -v name="$(basename "$model"), $cpu" -v d="$alone" -v a="$decode" \
            'BEGIN { printf "| %s | %.2f | %.2f | %.1f %% |\n", name, d / 1e6, a / 1e6, 100 * (a - d) / d }'
    done
    exit
fi
failed=0
echo "| million instructions | decode | prefill 128 | prefill 256 | prefill 512 | start |"
echo "|---|---:|---:|---:|---:|---:|"
for cpu in "$@"; do
    tokens "$cpu"
    prefill=
    for prompt in 128 256 512; do
        prefill+=" $((($(count "$cpu" bench "$model" -n 0 -p $prompt -r 1) - before) / (2 * prompt)))"
    done
    start=$before
    if [ -z "${EDGE_LIBRARY:-}" ]; then
        start=$(($(count "$cpu" generate "$model" --prompt A --max-tokens 1) - token))
    fi
    case $model in *.edgepack) [ "$start" -le 30000000 ] || failed=1 ;; esac
    awk -v name="$(basename "$model"), $cpu" -v counts="$decode$prefill $start" 'BEGIN {
        printf "| %s |", name
        n = split(counts, count, " ")
        for (i = 1; i <= n; i++) printf " %.2f |", count[i] / 1e6
        print ""
    }'
done
exit $failed
