"""What a busy neighbour costs: plans calibrated with and without one core loaded, judged by times of a quiet machine.

    python benchmarks/neighbour.py [NETWORK...] [--threads 2] [--budget-s 2]

Writes NEIGHBOUR.md. The machine must be otherwise idle. Calibration starts from nothing each time.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import click
import torch

from convselect import machine
from convselect.bench import markdown
from convselect.bench.networks import load
from convselect.bench.oracle import Judge
from convselect.bench.report import geomean
from convselect.choices import predict
from convselect.costs import CostModel, shipped
from convselect.options import Options

NETWORKS = ("resnet18", "resnet50", "googlenet", "squeezenet1_1", "mobilenet_v2", "efficientnet_b0")


@contextlib.contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that never sleeps."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


@click.command(help=__doc__)
@click.argument("networks", nargs=-1)
@click.option("--threads", default=2, show_default=True)
@click.option("--budget-s", default=2.0, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Calibrations of each kind; medians are shown.")
def main(networks: tuple[str, ...], threads: int, budget_s: float, repeats: int) -> None:
    torch.set_num_threads(threads)
    options, cost_model = Options(budget_s=budget_s), CostModel.load(shipped(machine.cpu()))
    lines = [
        "# Calibration beside a busy neighbour",
        "",
        f"- machine: {machine.cpu()}; torch {torch.__version__}; {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- command: `{' '.join(['python benchmarks/neighbour.py', *sys.argv[1:]])}`",
        f"- budget {budget_s:g} s; medians of {repeats} calibrations of each kind, in turn",
        "",
        "Convolutions and layout transforms of the plan, in ms as measured on the quiet machine.",
        "",
    ]
    rows: list[list[object]] = []
    ratios = []
    for name in networks or NETWORKS:
        judge = Judge(*load(name), options, cost_model)
        plans, seconds = {False: [], True: []}, {False: [], True: []}
        for _ in range(repeats):
            for busy in (False, True):
                with neighbour(busy):
                    start = time.perf_counter()
                    costs = judge.calibrated()
                    seconds[busy].append(time.perf_counter() - start)
                plans[busy].append(judge.plan(costs, predict(costs, judge.able)[0]))
        judge.measure(costs)
        alone, beside = (median(judge.ms(plan) for plan in plans[busy]) for busy in (False, True))
        ratios.append(beside / alone)
        spent = [f"{median(seconds[busy]):.2f}" for busy in (False, True)]
        rows.append([name, f"{alone:.3f}", f"{beside:.3f}", f"{beside / alone:.3f}", *spent])
        click.echo(f"{name}: {beside / alone:.3f}")
    rows.append(["geometric mean", None, None, f"{geomean(ratios):.3f}", None, None])
    head = ["network", "calibrated alone", "beside a neighbour", "ratio", "seconds, alone", "seconds, beside"]
    lines += markdown.table(head, rows)
    Path(__file__).with_name("NEIGHBOUR.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
