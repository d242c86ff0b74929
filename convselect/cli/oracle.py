"""`convselect bench --oracle`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convselect.cli.checks import usage_errors

if TYPE_CHECKING:
    from rich.console import Console

    from convselect.bench.oracle import Verdict


def run(
    console: Console,
    jobs: Sequence[tuple[str, str | None]],
    batch: int,
    accuracy: str,
    budget_s: float,
    json_path: Path | None,
) -> None:
    """Judges each job, a network and the shape of its input if it is the user's own, and prints the table."""
    from datetime import datetime, timezone

    from convselect import machine
    from convselect.bench import networks
    from convselect.bench.oracle import judge
    from convselect.costs import CostModel, shipped
    from convselect.options import Options

    here = machine.cpu()
    with usage_errors():
        options, cost_model = Options(accuracy=accuracy, budget_s=budget_s), CostModel.load(shipped(here))
    verdicts: list[Verdict] = []
    try:
        for job, shape in jobs:
            with console.status(f"{job}: building") as status:
                model, x = networks.load(job, shape, batch)

                def tell(text: str, job: str = job) -> None:
                    status.update(f"{job}: {text}")

                verdicts.append(judge(job, model, x, options, cost_model, tell))
            if json_path:
                record = {
                    "machine": str(here),
                    "threads": here.threads,
                    "batch": batch,
                    "accuracy": accuracy,
                    "budget_s": budget_s,
                    "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
                    "networks": [verdict.to_dict() for verdict in verdicts],
                }
                json_path.write_text(json.dumps(record, indent=1) + "\n")
    finally:  # what was judged is not lost to an error in a later network
        if verdicts:
            print_verdicts(console, verdicts, f"{here}, {here.threads} threads, batch {batch}")


def print_verdicts(console: Console, verdicts: Sequence[Verdict], where: str) -> None:
    """The time of each plan over the oracle's, and what it took to come to it."""
    from rich.table import Table

    from convselect.bench.oracle import WAYS
    from convselect.bench.report import geomean

    table = Table(title=f"time over the oracle's, and seconds to choose; {where}", title_justify="left")
    table.add_column("network", no_wrap=True)
    for head in ("oracle ms", *WAYS[:-1], *(f"{way} s" for way in WAYS)):
        table.add_column(head, justify="right", no_wrap=True)
    for v in verdicts:
        ratios = (f"{v.ratio(way):.3f}" for way in WAYS[:-1])
        seconds = (f"{v.seconds[way]:.3f}" for way in WAYS)
        table.add_row(v.network, f"{v.ms['oracle']:.2f}", *ratios, *seconds)
    if len(verdicts) > 1:
        means = (f"{geomean([v.ratio(way) for v in verdicts]):.3f}" for way in WAYS[:-1])
        table.add_row("geometric mean", "", *means, *("" for _ in WAYS))
    console.print(table)
