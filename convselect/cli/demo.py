"""`convselect demo`: the main job on one real network, shown step by step."""

from __future__ import annotations

import time
from pathlib import Path

import click

from convselect.cli.checks import out_file, usage_errors


@click.command()
@click.option("--threads", type=click.IntRange(min=1), help="torch's own number otherwise.")
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@out_file("--html", "html_path", help="Write the page here.")
def demo(threads: int | None, rounds: int, html_path: Path | None) -> None:
    """Compile ResNet-18 at 1x3x224x224 and compare it with eager and with Inductor."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]1. A network[/]: torchvision's ResNet-18, random weights, input 1x3x224x224")
    import torch

    from convselect import machine
    from convselect.bench import networks
    from convselect.bench.peers import PEERS, convselect_peer
    from convselect.bench.report import Report, Row
    from convselect.bench.runner import Protocol, compare, pin_threads
    from convselect.cli.bench import print_table

    with usage_errors():
        if threads is not None:
            pin_threads(threads)
        networks.check("resnet18")
    model, x = networks.build("resnet18")
    here = machine.cpu()
    console.print(f"   machine: {here}\n")

    import convselect

    console.print("[bold]2. First call[/]: capture, calibrate if this machine is new, select, pack weights")
    fast = convselect.compile(model)
    with torch.inference_mode():
        start = time.perf_counter()
        y = fast(x)
        first_s = time.perf_counter() - start
        expected = model(x)
    explanation = convselect.explain(fast, x)
    console.print(f"   took {first_s:.1f} s, of which prediction and selection {explanation.plan.select_ms:.1f} ms\n")

    console.print("[bold]3. What was chosen, and why[/]")
    click.echo(explanation)
    difference = float((y - expected).abs().max())
    console.print(
        f"\n[bold]4. The same output[/]: largest difference from eager {difference:.2e}, where outputs reach "
        f"{float(expected.abs().max()):.2f}\n"
    )

    console.print("[bold]5. Time[/], interleaved; Inductor compiles for about 20 s the first time")
    peers = [PEERS["eager"], PEERS["inductor"], convselect_peer()]
    protocol = Protocol(rounds=rounds)
    report = Report.begin(here, 1, "convselect demo", protocol, {peer.name: peer.label for peer in peers})
    with console.status("preparing") as status:
        results = compare(model, x, peers, protocol, status.update)
    report.rows.append(Row("resnet18", tuple(x.shape), results))
    print_table(console, report)
    if html_path:
        explanation.to_html(html_path)
        console.print(f"wrote {html_path}")
