"""What is to be measured on a GPU, in parts that are written as they end and not repeated.

    python benchmarks/gpu.py all --out FOLDER --budget-s 500
    python benchmarks/gpu.py ceilings|compile|profile|train|networks|page --out FOLDER [--budget-s 120]

- ceilings.json: the machine; rates of a copy and of a large matrix product in each precision.
- compile: Triton's kernels for what profile will time, in as many processes as there are cores, into Triton's cache.
- profile_PRECISION.parquet: every primitive on the convolutions of the networks at batch 1 and 32.
- PRECISION.safetensors, models.json: the cost model trained on that profile, and its held-out errors.
- networks.json: convselect, cuDNN and Inductor on the networks of `make bench`; first without Inductor, which compiles
  for up to a minute a network.
- layers.json, from the profile: for each network the sum over its convolutions of cuDNN's times, of the fastest
  primitive's, and of the one that the analytic prior takes for the fastest.
- failures.json: what a worker died of; it is left out from then on. Remove an entry to have it tried again.
- RESULTS_GPU.md, from the JSON.

Times are those of events on the GPU. Resumable: what a file holds is not measured again.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from make_grid import convolutions

from convselect import profiling
from convselect.bench import networks
from convselect.bench.gpu.compare import PRECISIONS, SYSTEMS, Clock, Events, Job, allow_tf32, compare
from convselect.bench.gpu.floor import SIZES, floor_ms, layers
from convselect.bench.gpu.report import missing, page
from convselect.bench.gpu.supervise import Note, read, supervise, write
from convselect.costs import roofline, tables
from convselect.costs.train import train
from convselect.gpu_timing import Cuda, GpuTimer
from convselect.machine import Gpu, gpu
from convselect.primitive import Primitive, primitives
from convselect.problem import ConvProblem

BATCHES = (1, 32)
JOBS = [Job(name, batch, precision) for precision in PRECISIONS for batch in BATCHES for name in networks.DEFAULT]
PATIENCE_S = {"profile": 40.0, "networks": 150.0}
"""Without a new note a worker hangs; Inductor may take long to compile."""
MOST_FAILURES = 2
"""Problems on which a primitive may fail before it is not tried on others."""


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
    device, here = Cuda(), gpu()
    import triton

    found: dict[str, Any] = {
        "machine": f"{here.name}, {here.isa}, {here.cores} multiprocessors, driver {here.driver}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": f"torch {torch.__version__}, Triton {triton.__version__}, cuDNN {here.cudnn}",
    }
    src = torch.rand(2**28, device="cuda")
    dst = torch.empty_like(src)
    found["copy_gbs"] = 2 * 4 * 2**28 / median_ms(lambda: dst.copy_(src), device) * 1e-6
    n = 8192
    for dtype, tf32 in ((torch.float16, False), (torch.float32, True), (torch.float32, False)):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        c = torch.empty_like(a)
        key = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        found[f"{key}_tflops"] = 2 * n**3 / median_ms(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), device) * 1e-9
    return found


class Watched:
    """A primitive that notes when its turn comes, and refuses what it failed on before."""

    def __init__(self, primitive: Primitive, precision: str, failed: set[str], note: Note) -> None:
        self._primitive, self._precision, self._failed, self._note = primitive, precision, failed, note
        self._noted = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._primitive, name)

    def refusal(self, problem: ConvProblem, machine: Gpu) -> str | None:
        return "it failed here" if str(problem) in self._failed else self._primitive.refusal(problem, machine)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        if self._noted != str(problem):
            self._noted = str(problem)
            self._note(precision=self._precision, primitive=self._primitive.name, problem=str(problem))
        return self._primitive.prepack(problem, weight)


def watched(precision: str, failures: Sequence[Mapping[str, Any]], note: Note) -> list[Watched]:
    """The primitives of GPUs without those that fail everywhere."""
    mine = [(f["primitive"], f["problem"]) for f in failures if f.get("precision") == precision and "primitive" in f]
    often = Counter(name for name, _ in mine)
    return [
        Watched(q, precision, {problem for name, problem in mine if name == q.name}, note)
        for q in primitives("cuda") if often[q.name] < MOST_FAILURES
    ]  # fmt: skip


def profile(out: Path, note: Note, budget_s: float, timer: Callable[[torch.dtype], Any] = GpuTimer.here) -> bool:
    """Both precisions, each in half of the time. Whether all problems are timed."""
    allow_tf32()
    torch.backends.cudnn.benchmark = True
    complete = True
    start, todo = time.monotonic(), all_problems()
    for left, (precision, dtype) in zip((2, 1), PRECISIONS.items(), strict=True):
        rest = (budget_s - (time.monotonic() - start)) / left
        some: Any = watched(precision, read(out / "failures.json"), note)
        own = timer(dtype)
        assert own.machine.precision == precision, f"torch's switches make it {own.machine.precision}"
        path = out / f"profile_{precision}.parquet"
        done = profiling.profile(path, todo, some, timer=own, budget_s=max(rest, 1.0))
        click.echo(f"{precision}: {done}")
        complete = complete and done.complete
    return complete


def launches(precision: str, here: Gpu, some: Sequence[Primitive]) -> Iterator[Any]:
    """All that `profile` will time of the primitives `some`, on tensors without memory."""
    from convselect.layout import strides
    from convselect.primitive import Activation
    from convselect.primitives.gpu.base import TritonPrimitive, epilogue

    dtype = PRECISIONS[precision]

    def meta(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    for p in all_problems():
        for primitive in some:
            if not isinstance(primitive, TritonPrimitive) or primitive.refusal(p, here) is not None:
                continue
            src, dst = (
                torch.empty_strided(size, strides(size, layout), dtype=dtype, device="meta")
                for size, layout in (((p.mb, p.ic, p.ih, p.iw), primitive.src_layout),
                                     ((p.mb, p.oc, p.oh, p.ow), primitive.dst_layout))
            )  # fmt: skip
            packed = primitive.prepack(p, meta(p.oc, p.ic // p.g, p.kh, p.kw))
            end = epilogue(Activation("relu"), meta(p.oc), None)
            yield from primitive.launches(p, src, packed, dst, end, precision == "tf32")


def compile_kernels(shard: int, shards: int) -> None:
    """Those of the primitives that are this shard's. Triton itself leaves out what it has compiled."""
    allow_tf32()
    for precision, dtype in PRECISIONS.items():
        for launch in launches(precision, gpu(0, dtype), primitives("cuda")[shard::shards]):
            launch.kernel.warmup(
                *launch.args, grid=launch.grid, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
            )


def train_models(out: Path, machine: Callable[[torch.dtype], Gpu]) -> None:
    """layers.json, and a model for each precision, anew where its profile has grown."""
    profiles = {p: tables.read([path]) for p in PRECISIONS if (path := out / f"profile_{p}.parquet").exists()}
    sums = [row for p, table in profiles.items() for row in layer_sums(table, machine(PRECISIONS[p]))]
    write(out / "layers.json", sums)
    path = out / "models.json"
    models = json.loads(path.read_text()) if path.exists() else {}
    for precision, table in profiles.items():
        if table.timings != models.get(precision, {}).get("timings"):
            weights = out / f"{precision}.safetensors"
            models[precision] = dict(train([out / f"profile_{precision}.parquet"], out=weights, progress=False).info)
            write(path, models)


@lru_cache
def built(name: str) -> torch.nn.Module:
    return networks.build(name)[0]


def run_networks(
    out: Path, note: Note, budget_s: float, clock: Clock, jobs: Sequence[Job] = JOBS, first: Sequence[str] = SYSTEMS[:2]
) -> bool:
    """All jobs with the systems `first`, then with all. Whether nothing is left."""
    allow_tf32()
    deadline = time.monotonic() + budget_s
    path, rates = out / "networks.json", json.loads((out / "ceilings.json").read_text())
    for systems in (first, SYSTEMS):
        for job in jobs:
            records = read(path)
            known = next((r for r in records if Job(r["network"], r["batch"], r["precision"]) == job), None)
            failed = {f.get("system") for f in read(out / "failures.json") if job._asdict().items() <= f.items()}
            able = [system for system in systems if system not in failed]
            if failed & {"input", "float64", "eager"} or (known and set(able) <= known["systems"].keys()):
                continue  # there is nothing to compare with, or nothing new
            if time.monotonic() > deadline:
                return False
            note(**job._asdict(), system="input")
            side = SIZES.get(job.network, 224)
            x = torch.randn(job.batch, 3, side, side, generator=torch.Generator().manual_seed(1))
            floor = floor_ms(layers(job.network, job.batch), job.precision, rates)
            found = compare(built(job.network), x, job, able, clock, note)
            record = {**job._asdict(), "floor_ms": floor, "systems": found}
            write(path, [*(r for r in records if r is not known), record])
            click.echo(f"{job}: {found}")
            gc.collect()
            if clock.device.type == "cuda":
                torch.cuda.empty_cache()
    return True


def layer_sums(profile: tables.Profile, here: Gpu) -> Iterator[dict[str, Any]]:
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


def write_page(out: Path, command: str) -> list[str]:
    """RESULTS_GPU.md; what is missing."""
    rates, models = json.loads((out / "ceilings.json").read_text()), out / "models.json"
    infos = json.loads(models.read_text()) if models.exists() else {}
    records, failures = read(out / "networks.json"), read(out / "failures.json")
    (out / "RESULTS_GPU.md").write_text(page({**rates, "command": command}, rates, infos, records, failures, JOBS))
    return missing(JOBS, records, [f for f in failures if "network" in f])


def attempt(command: Sequence[str], seconds: float, **where: Any) -> None:
    """What fails here, or takes too long, does not keep the rest from being measured."""
    try:
        done = subprocess.run(command, check=False, timeout=max(seconds, 1.0), **where)
        if done.returncode:
            click.echo(f"exit code {done.returncode}: {shlex.join(command)}", err=True)
    except subprocess.TimeoutExpired:
        click.echo(f"stopped after {seconds:.0f} s: {shlex.join(command)}", err=True)


def everything(out: Path, budget_s: float) -> None:
    deadline = time.monotonic() + budget_s

    def left(most: float = 1e9) -> float:
        return max(0.0, min(most, deadline - 10 - time.monotonic()))

    def part(*arguments: object) -> list[str]:
        return [sys.executable, __file__, *map(str, arguments), "--out", str(out)]

    subprocess.run(part("ceilings"), check=True, timeout=60)
    shards = os.cpu_count() or 1
    compiling = [subprocess.Popen(part("compile", "--shard", i, "--shards", shards)) for i in range(shards)]
    for process in compiling:
        try:
            process.wait(left(60))
        except subprocess.TimeoutExpired:
            process.kill()
    log = out / "tests.log"
    if not log.exists() or " passed" not in log.read_text() or " failed" in log.read_text():
        names = "gpu_runs", "gpu_kernels", "gpu_plans", "cuda_graphs", "gpu", "gpu_costs"
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # they wait for Triton's compiler mostly
        tests = [f"tests/test_{name}.py" for name in names]
        command = [sys.executable, "-m", "pytest", "-W", "default", "-q", *workers, *tests]
        with log.open("w") as file:  # PYTHONSAFEPATH: the sources here have no compiled kernels
            attempt(command, left(100), stdout=file, stderr=file, env={**os.environ, "PYTHONSAFEPATH": "1"})
        click.echo(log.read_text()[-2000:])
    with tempfile.TemporaryDirectory() as folder:
        for name, most in (("profile", 150.0), ("networks", 1e9)):
            note, seconds = Path(folder, f"{name}.json"), left(most)
            command = part(name, "--note", note, "--until", time.time() + seconds)
            try:
                supervise(command, note, out / "failures.json", time.monotonic() + seconds + 5, PATIENCE_S[name])
            except RuntimeError as error:  # the other parts are worth having all the same
                click.echo(f"{name}: {error}", err=True)
            if name == "profile":
                attempt(part("train"), left(60))


@click.command(help=__doc__)
@click.argument("part", type=click.Choice(["all", "ceilings", "compile", "profile", "train", "networks", "page"]))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--budget-s", default=120.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--until", type=float, help="In place of a budget: when to stop, in seconds of the epoch.")
@click.option("--note", type=click.Path(dir_okay=False, path_type=Path), help="Where a worker notes what it does.")
@click.option("--shard", default=0, help="Of compile.")
@click.option("--shards", default=1, help="Of compile.")
def main(
    part: str, out: Path, budget_s: float, until: float | None, note: Path | None, shard: int, shards: int
) -> None:
    if part != "page" and not torch.cuda.is_available():
        raise click.UsageError("torch finds no GPU that it can use")
    out.mkdir(parents=True, exist_ok=True)
    noted, budget_s = Note(note or out / "note.json"), (budget_s if until is None else until - time.time())
    if part == "ceilings":
        if not (out / "ceilings.json").exists():
            write(out / "ceilings.json", ceilings())
    elif part == "compile":
        compile_kernels(shard, shards)
    elif part == "profile":
        profile(out, noted, budget_s)
    elif part == "train":
        allow_tf32()
        train_models(out, partial(gpu, 0))
    elif part == "networks":
        run_networks(out, noted, budget_s, Events())
    elif part == "all":
        everything(out, budget_s)
    if part in ("all", "page"):
        for line in write_page(out, shlex.join(["benchmarks/gpu.sh"])):
            click.echo(f"not measured yet: {line}")


if __name__ == "__main__":
    main()
