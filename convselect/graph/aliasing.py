"""Which values of a captured graph may share memory: results share it with inputs and each other where eager's do."""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Node

from convselect.graph.capture import convolution, scale_shift
from convselect.graph.nodes import args_of

_FRESH = (convolution, scale_shift)


def may_alias(node: Node) -> bool:
    """Whether the value of `node` may lie in memory of its operands: views, what views give, in-place operators."""
    if node.op != "call_function" or node.target in _FRESH:
        return False
    if isinstance(node.target, OpOverload):
        return any(result.alias_info is not None for result in node.target._schema.returns)
    if node.target is operator.getitem:
        return may_alias(args_of(node)[0])
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def origins(node: Node) -> set[Node]:
    """The nodes in whose memory the value of `node` may lie, itself included where it has memory of its own."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        value = stack.pop()
        if may_alias(value):
            stack.extend(value.all_input_nodes)
        else:
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
