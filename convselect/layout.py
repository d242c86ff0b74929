"""Memory layouts of activations: torch's own two memory formats."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch


class Layout(enum.Enum):
    """Order of the dimensions of a dense 4-d tensor in memory, outermost first."""

    NCHW = "nchw"
    NHWC = "nhwc"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.contiguous_format if self is Layout.NCHW else torch.channels_last

    def __str__(self) -> str:
        return self.value


def holds(tensor: torch.Tensor, layout: Layout) -> bool:
    """Whether the 4-d `tensor` is dense in `layout`. One with C == 1 or H == W == 1 can be in both."""
    return tensor.is_contiguous(memory_format=layout.memory_format)


def strides(size: Sequence[int], layout: Layout) -> tuple[int, int, int, int]:
    """The strides of a dense tensor of that 4-d size, also where a dimension of size 0 or 1 leaves them open."""
    c, h, w = (max(length, 1) for length in size[1:])
    return (c * h * w, h * w, w, 1) if layout is Layout.NCHW else (c * h * w, 1, w * c, c)


def dense(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`tensor` with exactly those strides: itself, a view of it, or a copy."""
    exact = strides(tensor.shape, layout)
    if tensor.stride() == exact:
        return tensor
    return tensor.contiguous(memory_format=layout.memory_format).as_strided(tensor.shape, exact)
