"""First layers: of 3 or 4 channels (or any few), read in either layout, with all taps and channels as one dimension."""

from __future__ import annotations

import torch

from convselect.kernels.triton.launch import Launch, Tile, round_up
from convselect.layout import Layout
from convselect.primitive import register
from convselect.primitives.gpu.base import Operands, TritonPrimitive, on_matrix_units
from convselect.primitives.kernel import ungrouped
from convselect.problem import ConvProblem

MOST_CHANNELS = 8
"""With more, a step of an implicit GEMM over the channels of one tap is full enough."""
_DEPTH_BYTES = 64
"""A block of patches has another shape than one of dst, whose vectors Triton would give to its threads as well: what is
gathered one by one should be adjacent from thread to thread instead.
"""


def few_channels(p: ConvProblem) -> str | None:
    return None if p.ic <= MOST_CHANNELS else f"at most {MOST_CHANNELS} input channels are supported (ic={p.ic})"


class OfPatches(TritonPrimitive):
    """A product with a matrix of patches: packed [kh * kw * ic, oc], filled up to whole tiles."""

    tile: Tile

    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, int]:
        p = problem
        return round_up(p.kh * p.kw * p.ic, self.tile.depth(element_bytes)), round_up(p.oc, self.tile.columns)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        from convselect.kernels.triton import stem

        shape = self.packed_shape(problem, weight.element_size())
        packed: torch.Tensor = stem.pack(weight.detach(), shape, on_matrix_units(weight.dtype))
        return packed


class Stem(OfPatches):
    def __init__(self, name: str, src_layout: Layout, tile: Tile) -> None:
        self.tile = tile
        super().__init__(name, "stem", src_layout, Layout.NHWC, (few_channels, ungrouped))

    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        from convselect.kernels.triton import stem

        src, packed, dst, end = operands
        return list(stem.launches(problem, self.tile, src, packed, dst, end, tf32))


register(
    Stem("stem_64x64_nhwc", Layout.NHWC, Tile(64, 64, 4, 2, _DEPTH_BYTES)),
    Stem("stem_64x64_nchw_nhwc", Layout.NCHW, Tile(64, 64, 4, 2, _DEPTH_BYTES)),
    Stem("stem_128x32_nchw_nhwc", Layout.NCHW, Tile(128, 32, 8, 2, _DEPTH_BYTES)),
)
