"""The matrix of patches, stored, then one matrix product."""

from __future__ import annotations

from convselect.kernels.triton.launch import Launch, Tile
from convselect.layout import Layout
from convselect.machine import Machine
from convselect.primitive import register
from convselect.primitives.gpu.base import Operands, element_bytes
from convselect.primitives.gpu.stem import OfPatches
from convselect.primitives.kernel import ungrouped
from convselect.problem import ConvProblem


class Im2row(OfPatches):
    def __init__(self, name: str, src_layout: Layout, tile: Tile) -> None:
        self.tile = tile
        super().__init__(name, "im2row", src_layout, Layout.NHWC, (ungrouped,))

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        p, size = problem, element_bytes(machine.precision)
        return size * p.mb * p.oh * p.ow * self.packed_shape(p, size)[0]

    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        from convselect.kernels.triton import gemm, stem

        src, packed, dst, end = operands
        p, kp = problem, len(packed)
        patches = src.new_empty((src.shape[0] * p.oh * p.ow, kp))
        factors = gemm.Matrices(patches, kp), gemm.factors(packed), gemm.Matrices(dst, p.oc)
        products = gemm.launches(self.tile, (1, len(patches), p.oc, kp), *factors, tf32, end)
        return [*stem.im2row_launches(p, src, patches), *products]


register(
    Im2row("im2row_128x64_nhwc", Layout.NHWC, Tile(128, 64, 4, 4)),
    Im2row("im2row_128x64_nchw_nhwc", Layout.NCHW, Tile(128, 64, 4, 4)),
)
