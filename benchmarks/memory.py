"""Memory of a network in each system, in a fresh process that builds it and runs it three times.

    python benchmarks/memory.py [--network resnet50] [--threads 2]

writes benchmarks/MEMORY.md.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

import click

CALLS = 3
SYSTEMS = ("eager", "convselect", "onnxruntime", "openvino")
NOTE = """\
Resident memory of a fresh process, MiB: with its libraries imported, after {calls} calls, and at the peak (VmHWM of
/proc/self/status). ONNX Runtime and OpenVINO read the network from a file and import no torch. The process of eager and
of convselect imports torch with its compiler, and holds the module, {weights:.0f} MiB, beside what is made of it."""


def status_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process. `ru_maxrss` would count the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def run_torch(system: str, network: str, threads: int) -> tuple[float, float]:
    """MiB with the libraries alone, and after the calls."""
    import torch

    import convselect
    from convselect.bench.networks import torchvision_models

    models = torchvision_models()
    torch.set_num_threads(threads)
    imported = status_mib("VmRSS")
    model = models.get_model(network, weights=None).eval()
    fast = convselect.compile(model) if system == "convselect" else model
    with torch.inference_mode():
        for _ in range(CALLS):
            fast(torch.zeros(1, 3, 224, 224))
    return imported, status_mib("VmRSS")


def run_file(system: str, file: str, threads: int) -> tuple[float, float]:
    """The same."""
    import numpy as np

    runtime = importlib.import_module(system)
    imported = status_mib("VmRSS")
    x = np.zeros((1, 3, 224, 224), np.float32)
    if system == "onnxruntime":
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for _ in range(CALLS):
            session.run(None, {"x": x})
    else:
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        request = runtime.Core().compile_model(file, "CPU", settings).create_infer_request()
        for _ in range(CALLS):
            request.infer([x])
    return imported, status_mib("VmRSS")


def child(system: str, network: str, file: str, threads: int) -> None:
    """Runs one system in this process and prints what it held."""
    own = system in ("eager", "convselect")
    imported, after = run_torch(system, network, threads) if own else run_file(system, file, threads)
    print(json.dumps({"imported": imported, "after": after, "peak": status_mib("VmHWM")}))


@click.command(help=__doc__)
@click.option("--network", default="resnet50", show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(network: str, threads: int) -> None:
    from convselect import machine
    from convselect.bench import markdown
    from convselect.bench.networks import build
    from convselect.bench.peers import onnx_file

    model, x = build(network)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = onnx_file(model, x, Path(folder))
        for system in SYSTEMS:
            command = [sys.executable, __file__, "child", system, network, str(file), str(threads)]
            found[system] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    base = found["onnxruntime"]
    rows = []
    for system, one in found.items():
        added = one["peak"] - one["imported"]
        ratios = (added / (base["peak"] - base["imported"]), one["peak"] / base["peak"])
        sizes = (one["imported"], one["after"], one["peak"], added)
        rows.append([system, *(f"{mib:.0f}" for mib in sizes), *(f"{ratio:.2f}" for ratio in ratios)])
    head = [network, "libraries", "after", "peak", "peak - libraries", "of ONNX Runtime's", "peak, of ONNX Runtime's"]
    lines = [
        "# Memory",
        "",
        f"- machine: {machine.cpu()}; {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- command: `python benchmarks/memory.py --network {network} --threads {threads}`",
        "",
        NOTE.format(calls=CALLS, weights=weights),
        "",
        *markdown.table(head, rows),
    ]
    text = "\n".join(lines) + "\n"
    click.echo(text)
    Path(__file__).with_name("MEMORY.md").write_text(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
