"""Costs that a test makes up, so that what is chosen does not depend on the machine at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from convselect.backend import Backend
from convselect.choices import Choices, choices_for
from convselect.costs import Samples
from convselect.graph.target import Target
from convselect.machine import Machine, cpu
from convselect.problem import ConvProblem


class Costs:
    """ms = GFLOP times the primitive's factor, except where it was sampled; 1 ns a byte for all else, 2 in NCHW."""

    def __init__(
        self,
        factors: Mapping[str, float],
        std: float = 0.3,
        samples: Samples | None = None,
        machine: Machine | None = None,
    ) -> None:
        self.factors, self.std, self.samples, self.machine = factors, std, samples or Samples(), machine or cpu()

    def predict(
        self, problems: Sequence[ConvProblem], candidates: Sequence[tuple[str, str]]
    ) -> tuple[np.ndarray, np.ndarray]:
        ms = np.array([[1e-8 * p.flops * self.factors[name] for name, _ in candidates] for p in problems])
        std = np.full(ms.shape, self.std)
        known = {(t.problem, t.primitive): t.ms for t in self.samples.timings}
        for i, p in enumerate(problems):
            for j, (name, _) in enumerate(candidates):
                if (str(p), name) in known:
                    ms[i, j], std[i, j] = known[str(p), name], 0.02
        return ms, std

    def with_samples(self, samples: Samples) -> Costs:
        return Costs(self.factors, self.std, self.samples.merged(samples), self.machine)

    def operator_ms(self, key: str, nbytes: float) -> float:
        return nbytes * (2e-6 if key.endswith("nchw") else 1e-6)


def choose(patch: pytest.MonkeyPatch, *names: str) -> None:
    """From now on a plan takes for each layer the first of the primitives `names` that can run it."""

    def choices(self: Backend, problems: Sequence[ConvProblem], target: Target) -> Choices:
        found = choices_for(problems, replace(self.options, calibrate="never"), target.machine())
        taken = {}
        for problem, every in found.candidates.items():
            able = {candidate.primitive.name: candidate for candidate in every}
            wanted = [able[name] for name in names if name in able]
            assert wanted, f"none of {', '.join(names)} can run {problem}"
            taken[problem] = wanted[:1]
        return replace(found, candidates=taken, costs=Costs({}, machine=target.machine()))

    patch.setattr(Backend, "choices", choices)
