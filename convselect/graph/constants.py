"""What is computed from the weights alone: split from the graph, folded and packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from convselect.graph.aliasing import is_returned
from convselect.graph.capture import convolution, kept, scale_shift
from convselect.graph.nodes import args_of

Prepack = Callable[[torch.Tensor], torch.Tensor]


def split_constants(graph: Graph, constant: set[Node]) -> tuple[GraphModule, list[int]]:
    """Moves what computes the weights and biases of `convolution` and `scale_shift` nodes out of `graph`.

    So it does the casts of other weights, which autocast makes; `kept` nodes stand for them.

    Returns a module that maps the static inputs to a tuple of weights and biases, and the positions of those inputs
    among the placeholders of `graph`. A node's `meta["constants"]` holds the positions of its weight and its bias (or
    None) in that tuple; its own operands for them become None.
    """
    wanted: list[Node] = []
    for node in graph.nodes:
        if node.target in (convolution, scale_shift):
            src, *operands = args_of(node)
            positions: list[int | None] = []
            node.meta["constants"] = positions
            for operand in operands[:2]:
                positions.append(None if operand is None else len(wanted))
                wanted += [] if operand is None else [operand]
            node.args = (src, None, None, *operands[2:])
    needed: set[Node] = set()
    _add_all(needed, wanted)
    for cast in reversed(graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)):
        if cast in constant and cast not in needed and cast.users and not is_returned(cast):
            with graph.inserting_after(cast):
                new = graph.call_function(kept)
            new.meta = {**cast.meta, "constants": [len(wanted)]}
            cast.replace_all_uses_with(new)
            wanted.append(cast)
            _add_all(needed, [cast])
    assert needed <= constant
    copy, copies = Graph(), {}
    inputs: list[int] = []
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        if node in needed:
            inputs.append(position)
            copies[node] = copy.placeholder(node.name)
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            copies[node] = copy.node_copy(node, lambda n: copies[n])
    copy.output(tuple(copies[node] for node in wanted))
    graph.eliminate_dead_code()
    return GraphModule(graph.owning_module or {}, copy), inputs  # which has tensors made in `forward`


def _add_all(needed: set[Node], wanted: list[Node]) -> None:
    """`wanted`, and what they are computed from."""
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)


class _Packing(Interpreter):
    """Runs a fold and packs each result as soon as it is there: folded weights never lie all side by side."""

    def __init__(
        self, fold: GraphModule, prepacks: Sequence[Prepack | None], into: Sequence[torch.Tensor] | None
    ) -> None:
        super().__init__(fold)
        self._prepacks, self._into = prepacks, into
        self.packed: dict[int, torch.Tensor] = {}
        self._positions: dict[Node, list[int]] = {}
        for position, node in enumerate(args_of(fold.graph.output_node())[0]):
            self._positions.setdefault(node, []).append(position)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        for position in self._positions.get(n, ()):
            prepack = self._prepacks[position]
            packed = value.detach().clone() if prepack is None else prepack(value.detach())
            self.packed[position] = packed if self._into is None else self._into[position].copy_(packed)
        return value if any(user.op != "output" for user in n.users) else None


@torch.no_grad()
def pack(
    fold: GraphModule,
    prepacks: Sequence[Prepack | None],
    statics: Sequence[torch.Tensor],
    into: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The results of `fold`, each packed by its `prepacks[i]`; None copies, so that nothing aliases a weight.

    into: what an earlier call returned, whose tensors are overwritten and returned again.
    """
    packing = _Packing(fold, prepacks, into)
    packing.run(*statics)
    return into or tuple(packing.packed[position] for position in range(len(prepacks)))
