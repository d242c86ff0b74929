"""`convselect doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from convselect.machine import Machine


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, what was found, and whether it is there."""

    what: str
    found: str
    present: bool = True


def findings() -> list[Finding]:
    """Everything on this machine that matters to convselect."""
    import torch

    from convselect import machine

    here = machine.cpu()
    return [
        Finding("convselect", importlib.metadata.version("convselect")),
        Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        Finding("torch", torch.__version__),
        _guards(),
        _compiler(),
        Finding("processor", here.name),
        Finding("kernels", f"compiled for {here.isa}"),
        Finding("threads", f"{here.threads} of {here.cores} cores"),
        _caches(here.l1d_bytes, here.l2_bytes, here.l3_bytes),
        cost_model(here),
        *_store(here.fingerprint),
        _gpu(),
        _package("Triton", "triton"),
    ]


def _guards() -> Finding:
    from convselect.runtime import changes

    missing = changes.missing()
    return Finding(
        "torch's guards", f"run at each call: {missing}" if missing else "skipped while nothing changes", not missing
    )


def _compiler() -> Finding:
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return Finding("C++ compiler", (run.stdout.splitlines() or [name])[0])
    return Finding("C++ compiler", "none on the PATH; Inductor needs one", False)


def _caches(l1d: int, l2: int, l3: int) -> Finding:
    known = [f"{name} {_size(size)}" for name, size in (("L1d", l1d), ("L2", l2), ("L3", l3)) if size]
    return Finding("caches", ", ".join(known) or "sizes unknown", bool(known))


def _size(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


def cost_model(here: Machine) -> Finding:
    """The shipped weights that predict for `here`, and whether they are those of its instruction set."""
    from convselect.costs import shipped

    path = shipped(here)
    own = path.stem == here.model
    return Finding("cost model", path.name if own else f"{path.name}, as {here.isa} has none of its own", own)


def _store(fingerprint: str) -> list[Finding]:
    from convselect.costs import store

    here = next((entry for entry in store.entries() if entry.fingerprint == fingerprint), None)
    if here is None:
        calibration = Finding("calibration", f"none yet for {fingerprint}; the first call makes one", False)
    elif here.damage is not None:
        calibration = Finding("calibration", f"damaged, the next call makes another: {here.damage}", False)
    else:
        calibration = Finding("calibration", f"{here.timings} timings, {here.saved} ({fingerprint})")
    folder = store.directory()
    found = "none: the user has no home directory; set CONVSELECT_CACHE" if folder is None else str(folder)
    return [calibration, Finding("cache folder", found, folder is not None)]


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "none that this build of torch can use", False)
    return Finding("GPU", torch.cuda.get_device_name())


def _package(label: str, name: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(label, "not installed", False)
    return Finding(label, importlib.metadata.version(name))


@click.command()
def doctor() -> None:
    """Print what was found on this machine."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings():
        mark = "[green]ok[/]" if finding.present else "[yellow]absent[/]"
        table.add_row(mark, finding.what, finding.found)
    Console(highlight=False).print(table)
