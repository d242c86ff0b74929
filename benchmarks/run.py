"""Writes benchmarks/RESULTS.md, results.png and results/<setting>.json: `convselect bench` with every peer there is.

    python benchmarks/run.py NET... [--settings 1x1,1x2,8x1,8x2] [--again]

A setting is batch x threads, and each is run in a process of its own. One is kept whose JSON has these networks, is of
this machine with these kernels, and is newer than the package: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click

from convselect import machine
from convselect.bench.networks import DEFAULT
from convselect.bench.plot import plot
from convselect.bench.report import Report, page

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path("benchmarks/results")
EXPORTS = Path("build/exports")
PEERS = "eager,eager_nhwc,inductor,onnxruntime,openvino,ncnn"
SETTINGS = "1x1,1x2,8x1,8x2"


def done(path: Path, nets: tuple[str, ...]) -> bool:
    """Whether `path` holds a whole run on these networks by the package as it is."""
    changed = max(source.stat().st_mtime for source in Path("convselect").rglob("*.py"))
    if not path.exists() or path.stat().st_mtime < changed:
        return False
    report = Report.from_json(path.read_text())
    same = report.fingerprint == replace(machine.cpu(), threads=report.threads).fingerprint
    return same and [row.network for row in report.rows] == list(nets)


@click.command(help=__doc__)
@click.argument("nets", nargs=-1)
@click.option("--settings", default=SETTINGS, show_default=True, help="Batch x threads of each table.")
@click.option("--again", is_flag=True, help="Also where there are results.")
@click.option("--budget-s", default=15.0, show_default=True, help="For the rounds of one network in one setting.")
def main(nets: tuple[str, ...], settings: str, again: bool, budget_s: float) -> None:
    os.chdir(ROOT)
    RESULTS.mkdir(exist_ok=True)
    nets = nets or DEFAULT
    EXPORTS.mkdir(parents=True, exist_ok=True)
    for setting in settings.split(","):
        batch, _, threads = setting.partition("x")
        path = RESULTS / f"{setting}.json"
        if not again and done(path, nets):
            click.echo(f"{path} is kept")
            continue
        options = ["--batch", batch, "--threads", threads, "--against", PEERS, "--budget-s", f"{budget_s:g}"]
        files = ["--json", str(path), "--exports", str(EXPORTS)]
        run = [sys.executable, "-c", "from convselect.cli import main; main()", "bench", *nets, *options, *files]
        subprocess.run(run, check=True)
    shutil.rmtree(EXPORTS)
    reports = [Report.from_json(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    plot(reports, Path("benchmarks/results.png"))
    Path("benchmarks/RESULTS.md").write_text(page(reports, "results.png"))


if __name__ == "__main__":
    main()
