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

# symbol NAME: the first symbol whose demangled name has NAME in it.
symbol() { awk -v name="$1" 'index($0, name) { print $1; exit }' "$work/symbols"; }

# loop NAME SYMBOL [DEPTH]: the loop with the most products in a function, or in those that it goes on to; as mca.awk
# prints it.
loop() {
    local name=$1 symbol=$2 depth=${3:-0} found next
    "$objdump" -d --no-show-raw-insn --mattr=+dotprod,+i8mm,+fullfp16 --disassemble-symbols="$symbol" \
        "$program" > "$work/$name.$depth"
    found=$(awk -v out="$work/$name.$depth.$symbol" -f tests/bench/mca.awk "$work/$name.$depth" |
        sort -s -k 3,3nr | head -n 1)
    if [ -n "$found" ]; then
        echo "$found"
    elif [ "$depth" -lt 3 ]; then
        for next in $(sed -nE 's/.*[[:space:]]bl?[[:space:]].*<([^+>]*)>$/\1/p' "$work/$name.$depth" | awk '!seen[$0]++'); do
            loop "$name" "$next" $((depth + 1)) && return
        done
        return 1
    else
        return 1
    fi
}

# row NAME TABLE FUNCTION: of the table that is printed.
row() {
    local name=$1 table=$2 function=$3 file instructions products core row
    [ -n "$function" ] && read -r file instructions products < <(loop "${name//[ ,]/-}" "$function") ||
        { echo "$0: no loop of products for $name" >&2; exit 1; }
    row="| $name | $instructions | $products"
    for core in "${cores[@]}"; do
        # Cores without the instruction never run the loop.
        case $core-$table in
            cortex-a55-i8mm | neoverse-n1-i8mm) row+=" | -" ;;
            *) row+=$(cycles "$core" "$file" | awk -v p="$products" '{ printf " | %d (%.1f)", $1, p / $1 }') ;;
        esac
    done
    echo "$row |"
}

echo "llvm-mca $version; cycles of a turn (products of 8-bit integers in a cycle)" >&2
echo "| loop | instructions | products$(printf ' | %s' "${cores[@]}") |"
echo "|---|---:|---:$(printf '|---:%.0s' "${cores[@]}")|"
for type in "$@"; do
    for table in neon dotprod i8mm; do
        # Matrix products are for several tokens: a single one takes dotprod's way.
        [ $table = i8mm ] || row "$type $table, decode" $table "$(symbol "aarch64::$table::ONE_TOKEN::$type")"
        row "$type $table, prefill" $table "$(symbol "aarch64::$table::MULTIPLY::$type")"
    done
done
# The loop that these types share in batches of 32 tokens and more.
row "q8_0, q4_0 and q5_0 i8mm, wide prefill" i8mm "$(symbol i8mm_panel::eight_rows_wide)"
