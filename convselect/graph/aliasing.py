"""Which values of a captured graph may share memory: results share it with inputs and each other where eager's do."""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Node

from convselect.graph.capture import convolution, scale_shift
from convselect.graph.nodes import args_of

_FRESH = (convolution, scale_shift)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def sources(node: Node) -> list[Node]:
    """The operands in whose memory the value of `node` may lie: of views, of what views give, of operators in place."""
    if node.op != "call_function" or node.target in _FRESH:
        return []
    if node.target is operator.getitem:
        return [args_of(node)[0]] if sources(args_of(node)[0]) else []
    if isinstance(node.target, OpOverload):
        schema = node.target._schema
        if all(result.alias_info is None for result in schema.returns):
            return []
        operands = zip(schema.arguments, args_of(node), strict=False)
        return [value for argument, value in operands if argument.alias_info is not None and isinstance(value, Node)]
    return [operand for operand in node.all_input_nodes if not isinstance(operand.meta.get("val"), _NUMBERS)]


def may_alias(node: Node) -> bool:
    """Whether the value of `node` may lie in memory of its operands."""
    return bool(sources(node))


def origins(node: Node) -> set[Node]:
    """The nodes in whose memory the value of `node` may lie, itself included where it has memory of its own."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        value = stack.pop()
        stack.extend(sources(value))
        if not may_alias(value):
            found.add(value)
    return found


def readers(node: Node) -> set[Node]:
    """The nodes that read the value of `node`, or one that may lie in its memory."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                if may_alias(user):
                    stack.append(user)
    return found


def is_returned(node: Node) -> bool:
    """Whether a result of the graph may lie in the memory of `node`'s value."""
    return any(reader.op == "output" for reader in readers(node))
