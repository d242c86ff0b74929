"""The assignment: a PBQP instance of primitives, operators and layout transforms, solved and read back.

Nodes are the graph's values. A convolution has an option for each pair of layouts its primitives offer (the cheapest
primitive of each pair dominates the others); an operator that runs in either layout has two; anything else has one,
the layout it was traced in. A value with several readers gets a node of its own that says in which layouts it is kept,
so that a transform read twice is paid once. Edges cost the transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.fx import Graph, Node

from convselect.graph.capture import convolution, nbytes
from convselect.graph.nodes import args_of
from convselect.graph.operators import in_both, is_activation, kind_of, layout_of, reads_strided
from convselect.layout import Layout
from convselect.primitive import Primitive
from convselect.selection import solve

Array = npt.NDArray[np.float64]
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


Price = Callable[[Candidate], float]
"""ms that the memory of a candidate is worth."""


@dataclass(frozen=True)
class OperatorCosts:
    """ms of operators and of layout transforms, from the cost model's key and the bytes moved."""

    operator_ms: Callable[[str, int], float]

    def transform_ms(self, value_bytes: int, src: Where, dst: Where) -> float:
        """Milliseconds to bring a value that is in `src` to a reader that needs `dst`; None takes whatever is there."""
        if src is dst or dst is None:
            return 0.0
        return self.operator_ms(f"to_{dst}", 2 * value_bytes)


def assign(graph: Graph, candidates: Mapping[Node, Sequence[Candidate]], costs: OperatorCosts) -> Assignment:
    """The least total time."""
    return Instance.of(graph, candidates, costs).solved()


def transforms_ms(graph: Graph, chosen: Mapping[Node, Option], costs: OperatorCosts) -> float:
    """Milliseconds of the layout transforms that `chosen` makes necessary."""
    total = 0.0
    for value in _placed(graph):
        layouts = frozenset[Layout]().union(*(_needs(chosen[reader], value, reader) for reader in value.users))
        total += sum(costs.transform_ms(nbytes(value), chosen[value].gives, layout) for layout in layouts)
    return total


def _placed(graph: Graph) -> list[Node]:
    """The values that lie in one layout or the other."""
    return [n for n in graph.nodes if is_activation(n.meta.get("val")) and not in_both(n.meta["val"])]


@dataclass(frozen=True)
class Instance:
    """A graph's assignment as PBQP. Costs are ms, and the `price` of the memory that a primitive holds."""

    options: Mapping[Node, Sequence[Option]]
    """The options of the first nodes, in order. Each further node stands for a value and the layouts it is kept in."""
    nodes: list[Array]
    edges: dict[tuple[int, int], Array]

    @classmethod
    def of(
        cls,
        graph: Graph,
        candidates: Mapping[Node, Sequence[Candidate]],
        costs: OperatorCosts,
        price: Price = lambda candidate: 0.0,
    ) -> Instance:
        options = {node: _options(node, candidates.get(node), costs, price) for node in graph.nodes}
        index = {node: i for i, node in enumerate(options)}
        nodes = [np.array([_priced(option, price) for option in choices]) for choices in options.values()]
        edges: dict[tuple[int, int], Array] = {}

        def add_edge(a: int, b: int, matrix: list[list[float]]) -> None:
            edges[a, b] = edges.get((a, b), 0.0) + np.array(matrix)

        for value in _placed(graph):
            size = nbytes(value)

            def transforms(src: Where, layouts: Iterable[Where], size: int = size) -> float:
                return sum(costs.transform_ms(size, src, dst) for dst in layouts)

            gives = [option.gives for option in options[value]]
            needs = {reader: [_needs(option, value, reader) for option in options[reader]] for reader in value.users}
            if len(needs) == 1:
                ((reader, needed),) = needs.items()
                add_edge(index[value], index[reader], [[transforms(src, each) for each in needed] for src in gives])
            elif needs:
                kept = _KEPT if layout_of(value.meta["val"]) else (frozenset[Layout](), *_KEPT)
                keeper = len(nodes)
                nodes.append(np.zeros(len(kept)))
                add_edge(index[value], keeper, [[transforms(src, layouts) for layouts in kept] for src in gives])
                for reader, needed in needs.items():
                    allowed = [[0.0 if each <= layouts else math.inf for each in needed] for layouts in kept]
                    add_edge(keeper, index[reader], allowed)
        return cls(options, nodes, edges)

    def solved(self) -> Assignment:
        """The best assignment; `total_ms` and `gap_ms` are without the price."""
        solution = solve(self.nodes, self.edges)
        chosen = {node: choices[x] for (node, choices), x in zip(self.options.items(), solution.choices, strict=False)}
        x = solution.choices
        total = sum(option.ms for option in chosen.values())
        total += sum(float(matrix[x[a], x[b]]) for (a, b), matrix in self.edges.items())
        return Assignment(chosen, total, solution.cost - solution.lower_bound)


_KEPT = (frozenset({Layout.NCHW}), frozenset({Layout.NHWC}), frozenset(Layout))


def _priced(option: Option, price: Price) -> float:
    return option.ms + (price(option.candidate) if option.candidate else 0.0)


def _needs(option: Option, value: Node, reader: Node) -> frozenset[Layout]:
    """The layouts in which `reader` needs `value`; none where it takes what is there.

    A convolution's residual must be in the layout of its result, also where it is its source as well.
    """
    if reader.target is convolution:
        roles = ((args_of(reader)[0], option.reads), (args_of(reader)[3], option.gives))
        return frozenset(layout for operand, layout in roles if operand is value and layout is not None)
    layout = layout_of(value.meta["val"]) if option.reads is None else option.reads
    return frozenset() if layout is None else frozenset({layout})


def _options(node: Node, candidates: Sequence[Candidate] | None, costs: OperatorCosts, price: Price) -> list[Option]:
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
        options = [Option(layout, layout, costs.operator_ms(f"{kind}.{layout}", moved)) for layout in Layout]
        if reads_strided(node, kind):
            dense = layout_of(node.meta["val"])
            options.append(Option(None, dense, costs.operator_ms(f"{kind}.{dense}", moved)))
        return options
    return [Option(None, layout_of(value) if is_activation(value) else None, 0.0)]
