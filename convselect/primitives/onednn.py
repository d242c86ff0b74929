"""oneDNN's convolution, through the operators Inductor uses; the weights are reordered once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from convselect.layout import Layout, dense
from convselect.machine import Machine
from convselect.primitive import Activation, Primitive, register
from convselect.primitives.aten import all_padding, apply_activation, strided_column
from convselect.problem import ConvProblem

_OPS = torch.ops.mkldnn

# activation -> attribute and algorithm of mkldnn._convolution_pointwise; the others run as ATen operators afterwards.
_FUSED = {
    "identity": ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "sigmoid": ("sigmoid", ""),
    "hardswish": ("hardswish", ""),
    "hardsigmoid": ("hardsigmoid", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "clamp": ("hardtanh", ""),
    "leaky_relu": ("leaky_relu", ""),
}


def _scalars(activation: Activation) -> list[float]:
    if activation.kind == "clamp":
        return [activation.alpha, activation.beta]
    return [activation.alpha] if activation.kind == "leaky_relu" else []


class OneDnn(Primitive):
    """`mkldnn._convolution_pointwise` with src and dst in one layout.

    oneDNN works on NHWC whenever src's strides say so, and otherwise on a plain or blocked NCHW of its own choice.
    """

    family = "onednn"

    def __init__(self, layout: Layout) -> None:
        self.name = f"onednn_{layout}"
        self.src_layout = self.dst_layout = layout

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return "this build of torch has no oneDNN"
        return all_padding(problem) or strided_column(problem)

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return 0  # its scratchpad is its own

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return problem.weight_bytes

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        p = problem
        # The layout of the weights depends on src's size, and on its memory format by way of the weight's.
        dense = weight.detach().clone(memory_format=self.src_layout.memory_format)
        reorder: Callable[..., torch.Tensor] = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the size
        return reorder(dense.to_mkldnn(), [p.ph, p.pw], [p.sh, p.sw], [p.dh, p.dw], p.g, [p.mb, p.ic, p.ih, p.iw])

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        p = problem
        geometry = ((p.ph, p.pw), (p.sh, p.sw), (p.dh, p.dw), p.g)
        src = dense(src, self.src_layout)  # oneDNN reads the layout off the strides
        if residual is None:
            attribute, algorithm = _FUSED[activation.kind]
            dst = _OPS._convolution_pointwise(src, packed, bias, *geometry, attribute, _scalars(activation), algorithm)
        else:
            relu = activation.kind == "relu"
            dst = _OPS._convolution_pointwise.binary(
                src, residual, packed, bias, *geometry, "add", 1.0, "relu" if relu else None, [], None
            )
            if not relu:
                dst = apply_activation(dst, activation)
        return dense(dst, self.dst_layout)


register(OneDnn(Layout.NCHW), OneDnn(Layout.NHWC))
