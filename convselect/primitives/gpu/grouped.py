"""Grouped convolutions as implicit GEMMs: one for each group, or for several narrow groups as one."""

from __future__ import annotations

from dataclasses import replace

import torch

from convselect.kernels.triton.launch import Launch, Tile
from convselect.primitive import register
from convselect.primitives.gpu.base import Operands
from convselect.primitives.gpu.igemm import ImplicitGemm
from convselect.problem import ConvProblem

MERGED_CHANNELS = 32
"""In and out, as many as the tile has columns, of the groups that are computed as one."""
_MOST_GROUPS = 65535
"""CUDA's limit on the second axis of a grid."""


def several_groups(p: ConvProblem) -> str | None:
    if p.g == 1:
        return "only grouped convolutions are supported (g=1)"
    return None if p.g <= _MOST_GROUPS else f"at most {_MOST_GROUPS} groups are supported (g={p.g})"


def merged_groups(p: ConvProblem) -> int:
    """How many groups to compute as one: the most that divide `g` and fit into `MERGED_CHANNELS`."""
    widest = max(p.ic, p.oc) // p.g
    fitting = [n for n in range(1, MERGED_CHANNELS // widest + 1) if p.g % n == 0] if widest <= MERGED_CHANNELS else []
    return max(fitting, default=1)


def mergeable(p: ConvProblem) -> str | None:
    if merged_groups(p) > 1:
        return None
    return f"no several groups fit into {MERGED_CHANNELS} channels (g={p.g}, ic={p.ic}, oc={p.oc})"


class Merged(ImplicitGemm):
    """The weights of the merged groups are the blocks of a diagonal: zeros times what is not finite spread NaN, and so
    it is not "strict".
    """

    accuracy = "default"

    def _merge(self, p: ConvProblem) -> ConvProblem:
        return replace(p, g=p.g // merged_groups(p))

    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, ...]:
        return super().packed_shape(self._merge(problem), element_bytes)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        n, p = merged_groups(problem), problem
        blocks = weight.detach().reshape(p.g // n, n, p.oc // p.g, p.ic // p.g, p.kh, p.kw)
        dense = weight.new_zeros(p.g // n, n, p.oc // p.g, n, p.ic // p.g, p.kh, p.kw)
        for i in range(n):
            dense[:, i, :, i] = blocks[:, i]
        return super().prepack(self._merge(p), dense.view(p.oc, n * (p.ic // p.g), p.kh, p.kw))

    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        return super().launches(self._merge(problem), operands, tf32)


_WIDE, _NARROW = Tile(64, 64, 4, 4, depth_bytes=64), Tile(128, 32, 4, 4, depth_bytes=64)

register(
    ImplicitGemm("grouped_64x64_nhwc", _WIDE, family="grouped", rules=(several_groups,)),
    ImplicitGemm("grouped_128x32_nhwc", _NARROW, family="grouped", rules=(several_groups,)),
    Merged("grouped_merged_nhwc", _NARROW, family="grouped", rules=(several_groups, mergeable)),
)
