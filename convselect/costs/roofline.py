"""What a GPU primitive takes if it is held up by nothing but arithmetic, memory and launches: the prior for GPUs.

Nothing here was fitted to a measurement: rates are those that the vendor states for the architecture. It ranks
candidates until calibration on a GPU corrects it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from convselect.machine import Gpu
from convselect.problem import ConvProblem

# Multiply-adds of a multiprocessor in a clock, by compute capability: float32, tf32, half precision.
_FMA_PER_CLOCK = {
    0: (64, 64, 128), 70: (64, 64, 512), 75: (64, 64, 512), 80: (64, 512, 1024), 86: (128, 256, 512),
    89: (128, 256, 512), 90: (128, 1024, 2048), 100: (128, 1024, 4096), 120: (128, 256, 512),
}  # fmt: skip
_L2_BYTES_PER_CLOCK = 64
"""From the L2 to one multiprocessor."""
_CLOCK_KHZ, _BANDWIDTH = 1_500_000, 1e12
"""Where torch does not tell."""
LAUNCH_MS = 0.003
"""Of a kernel in a graph."""

_TILE = re.compile(r"_(\d{2,})x(\d{2,})_")
_PARTS = re.compile(r"_split(\d+)")
_WINOGRAD = re.compile(r"_f(\d)x\d_")
_TORCH_TILES = ((128, 256), (128, 128), (128, 64), (64, 64))
"""Of a vendor's library, that may choose."""


@dataclass(frozen=True)
class Rates:
    """In one millisecond: multiply-adds of one multiprocessor, its bytes from the L2, bytes of memory for all."""

    multiprocessors: int
    fma: float
    plain_fma: float
    l2_bytes: float
    memory_bytes: float
    element_bytes: int

    @classmethod
    def of(cls, machine: Gpu) -> Rates:
        known = max(capability for capability in _FMA_PER_CLOCK if capability <= machine.capability)
        plain, tf32, half = _FMA_PER_CLOCK[known]
        clock = machine.clock_khz or _CLOCK_KHZ
        bandwidth = 2e3 * machine.memory_clock_khz * machine.memory_bus_bits / 8 or _BANDWIDTH
        size, fma = {"float32": (4, plain), "tf32": (4, tf32)}.get(machine.precision, (2, half))
        return cls(machine.cores, fma * clock, plain * clock, _L2_BYTES_PER_CLOCK * clock, bandwidth / 1e3, size)

    def product_ms(self, rows: int, columns: int, depth: int, tile: tuple[int, int], count: int = 1) -> float:
        """`count` matrix products, tile by tile: in each wave every multiprocessor has one tile."""
        tiles = count * -(-rows // tile[0]) * -(-columns // tile[1])
        fma = tile[0] * tile[1] * depth / self.fma
        loads = (tile[0] + tile[1]) * depth * self.element_bytes / self.l2_bytes
        return -(-tiles // self.multiprocessors) * max(fma, loads)

    def memory_ms(self, nbytes: float) -> float:
        return nbytes / self.memory_bytes


def primitives_ms(
    problems: Sequence[ConvProblem], candidates: Sequence[tuple[str, str]], machine: Gpu
) -> npt.NDArray[np.float64]:
    """Milliseconds, f64 [n, len(candidates)], whether or not a primitive can run the problem.

    candidates: (primitive, family).
    """
    rates = Rates.of(machine)
    return np.array([[roofline_ms(p, name, family, rates) for name, family in candidates] for p in problems])


def roofline_ms(problem: ConvProblem, primitive: str, family: str, rates: Rates) -> float:
    """Milliseconds of one primitive, by its family and by the tile and the parts that its name tells."""
    p, size = problem, rates.element_bytes
    rows, columns, depth = p.mb * p.oh * p.ow, p.oc // p.g, p.ic // p.g * p.kh * p.kw
    moved = size / 4 * (p.src_bytes + p.dst_bytes + p.weight_bytes)
    if family == "depthwise":
        fma = rows * p.oc * depth / rates.plain_fma / rates.multiprocessors
        return LAUNCH_MS + max(fma, rates.memory_ms(moved))
    found = _TILE.search(primitive)
    tile = (int(found[1]), int(found[2])) if found else (64, 64)
    if family == "winograd":
        match = _WINOGRAD.search(primitive)
        m = int(match[1]) if match else 2
        if m > 2 and size == 4:  # in float32, whatever is allowed
            rates = replace(rates, fma=rates.plain_fma)
        tiles, planes = p.mb * -(-p.oh // m) * -(-p.ow // m), (m + 2) ** 2
        between = 2 * planes * tiles * (size * p.ic + 4 * p.oc)  # written once, read once
        product = rates.product_ms(tiles, p.oc, p.ic, tile, planes)
        return 3 * LAUNCH_MS + product + rates.memory_ms(moved + between)
    if family == "im2row":
        patches = rates.memory_ms(moved + 2 * size * rows * depth)
        return 2 * LAUNCH_MS + rates.product_ms(rows, columns, depth, tile) + patches
    if family in ("cudnn", "aten"):
        best = min(rates.product_ms(rows, columns, depth, choice, p.g) for choice in _TORCH_TILES)
        return 2 * LAUNCH_MS + max(best, rates.memory_ms(moved)) + rates.memory_ms(2 * size / 4 * p.dst_bytes)
    parts = int(match[1]) if (match := _PARTS.search(primitive)) else 1
    product = rates.product_ms(rows, columns, -(-depth // parts), tile, p.g * parts)
    partial = 0.0 if parts == 1 else LAUNCH_MS + rates.memory_ms(2 * 4 * parts * rows * p.oc)
    return LAUNCH_MS + max(product, rates.memory_ms(moved)) + partial
