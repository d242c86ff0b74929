"""`convselect transfer-eval`: the transfer study on any pair of profile tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from convselect.cli.checks import out_file, usage_errors

_TABLE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _counts(ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
    """ "0,5,25" -> (0, 5, 25)."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 0,5,25", ctx, param)
    return tuple(int(part) for part in text.split(","))


@click.command("transfer-eval")
@click.option("--source", required=True, type=_TABLE, help="Profile table of the machine that is known.")
@click.option("--target", required=True, type=_TABLE, help="Profile table of the machine to adapt to.")
@click.option(
    "--samples",
    default="0,5,25,125",
    show_default=True,
    callback=_counts,
    metavar="N,N,...",
    help="Problems timed on the target.",
)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1), help="Draws of the samples.")
@click.option(
    "--holdout",
    default=0.2,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Part of the (ic, oc, ih) groups to judge by.",
)
@out_file("--json", "out", required=True, help="The rows.")
def transfer_eval(
    source: Path, target: Path, samples: tuple[int, ...], repeats: int, holdout: float, out: Path
) -> None:
    """Compare methods of adapting a model of one machine to another by a few samples."""
    from rich.console import Console
    from rich.table import Table

    from convselect.study.evaluate import evaluate, summary

    with usage_errors():
        rows = evaluate(source, target, samples=samples, repeats=repeats, holdout=holdout)
    out.write_text(json.dumps(rows, indent=1))
    table = Table("method", "samples", "MdRAE", "slowdown, total", "slowdown, geomean", "in the 90% interval")
    for method, count, values in summary(rows):
        cells = [
            f"{values[name][0]:.4f} ± {values[name][1]:.4f}" if name in values else ""
            for name in ("mdrae", "slowdown_total", "slowdown_geomean", "coverage_90")
        ]
        table.add_row(method, str(count), *cells)
    Console().print(table)
