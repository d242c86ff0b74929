"""A progress bar on stderr, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[float, str], None]
"""(done so far, in the unit of the total; what is going on)."""


@contextmanager
def reporting(title: str, total: float, show: bool | None) -> Iterator[Report]:
    """A bar that runs to `total`. `show` None: only when stderr is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda done, what: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, what="")
        yield lambda done, what: progress.update(task, completed=min(done, total), what=what)
