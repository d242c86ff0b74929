"""torch's own convolution: the last resort, which takes whatever torch takes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from convselect.layout import Layout, dense
from convselect.machine import Machine
from convselect.primitive import Activation, Primitive, register
from convselect.problem import ConvProblem


def apply_activation(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """`activation` as ATen operators, out of place."""
    kind, alpha, beta = activation
    if kind == "identity":
        return x
    if kind == "clamp":
        return torch.clamp(x, alpha, beta)
    if kind == "leaky_relu":
        return F.leaky_relu(x, alpha)
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return {
        "relu": torch.relu,
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
    }[kind](x)


def all_padding(p: ConvProblem) -> str | None:
    """A refusal: torch 2.13 dies of a segmentation fault in oneDNN on such a problem, e.g. a 1x1 src, sw=2, pw=1."""

    def seen(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
        return any(0 <= o * stride - padding + k * dilation < size for o in range(out) for k in range(kernel))

    if seen(p.ih, p.oh, p.kh, p.sh, p.ph, p.dh) and seen(p.iw, p.ow, p.kw, p.sw, p.pw, p.dw):
        return None
    return "all output pixels see padding only, which oneDNN does not survive"


def strided_column(p: ConvProblem) -> str | None:
    """A refusal: oneDNN 3.12's brg_conv_fwd, which runs where the strides can be read as NHWC, gets such a problem
    wrong, and eager with it, e.g. mb2_g1ic1ih23iw1oc16oh23ow1kh3kw3sh1sw2ph1pw1dh1dw1.
    """
    if p.ic == p.ow == p.sh == 1 and p.sw > 1:
        return f"oneDNN gets one channel and one column of output with sh=1 and sw={p.sw} wrong"
    return None


class TorchConvolution(Primitive):
    """`torch.conv2d` on any device, its weights in the layout of src."""

    def __init__(self, layout: Layout) -> None:
        self.src_layout = self.dst_layout = layout

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return 0  # a library's own is not counted

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        return weight.detach().clone(memory_format=self.src_layout.memory_format)

    def convolve(
        self, problem: ConvProblem, src: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """conv(src) + bias [mb', oc, oh, ow], in whatever layout torch gives it."""
        p = problem
        return torch.conv2d(src, packed, bias, (p.sh, p.sw), (p.ph, p.pw), (p.dh, p.dw), p.g)


class Aten(TorchConvolution):
    """`torch.conv2d` and ATen operators for the rest of the epilogue."""

    family = "aten"

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.name = f"aten_{layout}"

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        return all_padding(problem) or (strided_column(problem) if self.src_layout is Layout.NHWC else None)

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return problem.weight_bytes

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        dst = self.convolve(problem, src, packed, bias)
        if residual is not None:
            dst = dst + residual
        dst = apply_activation(dst, activation)
        return dense(dst, self.dst_layout)


register(Aten(Layout.NCHW), Aten(Layout.NHWC))
