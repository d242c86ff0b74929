"""`convselect bench`."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convselect.cli.checks import DEVICE, DTYPE, check_model, out_file, usage_errors

if TYPE_CHECKING:
    from rich.console import Console

    from convselect.bench.peers import Peer
    from convselect.bench.report import Report


@click.command()
@click.argument("nets", nargs=-1, metavar="NET...")
@click.option("--model", metavar="MODULE:FACTORY", help="A network of your own, with its own weights.")
@click.option("--input", "shape", metavar="SIZES", help="The input of --model, such as 1x3x224x224.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1))
@DEVICE
@DTYPE
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1), help="For every system.")
@click.option(
    "--against",
    default="eager,inductor",
    show_default=True,
    metavar="PEER,...",
    help="eager, eager_nhwc, inductor, onnxruntime, openvino, ncnn; also convselect itself is always timed.",
)
@click.option("--without-convselect", is_flag=True, help="Time the peers alone.")
@click.option("--accuracy", default="default", show_default=True, help="convselect's: strict, default or fast.")
@click.option("--calibrate", default="auto", show_default=True, help="convselect's: auto, always or never.")
@click.option("--select", default="model", show_default=True, help="convselect's: model, measure or model+verify.")
@click.option("--remainder", default="eager", show_default=True, help="convselect's: eager or inductor.")
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option(
    "--budget-s",
    type=click.FloatRange(min=0),
    help="Bound on a network's rounds, fewer where needed; with --oracle, on calibration (2 s).",
)
@click.option("--oracle", is_flag=True, help="Judge convselect's plans by timing every candidate; no other system.")
@click.option(
    "--exports",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Keep the files made for the peers in this folder, and use them again.",
)
@out_file("--json", "json_path", help="Write the results here.")
@out_file("--markdown", "markdown_path", help="Write the page with the table here.")
@out_file("--plot", "plot_path", help="Write a PNG here.")
def bench(
    nets: tuple[str, ...],
    model: str | None,
    shape: str | None,
    batch: int,
    device: str,
    dtype: str,
    threads: int,
    against: str,
    without_convselect: bool,
    accuracy: str,
    calibrate: str,
    select: str,
    remainder: str,
    rounds: int,
    budget_s: float | None,
    oracle: bool,
    exports: Path | None,
    json_path: Path | None,
    markdown_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Time networks against other runtimes, interleaved in one process.

    NET is a network of torchvision, such as resnet18; it gets random weights. Every output is compared with eager in
    float64.
    """
    import torch
    from rich.console import Console

    from convselect import machine
    from convselect.bench import networks
    from convselect.bench.peak import gemm_gflops
    from convselect.bench.report import Report, Row
    from convselect.bench.runner import Protocol, compare, pin_threads
    from convselect.cli.oracle import run as judge_plans
    from convselect.options import Options

    if model is None and not nets:
        raise click.UsageError("name a network, or give --model")
    check_model(model, shape)
    if oracle and (markdown_path or plot_path):
        raise click.UsageError("--markdown and --plot do not go with --oracle")
    if oracle and budget_s == 0:
        raise click.UsageError("--oracle calibrates, so --budget-s must be more than 0")
    if device == "cpu" and dtype != "float32":
        raise click.UsageError("--dtype goes with --device cuda")
    if oracle and device != "cpu":
        raise click.UsageError("--oracle judges plans of the CPU")
    jobs: list[tuple[str, str | None]] = [*((net, None) for net in nets), *([(model, shape)] if model else [])]
    options = {"accuracy": accuracy, "calibrate": calibrate, "select": select, "remainder": remainder}
    with usage_errors():
        pin_threads(threads)
        Options.of(options)
        here = machine.machine_of(device, getattr(torch, dtype))
        peers = chosen_peers(against, None if without_convselect else options)
        for name, sizes in jobs:
            networks.check(name, sizes)
    if plot_path and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib, which is not installed: `pip install matplotlib`")
    console = Console(width=None if sys.stdout.isatty() else 120)
    if oracle:
        judge_plans(console, jobs, batch, accuracy, 2.0 if budget_s is None else budget_s, json_path)
        return
    protocol = Protocol(rounds=rounds, budget_s=budget_s)
    command = shlex.join(["convselect", *sys.argv[1:]])
    labels = {peer.name: peer.label for peer in peers}
    report = Report.begin(here, batch, command, protocol, labels, dtype)
    if device == "cpu":
        report.peak_gflops = gemm_gflops()
    where = torch.device(device), getattr(torch, dtype)
    try:
        for index, (name, sizes) in enumerate(jobs):
            with console.status(f"{name}: building") as status:

                def tell(text: str, name: str = name, index: int = index) -> None:
                    status.update(f"{name} ({index + 1} of {len(jobs)}): {text}")

                network, x = networks.load(name, sizes, batch)
                results = compare(network, x, peers, protocol, tell, exports, *where)
            report.rows.append(Row(name, tuple(x.shape), results, networks.convolution_flops(network, x)))
            if json_path:
                json_path.write_text(report.to_json() + "\n")
            times = [
                f"{labels[r.peer]} {r.median_ms:.2f} ms" if r.median_ms is not None else f"{labels[r.peer]} -"
                for r in results
            ]
            console.print(f"[bold]{name}[/]: {', '.join(times)}", highlight=False)
    finally:  # what was timed is not lost to an error in a later network
        if report.rows:
            show(console, report, markdown_path, plot_path)


def show(console: Console, report: Report, markdown_path: Path | None, plot_path: Path | None) -> None:
    """The table of what was timed, on the console and where it is asked for."""
    from convselect.bench.report import page

    print_table(console, report)
    if markdown_path:
        markdown_path.write_text(page([report], plot_path.name if plot_path else None))
    if plot_path:
        from convselect.bench.plot import plot

        plot([report], plot_path)


def chosen_peers(names: str, options: dict[str, str] | None) -> list[Peer]:
    """The peers named in a list separated by commas, then convselect with `options` unless they are None."""
    from convselect.bench.peers import PEERS, convselect_peer
    from convselect.errors import unknown_choice

    wanted = [name.strip() for name in names.split(",") if name.strip() not in ("", "convselect")]
    for name in wanted:
        if name not in PEERS:
            raise unknown_choice("--against", name, PEERS)
    peers = [PEERS[name] for name in dict.fromkeys(wanted)]
    return peers if options is None else [*peers, convselect_peer(**options)]


def print_table(console: Console, report: Report) -> None:
    """The medians, the fastest system of each network in bold, and how much faster than the others ours is."""
    from rich.table import Table

    from convselect.bench.report import OURS

    table = Table(title=f"median ms, {report.machine}", title_justify="left")
    table.add_column("network")
    for label in report.labels.values():
        table.add_column(label, justify="right")
    for row in report.rows:
        best = min((r.median_ms for r in row.results if r.median_ms is not None), default=None)
        cells = []
        for result in row.results:
            text = "-" if result.median_ms is None else f"{result.median_ms:.2f}"
            cells.append(f"[bold green]{text}[/]" if best is not None and result.median_ms == best else text)
        table.add_row(row.network, *cells)
    console.print(table)
    for row in report.rows:
        for result in row.results:
            if result.absent:
                console.print(f"[yellow]{row.network}: {result.absent}[/]", highlight=False)
    for name, label in report.labels.items():
        ratio = report.ratio(name) if name != OURS else None
        if ratio is not None:
            console.print(f"convselect is {ratio:.2f} times as fast as {label}", highlight=False)
