#!/usr/bin/env bash
# What more threads do to the speed of `edge-run`: they must never cost more than 5 %.
#
#   tests/bench/threads.sh MODEL [MOST]      MOST threads (twice as many as there are processors)
#
# Prompt of 512 and 128 tokens one after the other, with 1 to MOST threads that may run on any core. The numbers of
# threads take turns, five times over; speeds are medians. The ratio is to the best of fewer threads: the check fails
# below 0.95. A second table is measured beside a process that keeps one processor busy (LOAD=0 leaves it out).
# Nothing else should run meanwhile. EDGE_RUN names another program.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
model=$1 most=${2:-$((2 * $(nproc)))}
work=$(mktemp -d)
load=
trap 'rm -rf "$work"; [ -z "$load" ] || kill "$load"' EXIT
if [ -z "${EDGE_RUN:-}" ]; then
    cargo build --quiet --release --package edge-run
    EDGE_RUN=${CARGO_TARGET_DIR:-target}/release/edge-run
fi

# measure NAME: a table of its own, and `failed` set if a ratio is too low.
measure() {
    local round threads
    for round in 1 2 3 4 5; do
        for threads in $(seq "$most"); do
            "$EDGE_RUN" bench "$model" -p 512 -n 128 -r 1 -t "$threads" --no-pin -o json |
                awk -F '[:,]' '/"n_prompt"/ { prompt = $2 + 0 } /"avg_ts"/ { ts[prompt > 0 ? "p" : "n"] = $2 + 0 }
                    END { print ts["p"], ts["n"] }' >> "$work/$1-$threads"
        done
    done
    echo
    echo "| $1: threads | prefill 512, tok/s | to the best of fewer | decode 128, tok/s | to the best of fewer |"
    echo "|---:|---:|---:|---:|---:|"
    for threads in $(seq "$most"); do
        echo "$threads $(cut -d ' ' -f 1 "$work/$1-$threads" | sort -g | sed -n 3p)" \
            "$(cut -d ' ' -f 2 "$work/$1-$threads" | sort -g | sed -n 3p)"
    done | awk '{ printf "| %d | %.1f | %s | %.1f | %s |\n", $1, $2, ratio("p", $2), $3, ratio("n", $3) }
        function ratio(test, speed,   r) {
            r = best[test] ? speed / best[test] : 1
            if (speed > best[test]) best[test] = speed
            if (r < 0.95) bad = 1
            return sprintf("%.2f%s", r, r < 0.95 ? " (!)" : "")
        }
        END { exit bad }' || failed=1
}

failed=0
measure alone
if [ "${LOAD:-1}" != 0 ]; then
    (while :; do :; done) &
    load=$!
    measure "beside a busy process"
fi
exit $failed
