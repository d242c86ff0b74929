"""Partitioned Boolean quadratic programming: one option for each node, least sum of node and edge costs.

Reductions solve chains, trees and series-parallel graphs exactly; what remains is searched best-first by branch and
bound with a dual bound, until the optimum is proven or the time is up, and then the gap is known.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from convselect.selection.bound import Diffusion
from convselect.selection.graph import Graph

_TOLERANCE = 1e-9
"""Solutions whose costs differ by less, relative to the cost, count as equal."""
_SWEEPS = 10
"""Diffusion sweeps between two looks at the bound."""
_STALLED = 0.02
"""Diffusion stops when that many sweeps close less than this share of the gap."""


class Solution(NamedTuple):
    """`choices[i]` is node i's option; `cost` its total, in the unit of the costs; no solution costs less than
    `lower_bound`, which equals `cost` when the solution is proven optimal (to a relative 1e-9)."""

    choices: list[int]
    cost: float
    lower_bound: float


def solve(
    nodes: Sequence[npt.ArrayLike], edges: Mapping[tuple[int, int], npt.ArrayLike], *, budget_s: float = 0.1
) -> Solution:
    """The options of least total cost: sum_i nodes[i][x_i] + sum_(i,j) edges[i, j][x_i, x_j].

    Args:
        nodes: f64 [k_i] each, any unit; inf forbids the option.
        edges: (i, j) -> f64 [k_i, k_j]; inf forbids the pair. (i, j) and (j, i) add up; (i, i) counts by its diagonal.
        budget_s: wall-clock seconds after which the search stops with the best solution found. The reductions are not
            interrupted, and the search goes on until it has a solution at all.

    Raises:
        ValueError: the input is malformed, or no choice of options has a finite cost.
    """
    deadline = time.perf_counter() + budget_s
    graph = Graph.build(nodes, edges)
    graph.reduce()
    choices: dict[int, int] = {}
    slack = 0.0
    if not graph.infeasible:
        parts = graph.components()
        for number, part in enumerate(parts):
            now = time.perf_counter()
            found = _Search(part, now + max(0.0, deadline - now) / (len(parts) - number)).run()
            if found is None:
                graph.infeasible = True
                break
            part_choices, gap = found
            choices.update(part_choices)
            slack += gap
    if graph.infeasible:
        raise ValueError("infeasible: every choice of options breaks a forbidden option or pair")
    graph.complete(choices)
    ordered = [choices[i] for i in range(len(nodes))]
    cost = cost_of(nodes, edges, ordered)
    return Solution(ordered, cost, cost - slack)


def cost_of(
    nodes: Sequence[npt.ArrayLike], edges: Mapping[tuple[int, int], npt.ArrayLike], choices: Sequence[int]
) -> float:
    """The total cost of `choices`, one option for each node."""
    total = sum(float(np.asarray(cost)[x]) for cost, x in zip(nodes, choices, strict=True))
    return total + sum(float(np.asarray(matrix)[choices[i], choices[j]]) for (i, j), matrix in edges.items())


class _Search:
    """Best-first branch and bound on one connected core in which no reduction applies."""

    def __init__(self, root: Graph, deadline: float) -> None:
        self._deadline = deadline
        self._cost = np.inf
        self._choices: dict[int, int] | None = None
        self._order = itertools.count()
        self._open: list[tuple[float, int, Graph]] = [(-np.inf, next(self._order), root)]

    def run(self) -> tuple[dict[int, int], float] | None:
        """(node -> option, gap), None if infeasible."""
        while self._open:
            late = time.perf_counter() > self._deadline
            if self._open[0][0] >= self._threshold or (late and self._choices is not None):
                break
            _, _, graph = heapq.heappop(self._open)
            self._visit(graph)
        if self._choices is None:
            return None
        bound = min((entry[0] for entry in self._open), default=np.inf)
        return self._choices, (0.0 if bound >= self._threshold else self._cost - bound)

    @property
    def _threshold(self) -> float:
        """A bound from here on cannot lead to a better solution."""
        return self._cost - _TOLERANCE * max(1e-30, abs(self._cost)) if np.isfinite(self._cost) else np.inf

    def _visit(self, graph: Graph) -> None:
        """Bounds the subproblem, shrinks it, and branches if it is still open. Leaves `graph` changed."""
        while True:
            if graph.infeasible:
                return
            if not graph.costs:
                self._offer(graph, {}, graph.base)
                return
            diffusion = Diffusion(graph)
            bound = diffusion.bound()
            while True:
                diffusion.ascend(_SWEEPS, self._deadline)
                before, bound = bound, diffusion.bound()
                positions, cost = diffusion.rounded()
                if cost < self._threshold:
                    chosen = zip(diffusion.nodes, positions, strict=True)
                    self._offer(graph, {node: int(graph.labels[node][p]) for node, p in chosen}, cost)
                if bound.value >= self._threshold:
                    return
                closed = bound.value - before.value
                if not closed > _STALLED * (self._cost - bound.value) or time.perf_counter() > self._deadline:
                    break
            diffusion.write_back()
            keep = bound.marginals < self._threshold
            shrunk = [p for p in range(len(keep)) if not keep[p, : diffusion.sizes[p]].all()]
            for p in shrunk:
                graph.restrict(diffusion.nodes[p], keep[p, : diffusion.sizes[p]])
            if graph.infeasible:
                return
            size = len(graph.costs)
            graph.reduce()
            if len(graph.costs) == size and len(shrunk) < 1:
                break
            if time.perf_counter() > self._deadline:
                if not graph.infeasible:
                    heapq.heappush(self._open, (bound.value, next(self._order), graph))
                return
        self._branch(graph, diffusion, bound.value, bound.marginals)

    def _branch(self, graph: Graph, diffusion: Diffusion, value: float, marginals: npt.NDArray[np.float64]) -> None:
        """Splits the node with the largest second-best bound into its best option and the others."""
        second = np.sort(marginals, axis=1)[:, 1]
        p = int(second.argmax())
        node = diffusion.nodes[p]
        only = np.zeros(diffusion.sizes[p], dtype=np.bool_)
        only[marginals[p, : only.size].argmin()] = True
        for keep, bound in ((only, value), (~only, float(second[p]))):
            child = graph.copy()
            child.restrict(node, keep)
            child.reduce([node, *graph.adjacent[node]])
            if not child.infeasible and bound < self._threshold:
                heapq.heappush(self._open, (bound, next(self._order), child))

    def _offer(self, graph: Graph, choices: dict[int, int], cost: float) -> None:
        """Keeps the solution if it is the best so far."""
        if cost < self._cost:
            graph.complete(choices)
            self._choices, self._cost = choices, cost
