"""What a convolution costs: a learned model, adapted to the machine at hand by what was timed on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from convselect.costs.metrics import TWO_SIDED_90
from convselect.costs.model import CostModel, PrimitiveKey, shipped
from convselect.costs.operators import OperatorModel, OperatorTiming
from convselect.costs.prior import Model, model_for
from convselect.costs.samples import Samples, Timing
from convselect.costs.transfer import MEASURED_STD, Adapted
from convselect.machine import Machine
from convselect.problem import ConvProblem

__all__ = [
    "MEASURED_STD",
    "TWO_SIDED_90",
    "CostModel",
    "Costs",
    "Model",
    "OperatorModel",
    "OperatorTiming",
    "PrimitiveKey",
    "Samples",
    "Timing",
    "model_for",
    "shipped",
]

Array = npt.NDArray[np.float64]


class Costs:
    """Times of primitives and operators on `machine`, at its number of threads, from `model` and `samples`.

    Raises `ValueError` where a sample's problem is not in `ConvProblem`'s grammar.
    """

    def __init__(self, model: Model, samples: Samples | None, machine: Machine) -> None:
        self.model, self.samples, self.machine = model, samples or Samples(), machine
        self._adapted = Adapted(model, self.samples, trusted=str(machine) in model.info.get("machines", ()))

    def with_samples(self, samples: Samples) -> Costs:
        """The same model on the same machine, with `samples` added to those at hand."""
        return Costs(self.model, self.samples.merged(samples), self.machine)

    def predict(self, problems: Sequence[ConvProblem], candidates: Sequence[PrimitiveKey]) -> tuple[Array, Array]:
        """Milliseconds, and the standard deviations of their logs, both f64 [n, len(candidates)].

        candidates: (primitive, family), whether or not a primitive can run the problem. What was timed is as the
        prediction and the timing together make it.
        """
        mean, std = self._adapted.log_predict(problems, candidates, self.machine.threads)
        return np.exp(mean), std

    def operator_ms(self, key: str, nbytes: float) -> float:
        """Milliseconds of the operator or layout transform `key`, such as "to_nhwc" or "max_pool.nhwc".

        nbytes: what it reads and writes, together.
        """
        return self._adapted.operator_ms(key, nbytes, self.machine.threads)
