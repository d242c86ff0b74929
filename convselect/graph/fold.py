"""Batch norm: folded into the convolution before it, else turned into an operator with one result."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from convselect.graph.capture import convolution

aten = torch.ops.aten


def fold_batch_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight f32 [oc, ic/g, kh, kw] and bias f32 [oc] of batch_norm(conv(x)); computed in float64.

    scale = gamma / sqrt(var + eps); weight' = scale weight; bias' = scale (bias - mean) + beta.
    """
    scale = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = (-mean.double() if bias is None else bias.double() - mean.double()) * scale
    if beta is not None:
        shift = shift + beta.double()
    return (weight.double() * scale.view(-1, 1, 1, 1)).float(), shift.float()


def fold_batch_norms(graph: Graph, constant: set[Node]) -> None:
    """Rewrites every inference batch norm of `graph`; nodes made for folded weights are added to `constant`."""
    for norm in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        users = list(norm.users)
        if [user.args[1] for user in users if user.target is operator.getitem] != [0] or len(users) != 1:
            continue
        result = users[0]
        conv, gamma, beta, mean, var, momentum, eps = norm.args
        parameters = [parameter for parameter in (gamma, beta, mean, var) if parameter is not None]
        foldable = conv.target is convolution and len(conv.users) == 1 and constant.issuperset(parameters)
        with graph.inserting_before(norm):
            if foldable:
                src, weight, bias, _ = conv.args
                folded = graph.call_function(fold_batch_norm, (weight, bias, gamma, beta, mean, var, eps))
                new_weight = graph.call_function(operator.getitem, (folded, 0))
                new_bias = graph.call_function(operator.getitem, (folded, 1))
                constant.update((folded, new_weight, new_bias))
                new_weight.meta["val"], new_bias.meta["val"] = weight.meta["val"], mean.meta["val"]
                new = graph.call_function(convolution, (src, new_weight, new_bias, None))
                new.meta = dict(conv.meta)
            else:
                new = graph.call_function(
                    aten.batch_norm.default, (conv, gamma, beta, mean, var, False, momentum, eps, False)
                )
                new.meta = dict(result.meta)
        result.replace_all_uses_with(new)
        for old in (result, norm, conv) if foldable else (result, norm):
            graph.erase_node(old)


def drop_pool_indices(graph: Graph) -> None:
    """max_pool2d_with_indices, whose indices nobody reads, becomes the operator with one result."""
    for pool in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices.default):
        users = list(pool.users)
        if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0:
            continue
        with graph.inserting_before(pool):
            new = graph.call_function(aten.max_pool2d.default, pool.args, pool.kwargs)
        new.meta = dict(users[0].meta)
        users[0].replace_all_uses_with(new)
        graph.erase_node(users[0])
        graph.erase_node(pool)
