"""The assignment: a PBQP instance of primitives, operators and layout transforms, solved and read back.

Nodes are the graph's values. A convolution has an option for each pair of layouts its primitives offer (the cheapest
primitive of each pair dominates the others); an operator that runs in either layout has two; anything else has one,
the layout it was traced in. A value with several readers gets a node of its own that says in which layouts it is kept,
so that a transform read twice is paid once. Edges cost the transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.fx import Graph, Node

from convselect.graph.capture import convolution
from convselect.graph.operators import in_both, is_activation, kind_of, layout_of
from convselect.layout import Layout
from convselect.primitive import Primitive
from convselect.selection import solve

Where = Layout | None
"""A layout; None for a tensor dense in neither."""


@dataclass(frozen=True)
class Candidate:
    """A primitive for one convolution: predicted time, and the memory it holds (packed weights)."""

    primitive: Primitive
    ms: float
    packed_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class Option:
    """One way to run a node: `reads` is the layout it needs its activations in, None the one each was traced in."""

    reads: Layout | None
    gives: Where
    ms: float
    candidate: Candidate | None = None


@dataclass(frozen=True)
class Assignment:
    chosen: Mapping[Node, Option]
    total_ms: float
    gap_ms: float


@dataclass(frozen=True)
class OperatorCosts:
    """ms of operators and of layout transforms, from the cost model's key and the bytes moved."""

    operator_ms: Callable[[str, int], float]

    def transform_ms(self, value_bytes: int, src: Where, dst: Where) -> float:
        """Of a value that is in `src` for a reader that needs `dst`; None takes whatever is there."""
        if src is dst or dst is None:
            return 0.0
        return self.operator_ms(f"to_{dst}", 2 * value_bytes)


def assign(
    graph: Graph,
    candidates: Mapping[Node, Sequence[Candidate]],
    costs: OperatorCosts,
    nbytes: Callable[[Node], int],
    memory_bytes: float = math.inf,
) -> Assignment:
    """The least total time, with packed weights and the largest workspace within `memory_bytes`.

    Under a bound the time is minimised plus a price on each byte, found by bisection (Lagrangian relaxation); the
    result obeys the bound but is optimal only up to the duality gap. Raises `ValueError` when nothing fits.
    """
    best = _solve(graph, candidates, costs, nbytes, 0.0)
    if _memory(best) <= memory_bytes:
        return best
    low, high = 0.0, 1e-9
    while _memory(feasible := _solve(graph, candidates, costs, nbytes, high)) > memory_bytes:
        low, high = high, 10 * high
        if high > 1e6:
            raise ValueError(
                f"memory_mb is {memory_bytes / 2**20:.4g}, but the least that this model's primitives need is "
                f"{_memory(feasible) / 2**20:.4g}"
            )
    for _ in range(12):
        middle = math.sqrt(max(low, high * 1e-3) * high)
        trial = _solve(graph, candidates, costs, nbytes, middle)
        if _memory(trial) <= memory_bytes:
            high, feasible = middle, min(trial, feasible, key=lambda a: a.total_ms)
        else:
            low = middle
    return feasible


def _memory(assignment: Assignment) -> int:
    used = [option.candidate for option in assignment.chosen.values() if option.candidate]
    return sum(c.packed_bytes for c in used) + max((c.workspace_bytes for c in used), default=0)


def _solve(
    graph: Graph,
    candidates: Mapping[Node, Sequence[Candidate]],
    costs: OperatorCosts,
    nbytes: Callable[[Node], int],
    price: float,
) -> Assignment:
    """The assignment that minimises ms + price * bytes; `total_ms` and `gap_ms` are without the price."""
    options: dict[Node, list[Option]] = {}
    for node in graph.nodes:
        options[node] = _options(node, candidates.get(node), costs, nbytes, price)
    index = {node: i for i, node in enumerate(options)}
    nodes = [np.array([_priced(option, price) for option in choices]) for choices in options.values()]
    edges: dict[tuple[int, int], np.ndarray] = {}
    for value in graph.nodes:
        if not is_activation(value.meta.get("val")) or in_both(value.meta["val"]):
            continue
        readers = list(value.users)
        size = nbytes(value)

        def transform(src: Where, dst: Where, size: int = size) -> float:
            return costs.transform_ms(size, src, dst)

        gives = [option.gives for option in options[value]]
        if len(readers) == 1:
            reads = [_reads(option, value, readers[0]) for option in options[readers[0]]]
            matrix = np.array([[transform(src, dst) for dst in reads] for src in gives])
            _add_edge(edges, index[value], index[readers[0]], matrix)
        elif readers:
            kept: list[tuple[Layout, ...]] = [(Layout.NCHW,), (Layout.NHWC,), (Layout.NCHW, Layout.NHWC)]
            nodes.append(np.zeros(len(kept)))
            matrix = np.array([[sum(transform(src, dst) for dst in layouts) for layouts in kept] for src in gives])
            _add_edge(edges, index[value], len(nodes) - 1, matrix)
            for reader in readers:
                reads = [_reads(option, value, reader) for option in options[reader]]
                matrix = np.array([[0.0 if r is None or r in layouts else math.inf for r in reads] for layouts in kept])
                _add_edge(edges, len(nodes) - 1, index[reader], matrix)
    solution = solve(nodes, edges)
    chosen = {node: choices[solution.choices[index[node]]] for node, choices in options.items()}
    paid = price * sum(_held(option.candidate) for option in chosen.values() if option.candidate)
    return Assignment(chosen, solution.cost - paid, solution.cost - solution.lower_bound)


def _priced(option: Option, price: float) -> float:
    """Each workspace is priced as if it were held for itself, though one serves all: a bound, but a separable one."""
    return option.ms + (price * _held(option.candidate) if option.candidate else 0.0)


def _held(candidate: Candidate) -> int:
    return candidate.packed_bytes + candidate.workspace_bytes


def _reads(option: Option, value: Node, reader: Node) -> Where:
    """The layout in which `reader` needs `value`: a convolution's residual must be in the layout of its result."""
    if reader.target is convolution and reader.args[3] is value and reader.args[0] is not value:
        return option.gives
    return layout_of(value.meta["val"]) if option.reads is None else option.reads


def _add_edge(edges: dict[tuple[int, int], np.ndarray], a: int, b: int, matrix: np.ndarray) -> None:
    edges[a, b] = edges[a, b] + matrix if (a, b) in edges else matrix


def _options(
    node: Node,
    candidates: Sequence[Candidate] | None,
    costs: OperatorCosts,
    nbytes: Callable[[Node], int],
    price: float,
) -> list[Option]:
    if candidates is not None:
        best: dict[tuple[Layout, Layout], Option] = {}
        for candidate in candidates:
            primitive = candidate.primitive
            option = Option(primitive.src_layout, primitive.dst_layout, candidate.ms, candidate)
            pair = (primitive.src_layout, primitive.dst_layout)
            if pair not in best or _priced(option, price) < _priced(best[pair], price):
                best[pair] = option
        return list(best.values())
    value = node.meta.get("val")
    kind = kind_of(node)
    if kind is not None:
        moved = nbytes(node) + sum(nbytes(source) for source in node.all_input_nodes)
        return [Option(layout, layout, costs.operator_ms(f"{kind}.{layout}", moved)) for layout in Layout]
    return [Option(None, layout_of(value) if is_activation(value) else None, 0.0)]
