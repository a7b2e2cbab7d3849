#!/usr/bin/env bash
# Prove and measure this program on a machine with an NVIDIA GPU, JAX and PyTorch but without a
# network, in at most 8 minutes. Run it in the kit that `make gpu-kit` builds:
#
#     bash build/gpu-kit/gpu/run.sh
#
# Results are in ${OUT:-build/gpu} of the current folder: table.md, results.json, log.txt.
# PYTHON names the interpreter; arguments go to gpu/stages.py (--tiny tries everything on a CPU).
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)

# A folder of its own rather than a virtual environment, which would not see the packages of the
# virtual environment that the interpreter may be of.
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --no-cache-dir --target "$site" "$kit"/wheels/*.whl
export PYTHONPATH="$kit:$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONDONTWRITEBYTECODE=1
"$python" "$kit/gpu/stages.py" --out "$out" "$@" &
child=$!
trap 'kill -TERM $child 2>/dev/null; wait $child || true; rm -rf "$site"; exit 143' INT TERM
wait $child
