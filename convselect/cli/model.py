"""`convselect calibrate`, `profile` and `train`: the cost model's data and weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from convselect.cli.checks import DEVICE, DTYPE, out_file, usage_errors


@click.command()
@click.option("--budget-s", default=2.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--threads", type=click.IntRange(min=1), help="Calibrate for this many; torch's own number otherwise.")
@DEVICE
def calibrate(budget_s: float, threads: int | None, device: str) -> None:
    """Time a few samples on this machine and adapt the cost model to it."""
    import convselect
    from convselect.bench.runner import pin_threads

    if threads is not None:
        pin_threads(threads)
    with usage_errors():
        convselect.calibrate(budget_s=budget_s, device=device)


@click.command()
@out_file("--out", required=True, help="The Parquet table.")
@click.option(
    "--shapes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Problems to time, one a line; otherwise a grid drawn from real networks.",
)
@click.option("--budget-s", type=click.FloatRange(min=0, min_open=True), help="Stop after so many seconds.")
@click.option("--threads", type=click.IntRange(min=1), help="torch's own number otherwise.")
@DEVICE
@DTYPE
def profile(
    out: Path, shapes: Path | None, budget_s: float | None, threads: int | None, device: str, dtype: str
) -> None:
    """Time every primitive on many problems. Stop it at any time: the next run goes on where this one stopped."""
    import torch

    from convselect.measure import profiling
    from convselect.measure.timers import timer_on

    with usage_errors():
        problems = profiling.read_problems(shapes) if shapes else None
        timer = timer_on(device, getattr(torch, dtype)) if device == "cuda" else None
        done = profiling.profile(out, problems, timer=timer, threads=threads, budget_s=budget_s)
    rest = "complete" if done.complete else "not complete: run it again to go on"
    click.echo(f"{out}: {done.timings} timings of {done.problems} problems in {done.seconds:.0f} s, {rest}")


@click.command()
@click.argument("tables", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@out_file("--out", required=True, help="The safetensors file.")
def train(tables: tuple[Path, ...], out: Path) -> None:
    """Fit the cost model to profile tables."""
    from convselect.costs.train import train as fit
    from convselect.measure import profiling

    operators = [path for table in tables if (path := profiling.operators_path(table)).exists()]
    with usage_errors():
        model = fit(tables, operators=operators, out=out)
    click.echo(json.dumps(model.info, indent=1))
