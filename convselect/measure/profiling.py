"""Profiles: times primitives over a grid of problems into a table that cost models are trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.data import read_problems
from convselect.files import replaced
from convselect.machine import Machine, cpu
from convselect.measure.cpu import PrimitiveTimer
from convselect.measure.cuda import GpuTimer
from convselect.measure.operators import SHAPES, time_operators
from convselect.measure.progress import reporting
from convselect.measure.timers import Timer
from convselect.primitive import Primitive, primitives
from convselect.problem import DIMENSIONS, ConvProblem

__all__ = ["Profiled", "operators_path", "profile", "read_problems"]

SAVE_EVERY_S = 20.0
_GPU_SHAPES = [(n, *shape[1:]) for n in (1, 32) for shape in SHAPES if shape[0] == 1]
"""Shapes of the layout transforms that are timed on a GPU."""

_SCHEMA = pa.schema(
    [(name, pa.int32()) for name in DIMENSIONS]
    + [
        ("primitive", pa.string()),
        ("ms", pa.float64()),
        ("workspace_bytes", pa.int64()),
        ("machine", pa.string()),
        ("threads", pa.int32()),
        ("family", pa.string()),
    ]
)
"""The long format: a row for each timing."""
_OPERATORS_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("bytes", pa.int64()),
        ("threads", pa.int32()),
        ("ms", pa.float64()),
        ("machine", pa.string()),
    ]
)


class Profiled(NamedTuple):
    """What a call of `profile` did. `complete`: no problem is left to time."""

    problems: int
    skipped: int
    timings: int
    seconds: float
    complete: bool


def operators_path(out: Path) -> Path:
    """The table of operators beside the profile `out`."""
    return out.with_suffix(".operators.parquet")


def profile(
    out: Path,
    problems: Sequence[ConvProblem] | None = None,
    candidates: Sequence[Primitive] | None = None,
    *,
    timer: Timer | None = None,
    threads: int | None = None,
    budget_s: float | None = None,
    rounds: int = 7,
    progress: bool | None = None,
) -> Profiled:
    """Times every candidate that accepts it on every problem, and the operators between convolutions (of a GPU: the
    changes of layout).

    Appends to the Parquet table `out` (columns: `ConvProblem`'s, primitive ms workspace_bytes machine threads family)
    and to `operators_path(out)` (key bytes threads ms machine). What the tables hold of this machine and number of
    threads is not timed again. They are written, each at once or not at all, every 20 seconds and at the end,
    also an end by an exception or Ctrl-C.

    Args:
        problems: default the shipped grid.
        candidates: default all registered primitives of the timer's device.
        timer: default the CPU's. What its `time_primitives` leaves out is timed again by the next call.
        threads: default torch's current number.
        budget_s: seconds after which no further problem is begun.
        progress: a progress bar on stderr; None when it is a terminal.

    Raises:
        ValueError: `out` exists and is not such a table, or is not writable as a file.
    """
    problems = list(dict.fromkeys(read_problems() if problems is None else problems))
    if out.suffix != ".parquet":
        raise ValueError(f"the profile is to be written to {str(out)!r}, must end in .parquet")
    start = time.perf_counter()
    deadline = None if budget_s is None else start + budget_s
    operators_deadline = None if budget_s is None else start + 0.1 * budget_s
    with _threads(threads):
        table = _Table(out, _SCHEMA)
        if timer is None:
            timer = PrimitiveTimer(cpu())
            _profile_operators(operators_path(out), timer.machine, time_operators, operators_deadline)
        elif isinstance(timer, GpuTimer):
            transforms = partial(timer.time_transforms, _GPU_SHAPES)
            _profile_operators(operators_path(out), timer.machine, transforms, operators_deadline)
        machine = timer.machine
        candidates = primitives(machine.device) if candidates is None else candidates
        done = table.keys((*DIMENSIONS, "primitive"), machine)
        todo = []
        for problem in problems:
            able = [q for q in candidates if q.refusal(problem, machine) is None]
            if missing := [q for q in able if (*astuple(problem), q.name) not in done]:
                todo.append((problem, missing))
        finished = timings = 0
        try:
            with reporting("profile", len(todo), progress) as report:
                for problem, missing in todo:
                    if deadline is not None and time.perf_counter() >= deadline:
                        break
                    times = timer.time_primitives(problem, missing, rounds=rounds)
                    for primitive in (q for q in missing if q.name in times):
                        table.append(_row(problem, primitive, times[primitive.name], machine))
                    finished += 1
                    timings += len(times)
                    report(finished, f"{len(table)} timings, {problem}")
                    table.save_if_due()
        finally:
            table.save()
    skipped = len(problems) - len(todo)
    return Profiled(finished, skipped, timings, time.perf_counter() - start, finished == len(todo))


def _row(problem: ConvProblem, primitive: Primitive, ms: float, machine: Machine) -> dict[str, Any]:
    return {
        **dict(zip(DIMENSIONS, astuple(problem), strict=True)),
        "primitive": primitive.name,
        "ms": ms,
        "workspace_bytes": primitive.workspace_bytes(problem, machine),
        "machine": str(machine),
        "threads": machine.threads,
        "family": primitive.family,
    }


def _profile_operators(
    path: Path, machine: Machine, time_all: Callable[..., Iterable[tuple[str, int, int, float]]], deadline: float | None
) -> None:
    """Times the operators unless the table has them for this machine and number of threads."""
    table = _Table(path, _OPERATORS_SCHEMA)
    if table.keys(("key",), machine):
        return
    for key, nbytes, threads, ms in time_all(deadline=deadline):
        table.append({"key": key, "bytes": nbytes, "threads": threads, "ms": ms, "machine": str(machine)})
    table.save()


class _Table:
    """A Parquet file that grows by rows and is replaced as a whole, atomically."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._rows: list[dict[str, Any]] = []
        self._unsaved = False
        self._saved_at = time.perf_counter()
        if path.exists():
            try:
                stored = pq.read_table(path)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{path} is not a Parquet table: {error}") from error
            if missing := [name for name in schema.names if name not in stored.column_names]:
                raise ValueError(f"{path} is another table: it lacks the columns {', '.join(missing)}")
            self._rows = stored.select(schema.names).to_pylist()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def keys(self, columns: tuple[str, ...], machine: Machine) -> set[tuple[Any, ...]]:
        """The values of `columns` in the rows of `machine` at its number of threads."""
        mine = (str(machine), machine.threads)
        return {tuple(row[c] for c in columns) for row in self._rows if (row["machine"], row["threads"]) == mine}

    def append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._unsaved = True

    def save_if_due(self) -> None:
        if time.perf_counter() - self._saved_at > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        if not self._unsaved:
            return
        with replaced(self._path) as new:
            pq.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), new, compression="zstd")
        self._unsaved = False
        self._saved_at = time.perf_counter()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch's number of threads set to `count`, and set back."""
    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ValueError(f"threads is {count}, must be at least 1")
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
