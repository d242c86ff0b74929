"""`convselect explain` and `convselect primitives`."""

from __future__ import annotations

from pathlib import Path

import click

from convselect.cli.checks import DEVICE, check_model, out_file, usage_errors


@click.command()
@click.argument("network", required=False, metavar="[NET]")
@click.option("--model", metavar="MODULE:FACTORY", help="A network of your own, with its own weights.")
@click.option("--input", "shape", metavar="SIZES", help="The input of --model, such as 1x3x224x224.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1), help="torch's own number otherwise.")
@click.option("--accuracy", default="default", show_default=True, help="strict, default or fast.")
@click.option("--calibrate", default="auto", show_default=True, help="auto, always or never.")
@click.option("--select", default="model", show_default=True, help="model, measure or model+verify.")
@out_file("--json", "json_path", help="Write the plan here.")
@out_file("--html", "html_path", help="Write the page here.")
def explain(
    network: str | None,
    model: str | None,
    shape: str | None,
    batch: int,
    threads: int | None,
    accuracy: str,
    calibrate: str,
    select: str,
    json_path: Path | None,
    html_path: Path | None,
) -> None:
    """Print what was chosen for each layer of a network, and why."""
    import torch

    import convselect
    from convselect.bench import networks
    from convselect.bench.runner import pin_threads
    from convselect.options import Options

    if (network is None) == (model is None):
        raise click.UsageError("give either a network of torchvision or --model")
    check_model(model, shape)
    target = network or model or ""
    with usage_errors():
        if threads is not None:
            pin_threads(threads)
        Options(accuracy=accuracy, calibrate=calibrate, select=select)
        networks.check(target, shape)
    module, x = networks.load(target, shape, batch)
    fast = convselect.compile(module, accuracy=accuracy, calibrate=calibrate, select=select)
    with torch.inference_mode():
        explanation = convselect.explain(fast, x)
    click.echo(explanation)
    if json_path:
        json_path.write_text(explanation.to_json() + "\n")
    if html_path:
        explanation.to_html(html_path)


@click.command()
@DEVICE
@click.option("--problem", help="Say for each whether it can run this problem, and if not, why.")
def primitives(device: str, problem: str | None) -> None:
    """List the primitives: the ways to compute a convolution."""
    import torch
    from rich.console import Console
    from rich.table import Table

    import convselect
    from convselect import machine
    from convselect.problem import ConvProblem

    with usage_errors():
        asked = ConvProblem.parse(problem) if problem else None
    table = Table(box=None, pad_edge=False)
    for head in ("primitive", "family", "layouts", "accuracy", "error bound", *(["this problem"] if asked else [])):
        table.add_column(head, overflow="fold")
    here = machine.gpu() if device == "cuda" and torch.cuda.is_available() else machine.cpu()
    for primitive in convselect.primitives(device=device):
        cells = [
            primitive.name,
            primitive.family,
            f"{primitive.src_layout} -> {primitive.dst_layout}",
            primitive.accuracy,
            f"{primitive.error_bound:.0e}",
        ]
        if asked:
            refusal = primitive.refusal(asked, here)
            cells.append("[green]can run it[/]" if refusal is None else refusal)
        table.add_row(*cells)
    Console(highlight=False).print(table)
