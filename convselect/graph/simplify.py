"""Operators in their plainest form: no needless copies, no indices that nobody reads, averages that keep dimensions."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from convselect.graph.aliasing import origins, readers
from convselect.graph.capture import expressions, known_size
from convselect.graph.nodes import args_of
from convselect.graph.operators import is_activation

aten = torch.ops.aten

_BY_STORAGE = (aten.as_strided.default,)


def simplify(graph: Graph, constant: set[Node]) -> None:
    """Rewrites operators to simpler ones with the same results; the kernels know the simpler ones.

    What is `constant` is computed once, and stays as it is.
    """
    _drop_pool_indices(graph)
    for node in graph.nodes:
        if node in constant:
            continue
        if node.target is aten.mean.dim:
            _global_average(graph, node)
        elif node.target is aten._adaptive_avg_pool2d.default:
            _adaptive_average(graph, node)
        elif node.target is aten.clone.default:
            _drop_clone(graph, node)
        elif node.target is aten.as_strided.default:
            _drop_strides_of_ones(graph, node)


def _drop_clone(graph: Graph, node: Node) -> None:
    """A copy, such as dropout's in inference, of what the graph computes, for operators of the graph.

    In a captured graph only inputs are written to, after all else, so a copy of one may have to outlive it.
    """
    src = args_of(node)[0]
    if node.kwargs or src.meta["val"].stride() != node.meta["val"].stride():
        return
    if all(origin.op == "call_function" for origin in origins(src)):
        _read_its_source(graph, node)


def _drop_strides_of_ones(graph: Graph, node: Node) -> None:
    """`as_strided` that changes nothing but strides of dimensions of size one: what `AdaptiveAvgPool2d(1)` ends in."""
    src, size, stride, *offset = args_of(node)
    value = src.meta["val"]
    sizes = expressions(size)
    if expressions([value.storage_offset(), *offset]) not in ([0], [0, 0]) or sizes != expressions(value.shape):
        return
    strides = zip(sizes, expressions(value.stride()), expressions(stride), strict=True)
    if all(n == 1 or one == other for n, one, other in strides):
        _read_its_source(graph, node)


def _read_its_source(graph: Graph, node: Node) -> None:
    """Drops `node`, of its source's values, but where its memory or its strides show: in a result, by `as_strided`."""
    if not any(reader.op == "output" or reader.target in _BY_STORAGE for reader in readers(node)):
        node.replace_all_uses_with(args_of(node)[0])
        graph.erase_node(node)


def _drop_pool_indices(graph: Graph) -> None:
    """max_pool2d_with_indices, whose indices nobody reads, becomes the operator with one result."""
    for pool in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default):
        users = list(pool.users)
        if len(users) != 1 or users[0].target is not operator.getitem or args_of(users[0])[1] != 0:
            continue
        with graph.inserting_before(pool):
            new = graph.call_function(aten.max_pool2d.default, args_of(pool), pool.kwargs)
        new.meta = dict(users[0].meta)
        users[0].replace_all_uses_with(new)
        graph.erase_node(users[0])
        graph.erase_node(pool)


def _global_average(graph: Graph, node: Node) -> None:
    """A mean over the two spatial dimensions that drops them becomes one that keeps them, and a view.

    It stays a mean: ATen sums a window of `avg_pool2d` in one go, which errs by 1e-2 on a map of 1024 x 1024. In NHWC
    on the CPU lowering takes our pooling for it.
    """
    src, dims, *rest = args_of(node)
    value = src.meta.get("val")
    if not is_activation(value) or not dims or sorted(d % 4 for d in dims) != [2, 3] or node.kwargs:
        return
    if (rest and rest[0]) or _spatial(src) is None:
        return
    with graph.inserting_before(node):
        new = graph.call_function(aten.mean.dim, (src, [2, 3], True))
        new.meta = {**node.meta, "val": value.new_empty((*value.shape[:2], 1, 1))}
        last = graph.call_function(aten.squeeze.dims, (new, [2, 3]))
        last.meta = dict(node.meta)
    node.replace_all_uses_with(last)
    graph.erase_node(node)


def _adaptive_average(graph: Graph, node: Node) -> None:
    """Windows of equal size, where the result's size divides the source's; a copy where they are equal."""
    src, out = args_of(node)
    size = _spatial(src)
    if not is_activation(src.meta.get("val")) or size is None:
        return
    if any(not isinstance(parts, int) or parts == 0 or length % parts for length, parts in zip(size, out, strict=True)):
        return
    same = size == list(out)
    if same and src.meta["val"].stride() != node.meta["val"].stride():
        return
    window = [length // parts for length, parts in zip(size, out, strict=True)]
    target, arguments = (aten.clone.default, (src,)) if same else (aten.avg_pool2d.default, (src, window))
    with graph.inserting_before(node):
        new = graph.call_function(target, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if same:
        _drop_clone(graph, new)


def _spatial(node: Node) -> list[int] | None:
    """Height and width, where they are fixed and not 0."""
    sizes = [known_size(size) for size in node.meta["val"].shape[2:]]
    return [size for size in sizes if size] if all(sizes) else None
