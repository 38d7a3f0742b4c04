#!/usr/bin/env bash
# Cycles that llvm-mca predicts for the inner loops of the tile kernels, as they are in the built `edge-run`.
#
#   tests/bench/mca.sh [TYPE]...      q4_0 and q8_0, or any of q4_1 q5_0 q5_1 q4_k q5_k q6_k
#
# A loop's cycles are those of one turn in the steady state, everything in the first-level cache. Needs llvm-objdump,
# llvm-nm, and llvm-mca of version 16 or later: older ones lack models of these cores. EDGE_RUN names another program.
set -euo pipefail
cd "$(dirname "$0")/../.."
cores=(cortex-a55 neoverse-n1 neoverse-v1 neoverse-n2)
[ $# -gt 0 ] || set -- q4_0 q8_0
target=${CARGO_TARGET_DIR:-target}
musl=aarch64-unknown-linux-musl

# newest NAME: the newest of NAME-19, NAME-18, ..., NAME.
newest() {
    local version
    for version in -21 -20 -19 -18 -17 -16 ""; do
        if command -v "$1$version"; then return; fi
    done
    echo "$0: $1 is missing" >&2
    return 1
}
mca=$(newest llvm-mca) objdump=$(newest llvm-objdump) nm=$(newest llvm-nm)
version=$("$mca" --version | sed -n 's/.*version \([0-9]*\).*/\1/p' | head -n 1)
[ "$version" -ge 16 ] || { echo "$0: $mca is of version $version, 16 or later is needed" >&2; exit 1; }

program=${EDGE_RUN:-$target/$musl/release/edge-run}
[ -n "${EDGE_RUN:-}" ] || cargo build --quiet --release --package edge-run --target $musl
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
paste -d ' ' <("$nm" "$program" | awk '{ print $NF }') <("$nm" --demangle "$program") > "$work/symbols"

# cycles CORE FILE: of one turn.
cycles() {
    local turns=200
    "$mca" -mtriple=aarch64 -mcpu="$1" -mattr=+dotprod,+i8mm,+fullfp16 -iterations=$turns "$2" 2> "$work/said" |
        awk -v turns=$turns '/^Total Cycles:/ { printf "%.0f", $3 / turns }' ||
        { cat "$work/said" >&2; return 1; }
}

echo "llvm-mca $version; cycles of a turn (products of 8-bit integers in a cycle)" >&2
echo "| loop | instructions | products$(printf ' | %s' "${cores[@]}") |"
echo "|---|---:|---:$(printf '|---:%.0s' "${cores[@]}")|"
for type in "$@"; do
    for table in neon dotprod i8mm; do
        symbol=$(awk -v name="aarch64::$table::TILES::$type" 'index($0, name) { print $1; exit }' "$work/symbols")
        [ -n "$symbol" ] || { echo "$0: no kernel for $type in $table" >&2; exit 1; }
        "$objdump" -d --no-show-raw-insn --mattr=+dotprod,+i8mm,+fullfp16 --disassemble-symbols="$symbol" \
            "$program" > "$work/listing"
        # The first loop is that of a single token; those that follow differ in the number of tokens.
        awk -v out="$work/$table" -f tests/bench/mca.awk "$work/listing" > "$work/loops"
        [ "$(wc -l < "$work/loops")" -ge 2 ] || { echo "$0: fewer loops than expected in $symbol" >&2; exit 1; }
        kind=decode
        while read -r file instructions products; do
            row="| $type $table, $kind | $instructions | $products"
            for core in "${cores[@]}"; do
                # Cores without the instruction never run the loop.
                case $core-$table in
                    cortex-a55-i8mm | neoverse-n1-i8mm) row+=" | -" ;;
                    *) row+=$(cycles "$core" "$file" | awk -v p="$products" '{ printf " | %d (%.1f)", $1, p / $1 }') ;;
                esac
            done
            echo "$row |"
            kind=prefill
        done < <(head -n 2 "$work/loops")
    done
done
