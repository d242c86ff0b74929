"""Every network of the zoo against eager: `make zoo`. Writes benchmarks/ZOO.md and benchmarks/zoo/*.json.

    python benchmarks/zoo.py [--part results|times] [--again] [NETWORK...]

The parts: results, strides and aliasing against eager in float64; times, first calls among them, which need a quiet
machine. Each network runs in a process of its own (zoo_check.py) with one thread and a limit on its time, so that a
crash is a row. Rows are kept as they come, and a sweep that was stopped goes on; `--again` runs networks that have one.
NETWORK is the beginning of a name, such as timm/ or torchvision/resnet. Ends with 1 where a row is wrong or raises.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue

import click
import rows
from rows import Row
from zoo_networks import names
from zoo_page import FAULTS, page, said

from convselect.machine import cpu

FOLDER = Path(__file__).with_name("zoo")
CHECK = Path(__file__).with_name("zoo_check.py")
PARTS = ("results", "times")
LIMIT_S = 1200
"""Of processor time for one network."""
PATIENCE = 20
"""So many times longer it may take where others compute."""


def check(part: str, name: str, core: int) -> Row:
    """The row of one network. Where it raises, torch's own backend without a compiler is asked whether it does too."""
    row = run(part, name, core)
    if row["status"] in ("raises", "crash"):
        theirs = run("plain", name, core)
        if "raised" in theirs:
            row |= {"status": "torch raises", "torch_raised": theirs["raised"]}
    return row


def measured() -> str:
    """On which machine and when: a sweep may go on on another one."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    return f"{cpu()}, Python {platform.python_version()}, {versions}, {datetime.date.today()}"


def run(part: str, name: str, core: int) -> Row:
    """What a process finds, or how it ended. Where times are taken it stays on that core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    held = ["prlimit", f"--cpu={LIMIT_S}:{LIMIT_S + 10}", *(["taskset", "-c", str(core)] if part == "times" else [])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        process = subprocess.Popen(
            [*held, sys.executable, str(CHECK), part, name, str(out)],
            env=environment,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, stderr = process.communicate(timeout=PATIENCE * LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return {"status": "out of time", "raised": f"no row after {PATIENCE * LIMIT_S} s"}
        if out.exists():
            row: Row = json.loads(out.read_text())
            return row
    if process.returncode == -signal.SIGXCPU:
        return {"status": "out of time", "raised": f"no row after {LIMIT_S} s of the processor"}
    return {"status": "crash", "raised": f"ended with {process.returncode}: {stderr.splitlines()[-1:]}"}


def sweep(part: str, todo: list[str]) -> Iterator[tuple[str, Row]]:
    """The rows as they come, from as many processes at once as there are cores."""
    cores: SimpleQueue[int] = SimpleQueue()
    available = sorted(os.sched_getaffinity(0))
    for core in available:
        cores.put(core)

    def one(name: str) -> Row:
        core = cores.get()
        try:
            return check(part, name, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(len(available)) as pool:
        futures = {pool.submit(one, name): name for name in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@click.command(help=__doc__)
@click.argument("networks", nargs=-1)
@click.option("--part", type=click.Choice(PARTS), help="One of the two.")
@click.option("--again", is_flag=True, help="Also networks that have a row.")
def main(networks: tuple[str, ...], part: str | None, again: bool) -> None:
    wanted = [name for name in names() if not networks or name.startswith(networks)]
    faulty, where = False, measured()
    for each in [part] if part else PARTS:
        path = FOLDER / f"{each}.json"
        kept = rows.read(path)
        todo = [name for name in wanted if again or name not in kept]
        click.echo(f"{each}: {len(todo)} of {len(wanted)} networks to run")
        for count, (name, row) in enumerate(sweep(each, todo), 1):
            kept[name] = row | {"measured": where}
            rows.write(path, kept)
            click.echo(f"[{count}/{len(todo)}] {name}: {said(row)}")
        faulty |= any(kept[name]["status"] in FAULTS for name in wanted)
    (FOLDER.parent / "ZOO.md").write_text(page(*(rows.read(FOLDER / f"{part}.json") for part in PARTS)))
    sys.exit(faulty)


if __name__ == "__main__":
    main()
