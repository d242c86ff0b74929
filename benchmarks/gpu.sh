#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of less than nine minutes; run it again to go on where it stopped.
# PYTHON: an interpreter with torch for CUDA, Triton and what pyproject.toml asks for (pip must be able to build).
# OUT: a folder for what is measured.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/gpu}
SITE=${SITE:-build/gpu-site}

"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no GPU that it can use")'
"$PYTHON" -m pip install -q --no-build-isolation --no-deps --upgrade --target "$SITE" .
export PYTHONPATH="$PWD/$SITE${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
"$PYTHON" benchmarks/gpu.py ceilings --out "$OUT"
# What fails here does not keep the rest from being measured; the log says which kernel it was.
# PYTHONSAFEPATH: the sources here have no compiled kernels.
PYTHONSAFEPATH=1 timeout 120 "$PYTHON" -m pytest -W default tests/test_gpu_kernels.py tests/test_gpu.py tests/test_gpu_costs.py -q 2>&1 |
  tee "$OUT/tests.log" || echo "tests failed or took too long: see $OUT/tests.log" >&2
"$PYTHON" benchmarks/gpu.py profile --out "$OUT" --budget-s 150
"$PYTHON" benchmarks/gpu.py layers --out "$OUT"
"$PYTHON" benchmarks/gpu.py peers --out "$OUT" --budget-s 120
