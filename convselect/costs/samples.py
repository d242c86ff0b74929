"""`Samples`: what was timed on the machine at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from convselect.costs.operators import OperatorTiming

T = TypeVar("T", "Timing", OperatorTiming)


class Timing(NamedTuple):
    """One primitive on one problem, given in `ConvProblem`'s grammar."""

    problem: str
    primitive: str
    threads: int
    ms: float


@dataclass
class Samples:
    """Timings of primitives and of the operators between convolutions, and the `seconds` that calibration took."""

    timings: list[Timing] = field(default_factory=list)
    operators: list[OperatorTiming] = field(default_factory=list)
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.timings or self.operators or self.seconds)

    def add(self, problem: object, primitive: str, threads: int, ms: float) -> None:
        """`problem` is a `ConvProblem` or its text. Raises `ValueError` where `ms` is not positive and finite."""
        _check(ms)
        self.timings.append(Timing(str(problem), primitive, threads, ms))

    def add_operator(self, key: str, nbytes: int, threads: int, ms: float) -> None:
        _check(ms)
        self.operators.append(OperatorTiming(key, nbytes, threads, ms))

    def merged(self, other: Samples) -> Samples:
        """Both together; of what was timed twice the least time stays, as noise only ever adds."""
        return Samples(
            _least([*self.timings, *other.timings]),
            _least([*self.operators, *other.operators]),
            self.seconds + other.seconds,
        )


def _check(ms: float) -> None:
    if not (math.isfinite(ms) and ms > 0):
        raise ValueError(f"ms is {ms}, must be positive and finite")


def _least(timings: list[T]) -> list[T]:
    """The fastest of each that differ in `ms` alone, in order of first appearance."""
    result: dict[tuple[object, ...], T] = {}
    for timing in timings:
        kept = result.setdefault(tuple(timing[:3]), timing)
        if timing.ms < kept.ms:
            result[tuple(timing[:3])] = timing
    return list(result.values())
