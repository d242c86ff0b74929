"""Epilogues: a residual addition and an activation after a convolution become part of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.fx import Graph, Node

from convselect.graph.capture import ConvSpec, convolution, scale_shift
from convselect.graph.nodes import args_of, kwargs_of
from convselect.primitive import IDENTITY, Activation

aten = torch.ops.aten


def activation_of(node: Node) -> Activation | None:
    """The activation that `node` applies to its first argument; None if it is something else.

    So it is where a parameter is a value of the graph, such as a slope of 1 / x.shape[0].
    """
    match node.target:
        case aten.relu.default:
            return Activation("relu")
        case aten.silu.default | aten.sigmoid.default | aten.hardswish.default | aten.hardsigmoid.default:
            return Activation(node.target._schema.name.removeprefix("aten::"))
        case aten.gelu.default:
            tanh = node.kwargs.get("approximate", "none") == "tanh"
            return Activation("gelu_tanh" if tanh else "gelu")
        case aten.leaky_relu.default:
            slope = args_of(node)[1] if len(args_of(node)) > 1 else node.kwargs.get("negative_slope", 0.01)
            return Activation("leaky_relu", float(slope)) if isinstance(slope, (int, float)) else None
        case aten.hardtanh.default | aten.clamp.default | aten.clamp_min.default | aten.clamp_max.default:
            return _clamp(node)
    return None


def activation_after(node: Node) -> tuple[Activation, Node]:
    """The activation that is `node`'s only reader, and its node; the identity and `node` itself if there is none."""
    if len(node.users) == 1:
        user = next(iter(node.users))
        activation = activation_of(user)
        if activation is not None and args_of(user)[0] is node:
            return activation, user
    return IDENTITY, node


def _clamp(node: Node) -> Activation | None:
    """Bounds that are numbers; absent ones are infinite, except hardtanh's, which are -1 and 1."""
    default = (-1.0, 1.0) if node.target is aten.hardtanh.default else (-math.inf, math.inf)
    names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    arguments = list(args_of(node)[1:])
    if node.target is aten.clamp_max.default:
        arguments.insert(0, None)
    bounds: list[Any] = []
    for i, name in enumerate(names):
        bound = arguments[i] if i < len(arguments) else kwargs_of(node).get(name)
        bounds.append(default[i] if bound is None else bound)
    if not all(isinstance(bound, (int, float)) for bound in bounds):
        return None
    return Activation("clamp", float(bounds[0]), float(bounds[1]))


def _residual(node: Node, conv: Node) -> Node | None:
    """The other operand where `node` is conv + other, of the same shape and type and without a factor."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or len(args_of(node)) != 2:
        return None
    others = [operand for operand in args_of(node) if operand is not conv]
    if len(others) != 1 or not isinstance(others[0], Node):
        return None
    value, mine = others[0].meta.get("val"), conv.meta["val"]
    if not isinstance(value, torch.Tensor):
        return None
    same = value.shape == mine.shape and value.dtype == mine.dtype and value.device == mine.device
    return others[0] if same else None


def fuse_activations_into_norms(graph: Graph) -> None:
    """An activation after a `scale_shift` becomes part of it."""
    for norm in graph.find_nodes(op="call_function", target=scale_shift):
        activation, last = activation_after(norm)
        if last is not norm:
            norm.meta["activation"] = activation
            last.replace_all_uses_with(norm)
            graph.erase_node(last)


def fuse_epilogues(graph: Graph) -> None:
    """Takes up to one residual addition and then one activation into each `convolution`.

    The fused node stands where the last of them stood: there the residual has been computed.
    """
    for conv in graph.find_nodes(op="call_function", target=convolution):
        spec: ConvSpec = conv.meta["conv"]
        if spec.activation != IDENTITY:
            continue
        residual, chain = args_of(conv)[3], [conv]
        if residual is None and len(conv.users) == 1:
            user = next(iter(conv.users))
            residual = _residual(user, conv)
            if residual is not None:
                chain.append(user)
        activation, last = activation_after(chain[-1])
        if last is not chain[-1]:
            chain.append(last)
        if len(chain) == 1:
            continue
        with graph.inserting_before(chain[-1]):
            new = graph.call_function(convolution, (*args_of(conv)[:3], residual))
        # Strides are those of the last: a sum has its first operand's.
        new.meta = {**conv.meta, "val": chain[-1].meta["val"], "conv": dataclasses.replace(spec, activation=activation)}
        chain[-1].replace_all_uses_with(new)
        for absorbed in reversed(chain):
            graph.erase_node(absorbed)
