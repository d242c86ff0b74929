"""What is to be measured on a GPU, in parts that are written as they end and not repeated.

    python benchmarks/gpu.py ceilings|profile|peers|layers --out FOLDER [--budget-s 120]

- ceilings.json: rates of a copy and of a large matrix product in each precision.
- profile_DTYPE.parquet: every primitive on the convolutions of the networks at batch 1 and 32.
- peers.json: the networks in eager mode (cuDNN, benchmark=True, channels_last) and compiled by Inductor (max-autotune,
  CUDA graphs); {"network", "batch", "dtype", "system", "ms"}.
- layers.json, from the profile: for each network the sum over its convolutions of cuDNN's times, of the fastest
  primitive's, and of the one that the analytic prior takes for the fastest.

Times are those of events on the GPU. Resumable: what a file holds is not measured again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from make_grid import convolutions

from convselect import profiling
from convselect.bench import networks
from convselect.costs import roofline, tables
from convselect.gpu_timing import Cuda, GpuTimer
from convselect.machine import Gpu, gpu
from convselect.primitive import primitives
from convselect.problem import ConvProblem

BATCHES = (1, 32)
DTYPES = ("float16", "float32")
SIZES = {"inception_v3": 299}


def problems(name: str, batch: int) -> list[ConvProblem]:
    return [p.with_batch(batch) for p in convolutions(name, SIZES.get(name, 224))]


def all_problems() -> list[ConvProblem]:
    """In the order in which a time-boxed profile learns most: a layer of each network in turn."""
    lists = [list(dict.fromkeys(problems(name, batch))) for name in networks.DEFAULT for batch in BATCHES]
    longest = max(map(len, lists))
    return list(dict.fromkeys(some[i] for i in range(longest) for some in lists if i < len(some)))


def median_ms(run: Callable[[], object], device: Cuda, rounds: int = 15) -> float:
    device.warm_up(run)
    return statistics.median(device.elapsed_ms(run) for _ in range(rounds))


def ceilings() -> dict[str, Any]:
    """GB/s counts bytes read and written, TFLOP/s two operations for each multiply-add."""
    device = Cuda()
    found: dict[str, Any] = {"machine": str(gpu()), "torch": torch.__version__}
    src = torch.rand(2**28, device="cuda")
    dst = torch.empty_like(src)
    found["copy_gbs"] = 2 * 4 * 2**28 / median_ms(lambda: dst.copy_(src), device) * 1e-6
    n = 8192
    for dtype, tf32 in ((torch.float16, False), (torch.float32, True), (torch.float32, False)):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        c = torch.empty_like(a)
        key = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        found[f"{key}_tflops"] = 2 * n**3 / median_ms(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), device) * 1e-9
    return found


def peers(known: list[dict[str, Any]], deadline: float) -> Iterator[dict[str, Any]]:
    """Rows that `known` lacks, until `deadline` (perf_counter seconds)."""
    device = Cuda()
    torch.backends.cudnn.benchmark = True
    done = {(row["network"], row["batch"], row["dtype"], row["system"]) for row in known}
    for name in networks.DEFAULT:
        for dtype in DTYPES:
            for batch in BATCHES:
                for system in ("eager", "inductor"):
                    if (name, batch, dtype, system) in done or time.perf_counter() > deadline:
                        continue
                    model, x = networks.build(name, batch)
                    model = model.to("cuda", getattr(torch, dtype), memory_format=torch.channels_last)
                    x = x.to("cuda", getattr(torch, dtype), memory_format=torch.channels_last)
                    torch._dynamo.reset()
                    call = torch.compile(model, mode="max-autotune") if system == "inductor" else model
                    with torch.inference_mode():
                        ms = median_ms(lambda call=call, x=x: call(x), device)
                    yield {"network": name, "batch": batch, "dtype": dtype, "system": system, "ms": ms}


def layers(profile: tables.Profile, here: Gpu) -> Iterator[dict[str, Any]]:
    """For each network whose convolutions are all in `profile`. Milliseconds; `prior`: of what the prior chooses."""
    row = {problem: i for i, problem in enumerate(profile.problems)}
    families = {primitive.name: primitive.family for primitive in primitives("cuda")}
    names = list(profile.primitives)
    for name in networks.DEFAULT:
        for batch in BATCHES:
            convs = problems(name, batch)
            if not all(p in row for p in convs):
                continue
            ms = profile.ms[[row[p] for p in convs]]
            prior = roofline.primitives_ms(convs, [(n, families.get(n, n)) for n in names], here)
            chosen = np.where(np.isfinite(ms), prior, np.inf).argmin(axis=1)
            cudnn = np.nanmin(ms[:, [n.startswith("cudnn") for n in names]], axis=1)
            yield {
                "network": name, "batch": batch, "precision": here.precision, "cudnn": float(cudnn.sum()),
                "fastest": float(np.nanmin(ms, axis=1).sum()), "prior": float(ms[np.arange(len(ms)), chosen].sum()),
                "machine": str(here),
            }  # fmt: skip


def save(path: Path, data: object) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    beside.replace(path)


@click.command()
@click.argument("part", type=click.Choice(["ceilings", "profile", "peers", "layers"]))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--budget-s", default=120.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
def main(part: str, out: Path, budget_s: float) -> None:
    """Measure one part."""
    if not torch.cuda.is_available():
        raise click.UsageError("torch finds no GPU that it can use")
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + budget_s
    path = out / f"{part}.json"
    if part == "ceilings":
        if not path.exists():
            save(path, ceilings())
    elif part == "peers":
        rows = json.loads(path.read_text()) if path.exists() else []
        for row in peers(rows, deadline):
            rows.append(row)
            save(path, rows)
            click.echo(row)
    elif part == "profile":
        for dtype in DTYPES:
            done = profiling.profile(
                out / f"profile_{dtype}.parquet", all_problems(), timer=GpuTimer.here(getattr(torch, dtype)),
                budget_s=budget_s / len(DTYPES),
            )  # fmt: skip
            click.echo(f"{dtype}: {done}")
    else:
        found = []
        for dtype in DTYPES:
            here = gpu(0, getattr(torch, dtype))
            found += layers(tables.read([out / f"profile_{dtype}.parquet"]), here)
        save(path, found)
        for row in found:
            click.echo(row)


if __name__ == "__main__":
    main()
