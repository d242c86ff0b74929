"""Plans that no cost model would make: any primitive that can run a convolution, layouts as they come."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule

from convselect.backend import Backend
from convselect.choices import Choices
from convselect.graph.target import Target
from convselect.machine import Machine
from convselect.options import Options
from convselect.problem import ConvProblem


class _Dice:
    """Costs of what lies between the convolutions, in place of the cost model's."""

    def __init__(self, machine: Machine, draw: random.Random) -> None:
        self.machine, self._draw = machine, draw

    def operator_ms(self, key: str, nbytes: float) -> float:
        return self._draw.random()


class RandomPlans(Backend):
    """All costs are random."""

    def __init__(self, seed: int, options: Options) -> None:
        super().__init__(options)
        self._draw = random.Random(seed)

    def choices(self, problems: Sequence[ConvProblem], target: Target) -> Choices:
        choices = super().choices(problems, target)
        choices.candidates = {
            problem: [replace(candidate, ms=self._draw.random()) for candidate in candidates]
            for problem, candidates in choices.candidates.items()
        }
        return replace(choices, costs=_Dice(choices.costs.machine, self._draw))


class InTurn(Backend):
    """Compiles each graph by all of `backends`, which are captured as one; `current` is the one that runs."""

    def __init__(self, *backends: Backend) -> None:
        super().__init__(Options())
        self._backends, self.current = backends, 0

    def _compile(
        self, dynamo_module: GraphModule, dynamo_inputs: Sequence[Any], gm: GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[[list[Any]], Any]:
        given = dynamo_module, dynamo_inputs
        made = [backend._compile(*given, copy.deepcopy(gm), example_inputs) for backend in self._backends]

        def run(args: list[Any]) -> Any:
            return made[self.current](args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run
