"""Primitives that are Triton kernels of our own: what they share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from convselect.errors import brief
from convselect.kernels.triton.launch import Epilogue, Launch, Tile, start
from convselect.layout import Layout, dense, strides
from convselect.machine import PRECISIONS, Gpu, Machine, gpu, tf32_allowed
from convselect.primitive import ACTIVATIONS, Activation, Primitive
from convselect.problem import ConvProblem

Rule = Callable[[ConvProblem], str | None]
"""A necessary condition: None, or the sentence that says why the problem does not meet it."""

LEAST_CAPABILITY = 80
"""Compute capability that the kernels need: asynchronous copies, TF32 and bfloat16 came with 8.0."""
EXACT_BOUNDS: Mapping[str, float] = {"float32": 2e-6, "tf32": 2e-3, "float16": 5e-4, "bfloat16": 4e-3}
"""rel-L2 error of what only adds products: rounded factors (tf32) or a rounded result (half precision)."""
HALF = ("float16", "bfloat16")
MOST_WORKSPACE = 2**30
"""Bytes: what takes more has lost by the time it has moved them."""
_RESERVED_BYTES = 1024
"""Shared memory that CUDA itself takes of each block."""


def element_bytes(precision: str) -> int:
    return 2 if precision in HALF else 4


def on_matrix_units(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` run there: weights are packed for them. Plain float32 does not."""
    return dtype != torch.float32 or tf32_allowed()


def no_gpu(machine: Machine) -> str | None:
    """A refusal of whatever needs NVIDIA's GPUs."""
    if not isinstance(machine, Gpu):
        return f"it needs an NVIDIA GPU, which {machine.name} is not"
    return None if machine.capability else f"it needs an NVIDIA GPU, and {machine.name} ({machine.isa}) is another's"


def no_triton(machine: Gpu) -> str | None:
    if machine.capability < LEAST_CAPABILITY:
        have, least = (f"{c // 10}.{c % 10}" for c in (machine.capability, LEAST_CAPABILITY))
        return f"it needs compute capability {least} or later, and {machine.name} has {have}"
    if not machine.triton:
        return "it needs Triton, which is not installed"
    return None if machine.index is None else _no_launch(machine.index)


@lru_cache
def _no_launch(index: int) -> str | None:
    """Why Triton builds or launches nothing on this GPU: it needs a C compiler and Python's headers."""
    device = torch.device("cuda", index)
    try:
        from convselect.kernels.triton.probe import works

        with torch.utils._python_dispatch._disable_current_modes():
            right = works(device)
    except Exception as error:  # of a compiler, a linker or a driver: they have no common type
        return f"it needs Triton, which fails on {device} ({brief(error)})"
    return None if right else f"it needs Triton, which computes nothing on {device}"


@lru_cache
def triton_works(device: torch.device) -> bool:
    """Whether kernels of ours may follow a convolution of torch's on `device`."""
    return device.type == "cuda" and no_gpu(here := gpu(device.index or 0)) is None and no_triton(here) is None


@lru_cache
def resident(device: torch.device, shared_bytes: int) -> int:
    """How many blocks with so much shared memory the GPU has room for at once, two a multiprocessor at most.

    1 elsewhere, where Triton's interpreter runs.
    """
    if device.type != "cuda":
        return 1
    found = torch.cuda.get_device_properties(device)
    fitting = found.shared_memory_per_multiprocessor // (shared_bytes + _RESERVED_BYTES)
    return int(found.multi_processor_count * max(1, min(2, fitting)))


class Operands(NamedTuple):
    """What a primitive's kernels read and write: src, packed and dst of one dtype, in the primitive's layouts."""

    src: torch.Tensor
    packed: torch.Tensor
    dst: torch.Tensor
    end: Epilogue


class TritonPrimitive(Primitive):
    """Declared by its name, its rules and the launches that compute it. src, packed and dst are of one dtype.

    Attributes:
        precisions: those of `machine.PRECISIONS` that it takes.
        tile: of its matrix products, if it has any.
    """

    device = "cuda"
    traceable = False
    precisions: tuple[str, ...] = PRECISIONS
    tile: Tile | None = None
    bounds: Mapping[str, float] = EXACT_BOUNDS

    def __init__(self, name: str, family: str, src_layout: Layout, dst_layout: Layout, rules: tuple[Rule, ...]) -> None:
        self.name, self.family = name, family
        self.src_layout, self.dst_layout = src_layout, dst_layout
        self._rules = rules
        self.error_bound = self.bounds["float32"]

    def error_bound_at(self, precision: str) -> float:
        return self.bounds[precision]

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        reason = no_gpu(machine)
        if reason is not None or not isinstance(machine, Gpu):
            return reason
        if (reason := no_triton(machine)) is not None:
            return reason
        if machine.precision not in self.precisions:
            return f"only {' and '.join(self.precisions)} are supported (this is {machine.precision})"
        if 0 < machine.shared_bytes < (shared := self.shared_bytes()):
            return f"its tiles take {shared} bytes of shared memory, and a block of this GPU has {machine.shared_bytes}"
        if (reason := next((reason for rule in self._rules if (reason := rule(problem))), None)) is not None:
            return reason
        nbytes = self.workspace_bytes(problem, machine)
        return None if nbytes <= MOST_WORKSPACE else f"its workspace would take {nbytes / 2**30:.3g} GiB"

    def shared_bytes(self) -> int:
        """An upper bound on the shared memory of a block."""
        return self.tile.shared_bytes() if self.tile else 0

    @abstractmethod
    def packed_shape(self, problem: ConvProblem, element_bytes: int) -> tuple[int, ...]: ...

    @abstractmethod
    def launches(self, problem: ConvProblem, operands: Operands, tf32: bool) -> list[Launch]:
        """The kernels that compute dst, in order. `tf32`: whether factors of float32 may be rounded."""

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return 0

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        size = element_bytes(machine.precision)
        return size * math.prod(self.packed_shape(problem, size))

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        src, residual = as_planned(self, src, residual)
        size = (src.shape[0], problem.oc, problem.oh, problem.ow)
        dst = src.new_empty_strided(size, strides(size, self.dst_layout))
        end = epilogue(activation, bias, residual)
        if size[0]:
            start(self.launches(problem, Operands(src, packed, dst, end), tf32_allowed()), src.device)
        return dst


def as_planned(
    primitive: Primitive, src: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operands in the primitive's layouts: what ATen's operators give on a GPU, tracing does not always tell."""
    return dense(src, primitive.src_layout), None if residual is None else dense(residual, primitive.dst_layout)


def epilogue(activation: Activation, bias: torch.Tensor | None, residual: torch.Tensor | None) -> Epilogue:
    kind, alpha, beta = activation
    return Epilogue(bias, residual, ACTIVATIONS.index(kind), alpha, beta)
