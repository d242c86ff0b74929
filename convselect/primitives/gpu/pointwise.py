"""1x1 convolutions of stride 1: src is a factor of the product as it is."""

from __future__ import annotations

import torch

from convselect.kernels.triton.launch import Launch, Tile, right_factor, round_up, rounded
from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.gpu.base import Operands, TritonPrimitive, on_matrix_units
from convselect.primitives.kernel import ungrouped
from convselect.primitives.kn2 import unit_stride
from convselect.primitives.pointwise import one_by_one, unpadded
from convselect.problem import ConvProblem

_RULES = (one_by_one, unit_stride, unpadded, ungrouped)
_ALIGNED = 16
"""Rows of weights begin at multiples of so many elements: Triton asks whether 16 divides them."""


class Pointwise(TritonPrimitive):
    """packed  [icp, ocp] of `right_factor` for NHWC: dst = src * packed; [oc, icp] for NCHW: dst = packed * src, for
    each image.
    """

    tile: Tile

    def __init__(self, name: str, layout: Layout, tile: Tile) -> None:
        self.tile = tile
        super().__init__(name, "pointwise", layout, layout, _RULES)

    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, ...]:
        p = problem
        if self.src_layout is Layout.NHWC:
            return round_up(p.ic, _ALIGNED), round_up(p.oc, _ALIGNED)
        return p.oc, round_up(p.ic, _ALIGNED)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        matrix_units, nhwc = on_matrix_units(weight.dtype), self.src_layout is Layout.NHWC
        matrix = rounded(weight.detach(), matrix_units).flatten(1)
        if nhwc:
            matrix = matrix.t()
        shape = self.packed_shape(problem, weight.element_size())
        packed: torch.Tensor = right_factor(matrix, shape, nhwc and matrix_units)
        packed[: matrix.shape[0], : matrix.shape[1]] = matrix
        return packed

    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        from convselect.kernels.triton.gemm import Matrices, factors, launches

        src, packed, dst, end = operands
        mb, p, weights = src.shape[0], problem, factors(packed)
        pixels = p.ih * p.iw
        if self.src_layout is Layout.NHWC:
            size = 1, mb * pixels, p.oc, p.ic
            return list(launches(self.tile, size, Matrices(src, p.ic), weights, Matrices(dst, p.oc), tf32, end))
        images, results = Matrices(src, pixels, p.ic * pixels), Matrices(dst, pixels, p.oc * pixels)
        size = mb, p.oc, pixels, p.ic
        return list(launches(self.tile, size, weights, images, results, tf32, end, bias_of_rows=True))


register(
    Pointwise("pointwise_128x128_nhwc", Layout.NHWC, Tile(128, 128, 8, 3)),
    Pointwise("pointwise_128x64_nhwc", Layout.NHWC, Tile(128, 64, 4, 4)),
    Pointwise("pointwise_64x128_nhwc", Layout.NHWC, Tile(64, 128, 4, 4)),
    Pointwise("pointwise_64x64_nhwc", Layout.NHWC, Tile(64, 64, 4, 4)),
    Pointwise("pointwise_64x32_nhwc", Layout.NHWC, Tile(64, 32, 4, 4)),
    Pointwise("pointwise_128x64_nchw", Layout.NCHW, Tile(128, 64, 8, 4)),
    Pointwise("pointwise_64x128_nchw", Layout.NCHW, Tile(64, 128, 8, 4)),
)
