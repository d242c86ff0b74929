#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of less than nine minutes; run it again to go on where it stopped.
# PYTHON: an interpreter with torch for CUDA, Triton, torchvision and what can build packages (scikit-build-core).
# WHEELS: a folder of wheels of what else pyproject.toml asks for, where there is no package index.
# OUT: a folder for what is measured.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/gpu}
SITE=${SITE:-build/gpu-site}

"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no GPU that it can use")'
PIP=("$PYTHON" -m pip install -q --no-deps --upgrade --target "$SITE")
if [ -n "${WHEELS:-}" ]; then "${PIP[@]}" --no-index "$WHEELS"/*.whl; fi
"${PIP[@]}" --no-build-isolation .
export PYTHONPATH="$PWD/$SITE${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" - <<'CHECK'
import importlib.util, sys
names = ("platformdirs", "filelock", "safetensors", "jinja2", "pyarrow", "click", "rich", "triton", "torchvision")
missing = [name for name in names if importlib.util.find_spec(name) is None]
sys.exit(f"missing: {', '.join(missing)}; install them, or put their wheels into a folder WHEELS" if missing else None)
CHECK
exec "$PYTHON" benchmarks/gpu.py all --out "$OUT" --budget-s $((530 - SECONDS))
