"""Cost of what lies between convolutions: layout transforms, and the operators in each layout they can run in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class OperatorTiming(NamedTuple):
    """`nbytes`: read and written. `key`: the operator, its window after a colon, its layout after a dot, as far as it
    has them: "to_nhwc", "add.nhwc", "max_pool:3x3s2x2.nhwc".
    """

    key: str
    nbytes: int
    threads: int
    ms: float


class Line(NamedTuple):
    """ms = call + per_byte * bytes; `error` is the median relative one of the fit."""

    call: float
    per_byte: float
    error: float = 0.0


TIMES_ELEMENTWISE = {
    "upsample_nearest.nchw": 8.0,
    "upsample_nearest.nhwc": 2.0,
    "upsample_bilinear.nchw": 11.0,
    "upsample_bilinear.nhwc": 2.0,
}
"""Times of operators that the shipped weights have no line of, over "elementwise" in the same layout. Medians over the
first 17 of `measure.operators.SHAPES` on one thread of an AMD EPYC Zen 3, 2026-11-27."""

DEFAULT = Line(0.004, 1 / 10e6)
"""4 us a call and 10 GB/s: for an operator when not even "elementwise" has been timed."""


def _solve(design: Array) -> Array:
    """x >= 0 [2] that minimises |design x - 1|^2, exactly: with two unknowns the active set is one of four."""
    best, least = np.zeros(2), math.inf
    for active in ([0, 1], [0], [1]):
        x = np.zeros(2)
        x[active] = np.linalg.lstsq(design[:, active], np.ones(len(design)), rcond=None)[0]
        error = float(((design @ x - 1) ** 2).sum())
        if (x >= 0).all() and error < least:
            best, least = x, error
    return best


def _fit(nbytes: Array, ms: Array) -> Line:
    """Non-negative least squares on the relative error (call + per_byte * bytes) / ms - 1."""
    scale = nbytes.max() or 1.0
    design = np.stack([1 / ms, nbytes / scale / ms], axis=1)
    call, slope = _solve(design)
    error = np.median(np.abs(design @ np.array([call, slope]) - 1))
    return Line(float(call), float(slope / scale), float(error))


def _any_window(key: str) -> str:
    """ "max_pool:3x3s2x2.nhwc" -> "max_pool.nhwc", the line over all windows that were timed."""
    operator, _, layout = key.partition(".")
    return ".".join(filter(None, (operator.partition(":")[0], layout)))


class OperatorModel:
    """A line for each operator key and number of threads: `lines[key][threads]`."""

    def __init__(self, lines: Mapping[str, Mapping[int, Line]] | None = None) -> None:
        self.lines = {key: dict(by_threads) for key, by_threads in (lines or {}).items()}

    @classmethod
    def fit(cls, rows: Iterable[tuple[str, int, int, float]]) -> OperatorModel:
        """From rows (key, bytes, threads, ms); rows whose time is not positive and finite are dropped."""
        groups: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for key, nbytes, threads, ms in rows:
            if math.isfinite(ms) and ms > 0:
                for name in dict.fromkeys((key, _any_window(key))):
                    groups.setdefault((name, int(threads)), []).append((nbytes, ms))
        lines: dict[str, dict[int, Line]] = {}
        for (key, threads), pairs in sorted(groups.items()):
            table = np.array(pairs, dtype=np.float64)
            lines.setdefault(key, {})[threads] = _fit(table[:, 0], table[:, 1])
        return cls(lines)

    def known(self, key: str) -> str | None:
        """The key whose line predicts `key`: itself, else with any window, else "elementwise" in the same layout."""
        layout = key.rpartition(".")[2] if "." in key else ""
        tried = (key, _any_window(key), f"elementwise.{layout}", "elementwise")
        return next((k for k in tried if k in self.lines), None)

    def line(self, key: str, threads: int) -> Line:
        """The line of `key` at the nearest number of threads that was fitted."""
        found = self.known(key)
        if found is None:
            return DEFAULT
        by_threads = self.lines[found]
        line = by_threads[min(by_threads, key=lambda t: (abs(math.log(t / threads)), t))]
        if key not in TIMES_ELEMENTWISE or not found.startswith("elementwise."):
            return line
        times = TIMES_ELEMENTWISE[key]
        return Line(times * line.call, times * line.per_byte, line.error)

    def ms(self, key: str, nbytes: float, threads: int) -> float:
        """Predicted time of one call that reads and writes `nbytes` together."""
        line = self.line(key, threads)
        return line.call + line.per_byte * nbytes

    def to_json(self) -> dict[str, dict[str, list[float]]]:
        return {key: {str(t): list(line) for t, line in lines.items()} for key, lines in self.lines.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Mapping[str, Iterable[float]]]) -> OperatorModel:
        return cls({key: {int(t): Line(*line) for t, line in lines.items()} for key, lines in data.items()})
