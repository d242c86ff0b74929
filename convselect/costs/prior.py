"""What predicts times before anything was timed here: the shipped network, or, for a GPU without one, the roofline.

The roofline is what a GPU primitive takes if it is held up by nothing but arithmetic, memory and launches. Nothing in
it was fitted to a measurement: rates are those that the vendor states for the architecture. It ranks candidates until
calibration on a GPU corrects it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from convselect.costs.features import FEATURES, describe
from convselect.costs.model import VIEW, CostModel, PrimitiveKey, shipped
from convselect.costs.operators import Line, OperatorModel
from convselect.data import COMMON, read_problems
from convselect.machine import Gpu, Machine
from convselect.problem import ConvProblem

PRIMITIVE_STD = 0.5
"""Log deviation of a primitive as a whole: kernels reach between a third and nearly all of what the vendor states."""
PROBLEM_STD = 0.4
"""Log deviation beside that from problem to problem."""
_APART = 0.5
"""Two primitives whose log times differ by so much, from problem to problem, share little of their deviation."""
_TRANSPOSED = 2.0
"""A change of layout reads or writes across lines of memory."""
_REACH = 3.0

Array = npt.NDArray[np.float64]

# Multiply-adds of a multiprocessor in a clock, by compute capability: float32, tf32, half precision.
_FMA_PER_CLOCK = {
    0: (64, 64, 128),
    70: (64, 64, 512),
    75: (64, 64, 512),
    80: (64, 512, 1024),
    86: (128, 256, 512),
    89: (128, 256, 512),
    90: (128, 1024, 2048),
    100: (128, 1024, 4096),
    120: (128, 256, 512),
}
_L2_BYTES_PER_CLOCK = 64
"""From the L2 to one multiprocessor."""
_CLOCK_KHZ, _BANDWIDTH = 1_500_000, 1e12
"""Where torch does not tell."""
LAUNCH_MS = 0.003
"""The launch of a kernel in a CUDA graph."""

_TILE = re.compile(r"_(\d{2,})x(\d{2,})_")
_PARTS = re.compile(r"_split(\d+)")
_WINOGRAD = re.compile(r"_f(\d)x\d_")
_TORCH_TILES = ((128, 256), (128, 128), (128, 64), (64, 64))
"""Tiles (rows, columns) that a vendor's library may choose from."""


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


class Roofline:
    """`roofline_ms` behind what `transfer.Adapted` asks of a `CostModel`. Nothing in it was measured or trained,
    so it is wide everywhere, and calibration moves it far.
    """

    primitives: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    info: Mapping[str, Any] = {}

    def __init__(self, machine: Gpu) -> None:
        self._rates = Rates.of(machine)
        self._known: dict[tuple[ConvProblem, str], float] = {}
        self._references = list(dict.fromkeys(read_problems(COMMON)))
        x = describe(self._references, 1)[0]
        self._mean, self._std = x.mean(axis=0), np.maximum(x.std(axis=0), 1.0)
        per_byte = self._rates.memory_ms(1.0)
        moved, transposed = Line(LAUNCH_MS, per_byte), Line(LAUNCH_MS, _TRANSPOSED * per_byte)
        self.operators = OperatorModel(
            {"elementwise": {1: moved}, "to_nchw": {1: transposed}, "to_nhwc": {1: transposed}}
        )

    def _log_ms(self, problem: ConvProblem, primitive: str, family: str) -> float:
        key = problem, primitive
        if key not in self._known:
            self._known[key] = float(np.log(roofline_ms(problem, primitive, family, self._rates)))
        return self._known[key]

    def log_predict(
        self, problems: Sequence[ConvProblem], candidates: Sequence[PrimitiveKey], threads: int
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of log(ms), both f64 [n, len(candidates)]; `threads` is always one."""
        rows = [[self._log_ms(problem, *candidate) for candidate in candidates] for problem in problems]
        mean = np.array(rows, dtype=np.float64).reshape(len(problems), len(candidates))
        return mean, np.full_like(mean, np.hypot(PRIMITIVE_STD, PROBLEM_STD))

    def view(self, problems: Sequence[ConvProblem], threads: npt.NDArray[np.int64] | int) -> Array:
        """As `CostModel.view`, normalised over common problems."""
        x = np.clip((describe(problems, threads)[0] - self._mean) / self._std, -_REACH, _REACH)
        result: Array = x[:, [FEATURES.index(f"log_{name}") for name in VIEW]].astype(np.float64)
        return result

    @property
    def profile_parts(self) -> int:
        return len(self._references)

    def profile(self, primitive: str, family: str) -> npt.NDArray[np.float32] | None:
        """As `Statistics.profile`: by the roofline's own times of common problems."""
        logs = np.array([self._log_ms(problem, primitive, family) for problem in self._references])
        result: npt.NDArray[np.float32] = (logs - logs.mean()).astype(np.float32) / (_APART * len(logs) ** 0.5)
        return result

    def prior_std(self, primitive: str, family: str) -> float:
        return PRIMITIVE_STD


Model = CostModel | Roofline


@lru_cache(maxsize=8)
def _roofline(machine: Gpu) -> Roofline:
    return Roofline(machine)


def model_for(machine: Machine) -> Model:
    """The weights shipped for `machine`; for a GPU that has none, the roofline, which also has the operators that those
    weights know no line of: a GPU's profile times layout transforms only.
    """
    path = shipped(machine)
    if not isinstance(machine, Gpu):
        return CostModel.load(path)
    prior = _roofline(machine)
    if not path.exists():
        return prior
    model = CostModel.load(path)
    return replace(model, operators=OperatorModel(prior.operators.lines | model.operators.lines))
