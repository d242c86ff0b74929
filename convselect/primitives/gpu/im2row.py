"""The matrix of patches, stored, then one matrix product."""

from __future__ import annotations

import torch

from convselect.kernels.triton.launch import Epilogue, Launch, Tile, round_up
from convselect.layout import Layout
from convselect.machine import Machine
from convselect.primitive import register
from convselect.primitives.gpu.base import TritonPrimitive, element_bytes, on_matrix_units
from convselect.primitives.kernel import ungrouped
from convselect.problem import ConvProblem


class Im2row(TritonPrimitive):
    tile: Tile

    def __init__(self, name: str, src_layout: Layout, tile: Tile) -> None:
        self.tile = tile
        super().__init__(name, "im2row", src_layout, Layout.NHWC, (ungrouped,))

    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, int]:
        p = problem
        return round_up(p.kh * p.kw * p.ic, self.tile.depth(element_bytes)), round_up(p.oc, self.tile.columns)

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        p, size = problem, element_bytes(machine.precision)
        return size * p.mb * p.oh * p.ow * self.packed_shape(p, size)[0]

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        from convselect.kernels.triton import stem

        shape = self.packed_shape(problem, weight.element_size())
        packed: torch.Tensor = stem.pack(weight.detach(), shape, on_matrix_units(weight.dtype))
        return packed

    def launches(
        self,
        problem: ConvProblem,
        src: torch.Tensor,
        packed: torch.Tensor,
        dst: torch.Tensor,
        end: Epilogue,
        tf32: bool,
    ) -> list[Launch]:
        from convselect.kernels.triton import gemm, stem

        p, kp = problem, len(packed)
        patches = src.new_empty((src.shape[0] * p.oh * p.ow, kp))
        factors = gemm.Matrices(patches, kp), gemm.factors(packed), gemm.Matrices(dst, p.oc)
        products = gemm.launches(self.tile, (1, len(patches), p.oc, kp), *factors, tf32, end)
        return [*stem.im2row_launches(p, src, patches), *products]


register(
    Im2row("im2row_128x64_nhwc", Layout.NHWC, Tile(128, 64, 4, 4)),
    Im2row("im2row_128x64_nchw_nhwc", Layout.NCHW, Tile(128, 64, 4, 4)),
)
