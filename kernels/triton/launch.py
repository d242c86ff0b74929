"""`Launch`: a kernel with its arguments, to be started, or compiled for a GPU that is not there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """`rows` x `columns` of a matrix product; `warps` and `stages` as Triton means them.

    `depth_bytes`: of a row or column of the factors, what one step multiplies; 128 is a line of memory.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    depth_bytes: int = 128

    def depth(self, element_bytes: int) -> int:
        """Elements of a row or column in one step."""
        return self.depth_bytes // element_bytes

    def shared_bytes(self) -> int:
        """An upper bound on the shared memory that the stages take."""
        return self.stages * (self.rows + self.columns) * self.depth_bytes


class Block(NamedTuple):
    """What a program of a depthwise convolution computes; in NCHW it has one channel."""

    pixels: int
    channels: int
    warps: int


class Launch(NamedTuple):
    """`kernel[grid](*args, **constants)`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 1

    def start(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants, num_warps=self.warps, num_stages=self.stages)


class Epilogue(NamedTuple):
    """activation(sum + bias + residual). `act` counts as `primitive.ACTIVATIONS` does; residual is as dense as dst."""

    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    act: int = 0
    alpha: float = 0.0
    beta: float = 0.0

    @property
    def args(self) -> tuple[Any, ...]:
        return self.bias, self.residual, self.alpha, self.beta


NOTHING = Epilogue()


def start(launches: Sequence[Launch], device: torch.device) -> None:
    """On the current stream of `device`: Triton takes the current device's."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            launch.start()


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def round_up(size: int, multiple: int) -> int:
    return blocks(size, multiple) * multiple


def unit(data: torch.Tensor, *sizes: int) -> int:
    """The largest power of two that divides `sizes`, of which a vector of 16 bytes holds no more.

    Kernels take sizes that decide how wide copies are in such units: Triton itself only asks whether 16 divides one,
    which 24 channels are too few for, and would compile again for each combination of answers.
    """
    return math.gcd(16 // data.element_size(), *sizes)


_LARGEST_TF32 = (2 - 2**-10) * 2.0**127


def rounded(weight: torch.Tensor, matrix_units: bool) -> torch.Tensor:
    """`weight`, in float32 rounded to the nearest TF32, ties away from zero, where `matrix_units` multiply it.

    They drop the last 13 bits, which shrinks a factor by 3.5e-4 on average, and a network's results once a layer.
    """
    if not matrix_units or weight.dtype != torch.float32:
        return weight
    nearest = ((weight.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(
        weight.abs() <= _LARGEST_TF32, nearest, weight
    )  # the rest would become infinite, or is not finite


def right_factor(like: torch.Tensor, shape: tuple[int, ...], depth_first: bool) -> torch.Tensor:
    """Zeros of `shape` [..., k, n]. `depth_first`: elements adjacent in memory are those along k, otherwise along n.

    Hopper's matrix units want TF32 so, and take half precision either way; plain float32 multiplies rows of n.
    """
    if not depth_first:
        return like.new_zeros(shape)
    *batch, k, n = shape
    return like.new_zeros((*batch, n, k)).transpose(-1, -2)


def dot_precision(src: torch.Tensor, tf32: bool) -> str:
    """`input_precision` of `tl.dot`; half precision has only one."""
    return "tf32" if tf32 and src.dtype == torch.float32 else "ieee"
