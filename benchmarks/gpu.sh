#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run of less than nine minutes; run it again to go on where it stopped.
# PYTHON: an interpreter with torch for CUDA, Triton, torchvision and what can build packages (scikit-build-core, CMake).
# WHEELS: a folder of wheels of what else pyproject.toml asks for, where there is no package index.
# RESULTS: the folder for what is measured, build/gpu if it is not set; benchmarks/gpu/__main__.py says what lies in it.
# PARTS: what to do of "compile tests profile train networks", each with the seconds that it may take if they are to be
#   others: PARTS="profile=400 train" trains on more, PARTS=networks spends the whole run on further networks.
# BUDGET_S: seconds for all, 530 if it is not set.
# OUT: a folder that gets gpu.tgz, what is in RESULTS, however the run ends. To go on on another machine, unpack it there
#   first: mkdir -p build/gpu && tar -xzf gpu.tgz -C build/gpu
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
RESULTS=${RESULTS:-build/gpu}
SITE=${SITE:-build/gpu-site}

mkdir -p "$RESULTS"
if [ -n "${OUT:-}" ]; then trap 'tar -czf "$OUT/gpu.tgz" -C "$RESULTS" .' EXIT; fi
"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no GPU that it can use")'
PIP=("$PYTHON" -m pip install -q --no-deps --upgrade --target "$SITE")
if [ -n "${WHEELS:-}" ]; then "${PIP[@]}" --no-index "$WHEELS"/*.whl; fi
export PYTHONPATH="$PWD/$SITE${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" - <<'CHECK'
import importlib.util, sys
names = ("platformdirs", "filelock", "safetensors", "jinja2", "pyarrow", "click", "rich", "triton", "torchvision",
         "scikit_build_core")
missing = [name for name in names if importlib.util.find_spec(name) is None]
sys.exit(f"missing: {', '.join(missing)}; install them, or put their wheels into a folder WHEELS" if missing else None)
CHECK
"${PIP[@]}" --no-build-isolation .
"$PYTHON" benchmarks/gpu all --out "$RESULTS" --budget-s $((${BUDGET_S:-530} - SECONDS)) ${PARTS:+--parts "$PARTS"}
