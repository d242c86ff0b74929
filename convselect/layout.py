"""Memory layouts of activations: torch's own two memory formats."""

from __future__ import annotations

import enum

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
