"""Winograd F(2x2, 3x3) and F(4x4, 3x3) in three stages; the transforms in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from convselect.kernels.triton.launch import Launch, Tile, blocks, round_up
from convselect.layout import Layout
from convselect.machine import PRECISIONS, Machine
from convselect.primitive import register
from convselect.primitives.gpu.base import Operands, TritonPrimitive, element_bytes, on_matrix_units
from convselect.primitives.kernel import ungrouped
from convselect.primitives.winograd import dense, only
from convselect.problem import ConvProblem

_ALIGNED = 16


class Winograd(TritonPrimitive):
    """F(m x m, 3 x 3). F(4, 3) magnifies the rounding of factors too much for half precision and for TF32, so that it
    computes in float32 where TF32 is allowed too. Neither is "strict": see the CPU's.
    """

    accuracy = "default"
    tile: Tile

    def __init__(self, m: int, tile: Tile, bounds: Mapping[str, float]) -> None:
        self.m, self.tile, self.bounds = m, tile, bounds
        self.precisions = tuple(precision for precision in PRECISIONS if precision in bounds)
        rules = (only(3, 3), dense, ungrouped)
        super().__init__(
            f"winograd_f{m}x{m}_3x3_{tile.rows}x{tile.columns}_nhwc", "winograd", Layout.NHWC, Layout.NHWC, rules
        )

    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, int, int]:
        return (self.m + 2) ** 2, round_up(problem.ic, _ALIGNED), round_up(problem.oc, _ALIGNED)

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        p, size = problem, element_bytes(machine.precision)
        planes, cp, ocp = self.packed_shape(p, size)
        return planes * p.mb * int(blocks(p.oh, self.m) * blocks(p.ow, self.m)) * (size * cp + 4 * ocp)

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        from convselect.kernels.triton import winograd

        shape = self.packed_shape(problem, weight.element_size())
        matrix_units = self.m == 2 and on_matrix_units(weight.dtype)
        packed: torch.Tensor = winograd.pack(weight.detach(), self.m, shape, matrix_units)
        return packed

    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        from convselect.kernels.triton import winograd

        src, packed, dst, end = operands
        rounded = tf32 and self.m == 2
        return list(winograd.launches(problem, self.m, self.tile, src, packed, dst, end, rounded))


_F2 = {"float32": 2e-6, "tf32": 4e-3, "float16": 2e-3, "bfloat16": 1.6e-2}
_F4 = {"float32": 5e-6, "tf32": 5e-6}

register(
    Winograd(2, Tile(128, 64, 4, 4), _F2),
    Winograd(2, Tile(64, 64, 4, 4), _F2),
    Winograd(4, Tile(128, 64, 4, 4), _F4),
    Winograd(4, Tile(64, 64, 4, 4), _F4),
)
