"""Writes into what nobody reads any more: `x[:, 1:] += y` copies neither `x` nor the rest of it.

Tracing makes a write into a part of a tensor a copy of the whole with the part replaced, and Python's `+=` on a part a
second one, of the part into itself. Where the tensor is of the graph's own making and what it held is not read again,
the lowered graph writes into it, as the model does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node

from convselect.graph.aliasing import sources
from convselect.graph.capture import expressions, value_of
from convselect.graph.lower import Call, ScaleShift
from convselect.graph.nodes import args_of, call

aten = torch.ops.aten

_VIEW_OF_PART: dict[Any, OpOverload] = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
    aten.diagonal_scatter.default: aten.diagonal.default,
}
"""What gives the part that the operator replaces, from the same arguments."""

_OF_COPIES: tuple[OpOverloadPacket, ...] = (
    aten.index_put,
    aten.index_copy,
    aten.index_add,
    aten.index_fill,
    aten.index_reduce,
    aten.masked_fill,
    aten.masked_scatter,
    aten.put,
    aten.scatter,
    aten.scatter_add,
    aten.scatter_reduce,
)
"""Operators that copy their first operand and change a part of the copy."""

_OVERLAPPING = (aten.expand.default, aten.as_strided.default, aten.unfold.default)
"""Views in which one element may stand for several."""


def written(base: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """`base` after the write that gave the second operand: in the graph another value, in the same memory."""
    return base


def write_in_place(graph: Graph) -> None:
    """Replaces copies that change a part by writes. `graph` is lowered; call under the fake mode of its values."""
    copies = [node for node in graph.nodes if node.target in _VIEW_OF_PART or _packet(node) in _OF_COPIES]
    if not copies:
        return
    writes = _Writes(graph)
    for node in reversed(copies):  # the outermost part first
        if node in writes.index:
            writes.rewrite(node)


class _Writes:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self.memory: dict[Node, set[Node]] = {}
        """The values that may lie in the same memory."""
        for node in graph.nodes:
            self._join(node, *_sources(node))

    def rewrite(self, node: Node) -> None:
        if node.target in _VIEW_OF_PART:
            self._part(node)
        else:
            self._whole(node)

    def _whole(self, node: Node) -> None:
        base = args_of(node)[0]
        target = _in_place(node)
        if target is not None and self._may_write(node, base, node, ()) and self._apart(node, base):
            node.target = target
            self._join(node, base)

    def _part(self, node: Node) -> None:
        """`node` gives its first operand with a part replaced: then that is written to the part."""
        found = _replacement(node)
        if found is not None and not self._unchanged(found) and not self._in_the_part(found):
            self._copy_into_part(found)

    def _unchanged(self, new: _Replacement) -> bool:
        """The part becomes what it is: something in place has been written to it before."""
        if not _is_part(_copied(new.value), new.view, new.base, new.how):
            return False
        if self._may_write(new.node, new.whole, new.node, new.replaced):
            self._replace(new.replaced, new.whole, new.whole)
        return True

    def _in_the_part(self, new: _Replacement) -> bool:
        """What the part becomes is computed from the part, by an operator that can do so in place."""
        value, target = new.value, _in_place(new.value)
        if target is None or not _only_read_by(value, new.replaced[-1]):
            return False
        part = args_of(value)[0]
        if not _is_part(part, new.view, new.base, new.how) or not self._apart(value, new.whole):
            return False
        if not _same_kind(value, part) or not self._may_write(new.node, new.whole, value, new.replaced):
            return False
        value.target, value.meta["val"] = target, part.meta["val"]
        self._join(value, part)
        self._replace(new.replaced, new.whole, value)
        return True

    def _copy_into_part(self, new: _Replacement) -> None:
        """What the part becomes is copied into it."""
        node, whole, value = new.node, new.whole, new.value
        if value in self.memory[whole] or not self._may_write(node, whole, node, new.replaced):
            return
        with self.graph.inserting_before(node):
            part = self.graph.call_function(new.view, (new.base, *new.how))
            part.meta["val"] = new.view(*torch.fx.map_arg((new.base, *new.how), value_of))
            copy = self.graph.call_function(aten.copy_.default, (part, value))
            copy.meta["val"] = part.meta["val"]
        self.index |= {part: self.index[node], copy: self.index[node]}
        self._join(part, new.base)
        self._join(copy, part)
        self._replace(new.replaced, whole, copy)

    def _replace(self, replaced: list[Node], whole: Node, write: Node) -> None:
        """What read the first of `replaced` reads `whole`, after `write`."""
        node = replaced[0]
        if write is whole:
            new = whole
        else:
            with self.graph.inserting_before(node):
                new = call(self.graph, written, whole, write)
            new.meta = dict(node.meta)
            self.index[new] = self.index[node]
            self._join(new, whole)
        self._join(node, whole)
        node.replace_all_uses_with(new)
        for each in replaced:
            self._drop_unread(each)

    def _drop_unread(self, node: Node) -> None:
        """Erases what no longer serves anybody: `node`, what it is a view or a copy of, and so on."""
        if node.users or node not in self.index:
            return
        operands = node.all_input_nodes
        self.graph.erase_node(node)
        self.memory[node].discard(node)
        del self.index[node]
        for source in operands:
            if _is_view(source) or source.target is aten.copy.default or source.target in _VIEW_OF_PART:
                self._drop_unread(source)

    def _may_write(self, node: Node, base: Node, at: Node, replaced: Collection[Node]) -> bool:
        """Whether `base` may become the value of `node` by a write in place of the node `at`.

        It is the graph's own, has the strides that readers of `node` expect, and what it held is not read after that,
        but by those that are `replaced`.
        """
        value, new = base.meta.get("val"), node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(new, torch.Tensor) or not _same_kind(base, node):
            return False
        if expressions(value.stride()) != expressions(new.stride()):
            return False
        for member in self.memory[base]:
            if not _sources(member) and member.op != "call_function":
                return False
            if member.target in _OVERLAPPING:
                return False
            for user in member.users:
                if self.index[user] > self.index[at] and not _is_view(user) and user not in replaced:
                    return False
        return True

    def _apart(self, node: Node, base: Node) -> bool:
        """Whether no operand of `node` but its first lies in the memory of `base`."""
        rest = (args_of(node)[1:], node.kwargs)
        operands: list[Node] = []
        torch.fx.map_arg(rest, operands.append)
        return not any(operand in self.memory[base] for operand in operands)

    def _join(self, *nodes: Node) -> None:
        together = set(nodes).union(*(self.memory.get(node, ()) for node in nodes))
        self.memory |= dict.fromkeys(together, together)


class _Replacement(NamedTuple):
    """`node` is `whole`, but `view(base, *how)`, a part of it, is `value`."""

    node: Node
    whole: Node
    replaced: list[Node]
    """`node` and, where the part is a part of a part, what gives that with its part replaced; the outermost first."""
    view: OpOverload
    base: Node
    how: list[Any]
    value: Node


def _replacement(node: Node) -> _Replacement | None:
    """What `node`, a scatter, replaces."""
    whole = args_of(node)[0]
    base, value, *how = args_of(node)
    view, replaced = _VIEW_OF_PART[node.target], [node]
    while value.target in _VIEW_OF_PART and _only_read_by(value, replaced[-1]):
        if not _is_part(args_of(value)[0], view, base, how):
            break
        replaced.append(value)
        view = _VIEW_OF_PART[value.target]
        base, value, *how = args_of(value)
    if any(each.kwargs for each in replaced):
        return None
    return _Replacement(node, whole, replaced, view, base, how, value)


def _packet(node: Node) -> OpOverloadPacket | None:
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else None


def _in_place(node: Node) -> OpOverload | None:
    """The operator that writes its result to the first operand of `node`, where ATen has it.

    Those of views (`transpose_`) write nothing.
    """
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten" or target._schema.is_mutable or _sources(node):
        return None
    found = getattr(getattr(aten, f"{target._schema.name.removeprefix('aten::')}_", None), target._overloadname, None)
    return found if isinstance(found, OpOverload) else None


def _sources(node: Node) -> list[Node]:
    """The operands in whose memory the value of a node of a lowered graph may lie."""
    if isinstance(node.target, (Call, ScaleShift)):
        return []
    if node.target is aten._unsafe_view.default:
        return [args_of(node)[0]]
    return sources(node)


def _is_view(node: Node) -> bool:
    """Whether `node` reads no data: who reads its value does."""
    return node.target is written or (
        isinstance(node.target, OpOverload) and bool(_sources(node)) and not node.target._schema.is_mutable
    )


def _is_part(value: Any, view: OpOverload, base: Node, how: list[Any]) -> bool:
    """Whether `value` is `view(base, *how)`."""
    if not isinstance(value, Node) or value.target is not view or value.kwargs:
        return False
    source, *given = args_of(value)
    return given == how and _same(source, base)


def _same(value: Any, other: Any) -> bool:
    """Whether two nodes are one, or the same view of the same."""
    if value is other or not isinstance(value, Node) or not isinstance(other, Node):
        return bool(value == other)
    if (
        value.target is not other.target
        or not _is_view(value)
        or value.target is written
        or value.kwargs != other.kwargs
    ):
        return False
    return len(value.args) == len(other.args) and all(map(_same, value.args, other.args))


def _copied(value: Node) -> Any:
    """What `value` holds a copy of, if it is one in the kind of its first operand."""
    if value.target is aten.copy.default and not value.kwargs:
        part, source = args_of(value)[:2]
        return source if _same_kind(part, source) else value
    return value


def _only_read_by(value: Node, reader: Node) -> bool:
    return list(value.users) == [reader]


def _same_kind(value: Node, other: Node) -> bool:
    """Whether two tensors have the same type of elements, and as many in each dimension."""
    one, two = value.meta["val"], other.meta["val"]
    return bool(one.dtype == two.dtype) and expressions(one.shape) == expressions(two.shape)
