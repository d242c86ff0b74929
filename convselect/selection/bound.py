"""Lower bounds and good solutions of a PBQP core by dual block-coordinate ascent (min-sum diffusion).

Costs are moved between an edge and its ends, which changes no solution's cost: with messages M,
theta_i = c_i + sum_j M_ij and C'_ij(a, x) = C_ij(a, x) - M_ij(a) - M_ji(x), and
sum_i min theta_i + sum_ij min C'_ij is a lower bound. Diffusion (Werner, *A Linear Programming Approach to Max-sum
Problem: A Review*, PAMI 2007) collects at a node all its edges' minima and shares the sum equally among the edges;
the nodes of one colour class of the graph move at once.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from convselect.selection.graph import Array, Graph, Labels


class Bound(NamedTuple):
    """What diffusion found out about one graph; rows are nodes in `Diffusion.nodes`' order."""

    value: float
    """No solution costs less."""
    marginals: Array
    """f64 [n, k]: no solution in which the node takes that option costs less."""


class Diffusion:
    """A graph in padded arrays: n nodes of at most k options, d directed edges grouped by their first node.

    Forbidden pairs and the options beyond a node's own cost `_big`, more than any solution can differ from another.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        classes = _colour_classes(graph)
        self.nodes = [node for members in classes for node in members]
        self.sizes = np.array([graph.costs[node].size for node in self.nodes])
        position = {node: p for p, node in enumerate(self.nodes)}
        n, k = len(self.nodes), int(self.sizes.max())
        pairs = [(i, j) for i in self.nodes for j in graph.adjacent[i]]
        self._first = np.array([position[i] for i, _ in pairs])
        self._second = np.array([position[j] for _, j in pairs])
        number = {pair: e for e, pair in enumerate(pairs)}
        self._reverse = np.array([number[j, i] for i, j in pairs])
        degrees = np.bincount(self._first, minlength=n)
        self._starts = np.concatenate([[0], np.cumsum(degrees)])
        self._share = (1.0 / degrees)[:, None]
        ends = np.cumsum([len(members) for members in classes])
        self._classes = [(int(end) - len(members), int(end)) for end, members in zip(ends, classes, strict=True)]

        self._pair = np.full((len(pairs), k, k), np.inf)
        for e, (i, j) in enumerate(pairs):
            matrix = graph.adjacent[i][j]
            self._pair[e, : matrix.shape[0], : matrix.shape[1]] = matrix
        self._cost = np.full((n, k), np.inf)
        for p, node in enumerate(self.nodes):
            self._cost[p, : self.sizes[p]] = graph.costs[node]
        self._big = 1.0 + 2.0 * (_spread(self._cost) + _spread(self._pair))
        self._forbidden = np.isinf(self._pair)
        self._pair[self._forbidden] = self._big + np.abs(self._pair[np.isfinite(self._pair)]).max(initial=0.0)
        self._cost[np.isinf(self._cost)] = self._big + np.abs(self._cost[np.isfinite(self._cost)]).max(initial=0.0)
        self._messages = np.zeros((len(pairs), k))

    def ascend(self, sweeps: int, deadline: float) -> None:
        """That many sweeps over the colour classes, forth and back; fewer if the deadline (perf_counter) passes."""
        for _ in range(sweeps):
            for first, last in self._classes:
                lo, hi = self._starts[first], self._starts[last]
                minima = (self._pair[lo:hi] - self._messages[self._reverse[lo:hi]][:, None, :]).min(axis=2)
                collected = self._cost[first:last] + np.add.reduceat(minima, self._starts[first:last] - lo, axis=0)
                share = collected * self._share[first:last]
                self._messages[lo:hi] = minima - share[self._first[lo:hi] - first]
            if time.perf_counter() > deadline:
                return

    def bound(self) -> Bound:
        theta, pair = self._reparametrised()
        towards = pair.min(axis=2)
        least = towards.min(axis=1)
        value = self.graph.base + float(theta.min(axis=1).sum()) + 0.5 * float(least.sum())
        gains = np.add.reduceat(towards - least[:, None], self._starts[:-1], axis=0)
        return Bound(value, value + theta - theta.min(axis=1, keepdims=True) + gains)

    def rounded(self) -> tuple[Labels, float]:
        """A solution i64 [n] (positions among the remaining options) and its cost; inf where it breaks a rule.

        Class by class each node takes its best option given the classes decided before; then sweeps of the same with
        all neighbours known, while that improves (iterated conditional modes).
        """
        theta, pair = self._reparametrised()
        choice = np.full(len(self.nodes), -1)
        edges = np.arange(len(self._first))
        best, cost = choice, np.inf
        for sweep in range(12):
            for first, last in self._classes:
                lo, hi = self._starts[first], self._starts[last]
                known = choice[self._second[lo:hi]]
                chosen = pair[np.arange(lo, hi), :, np.maximum(known, 0)]
                if sweep == 0:
                    chosen = np.where(known[:, None] >= 0, chosen, pair[lo:hi].min(axis=2))
                total = theta[first:last] + np.add.reduceat(chosen, self._starts[first:last] - lo, axis=0)
                choice[first:last] = total.argmin(axis=1)
            picked = pair[edges, choice[self._first], choice[self._second]]
            new = self.graph.base + float(theta[np.arange(len(choice)), choice].sum() + 0.5 * picked.sum())
            if new >= cost:
                break
            best, cost = choice.copy(), new
        broken = (best >= self.sizes).any() or self._forbidden[edges, best[self._first], best[self._second]].any()
        return best, np.inf if broken else cost

    def write_back(self) -> None:
        """Gives the graph the costs moved so far, so that a later diffusion starts from here."""
        theta = self._cost + np.add.reduceat(self._messages, self._starts[:-1], axis=0)
        for p, node in enumerate(self.nodes):
            self.graph.costs[node] = theta[p, : self.sizes[p]]
        for e in np.flatnonzero(self._first < self._second):
            i, j = self.nodes[self._first[e]], self.nodes[self._second[e]]
            mine, theirs = self._messages[e], self._messages[self._reverse[e]]
            matrix = self.graph.adjacent[i][j]
            moved = matrix - mine[: matrix.shape[0], None] - theirs[None, : matrix.shape[1]]
            self.graph.adjacent[i][j], self.graph.adjacent[j][i] = moved, moved.T

    def _reparametrised(self) -> tuple[Array, Array]:
        theta = self._cost + np.add.reduceat(self._messages, self._starts[:-1], axis=0)
        pair = self._pair - self._messages[:, :, None] - self._messages[self._reverse][:, None, :]
        return theta, pair


def _spread(values: npt.NDArray[np.float64]) -> float:
    """Sum over the leading dimension of the largest minus the least finite value."""
    flat = values.reshape(len(values), -1)
    finite = np.isfinite(flat)
    return float((np.where(finite, flat, -np.inf).max(axis=1) - np.where(finite, flat, np.inf).min(axis=1)).sum())


def _colour_classes(graph: Graph) -> list[list[int]]:
    """Greedy colouring in breadth-first order: two classes where the graph is bipartite."""
    colour: dict[int, int] = {}
    for root in graph.costs:
        if root in colour:
            continue
        queue, seen = [root], {root}
        for node in queue:
            taken = {colour[j] for j in graph.adjacent[node] if j in colour}
            colour[node] = next(c for c in range(len(taken) + 1) if c not in taken)
            fresh = [j for j in graph.adjacent[node] if j not in seen and j not in colour]
            seen.update(fresh)
            queue += fresh
    classes: list[list[int]] = [[] for _ in range(max(colour.values()) + 1)]
    for node, c in colour.items():
        classes[c].append(node)
    return classes
