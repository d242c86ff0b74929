"""`convselect calibrate`, `profile` and `train`: the cost model's data and weights."""

from __future__ import annotations

from pathlib import Path

import click

_DEVICE = click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))


@click.command()
@click.option("--budget-s", default=2.0, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--threads", type=click.IntRange(min=1), help="Calibrate for this many; torch's own number otherwise.")
@_DEVICE
def calibrate(budget_s: float, threads: int | None, device: str) -> None:
    """Time a few samples on this machine and adapt the cost model to it."""
    import convselect
    from convselect.bench.runner import pin_threads

    if threads is not None:
        pin_threads(threads)
    click.echo(convselect.calibrate(budget_s=budget_s, device=device))


@click.command()
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The Parquet table.")
@click.option(
    "--shapes",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Problems to time, one a line; otherwise a grid drawn from real networks.",
)
@click.option("--budget-s", type=click.FloatRange(min=0, min_open=True), help="Stop after so many seconds.")
@click.option("--threads", type=click.IntRange(min=1), help="torch's own number otherwise.")
@_DEVICE
def profile(out: Path, shapes: Path | None, budget_s: float | None, threads: int | None, device: str) -> None:
    """Time every primitive on many problems. Stop it at any time: the next run goes on where this one stopped."""
    import torch

    import convselect
    from convselect import profiling
    from convselect.bench.runner import pin_threads

    if threads is not None:
        pin_threads(threads)
    problems = read_problems(shapes) if shapes else profiling.grid()
    profiling.profile(
        out, problems, convselect.primitives(device=device), threads=torch.get_num_threads(), budget_s=budget_s
    )


def read_problems(path: Path) -> list[object]:
    """The problems in a text file: one a line in the grammar of `ConvProblem`; empty lines and # lines do not count."""
    from convselect.problem import ConvProblem

    problems: list[object] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        try:
            problems.append(ConvProblem.parse(text))
        except ValueError as error:
            raise click.UsageError(f"{path}, line {number}: {error}") from error
    return problems


@click.command()
@click.argument("tables", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The safetensors file.")
def train(tables: tuple[Path, ...], out: Path) -> None:
    """Fit the cost model to profile tables."""
    from convselect.costs.train import train as fit

    click.echo(fit(list(tables), out))
