"""How near selection comes to timing everything: a network's plans, judged by one table of measured times.

Every candidate of every distinct convolution is timed, interleaved and with cold weights as in a profile, and so is
every layout transform that the network could need. The oracle's plan is the best by this table. The others are made
from the cost model alone, after a first run's calibration, and with their close calls verified; each is then worth what
its primitives and its transforms take by the same table, so that noise does not decide between them. Operators between
the convolutions are assigned by the cost model, and not part of the sums.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from convselect import calibration, machine
from convselect.backend import Prepared, captured
from convselect.costs import CostModel, Costs
from convselect.graph.assign import Assignment, OperatorCosts, assign, transforms_ms
from convselect.graph.capture import nbytes, size_hint
from convselect.graph.operators import is_activation
from convselect.operator_timing import time_transforms
from convselect.options import Options
from convselect.planning import Able, Times, measured_ms, predict, verified_ms, with_times
from convselect.primitive import candidates
from convselect.timing import PrimitiveTimer

WAYS = ("model", "calibrated", "verified", "oracle")
"""The cost model as it is; after calibration; that, with its close calls timed; and all timed."""


@dataclass(frozen=True)
class Verdict:
    """Of one network; by `WAYS`."""

    network: str
    convolutions: int
    distinct: int
    timings: int
    """Candidates of the distinct convolutions."""
    ms: Mapping[str, float]
    """Convolutions and layout transforms, by the measured table."""
    seconds: Mapping[str, float]
    """That it took to come to each plan, what it builds on included."""

    def ratio(self, way: str) -> float:
        """Time of that plan over the oracle's."""
        return self.ms[way] / self.ms["oracle"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": {way: self.ratio(way) for way in self.ms}}


def judge(
    name: str,
    model: nn.Module,
    x: torch.Tensor,
    options: Options,
    cost_model: CostModel,
    progress: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """`options`: the accuracy, and the budget of the calibration and again of the verification."""
    progress("capturing")
    torch._dynamo.reset()
    graphs = captured(model, x)
    here = machine.cpu()
    timer = PrimitiveTimer(here)
    problems = [spec.problem for g in graphs for spec in g.convs.values()]
    able: Able = {problem: candidates(problem, here, options.accuracy)[0] for problem in problems}
    plans: dict[str, list[Assignment]] = {}
    seconds: dict[str, float] = {}

    def plan(way: str, start: float, operators: OperatorCosts, times: Times) -> None:
        found = with_times(able, times, here)
        by_node = [{node: found[spec.problem] for node, spec in g.convs.items()} for g in graphs]
        plans[way] = [assign(g.graph, some, operators) for g, some in zip(graphs, by_node, strict=True)]
        seconds[way] = time.perf_counter() - start

    start = time.perf_counter()
    costs = Costs(cost_model, None, here)
    plan("model", start, OperatorCosts(costs.operator_ms), predict(costs, able)[0])

    progress("calibrating")
    start = time.perf_counter()
    with _no_calibrations():
        samples = calibration.calibrate(
            options.budget_s, problems=problems, able=able, model=cost_model, progress=False
        )  # fmt: skip
    costs = Costs(cost_model, samples, here)
    operators, times = OperatorCosts(costs.operator_ms), predict(costs, able)[0]
    plan("calibrated", start, operators, times)

    progress("verifying")
    plan("verified", start, operators, verified_ms(times, able, options, timer))

    progress("timing every candidate")
    start = time.perf_counter()
    table = measured_ms(able, timer)
    transforms = _timed_transforms(graphs, costs)
    plan("oracle", start, transforms, table)

    ms = {
        way: sum(_ms(g, assignment, table, transforms) for g, assignment in zip(graphs, plans[way], strict=True))
        for way in WAYS
    }
    return Verdict(name, len(problems), len(able), sum(map(len, able.values())), ms, seconds)


def _ms(prepared: Prepared, assignment: Assignment, table: Times, transforms: OperatorCosts) -> float:
    total = transforms_ms(prepared.graph, assignment.chosen, transforms)
    for node, spec in prepared.convs.items():
        candidate = assignment.chosen[node].candidate
        assert candidate is not None
        total += table[spec.problem][candidate.primitive.name]
    return total


def _timed_transforms(graphs: Sequence[Prepared], costs: Costs) -> OperatorCosts:
    """`costs`, but measured for the transforms of the graphs' values."""
    values = [node for g in graphs for node in g.graph.nodes if is_activation(node.meta.get("val"))]
    by_bytes = {nbytes(v): tuple(size_hint(size) for size in v.meta["val"].shape) for v in values}
    timed = time_transforms([(n, c, h, w) for n, c, h, w in by_bytes.values()])
    measured = {(row.key, row.nbytes): row.ms for row in timed}

    def operator_ms(key: str, size: int) -> float:
        ms = measured.get((key, size))
        return costs.operator_ms(key, size) if ms is None else ms

    return OperatorCosts(operator_ms)


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
