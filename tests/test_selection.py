"""Selection on real graphs: exact by an integer program, and costed as the graph that is built from it."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exact import check, exact_milp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from convselect import machine
from convselect.backend import Prepared, captured
from convselect.bench.networks import DEFAULT, load
from convselect.choices import choices_for
from convselect.graph.assign import Candidate, Instance, OperatorCosts, assign, transforms_ms
from convselect.graph.budget import assign_within
from convselect.graph.capture import nbytes
from convselect.graph.lower import lower
from convselect.options import Options
from convselect.primitive import candidates as able
from convselect.selection import solve

pytestmark = pytest.mark.usefixtures("solver_clock")

FEW = ("alexnet", "resnet18")
"""Networks that take seconds, a chain and one with residuals; the others take two minutes more."""

Candidates = dict[torch.fx.Node, list[Candidate]]


def with_costs(prepared: Prepared) -> tuple[Candidates, OperatorCosts]:
    """By the shipped model."""
    specs = prepared.convs
    choices = choices_for([spec.problem for spec in specs.values()], Options(calibrate="never"), machine.cpu())
    candidates = {node: choices.candidates[spec.problem] for node, spec in specs.items()}
    return candidates, OperatorCosts(choices.costs.operator_ms)


@lru_cache(maxsize=1)
def network(name: str) -> tuple[Prepared, Candidates, OperatorCosts]:
    torch._dynamo.reset()
    with FakeTensorMode():
        (prepared,) = captured(*load(name))
    return prepared, *with_costs(prepared)


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("torchvision") is None, reason="the networks are torchvision's")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in DEFAULT])
def test_networks_equal_milp(name: str) -> None:
    """With the model's costs, and with ones that make every layout as good as any."""
    prepared, candidates, costs = network(name)
    instance = Instance.of(prepared.graph, candidates, costs)
    nodes, edges = instance.nodes, instance.edges
    solution = solve(nodes, edges)
    check(nodes, edges, solution, exact_milp(nodes, edges))
    assert assign(prepared.graph, candidates, costs).total_ms == solution.cost
    rng = np.random.default_rng(0)
    for budget_s in (0.0, 10.0):
        nodes = [rng.uniform(0.0, 1.0, cost.size) for cost in instance.nodes]
        edges = {pair: np.where(matrix > 0, matrix + rng.uniform(0, 0.5), 0.0) for pair, matrix in edges.items()}
        check(nodes, edges, solve(nodes, edges, budget_s=budget_s), exact_milp(nodes, edges), exact=budget_s > 0)


class Small(nn.Module):
    """Two convolutions from 8 channels to as many, and what to do with them."""

    def __init__(self, body: Callable[[Small, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


BODIES: dict[str, Callable[[Small, torch.Tensor], torch.Tensor]] = {
    "chain": lambda m, x: m.b(F.max_pool2d(m.a(x), 3, 1, 1)),
    "own residual": lambda m, x: m.b(F.relu(m.a(x) + x)),
    "dense block": lambda m, x: torch.cat([x, y := m.a(x), m.b(y)], 1),
    "branches": lambda m, x: m.a(y := F.max_pool2d(x, 3, 1, 1)) + m.b(y) * torch.sigmoid(y),
    "strided": lambda m, x: m.a((y := torch.cat([x, x], 1)[:, 4:12]).flip(3)) + m.b(y.flip(2)),
}


@pytest.mark.parametrize("name", BODIES)
def test_assignment_is_the_best_of_all_graphs(name: str) -> None:
    """Every choice of options is lowered; its cost is that of its layers, its operators and the transforms in it."""
    torch._dynamo.reset()
    with FakeTensorMode():
        (prepared,) = captured(Small(BODIES[name]).eval(), torch.empty(2, 8, 16, 16))
    graph = prepared.graph
    fake = torch._guards.detect_fake_mode([node.meta.get("val") for node in graph.nodes])
    rng = np.random.default_rng(len(name))
    (problem,) = {spec.problem for spec in prepared.convs.values()}
    primitives = {(p.src_layout, p.dst_layout): p for p in able(problem, machine.cpu(), "default")[0]}
    assert len(primitives) == 3
    for _ in range(4):
        price = defaultdict[tuple[str, int], float](lambda: float(rng.uniform(0.0, 2.0)))
        costs = OperatorCosts(lambda key, size: price[key, size])  # noqa: B023
        candidates = {
            node: [Candidate(primitive, rng.uniform(0.0, 2.0), 0, 0) for primitive in primitives.values()]
            for node in prepared.convs
        }
        options = Instance.of(graph, candidates, costs).options
        best = math.inf
        for choice in itertools.product(*options.values()):
            chosen = dict(zip(options, choice, strict=True))
            with fake:
                lowered = lower(graph, chosen, 100)
            moved = sum(costs.transform_ms(nbytes(value), src, dst) for value, src, dst, _ in lowered.transforms)
            assert transforms_ms(graph, chosen, costs) == pytest.approx(moved)
            best = min(best, moved + sum(option.ms for option in choice))
        assert assign(graph, candidates, costs).total_ms == pytest.approx(best)


def test_the_gap_under_a_bound_on_memory_holds() -> None:
    """Against every choice that obeys the bound; the first bound is just below what is fastest."""
    torch._dynamo.reset()
    with FakeTensorMode():
        (prepared,) = captured(Small(BODIES["chain"]).eval(), torch.empty(2, 8, 16, 16))
    (problem,) = {spec.problem for spec in prepared.convs.values()}
    primitives = able(problem, machine.cpu(), "default")[0][:6]
    rng = np.random.default_rng(0)
    costs = OperatorCosts(lambda key, size: 0.1)
    loose = 0
    for _ in range(20):
        candidates = {
            node: [Candidate(p, rng.uniform(0.1, 1.0), *map(int, rng.integers(1, 1000, 2))) for p in primitives]
            for node in prepared.convs
        }
        every = []
        for choice in itertools.product(*candidates.values()):
            chosen = {node: [candidate] for node, candidate in zip(candidates, choice, strict=True)}
            held = sum(c.packed_bytes for c in choice) + max(c.workspace_bytes for c in choice)
            every.append((assign(prepared.graph, chosen, costs).total_ms, held))
        _, free_bytes = min(every)
        for bound in (free_bytes, free_bytes - 1, free_bytes * 0.6):
            optimum = min((ms for ms, held in every if held <= bound), default=None)
            if optimum is None:
                continue
            assignment = assign_within(prepared.graph, candidates, costs, bound)
            assert assignment.total_ms >= optimum - 1e-9
            assert 0 <= assignment.total_ms - assignment.gap_ms <= optimum + 1e-9
            loose += assignment.total_ms > optimum + 1e-9
            assert assignment.gap_ms == 0 or bound < free_bytes
            assert assignment.gap_ms > 0 or assignment.total_ms == pytest.approx(optimum)
    assert loose > 0
