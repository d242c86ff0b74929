"""Implicit GEMM: a product of patches, which are never stored, and weights. Any filter, stride, dilation, padding."""

from __future__ import annotations

import torch

from convselect.kernels.triton.launch import Launch, Tile, round_up
from convselect.layout import Layout
from convselect.machine import PRECISIONS, Machine
from convselect.primitive import register
from convselect.primitives.gpu.base import HALF, Operands, Rule, TritonPrimitive, on_matrix_units, resident
from convselect.primitives.kernel import ungrouped
from convselect.problem import ConvProblem


class ImplicitGemm(TritonPrimitive):
    """`parts`: the depth is cut into so many, for few pixels of many channels. `persistent`: all programs fit."""

    tile: Tile

    def __init__(
        self,
        name: str,
        tile: Tile,
        parts: int = 1,
        persistent: bool = False,
        precisions: tuple[str, ...] = PRECISIONS,
        family: str = "igemm",
        rules: tuple[Rule, ...] = (ungrouped,),
    ) -> None:
        self.tile, self.parts, self.persistent, self.precisions = tile, parts, persistent, precisions
        super().__init__(name, family, Layout.NHWC, Layout.NHWC, rules)

    def shared_bytes(self) -> int:
        exchange = 4 * 16 * self.tile.warps * self.tile.columns if self.persistent else 0  # 16 rows a warp at a time
        return super().shared_bytes() + exchange  # the result is stored while the next tile's factors arrive

    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, ...]:
        p = problem
        icp, ocp = round_up(p.ic // p.g, self.tile.depth(element_bytes)), round_up(p.oc // p.g, self.tile.columns)
        return p.g, p.kh * p.kw * icp, ocp

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        if self.parts == 1:
            return 0
        p = problem
        return 4 * self.parts * p.mb * p.oh * p.ow * int(round_up(p.oc, self.tile.columns))

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        from convselect.kernels.triton import igemm

        shape = self.packed_shape(problem, weight.element_size())
        packed: torch.Tensor = igemm.pack(weight.detach(), shape, on_matrix_units(weight.dtype))
        return packed

    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        from convselect.kernels.triton import igemm

        src, packed, dst, end = operands
        programs = resident(src.device, self.shared_bytes()) if self.persistent else 0
        return list(
            igemm.launches(problem, self.tile, src, packed, dst, end, tf32, programs=programs, parts=self.parts)
        )


register(
    ImplicitGemm("igemm_128x256_nhwc", Tile(128, 256, 8, 3), precisions=HALF),
    ImplicitGemm("igemm_128x128_nhwc", Tile(128, 128, 8, 3)),
    ImplicitGemm("igemm_128x64_nhwc", Tile(128, 64, 4, 4)),
    ImplicitGemm("igemm_64x128_nhwc", Tile(64, 128, 4, 4)),
    ImplicitGemm("igemm_128x32_nhwc", Tile(128, 32, 4, 4, depth_bytes=64)),
    ImplicitGemm("igemm_64x64_nhwc", Tile(64, 64, 4, 4)),
    ImplicitGemm("igemm_64x32_nhwc", Tile(64, 32, 4, 4)),
    ImplicitGemm("igemm_128x128_persistent_nhwc", Tile(128, 128, 8, 3), persistent=True),
    ImplicitGemm("igemm_128x64_persistent_nhwc", Tile(128, 64, 4, 4), persistent=True),
    ImplicitGemm("igemm_64x64_split4_nhwc", Tile(64, 64, 4, 4), parts=4),
    ImplicitGemm("igemm_64x64_split8_nhwc", Tile(64, 64, 4, 4), parts=8),
    ImplicitGemm("igemm_64x64_split16_nhwc", Tile(64, 64, 4, 4), parts=16),
)
