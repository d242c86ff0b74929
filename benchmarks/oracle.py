"""How near selection comes to timing everything, on the machines that this one can be.

    python benchmarks/oracle.py [NETWORK...] [--isas avx512,avx2] [--threads 1,2] [--repeats 3]

A machine is an instruction set, which also caps oneDNN and ATen, and a number of threads. Each network is judged with a
cost model trained on benchmarks/profiles without its convolutions: no row with the channels and the height of one of
them. Every repeat calibrates anew; the page shows medians. Writes oracle.json, with a row for each machine,
network and repeat, and ORACLE.md. Rows that are there are kept: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import rows
import torch
from oracle_judge import BUDGET_S
from torch._subclasses import FakeTensorMode

from convselect.backend import captured
from convselect.bench import markdown
from convselect.bench.networks import DEFAULT, load
from convselect.bench.report import geomean
from convselect.costs.tables import GROUP, group
from convselect.costs.train import train
from convselect.measure.profiling import operators_path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "oracle.json"
MODELS = HERE.parent / "build" / "oracle"
CAPS: Mapping[str, Mapping[str, str]] = {
    "avx512": {},
    "avx2": {"CONVSELECT_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}
WAYS = {"model": "model alone", "calibrated": "calibrated", "verified": "and verified"}


def profile(isa: str) -> Path:
    return HERE / "profiles" / f"epyc_{isa}.parquet"


def trained_without(network: str, isa: str) -> Path:
    """The weights of a cost model that has not seen the network."""
    out = MODELS / f"{isa}_{network}.safetensors"
    if not out.exists() or out.stat().st_mtime < profile(isa).stat().st_mtime:
        torch._dynamo.reset()
        with FakeTensorMode():
            model, x = load(network)
            problems = [spec.problem for graph in captured(model, x) for spec in graph.convs.values()]
        groups = set(map(group, problems))
        table = pq.read_table(profile(isa))
        rows = zip(*(table[name].to_pylist() for name in GROUP), strict=True)
        table = table.filter(pa.array([row not in groups for row in rows]))
        train([table], operators=[operators_path(profile(isa))], out=out, holdout=0.1, refit=True)
    return out


def judged(network: str, isa: str, threads: int) -> dict[str, Any]:
    """A row: the machine, the date and the verdict."""
    weights = trained_without(network, isa)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, HERE / "oracle_judge.py", network, str(threads), weights, out]
        subprocess.run(command, check=True, env=os.environ | CAPS[isa])
        row: dict[str, Any] = json.loads(out.read_text())
    return row


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """A table for each machine, of the medians of each network's repeats, and the geometric means of all."""
    machines: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in records:
        machines.setdefault(row["machine"], {}).setdefault(row["network"], []).append(row)
    counts = {len(repeats) for of in machines.values() for repeats in of.values()}
    lines = [
        "# Selection against timing everything",
        "",
        f"- command: `python benchmarks/oracle.py`; budget {BUDGET_S:g} s for calibration, and again for "
        "verification; batch 1",
        f"- dates: {min(r['date'] for r in records)} to {max(r['date'] for r in records)}",
        "- the cost model of each row was trained without the network's convolutions",
        f"- medians of {'repeats, up to ' if len(counts) > 1 else ''}{max(counts)} of each row; in brackets the worst",
        "",
        "Time of the plan's convolutions and layout transforms over that of the plan made by timing everything, both "
        "by a second table of measured times (`convselect bench --oracle`): less than 1 is noise in the timings that "
        "the latter was made by. Then the seconds that each way took to choose.",
        "",
    ]
    head = ["network", "timings", "oracle, ms", *WAYS.values()]
    head += ["prediction, ms", "calibration, s", "and verification, s", "timing everything, s"]
    for name, of in sorted(machines.items()):
        table: list[list[object]] = []
        ratio = {(n, way): [v["ms"][way] / v["ms"]["oracle"] for v in of[n]] for n in of for way in WAYS}
        spent = {n: {way: median(v["seconds"][way] for v in of[n]) for way in of[n][0]["seconds"]} for n in of}
        for network, repeats in of.items():
            cells = [f"{median(ratio[network, way]):.3f} ({max(ratio[network, way]):.3f})" for way in WAYS]
            s, oracle_ms = spent[network], median(v["ms"]["oracle"] for v in repeats)
            cells += [f"{1e3 * s['model']:.0f}", f"{s['calibrated']:.1f}", f"{s['verified']:.1f}", f"{s['oracle']:.0f}"]
            table.append([network, repeats[0]["timings"], f"{oracle_ms:.2f}", *cells])
        means = [f"**{geomean([median(ratio[n, way]) for n in of]):.3f}**" for way in WAYS]
        in_all = f"{sum(s['oracle'] for s in spent.values()):.0f} in all"
        table.append(["geometric mean", None, None, *means, None, None, None, in_all])
        lines += [f"## {name}", "", *markdown.table(head, table), ""]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.argument("networks", nargs=-1)
@click.option("--isas", default="avx512,avx2", show_default=True)
@click.option("--threads", default="1,2", show_default=True)
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
def main(networks: tuple[str, ...], isas: str, threads: str, repeats: int) -> None:
    kept = rows.read(RESULTS)
    for isa, network in product(isas.split(","), networks or DEFAULT):
        for count, repeat in product(threads.split(","), range(repeats)):
            if (key := f"{isa}_{count}_{network}_{repeat}") not in kept:
                kept[key] = judged(network, isa, int(count))
                rows.write(RESULTS, kept)
    (HERE / "ORACLE.md").write_text(page(list(kept.values())))


if __name__ == "__main__":
    main()
