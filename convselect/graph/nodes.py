"""Typed access to nodes of torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node


def args_of(node: Node) -> tuple[Any, ...]:
    """Its arguments, whose types its operator knows; torch types each as a union of all that there can be."""
    return node.args


def kwargs_of(node: Node) -> dict[str, Any]:
    """Its named arguments."""
    return node.kwargs


def call(graph: Graph, target: Callable[..., Any], *args: Any) -> Node:
    """A new node that calls `target`. Beside what torch's operators take, arguments may be layouts."""
    return graph.call_function(target, args)
