"""Operators between the convolutions: which of them run in either layout, and what they are to the cost model."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.fx import Node

from convselect.graph.capture import known_size, scale_shift
from convselect.graph.nodes import args_of, kwargs_of
from convselect.graph.target import GPU_DTYPES
from convselect.layout import Layout, holds
from convselect.primitives import upsampling
from convselect.primitives.pooling import mean_arguments, windowed

aten = torch.ops.aten

_KINDS = {
    "max_pool": (aten.max_pool2d.default,),
    "avg_pool": (aten.avg_pool2d.default,),
    "adaptive_avg_pool": (aten._adaptive_avg_pool2d.default,),
    "cat": (aten.cat.default,),
    "add": (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default),
    "upsample_nearest": (aten.upsample_nearest2d.default,),
    "upsample_bilinear": (aten.upsample_bilinear2d.default,),
    "batch_norm": (scale_shift,),
    "mean": (aten.mean.dim,),
    "elementwise": (
        aten.relu.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.gelu.default,
        aten.leaky_relu.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.tanh.default,
        aten.elu.default,
        aten.softplus.default,
        aten.exp.default,
        aten.neg.default,
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten._to_copy.default,
    ),
}
_DTYPES = {"cpu": (torch.float32,), "cuda": GPU_DTYPES}
_KIND_OF = {target: kind for kind, targets in _KINDS.items() for target in targets}


def in_programs(value: object) -> TypeGuard[torch.Tensor]:
    """Whether our C++ operators, which programs are made of, take `value`: a float32 tensor on the CPU."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.device.type == "cpu"


def is_activation(value: object) -> TypeGuard[torch.Tensor]:
    """Whether `value` is what layouts are about: a 4-d float32 tensor on the CPU, or one on a GPU."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 4
        and value.dtype in _DTYPES.get(value.device.type, ())
        and value.layout == torch.strided
    )


def kind_of(node: Node) -> str | None:
    """The cost model's name for an operator whose result is dense in the layout of its inputs; None for any other.

    Such an operator gives the same values in either layout. Its four-dimensional operands must be activations, so
    that none of them keeps it in a layout of its own.
    """
    kind = _KIND_OF.get(node.target) if node.op == "call_function" else None
    if kind is None or not is_activation(node.meta.get("val")) or layout_of(node.meta["val"]) is None:
        return None
    values = [source.meta.get("val") for source in node.all_input_nodes]
    if any(isinstance(value, torch.Tensor) and value.dim() == 4 and not is_activation(value) for value in values):
        return None
    if kind == "cat" and (args_of(node)[1] if len(args_of(node)) > 1 else node.kwargs.get("dim", 0)) not in (1, -3):
        return None
    if node.target is aten._to_copy.default and node.kwargs.keys() != {"dtype"}:
        return None
    if kind == "mean":
        return _mean(node)
    if kind == "upsample_nearest":
        scales = upsampling.nearest_arguments(*args_of(node)[1:], **kwargs_of(node))[3:]
        source, result = args_of(node)[0].meta["val"].shape, node.meta["val"].shape
        return kind if upsampling.reads_the_same(source[2:], result[2:], *scales) else None
    if kind in ("max_pool", "avg_pool"):
        stride = args_of(node)[2] if len(args_of(node)) > 2 else kwargs_of(node).get("stride", ())
        return windowed(kind, args_of(node)[1], stride)
    return kind


def reads_strided(node: Node, kind: str) -> bool:
    """Whether an operator of this kind reads operands that are dense in neither layout, such as slices, as they are."""
    values = (source.meta.get("val") for source in node.all_input_nodes)
    return kind in ("add", "cat", "elementwise") and any(is_activation(v) and layout_of(v) is None for v in values)


def _mean(node: Node) -> str | None:
    """A global average is predicted as the pooling with one window that it is in NHWC on the CPU."""
    if not (len(args_of(node)) > 2 and args_of(node)[2]):
        return None
    src = args_of(node)[0].meta["val"]
    window = [known for size in src.shape[2:] if (known := known_size(size)) is not None]
    if not in_programs(src) or len(window) < 2:
        return "mean"
    pooling = mean_arguments((0, 0, *window), (0, 0, 1, 1), *args_of(node)[1:], **kwargs_of(node))
    return "mean" if pooling is None else windowed("avg_pool", window)


def layout_of(value: torch.Tensor) -> Layout | None:
    """The layout in which `value` is dense; NCHW where both, None where neither."""
    return next((layout for layout in Layout if holds(value, layout)), None)


def in_both(value: torch.Tensor) -> bool:
    """Whether the two layouts are the same bytes: one channel, or one pixel."""
    return all(size == 1 for size in value.shape[2:]) or value.shape[1] == 1
