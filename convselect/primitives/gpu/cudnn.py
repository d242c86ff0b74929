"""cuDNN's convolution, and ATen's where there is no cuDNN, with one kernel of ours for the rest of the epilogue."""

from __future__ import annotations

import torch

from convselect.kernels.triton.launch import start
from convselect.layout import Layout, dense
from convselect.machine import PRECISIONS, Gpu, Machine
from convselect.primitive import IDENTITY, Activation, register
from convselect.primitives.aten import TorchConvolution, apply_activation
from convselect.primitives.gpu.base import EXACT_BOUNDS, as_planned, element_bytes, epilogue, no_gpu, triton_works
from convselect.problem import ConvProblem


class GpuConvolution(TorchConvolution):
    """`torch.conv2d` on a GPU. torch's own switches decide whether cuDNN times its algorithms, and on TF32.

    Some of cuDNN's algorithms are Winograd's, and which one it takes it does not say: it is not "strict".
    """

    device = "cuda"
    traceable = False

    def __init__(self, family: str, layout: Layout) -> None:
        self.family, self.name = family, f"{family}_{layout}" if family == "cudnn" else f"{family}_cuda_{layout}"
        super().__init__(layout)
        self.accuracy = "default" if family == "cudnn" else "strict"
        self.error_bound = EXACT_BOUNDS["float32"]

    def error_bound_at(self, precision: str) -> float:
        return EXACT_BOUNDS[precision]

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        if not isinstance(machine, Gpu):
            return f"it needs a GPU, which {machine.name} is not"
        if machine.precision not in PRECISIONS:
            return f"only {' and '.join(PRECISIONS)} are supported (this is {machine.precision})"
        if self.family == "cudnn":
            return no_gpu(machine) or (None if machine.cudnn else "this build of torch has no cuDNN")
        return None

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return problem.weight_bytes // 4 * element_bytes(machine.precision)

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        src, residual = as_planned(self, src, residual)
        dst = dense(self.convolve(problem, src, packed, None), self.dst_layout)
        if (bias is None and residual is None and activation == IDENTITY) or not len(dst):
            return dst
        if triton_works(src.device):
            from convselect.kernels.triton import elementwise

            end = epilogue(activation, bias, residual)
            start(elementwise.launches(dst, dst, self.dst_layout is Layout.NHWC, end), dst.device)
            return dst
        if bias is not None:
            dst += bias[:, None, None]
        if residual is not None:
            dst += residual
        return apply_activation(dst, activation)


register(*(GpuConvolution(family, layout) for family in ("cudnn", "aten") for layout in Layout))
