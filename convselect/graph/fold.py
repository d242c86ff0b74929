"""Batch norm: folded into the convolution before it, else reduced to one multiply-add a channel."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from convselect.graph.capture import convolution, scale_shift
from convselect.graph.nodes import args_of
from convselect.graph.operators import is_activation, layout_of
from convselect.primitive import IDENTITY

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
    """Weight [oc, ic/g, kh, kw], of its own type, and bias f32 [oc] of batch_norm(conv(x)); computed in float64.

    scale = gamma / sqrt(var + eps); weight' = scale weight; bias' = scale (bias - mean) + beta.
    """
    scale, shift = _scale_and_shift(gamma, beta, mean, var, eps)
    if bias is not None:
        shift = shift + bias.double() * scale
    return weight.double().mul_(scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.float()


def scale_and_shift(
    gamma: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [c] each, such that batch_norm(x) = x scale + shift; computed in float64."""
    scale, shift = _scale_and_shift(gamma, beta, mean, var, eps)
    return scale.float(), shift.float()


def _scale_and_shift(
    gamma: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


_NORMS = (
    aten._native_batch_norm_legit_no_training.default,
    aten._batch_norm_no_update.default,
    aten.cudnn_batch_norm.default,
    aten.native_batch_norm.default,
)
"""What a batch norm is captured as depends on the device and on torch's version. All take (src, weight, bias, mean,
variance, ..., eps); the last two also whether they train, before the momentum."""


def _inference_norms(graph: Graph) -> Iterator[Node]:
    for norm in (norm for target in _NORMS for norm in graph.find_nodes(op="call_function", target=target)):
        training = len(args_of(norm)) == 8 and args_of(norm)[5]
        if not training and None not in args_of(norm)[3:5]:
            yield norm


def fold_batch_norms(graph: Graph, constant: set[Node]) -> None:
    """Inference batch norms with constant statistics go into the convolution before them, or become `scale_shift`.

    The nodes made for what is folded are added to `constant`.
    """
    for norm in _inference_norms(graph):
        users = list(norm.users)
        if len(users) != 1 or users[0].target is not operator.getitem or args_of(users[0])[1] != 0:
            continue
        (src, gamma, beta, mean, var), eps = args_of(norm)[:5], args_of(norm)[-1]
        parameters = [parameter for parameter in (gamma, beta, mean, var) if parameter is not None]
        value = src.meta.get("val")
        if not constant.issuperset(parameters) or not is_activation(value):
            continue
        absorbed = src.target is convolution and len(src.users) == 1
        if not absorbed and layout_of(value) is None:
            continue
        with graph.inserting_before(norm):
            if absorbed:
                folded = graph.call_function(fold_batch_norm, (*args_of(src)[1:3], gamma, beta, mean, var, eps))
            else:
                folded = graph.call_function(scale_and_shift, (gamma, beta, mean, var, eps))
            parts = [graph.call_function(operator.getitem, (folded, i)) for i in (0, 1)]
            constant.update((folded, *parts))
            if absorbed:
                new = graph.call_function(convolution, (args_of(src)[0], *parts, None))
                new.meta = dict(src.meta)
            else:
                new = graph.call_function(scale_shift, (src, *parts))
                new.meta = {**users[0].meta, "activation": IDENTITY}
        users[0].replace_all_uses_with(new)
        for old in (users[0], norm, src) if absorbed else (users[0], norm):
            graph.erase_node(old)
