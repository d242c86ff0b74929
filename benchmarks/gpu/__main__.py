"""What is to be measured on a GPU, in parts that are written as they end and not repeated.

    python benchmarks/gpu all --out FOLDER --budget-s 500 [--parts "compile profile=300 train"]
    python benchmarks/gpu ceilings|compile|profile|train|networks|page --out FOLDER [--budget-s 120]

- ceilings.json: the machine; rates of a copy and of a large matrix product in each precision. Every call needs it.
- compile: Triton's kernels for what profile and networks will run, in as many processes as there are cores, into
  Triton's cache.
- tests.json: how the tests on the GPU ended; tests.log has them.
- profile_PRECISION.parquet: every primitive on the convolutions of the networks at batch 1 and 32; beside it
  profile_PRECISION.operators.parquet, the changes of layout.
- train: PRECISION.safetensors and models.json, the cost model trained on that profile and its held-out errors; and
  layers.json: for each network the sum over its convolutions of cuDNN's times, of the fastest primitive's, and of the
  one that the analytic prior takes for the fastest.
- networks.json: convselect, cuDNN and Inductor on the networks of `make bench`, the most telling first, with the model
  that train has made, which is copied into the package for that; what raised is there with its traceback.
  plans/NETWORK_BATCH_PRECISION.json: convselect's plan with the time of each layer.
- failures.json: what a worker died of, and what failed in profile; it is left out from then on. Remove an entry, or
  that of networks.json, to have it tried again. profile.log and networks.log: what the workers wrote to stderr.
- RESULTS_GPU.md, from the JSON.

Times are those of events on the GPU. Resumable: what a file holds is not measured again.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from ceilings import ceilings
from compare import OURS, PRECISIONS, SYSTEMS, Clock, Events, Job, allow_tf32, compare
from floor import floor_ms, layers
from page import missing, page
from profiles import compile_kernels, profile
from worker import Note, read, stop, supervise, tell, write

from convselect.bench import networks
from convselect.costs import model_for, prior, shipped, tables
from convselect.costs.train import train
from convselect.machine import Gpu, gpu
from convselect.measure.profiling import operators_path
from convselect.primitive import primitives
from convselect.problem import ConvProblem

BATCHES = (1, 32)
_TELLING = ("resnet50", "mobilenet_v2", "vgg16", "efficientnet_b0")
JOBS = [
    Job(name, batch, precision)
    for some in (_TELLING, tuple(name for name in networks.DEFAULT if name not in _TELLING))
    for precision in PRECISIONS
    for batch in BATCHES
    for name in some
]
PARTS = {"compile": 90.0, "tests": 100.0, "profile": 150.0, "train": 60.0, "networks": 1e9}
"""In this order; each has at most so many seconds, and `networks` what is left."""
RESERVE_S = 15.0
"""Of the budget: a worker is told to stop, and ends, and the page is written."""
LATE_S = 5.0
"""After its time a worker is stopped; between two problems or networks it sees itself that it is over."""
MachineOf = Callable[[torch.dtype], Gpu]


def patience_s(noted: Mapping[str, Any]) -> float:
    """A worker hangs if it does nothing else for so long: to compile for `max-autotune` takes minutes."""
    return 400.0 if noted.get("system") == "inductor" else 150.0 if "system" in noted else 60.0


@lru_cache
def problems(name: str, batch: int) -> list[ConvProblem]:
    return [p.with_batch(batch) for p in of_one_image(name)]


@lru_cache
def of_one_image(name: str) -> list[ConvProblem]:
    return list(networks.convolutions(name, networks.side_of(name)))


def all_problems() -> list[ConvProblem]:
    """In the order in which a time-boxed profile learns most: a layer of each network in turn."""
    lists = [list(dict.fromkeys(problems(name, batch))) for name in networks.DEFAULT for batch in BATCHES]
    longest = max(map(len, lists))
    return list(dict.fromkeys(some[i] for i in range(longest) for some in lists if i < len(some)))


def train_models(out: Path, machine: MachineOf) -> None:
    """layers.json, and a model for each precision, anew where its profile has grown."""
    profiles = {p: tables.read([path]) for p in PRECISIONS if (path := out / f"profile_{p}.parquet").exists()}
    sums = [row for p, table in profiles.items() for row in layer_sums(table, machine(PRECISIONS[p]))]
    write(out / "layers.json", sums)
    path = out / "models.json"
    models = json.loads(path.read_text()) if path.exists() else {}
    for precision, table in profiles.items():
        if table.timings != models.get(precision, {}).get("timings"):
            weights, rows = out / f"{precision}.safetensors", out / f"profile_{precision}.parquet"
            operators = [beside] if (beside := operators_path(rows)).exists() else []
            models[precision] = dict(train([rows], operators=operators, out=weights, progress=False).info)
            write(path, models)


def use_models(out: Path, machine: MachineOf) -> None:
    """What was trained goes where the package looks for it."""
    for precision, dtype in PRECISIONS.items():
        if (trained := out / f"{precision}.safetensors").exists():
            shutil.copy(trained, shipped(machine(dtype)))


def model_name(machine: Gpu) -> str:
    """Of what convselect predicts by before it calibrates."""
    info = model_for(machine).info
    return f"a model of {info['timings']} timings of {info['problems']} problems" if info else "the roofline"


@lru_cache
def built(name: str) -> torch.nn.Module:
    return networks.build(name)[0]


def run_networks(
    out: Path, note: Note, budget_s: float, clock: Clock, machine: MachineOf, jobs: Sequence[Job] = JOBS
) -> bool:
    """Whether nothing is left."""
    allow_tf32()
    use_models(out, machine)
    deadline = time.monotonic() + budget_s
    path, rates = out / "networks.json", json.loads((out / "ceilings.json").read_text())
    (out / "plans").mkdir(exist_ok=True)
    for job in jobs:
        records = read(path)
        known = next((r for r in records if Job(r["network"], r["batch"], r["precision"]) == job), None)
        failed = {f.get("system") for f in read(out / "failures.json") if job._asdict().items() <= f.items()}
        able = [system for system in SYSTEMS if system not in failed]
        if failed & {"input", "float64", "eager", "times"} or (known and set(able) <= known["systems"].keys()):
            continue  # there is nothing to compare, or nothing new
        if time.monotonic() > deadline:
            return False
        note(**job._asdict(), system="input")
        side = networks.side_of(job.network)
        x = torch.randn(job.batch, 3, side, side, generator=torch.Generator().manual_seed(1))
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CONVSELECT_CACHE"] = cache  # a network's first run, whichever ran before
            found = compare(built(job.network), x, job, able, clock, note)
        if plan := found.get(OURS, {}).pop("plan", None):
            write(out / "plans" / f"{'_'.join(map(str, job))}.json", plan)
        floor = floor_ms(layers(job.network, job.batch), job.precision, rates)
        record = {**job._asdict(), "floor_ms": floor, "model": model_name(machine(PRECISIONS[job.precision]))}
        write(path, [*(r for r in records if r is not known), {**record, "systems": found}])
        tell(
            f"{job}: " + ", ".join(f"{system} {of.get('median_ms', of.get('absent'))}" for system, of in found.items())
        )
        if clock.device.type == "cuda":
            gc.collect()
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
            predicted = prior.primitives_ms(convs, [(n, families.get(n, n)) for n in names], here)
            chosen = np.where(np.isfinite(ms), predicted, np.inf).argmin(axis=1)
            cudnn = np.nanmin(ms[:, [n.startswith("cudnn") for n in names]], axis=1)
            yield {
                "network": name,
                "batch": batch,
                "precision": here.precision,
                "cudnn": float(cudnn.sum()),
                "fastest": float(np.nanmin(ms, axis=1).sum()),
                "prior": float(ms[np.arange(len(ms)), chosen].sum()),
                "machine": str(here),
            }


def write_page(out: Path, command: str) -> list[str]:
    """RESULTS_GPU.md; what is missing."""
    rates, models, tests = json.loads((out / "ceilings.json").read_text()), out / "models.json", out / "tests.json"
    infos = json.loads(models.read_text()) if models.exists() else {}
    code = json.loads(tests.read_text())["exit_code"] if tests.exists() else None
    ended = {None: "not run to their end", 0: "passed"}.get(code, f"failed with exit code {code}")
    records, failures = read(out / "networks.json"), read(out / "failures.json")
    about = {**rates, "command": command, "tests": ended}
    (out / "RESULTS_GPU.md").write_text(page(about, rates, infos, records, failures, JOBS))
    return missing(JOBS, records, [f for f in failures if "network" in f])


def attempt(command: Sequence[str], seconds: float, **where: Any) -> int | None:
    """Its exit code, None if it took too long: what fails does not keep the rest from being measured."""
    process = subprocess.Popen(command, start_new_session=True, **where)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        tell(f"stopped after {seconds:.0f} s: {shlex.join(command)}")
        return None
    finally:
        stop(process, 10.0)


def run_tests(out: Path, seconds: float) -> None:
    """Unless they have run to their end."""
    if (out / "tests.json").exists():
        return
    names = ("gpu_runs", "gpu_streams", "gpu_kernels", "gpu_plans", "cuda_graphs", "gpu", "gpu_costs")
    names += ("changes", "model_state", "shortcut", "weights")  # calls without guards, on the Python there
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # they wait for Triton's compiler mostly
    tests = [f"tests/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-W", "default", "-vv", "--tb=short", *workers, *tests]
    log = out / "tests.log"
    with log.open("w") as file:  # PYTHONSAFEPATH: the sources here have no compiled kernels
        code = attempt(command, seconds, stdout=file, stderr=file, env={**os.environ, "PYTHONSAFEPATH": "1"})
    click.echo(log.read_text()[-3000:])
    if code is not None:
        write(out / "tests.json", {"exit_code": code})


def everything(out: Path, budget_s: float, parts: Mapping[str, float]) -> None:
    """`parts` -> seconds at most."""
    deadline = time.monotonic() + budget_s - RESERVE_S

    def command(*arguments: object) -> list[str]:
        return [sys.executable, __file__, *map(str, arguments), "--out", str(out)]

    subprocess.run(command("ceilings"), check=True, timeout=60)
    for name, most in parts.items():
        seconds = min(most, deadline - time.monotonic())
        if seconds <= 0:
            tell(f"no time is left for {name}")
            continue
        tell(f"{name}, for at most {seconds:.0f} s")
        if name == "compile":
            compile_in_shards(command, seconds)
        elif name == "tests":
            run_tests(out, seconds)
        elif name == "train":
            attempt(command("train"), seconds)
        else:
            work(out, name, command, seconds)


Command = Callable[..., list[str]]


def compile_in_shards(command: Command, seconds: float) -> None:
    deadline, shards = time.monotonic() + seconds, os.cpu_count() or 1
    running = [
        subprocess.Popen(command("compile", "--shard", i, "--shards", shards), start_new_session=True)
        for i in range(shards)
    ]
    while time.monotonic() < deadline and any(process.poll() is None for process in running):
        time.sleep(0.2)
    late = sum(process.poll() is None for process in running)
    for process in running:
        stop(process, 0.0)
    tell(f"compile: {shards - late} of {shards} shards are complete")


def work(out: Path, name: str, command: Command, seconds: float) -> None:
    """A part whose worker may die."""
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "note.json")
        whole = command(name, "--note", note, "--until", time.time() + seconds)
        log, deadline = out / f"{name}.log", time.monotonic() + seconds + LATE_S
        try:
            supervise(whole, note, out / "failures.json", log, deadline, patience_s)
        except RuntimeError as error:  # the other parts are worth having all the same
            tell(f"{name}: {error}")


def parse_parts(text: str) -> dict[str, float]:
    """ "train profile=200": those of `PARTS`, in its order, with their seconds."""
    asked = dict(word.partition("=")[::2] for word in text.split())
    if unknown := asked.keys() - PARTS.keys():
        raise click.BadParameter(f"no part is called {unknown.pop()!r}; there are {', '.join(PARTS)}")
    try:
        return {name: float(asked[name] or most) for name, most in PARTS.items() if name in asked}
    except ValueError as error:
        raise click.BadParameter(f"{text!r} must read NAME or NAME=SECONDS: {error}") from error


@click.command(help=__doc__)
@click.argument("part", type=click.Choice(["all", "ceilings", "compile", "profile", "train", "networks", "page"]))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--budget-s", default=120.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--parts", default=" ".join(PARTS), show_default=True, help="Of all; NAME=SECONDS bounds one.")
@click.option("--until", type=float, help="In place of a budget: when to stop, in seconds of the epoch.")
@click.option("--note", type=click.Path(dir_okay=False, path_type=Path), help="Where a worker notes what it does.")
@click.option("--shard", default=0, help="Of compile.")
@click.option("--shards", default=1, help="Of compile.")
def main(
    part: str, out: Path, budget_s: float, parts: str, until: float | None, note: Path | None, shard: int, shards: int
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has it ignored
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that workers are stopped
    if part != "page" and not torch.cuda.is_available():
        raise click.UsageError("torch finds no GPU that it can use")
    out.mkdir(parents=True, exist_ok=True)
    noted, budget_s = Note(note or out / "note.json"), (budget_s if until is None else until - time.time())
    if part == "ceilings":
        if not (out / "ceilings.json").exists():
            write(out / "ceilings.json", ceilings())
    elif part == "compile":
        both = {name: [p for batch in BATCHES for p in problems(name, batch)] for name in networks.DEFAULT}
        compile_kernels(both, shard, shards)
    elif part == "profile":
        profile(out, all_problems(), noted, budget_s)
    elif part == "train":
        allow_tf32()
        train_models(out, partial(gpu, 0))
    elif part == "networks":
        run_networks(out, noted, budget_s, Events(), partial(gpu, 0))
    elif part == "all":
        everything(out, budget_s, parse_parts(parts))
    if part in ("all", "page"):
        for line in write_page(out, shlex.join(["benchmarks/gpu.sh"])):
            click.echo(f"not measured yet: {line}")


if __name__ == "__main__":
    main()
