"""Exact answers to compare the PBQP solver with: all choices in turn, and an integer program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from convselect.selection import Solution
from convselect.selection.pbqp import cost_of

Nodes = list[np.ndarray]
Edges = dict[tuple[int, int], np.ndarray]


def brute_force(nodes: Nodes, edges: Edges) -> float:
    return min(cost_of(nodes, edges, x) for x in itertools.product(*(range(len(c)) for c in nodes)))


def exact_milp(nodes: Nodes, edges: Edges) -> float:
    """The local-marginal-polytope formulation with integral node variables, by HiGHS; inf if nothing is allowed.

    A 0-1 variable for each option, a continuous one for each pair of options on an edge. A node takes one option, and
    the pairs on an edge that contain an option sum to its variable. What costs inf is bounded to 0.
    """
    sizes = [cost.size for cost in (*nodes, *edges.values())]
    offsets = np.cumsum([0, *sizes])
    costs = np.concatenate([cost.ravel() for cost in (*nodes, *edges.values())])
    entries: list[tuple[int, int, float]] = []  # row, column, coefficient
    for i, cost in enumerate(nodes):
        entries += [(i, offsets[i] + option, 1.0) for option in range(cost.size)]
    rhs = [1.0] * len(nodes)
    for e, (pair, matrix) in enumerate(edges.items(), len(nodes)):
        block = offsets[e] + np.arange(matrix.size).reshape(matrix.shape)
        for node, groups in zip(pair, (block, block.T), strict=True):
            for option, group in enumerate(groups):
                entries += [(len(rhs), column, 1.0) for column in group]
                entries.append((len(rhs), offsets[node] + option, -1.0))
                rhs.append(0.0)
    rows, columns, coefficients = zip(*entries, strict=True)
    allowed = np.isfinite(costs)
    integrality = np.zeros(costs.size)
    integrality[: offsets[len(nodes)]] = 1
    result = milp(
        np.where(allowed, costs, 0.0),
        constraints=LinearConstraint(coo_array((coefficients, (rows, columns))).tocsr(), rhs, rhs),
        bounds=Bounds(0, allowed.astype(float)),
        integrality=integrality,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return np.inf
    assert result.success, result.message
    return float(result.fun)


def check(nodes: Nodes, edges: Edges, solution: Solution, optimum: float, *, exact: bool = True) -> None:
    """The cost is what the choices sum to, and the optimum lies between it and the bound; `exact`: they are equal."""
    assert solution.cost == pytest.approx(cost_of(nodes, edges, solution.choices), abs=1e-9)
    assert solution.lower_bound <= solution.cost
    assert solution.lower_bound <= optimum + 1e-7
    assert solution.cost >= optimum - 1e-7
    if exact:
        assert solution.cost == pytest.approx(optimum, abs=1e-7)
        assert solution.lower_bound == solution.cost
