"""The classifier: a matrix product of a few rows is bound by reading its weights, which ours does once and in place."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from convselect.graph.capture import size_hint
from convselect.graph.fuse import activation_after
from convselect.graph.nodes import args_of
from convselect.graph.operators import in_programs
from convselect.primitive import ACTIVATIONS

aten = torch.ops.aten

MOST_ROWS = 4
"""For more, a blocked matrix product such as ATen's has the better use of the caches: at 16 rows it is 1.2 to 1.8 times
faster where the weights are in L2 or L3, at 4 rows ours is (AMD EPYC Zen 3, AVX2, one and two threads, 2026-11-27).
"""


def replace_linears(graph: Graph) -> None:
    """x @ weight.t() + bias, and an activation after it, become `convselect::linear` where x has few rows."""
    for node in graph.nodes:
        if node.target is aten.addmm.default and not node.kwargs:
            bias, x, transposed = args_of(node)
        elif node.target is aten.mm.default:
            bias, (x, transposed) = None, args_of(node)
        else:
            continue
        if transposed.target not in (aten.t.default, aten.transpose.int):
            continue
        weight = args_of(transposed)[0]
        if not _is_matrix(x, MOST_ROWS) or not _is_matrix(weight) or not (bias is None or _is_vector(bias, weight)):
            continue
        activation, last = activation_after(node)
        with graph.inserting_before(last):
            code = ACTIVATIONS.index(activation.kind)
            arguments = (x, weight, bias, code, activation.alpha, activation.beta)
            new = graph.call_function(torch.ops.convselect.linear.default, arguments)
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for absorbed in (last, node) if last is not node else (node,):
            graph.erase_node(absorbed)


def _is_matrix(node: Node, most_rows: int | None = None) -> bool:
    """A contiguous float32 matrix on the CPU, with no more rows than that in the example at hand."""
    value = node.meta.get("val")
    return (
        in_programs(value)
        and value.dim() == 2
        and value.is_contiguous()
        and (most_rows is None or size_hint(value.shape[0]) <= most_rows)
    )


def _is_vector(bias: Node, weight: Node) -> bool:
    value = bias.meta.get("val")
    return (
        in_programs(value)
        and value.dim() == 1
        and value.is_contiguous()
        and value.shape[0] == weight.meta["val"].shape[0]
    )
