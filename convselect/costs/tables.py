"""Profile tables in the long format (one row a timing), read into a matrix of problems x primitives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from convselect.problem import DIMENSIONS, ConvProblem

GROUP = ("ic", "oc", "ih")
"""What problems that are held out together have in common."""


def group(problem: ConvProblem) -> tuple[int, int, int]:
    """Its `GROUP`."""
    return problem.ic, problem.oc, problem.ih


@dataclass(frozen=True)
class Profile:
    """Timings of n rows (machine, problem, threads) x p primitives."""

    problems: tuple[ConvProblem, ...]
    threads: npt.NDArray[np.int64]
    """[n]."""
    machines: tuple[str, ...]
    """[n]; empty where the table does not say."""
    primitives: tuple[str, ...]
    families: tuple[str, ...]
    ms: npt.NDArray[np.float64]
    """[n, p] milliseconds, the least of repeated timings; NaN where the primitive was not timed."""

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def timings(self) -> int:
        return int(np.isfinite(self.ms).sum())

    def take(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Profile:
        """The given rows, as a mask [n] or as indices."""
        index = np.arange(len(self))[rows]
        return Profile(
            tuple(self.problems[i] for i in index),
            self.threads[index],
            tuple(self.machines[i] for i in index),
            self.primitives,
            self.families,
            self.ms[index],
        )

    def timed(self) -> Profile:
        """Without the primitives that were never timed."""
        columns = np.nonzero(np.isfinite(self.ms).any(axis=0))[0]
        return replace(
            self,
            primitives=tuple(self.primitives[i] for i in columns),
            families=tuple(self.families[i] for i in columns),
            ms=self.ms[:, columns],
        )

    def held_out(self, fraction: float, seed: int = 0) -> npt.NDArray[np.bool_]:
        """A mask [n] of about `fraction` of the rows, whole groups of equal (ic, oc, ih) at a time."""
        if not 0 <= fraction < 1:
            raise ValueError(f"the held-out fraction is {fraction}, must be at least 0 and less than 1")
        _, number = np.unique([group(p) for p in self.problems], axis=0, return_inverse=True)
        groups = int(number.max()) + 1
        count = max(round(fraction * groups), 1 if fraction and groups > 1 else 0)
        chosen = np.random.default_rng(seed).permutation(groups)[:count]
        return np.isin(number.reshape(-1), chosen)


def family_of(primitive: str) -> str:
    """The family that a stable name begins with: "winograd" of "winograd_f4x4_3x3_nhwc"."""
    return re.split(r"[_\-]", primitive, maxsplit=1)[0]


def with_defaults(table: pa.Table) -> pa.Table:
    """`table` with every column of the long format.

    Absent: mb=1 g=1 iw=ih kw=kh sw=sh dh=dw=1 ph=kh//2 pw=kw//2 threads=1 machine="".
    Raises `ValueError` where one of ic, ih, oc, kh, primitive, ms is missing.
    """
    missing = [name for name in ("ic", "ih", "oc", "kh", "primitive", "ms") if name not in table.column_names]
    if missing:
        raise ValueError(f"the profile table lacks the columns {', '.join(missing)}; it has {table.column_names}")

    def column(name: str) -> npt.NDArray[np.int64]:
        return np.asarray(table[name].to_numpy(), dtype=np.int64)

    for name, like in (
        ("iw", "ih"),
        ("kw", "kh"),
        ("sh", None),
        ("sw", "sh"),
        ("mb", None),
        ("g", None),
        ("dh", None),
        ("dw", None),
        ("ph", "kh"),
        ("pw", "kw"),
        ("threads", None),
    ):
        if name not in table.column_names:
            values = np.ones(table.num_rows, np.int64) if like is None else column(like)
            table = table.append_column(name, pa.array(values // 2 if name in ("ph", "pw") else values))
    if "machine" not in table.column_names:
        table = table.append_column("machine", pa.array([""] * table.num_rows, pa.string()))
    return table


def read(tables: Iterable[Path | str | pa.Table], families: Mapping[str, str] | None = None) -> Profile:
    """Reads and joins tables in the long format.

    Timings that are not positive and finite are dropped, null machines and thread counts take their defaults.
    `families` maps primitives to families; without it a column `family`, or else `family_of` the name.
    Raises `ValueError` for a table without timings, without a required column, or with an impossible problem.
    """
    known = dict(families or {})
    keys: dict[tuple[str, int, tuple[int, ...]], int] = {}
    names: dict[str, int] = {}
    rows: list[npt.NDArray[np.int64]] = []
    columns: list[npt.NDArray[np.int64]] = []
    times: list[npt.NDArray[np.float64]] = []
    for source in tables:
        table = with_defaults(source if isinstance(source, pa.Table) else pq.read_table(source))
        ms = np.asarray(table["ms"].to_numpy(), dtype=np.float64)
        primitive = table["primitive"].to_pylist()
        if "family" in table.column_names:
            for name, family in zip(primitive, table["family"].to_pylist(), strict=True):
                known.setdefault(name, family)
        dims = zip(*(table[name].to_pylist() for name in DIMENSIONS), strict=True)
        machine = (str(value or "") for value in table["machine"].to_pylist())
        threads = (int(value or 1) for value in table["threads"].to_pylist())
        key = zip(machine, threads, dims, strict=True)
        rows.append(np.array([keys.setdefault(k, len(keys)) for k in key], dtype=np.int64))
        columns.append(np.array([names.setdefault(name, len(names)) for name in primitive], dtype=np.int64))
        times.append(ms)
    ms = np.concatenate(times) if times else np.empty(0)
    good = np.isfinite(ms) & (ms > 0)
    if not good.any():
        raise ValueError("the profile tables hold no timings")
    matrix = np.full((len(keys), len(names)), np.inf)
    np.minimum.at(matrix, (np.concatenate(rows)[good], np.concatenate(columns)[good]), ms[good])
    matrix[np.isinf(matrix)] = np.nan
    profile = Profile(
        tuple(ConvProblem(**dict(zip(DIMENSIONS, dims, strict=True))) for _, _, dims in keys),
        np.array([threads for _, threads, _ in keys]),
        tuple(machine for machine, _, _ in keys),
        tuple(names),
        tuple(known.get(name) or family_of(name) for name in names),
        matrix,
    )
    return profile.take(np.isfinite(matrix).any(axis=1))


def read_operators(tables: Sequence[Path | str | pa.Table]) -> list[tuple[str, int, int, float]]:
    """Rows (key, bytes, threads, ms) of tables with these columns; `threads` absent is 1."""
    rows: list[tuple[str, int, int, float]] = []
    for source in tables:
        table = source if isinstance(source, pa.Table) else pq.read_table(source)
        missing = [name for name in ("key", "bytes", "ms") if name not in table.column_names]
        if missing:
            raise ValueError(f"the operator table lacks the columns {', '.join(missing)}; it has {table.column_names}")
        threads = table["threads"].to_pylist() if "threads" in table.column_names else [1] * table.num_rows
        rows += zip(table["key"].to_pylist(), table["bytes"].to_pylist(), threads, table["ms"].to_pylist(), strict=True)
    return rows
