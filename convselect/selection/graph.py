"""A PBQP instance under reduction: every rule here keeps at least one optimal solution.

R0, RI and RII eliminate nodes of degree 0, 1 and 2 (Scholz and Eckstein, *Register Allocation for Irregular
Architectures*, LCTES 2002); a node with one option left folds into its neighbours at any degree; a dominated option
is dropped (Goldstein's criterion for dead-end elimination); a separable edge C(a, x) = u(a) + v(x) dissolves into its
nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


class Elimination(NamedTuple):
    """How to choose `node`'s option once its neighbours have theirs: argmin costs[a] + sum over edges C[a, choice]."""

    node: int
    labels: Labels
    costs: Array
    edges: tuple[tuple[int, Labels, Array], ...]


class Graph:
    """Nodes with option costs f64 [k], edges with pair costs f64 [k_i, k_j]; inf is forbidden. Arrays stay unwritten.

    Attributes:
        base: cost common to every solution.
        costs: node -> f64 [k], never empty, all finite.
        labels: node -> i64 [k], the options' numbers in the original instance.
        adjacent: node -> neighbour -> f64 [k_node, k_neighbour]; both directions are kept.
        eliminated: in order of elimination.
        infeasible: a node has lost all its options.
    """

    def __init__(self) -> None:
        self.base = 0.0
        self.costs: dict[int, Array] = {}
        self.labels: dict[int, Labels] = {}
        self.adjacent: dict[int, dict[int, Array]] = {}
        self.eliminated: list[Elimination] = []
        self.infeasible = False

    @classmethod
    def build(cls, nodes: Sequence[npt.ArrayLike], edges: Mapping[tuple[int, int], npt.ArrayLike]) -> Graph:
        """Edges (i, j) and (j, i) are added together, an edge (i, i) counts by its diagonal.

        Raises:
            ValueError: a shape that does not fit, a NaN or -inf, an edge to a node that is not there.
        """
        graph = cls()
        for i, values in enumerate(nodes):
            cost = np.asarray(values, dtype=np.float64)
            if cost.ndim != 1 or cost.size == 0:
                raise ValueError(
                    f"node {i} has costs of shape {cost.shape}, must be [options] with at least one option"
                )
            graph.costs[i] = cost
            graph.labels[i] = np.arange(cost.size)
            graph.adjacent[i] = {}
        _check_values(graph.costs)
        matrices: dict[tuple[int, int], Array] = {}
        for (i, j), values in edges.items():
            if i not in graph.costs or j not in graph.costs:
                raise ValueError(f"edge ({i}, {j}) names a node that is not there, there are {len(graph.costs)}")
            matrix = np.asarray(values, dtype=np.float64)
            if matrix.shape != (graph.costs[i].size, graph.costs[j].size):
                expected = (graph.costs[i].size, graph.costs[j].size)
                raise ValueError(f"edge ({i}, {j}) has shape {matrix.shape}, its nodes' options give {expected}")
            matrices[i, j] = matrix
        _check_values(matrices)
        for (i, j), matrix in matrices.items():
            if i == j:
                graph.costs[i] = graph.costs[i] + np.diagonal(matrix)
            else:
                graph._join(i, j, matrix)
        for i in graph.costs:
            graph._keep(i, np.isfinite(graph.costs[i]))
        return graph

    def copy(self) -> Graph:
        other = Graph()
        other.base, other.infeasible = self.base, self.infeasible
        other.costs, other.labels = dict(self.costs), dict(self.labels)
        other.adjacent = {i: dict(row) for i, row in self.adjacent.items()}
        other.eliminated = list(self.eliminated)
        return other

    def components(self) -> list[Graph]:
        """The connected components as graphs of their own, each with `base` 0 and nothing eliminated."""
        parts, seen = [], set[int]()
        for root in self.costs:
            if root in seen:
                continue
            members = [root]
            seen.add(root)
            for node in members:
                for neighbour in self.adjacent[node]:
                    if neighbour not in seen:
                        seen.add(neighbour)
                        members.append(neighbour)
            part = Graph()
            for node in members:
                part.costs[node], part.labels[node] = self.costs[node], self.labels[node]
                part.adjacent[node] = dict(self.adjacent[node])
            parts.append(part)
        return parts

    def complete(self, choices: dict[int, int]) -> None:
        """Adds to `choices` (node -> original option) the options of the eliminated nodes."""
        for node, labels, costs, edges in reversed(self.eliminated):
            total = costs
            for neighbour, theirs, matrix in edges:
                total = total + matrix[:, int(np.searchsorted(theirs, choices[neighbour]))]
            choices[node] = int(labels[int(total.argmin())])

    def restrict(self, node: int, keep: npt.NDArray[np.bool_]) -> None:
        """Leaves `node` the options where `keep` is true."""
        self._keep(node, keep)

    def reduce(self, touched: Sequence[int] | None = None) -> None:
        """Applies every rule until none applies, starting from the nodes `touched`, or from all."""
        queue = dict.fromkeys(self.costs if touched is None else touched)
        for i in list(queue) if touched is None else ():
            for j in [j for j in self.adjacent[i] if i < j]:
                self._dissolve(i, j)
        while queue and not self.infeasible:
            node = next(iter(queue))
            del queue[node]
            if node not in self.costs:
                continue
            neighbours = list(self.adjacent[node])
            if self._drop_dominated(node):
                for neighbour in neighbours:
                    self._dissolve(node, neighbour)
                queue.update(dict.fromkeys(neighbours))
                neighbours = list(self.adjacent[node])
            if len(neighbours) <= 2 or self.costs[node].size == 1:
                self._eliminate(node, neighbours)
                queue.update(dict.fromkeys(neighbours))

    def _keep(self, node: int, keep: npt.NDArray[np.bool_]) -> None:
        if keep.all():
            return
        if not keep.any():
            self.infeasible = True
            return
        self.costs[node] = self.costs[node][keep]
        self.labels[node] = self.labels[node][keep]
        for neighbour, matrix in self.adjacent[node].items():
            self._set(node, neighbour, matrix[keep])

    def _set(self, i: int, j: int, matrix: Array) -> None:
        self.adjacent[i][j] = matrix
        self.adjacent[j][i] = matrix.T

    def _join(self, i: int, j: int, matrix: Array) -> None:
        old = self.adjacent[i].get(j)
        self._set(i, j, matrix if old is None else old + matrix)

    def _dissolve(self, i: int, j: int) -> bool:
        """Removes the edge if it is separable. Returns whether it was."""
        matrix = self.adjacent[i].get(j)
        if matrix is None:
            return False
        if not np.isfinite(matrix).all():
            return False
        u, v = matrix[:, 0] - matrix[0, 0], matrix[0]
        if np.abs(matrix - (u[:, None] + v)).max() > 1e-13 * np.abs(matrix).max():
            return False
        self.costs[i] = self.costs[i] + u
        self.costs[j] = self.costs[j] + v
        del self.adjacent[i][j], self.adjacent[j][i]
        return True

    def _drop_dominated(self, node: int) -> bool:
        """Drops each option a for which some b costs no more whatever the neighbours choose. Returns whether any.

        a goes if c(a) - c(b) + sum_j min_x (C_j(a, x) - C_j(b, x)) >= 0; x with C_j(a, x) = inf is out beside a.
        """
        costs = self.costs[node]
        if costs.size == 1 and not self.adjacent[node]:
            return False
        changed = False
        if self.adjacent[node]:
            rows = np.concatenate(list(self.adjacent[node].values()), axis=1)
            starts = np.cumsum([0, *(m.shape[1] for m in self.adjacent[node].values())])[:-1]
            if not np.isfinite(rows).all():
                alive = np.isfinite(np.minimum.reduceat(rows, starts, axis=1).max(axis=1))
                if not alive.all():
                    self._keep(node, alive)
                    if self.infeasible:
                        return True
                    costs, rows, changed = self.costs[node], rows[alive], True
                with np.errstate(invalid="ignore"):
                    least = rows[:, None, :] - rows[None, :, :]
                least[np.broadcast_to(np.isinf(rows)[:, None, :], least.shape)] = np.inf
            else:
                least = rows[:, None, :] - rows[None, :, :]
            excess = np.minimum.reduceat(least, starts, axis=2).sum(axis=2) + (costs[:, None] - costs[None, :])
        else:
            excess = costs[:, None] - costs[None, :]
        beaten = excess >= 0
        np.fill_diagonal(beaten, False)
        if not beaten.any():
            return changed
        alive = np.ones(costs.size, dtype=np.bool_)
        for option in range(costs.size - 1, -1, -1):  # one after another: of options that beat each other one stays
            alive[option] = not (beaten[option] & alive).any()
        self._keep(node, alive)
        return True

    def _eliminate(self, node: int, neighbours: list[int]) -> None:
        """R0, RI, RII, and the folding of a node with one option."""
        costs, labels = self.costs[node], self.labels[node]
        row = self.adjacent[node]
        record = tuple((j, self.labels[j], row[j]) for j in neighbours)
        self.eliminated.append(Elimination(node, labels, costs, record))
        for j in neighbours:
            del self.adjacent[j][node]
        del self.costs[node], self.labels[node], self.adjacent[node]
        if not neighbours:
            self.base += float(costs.min())
        elif costs.size == 1:
            self.base += float(costs[0])
            for j in neighbours:
                self._charge(j, row[j][0])
        elif len(neighbours) == 1:
            (j,) = neighbours
            self._charge(j, (costs[:, None] + row[j]).min(axis=0))
        else:
            i, j = neighbours
            table = (costs[:, None, None] + row[i][:, :, None] + row[j][:, None, :]).min(axis=0)
            self._join(i, j, table)
            self._dissolve(i, j)

    def _charge(self, node: int, extra: Array) -> None:
        self.costs[node] = self.costs[node] + extra
        self._keep(node, np.isfinite(self.costs[node]))


def _check_values(arrays: Mapping[int, Array] | Mapping[tuple[int, int], Array]) -> None:
    """NaN and -inf are the caller's fault."""
    for key, values in arrays.items():
        if not (values > -np.inf).all():
            raise ValueError(f"the costs of {key} hold {values[~(values > -np.inf)][0]}, must be numbers or +inf")
