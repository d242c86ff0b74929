"""Depthwise convolutions: any filter, stride, dilation and padding."""

from __future__ import annotations

import torch

from convselect.kernels.triton.launch import Block, Launch
from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.depthwise import one_filter_a_channel
from convselect.primitives.gpu.base import Operands, TritonPrimitive
from convselect.problem import ConvProblem

MOST_WIDTH = 31


def narrow_filter(p: ConvProblem) -> str | None:
    """The row of a filter is unrolled."""
    return None if p.kw <= MOST_WIDTH else f"filters are at most {MOST_WIDTH} wide (kw={p.kw})"


class Depthwise(TritonPrimitive):
    def __init__(self, name: str, layout: Layout, block: Block) -> None:
        self.block = block
        super().__init__(name, "depthwise", layout, layout, (one_filter_a_channel, narrow_filter))

    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, ...]:
        taps = problem.kh * problem.kw
        return (taps, problem.ic) if self.src_layout is Layout.NHWC else (problem.ic, taps)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        taps = weight.detach().flatten(1)
        return (taps.t() if self.src_layout is Layout.NHWC else taps).clone(memory_format=torch.contiguous_format)

    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        from convselect.kernels.triton import depthwise

        src, packed, dst, end = operands
        return list(depthwise.launches(problem, self.block, self.src_layout is Layout.NHWC, src, packed, dst, end))


register(
    Depthwise("depthwise_8x64_nhwc", Layout.NHWC, Block(8, 64, 2)),
    Depthwise("depthwise_32x32_nhwc", Layout.NHWC, Block(32, 32, 4)),
    Depthwise("depthwise_512_nchw", Layout.NCHW, Block(512, 1, 4)),
)
