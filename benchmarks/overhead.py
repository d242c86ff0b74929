"""What a call costs beside the kernels: guards, the check that weights are current, Python and dispatch.

    python benchmarks/overhead.py [--threads 2] [NETWORK...]

Each round runs the whole call and the program alone, in turn, so that both find the caches as a network leaves them.
The last column is a call whose graph does nothing, again and again, with warm caches: its least time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import numpy as np
import torch

import convselect
from convselect import machine
from convselect.bench.networks import build
from convselect.runtime.compiled import run_graphs

NETWORKS = ("mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "googlenet", "resnet18", "resnet50", "densenet121")


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


@click.command(help=__doc__)
@click.argument("networks", nargs=-1)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=200, show_default=True)
@torch.inference_mode()
def main(networks: tuple[str, ...], threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    click.echo(f"{machine.cpu()}; {threads} threads; medians of {rounds} rounds, ms")
    click.echo("network            call  program  beside   share  of it weights  empty, us")
    for name in networks or NETWORKS:
        with torch.inference_mode(False):  # weights made under inference mode have no version and are read whole
            model, x = build(name)
        fast = convselect.compile(model)
        run = run_graphs(fast, [x])[0]
        graph, rest = run.graph, run.rest
        packed = graph._constants.current(run.statics)
        calls = (
            lambda: fast(x),  # noqa: B023
            lambda: graph.body(packed, *rest),  # noqa: B023
            lambda: graph._constants.current(run.statics),  # noqa: B023
        )
        for call in calls:
            timed(call)
        times = np.median([[timed(call) for call in calls] for _ in range(rounds)], axis=0)
        whole, program, weights = times
        beside = whole - program
        results = graph.body(packed, *rest)
        graph.body = lambda packed, *rest: results  # noqa: B023
        empty = 1e3 * min(timed(calls[0]) for _ in range(10 * rounds))
        row = f"{name:16s} {whole:6.2f}  {program:7.2f}  {beside:6.3f}  {beside / whole:6.1%}  {weights:6.3f}"
        click.echo(f"{row}  {empty:9.0f}")


if __name__ == "__main__":
    main()
