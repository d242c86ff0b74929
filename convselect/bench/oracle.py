"""How near selection comes to timing everything: a network's plans, judged by one table of measured times.

Every candidate of every distinct convolution is timed, interleaved and with cold weights as in a profile, and so is
every layout transform that the network could need. The oracle's plan is the best by such a table. The others are made
from the cost model alone, after a first run's calibration, and with their close calls verified. Each plan, the
oracle's too, is then worth what its primitives and its transforms take by a second table, of the lower quartiles of
several passes, so that noise neither decides between them nor favours the oracle. Operators between the convolutions
are assigned by the cost model, and not part of the sums.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from convselect import machine
from convselect.backend import captured
from convselect.choices import Able, Times, measured_ms, predict, verified, with_times
from convselect.costs import CostModel, Costs
from convselect.graph.assign import Assignment, OperatorCosts, assign, transforms_ms
from convselect.graph.capture import nbytes, size_hint
from convselect.graph.operators import is_activation
from convselect.measure import calibration
from convselect.measure.cpu import PrimitiveTimer, robust_ms
from convselect.measure.operators import time_transforms
from convselect.options import Options
from convselect.primitive import candidates

WAYS = ("model", "calibrated", "verified", "oracle")
"""The cost model as it is; after calibration; that, with its close calls timed; and all timed."""
PASSES = 5
"""Over all candidates, for the table that judges."""


class Loss(NamedTuple):
    """One convolution, with milliseconds by the measured table."""

    problem: str
    chosen: str
    chosen_ms: float
    fastest: str
    fastest_ms: float


@dataclass(frozen=True)
class Verdict:
    """The judgement of one network's plans, one for each of `WAYS`."""

    network: str
    convolutions: int
    distinct: int
    timings: int
    """Candidates of the distinct convolutions."""
    ms: Mapping[str, float]
    """Convolutions and layout transforms, by the measured table."""
    seconds: Mapping[str, float]
    """That it took to come to each plan, what it builds on included."""
    losses: Mapping[str, list[Loss]]
    """Where a plan's convolutions take longest beyond the fastest candidate, which transforms may justify."""

    def ratio(self, way: str) -> float:
        """Time of that plan over the oracle's."""
        return self.ms[way] / self.ms["oracle"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": {way: self.ratio(way) for way in self.ms}}


class Judge:
    """One network, its candidates, and what they take.

    Args:
        options: the accuracy, and the budget of the calibration and again of the verification.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, options: Options, cost_model: CostModel) -> None:
        torch._dynamo.reset()
        self.options, self.cost_model, self.machine = options, cost_model, machine.cpu()
        self.timer = PrimitiveTimer(self.machine)
        self._graphs = captured(model, x)
        self.problems = [spec.problem for g in self._graphs for spec in g.convs.values()]
        self.able: Able = {p: candidates(p, self.machine, options.accuracy)[0] for p in self.problems}

    def plan(self, costs: Costs, times: Times) -> list[Assignment]:
        """The best by `times`, of each of the network's graphs; operators and transforms as `costs` say."""
        found, operators = with_times(self.able, times, self.machine), OperatorCosts(costs.operator_ms)
        by_node = [{node: found[spec.problem] for node, spec in g.convs.items()} for g in self._graphs]
        return [assign(g.graph, some, operators) for g, some in zip(self._graphs, by_node, strict=True)]

    def calibrated(self) -> Costs:
        """As on a first run of this network; what is timed is not kept."""
        with _no_calibrations():
            samples = calibration.calibrate(
                self.options.budget_s, problems=self.problems, able=self.able, model=self.cost_model, progress=False
            )
        return Costs(self.cost_model, samples, self.machine)

    def measure(self, costs: Costs) -> None:
        """Fills the table by which `ms` judges."""
        passes = [measured_ms(self.able, self.timer) for _ in range(PASSES)]
        self._table = {}
        for problem, primitives in self.able.items():
            names = [primitive.name for primitive in primitives]
            ms = robust_ms([[times[problem][name] for name in names] for times in passes])
            self._table[problem] = dict(zip(names, ms.tolist(), strict=True))
        self._transforms = self._timed_transforms(costs)

    def ms(self, plans: Sequence[Assignment]) -> float:
        """Convolutions and layout transforms by the measured table."""
        total = 0.0
        for g, assignment in zip(self._graphs, plans, strict=True):
            total += transforms_ms(g.graph, assignment.chosen, self._transforms)
            for node, spec in g.convs.items():
                candidate = assignment.chosen[node].candidate
                assert candidate is not None
                total += self._table[spec.problem][candidate.primitive.name]
        return total

    def losses(self, plans: Sequence[Assignment], count: int = 3) -> list[Loss]:
        """The `count` largest."""
        found = []
        for g, assignment in zip(self._graphs, plans, strict=True):
            for node, spec in g.convs.items():
                candidate = assignment.chosen[node].candidate
                assert candidate is not None
                table, name = self._table[spec.problem], candidate.primitive.name
                fastest_ms, fastest = min((ms, other) for other, ms in table.items())
                found.append(Loss(str(spec.problem), name, table[name], fastest, fastest_ms))
        return sorted(found, key=lambda loss: loss.fastest_ms - loss.chosen_ms)[:count]

    def _timed_transforms(self, costs: Costs) -> OperatorCosts:
        """`costs`, but measured for the transforms of the graphs' values."""
        values = [node for g in self._graphs for node in g.graph.nodes if is_activation(node.meta.get("val"))]
        by_bytes = {nbytes(v): tuple(size_hint(size) for size in v.meta["val"].shape) for v in values}
        timed = time_transforms([(n, c, h, w) for n, c, h, w in by_bytes.values()])
        measured = {(row.key, row.nbytes): row.ms for row in timed}

        def operator_ms(key: str, size: int) -> float:
            ms = measured.get((key, size))
            return costs.operator_ms(key, size) if ms is None else ms

        return OperatorCosts(operator_ms)


def judge(
    name: str,
    model: nn.Module,
    x: torch.Tensor,
    options: Options,
    cost_model: CostModel,
    progress: Callable[[str], None] = lambda text: None,
) -> Verdict:
    progress("capturing")
    network = Judge(model, x, options, cost_model)
    plans: dict[str, list[Assignment]] = {}
    seconds: dict[str, float] = {}

    def plan(way: str, start: float, costs: Costs, times: Times) -> None:
        plans[way] = network.plan(costs, times)
        seconds[way] = time.perf_counter() - start

    start = time.perf_counter()
    costs = Costs(cost_model, None, network.machine)
    plan("model", start, costs, predict(costs, network.able)[0])

    progress("calibrating")
    start = time.perf_counter()
    costs = network.calibrated()
    plan("calibrated", start, costs, predict(costs, network.able)[0])

    progress("verifying")
    costs = verified(costs, network.able, options.budget_s, network.timer)
    plan("verified", start, costs, predict(costs, network.able)[0])

    progress("timing every candidate")
    start = time.perf_counter()
    plan("oracle", start, costs, measured_ms(network.able, network.timer))

    progress("judging")
    network.measure(costs)
    ms = {way: network.ms(plans[way]) for way in WAYS}
    timings = sum(map(len, network.able.values()))
    losses = {way: network.losses(plans[way]) for way in WAYS}
    return Verdict(name, len(network.problems), len(network.able), timings, ms, seconds, losses)


@contextmanager
def _no_calibrations() -> Iterator[None]:
    """An empty cache, as on a first run, that is thrown away."""
    before = os.environ.get("CONVSELECT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONVSELECT_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["CONVSELECT_CACHE"]
            else:
                os.environ["CONVSELECT_CACHE"] = before
