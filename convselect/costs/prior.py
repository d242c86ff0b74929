"""What predicts times before anything was timed here: the shipped network, or, for a GPU without one, the roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from convselect.costs.features import FEATURES, describe
from convselect.costs.network import VIEW, Candidate, CostModel, shipped
from convselect.costs.operators import Line, OperatorModel
from convselect.costs.roofline import LAUNCH_MS, Rates, roofline_ms
from convselect.data import COMMON, read_problems
from convselect.machine import Gpu, Machine
from convselect.problem import ConvProblem

PRIMITIVE_STD = 0.5
"""Log deviation of a primitive as a whole: kernels reach between a third and nearly all of what the vendor states."""
PROBLEM_STD = 0.4
"""Log deviation beside that from problem to problem."""
_APART = 0.5
"""Two primitives whose log times differ by so much, from problem to problem, share little of their deviation."""
_TRANSPOSED = 2.0
"""A change of layout reads or writes across lines of memory."""
_REACH = 3.0

Array = npt.NDArray[np.float64]


class Roofline:
    """`costs.roofline` behind what `transfer.Adapted` asks of a `CostModel`. Nothing in it was measured or trained,
    so it is wide everywhere, and calibration moves it far.
    """

    primitives: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    info: Mapping[str, Any] = {}

    def __init__(self, machine: Gpu) -> None:
        self._rates = Rates.of(machine)
        self._known: dict[tuple[ConvProblem, str], float] = {}
        self._references = list(dict.fromkeys(read_problems(COMMON)))
        x = describe(self._references, 1)[0]
        self._mean, self._std = x.mean(axis=0), np.maximum(x.std(axis=0), 1.0)
        per_byte = self._rates.memory_ms(1.0)
        moved, transposed = Line(LAUNCH_MS, per_byte), Line(LAUNCH_MS, _TRANSPOSED * per_byte)
        self.operators = OperatorModel(
            {"elementwise": {1: moved}, "to_nchw": {1: transposed}, "to_nhwc": {1: transposed}}
        )

    def _log_ms(self, problem: ConvProblem, primitive: str, family: str) -> float:
        key = problem, primitive
        if key not in self._known:
            self._known[key] = float(np.log(roofline_ms(problem, primitive, family, self._rates)))
        return self._known[key]

    def log_predict(
        self, problems: Sequence[ConvProblem], candidates: Sequence[Candidate], threads: int
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of log(ms), both f64 [n, len(candidates)]; `threads` is always one."""
        rows = [[self._log_ms(problem, *candidate) for candidate in candidates] for problem in problems]
        mean = np.array(rows, dtype=np.float64).reshape(len(problems), len(candidates))
        return mean, np.full_like(mean, np.hypot(PRIMITIVE_STD, PROBLEM_STD))

    def view(self, problems: Sequence[ConvProblem], threads: npt.NDArray[np.int64] | int) -> Array:
        """As `CostModel.view`, normalised over common problems."""
        x = np.clip((describe(problems, threads)[0] - self._mean) / self._std, -_REACH, _REACH)
        result: Array = x[:, [FEATURES.index(f"log_{name}") for name in VIEW]].astype(np.float64)
        return result

    @property
    def profile_parts(self) -> int:
        return len(self._references)

    def profile(self, primitive: str, family: str) -> npt.NDArray[np.float32] | None:
        """As `Statistics.profile`: by the roofline's own times of common problems."""
        logs = np.array([self._log_ms(problem, primitive, family) for problem in self._references])
        result: npt.NDArray[np.float32] = (logs - logs.mean()).astype(np.float32) / (_APART * len(logs) ** 0.5)
        return result

    def prior_std(self, primitive: str, family: str) -> float:
        return PRIMITIVE_STD


Model = CostModel | Roofline


@lru_cache(maxsize=8)
def _roofline(machine: Gpu) -> Roofline:
    return Roofline(machine)


def model_for(machine: Machine) -> Model:
    """The weights shipped for `machine`; for a GPU that has none, the roofline, which also has the operators that those
    weights know no line of: a GPU's profile times layout transforms only.
    """
    path = shipped(machine)
    if not isinstance(machine, Gpu):
        return CostModel.load(path)
    prior = _roofline(machine)
    if not path.exists():
        return prior
    model = CostModel.load(path)
    return replace(model, operators=OperatorModel(prior.operators.lines | model.operators.lines))
