"""Batch norms that no convolution absorbs, on a GPU: one kernel of ours, or ATen where Triton does not run."""

from __future__ import annotations

import torch

from convselect.kernels.triton.launch import start
from convselect.layout import Layout, holds
from convselect.primitive import Activation
from convselect.primitives.aten import apply_activation
from convselect.primitives.gpu.base import epilogue, triton_works


def by_aten(src: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: Activation) -> torch.Tensor:
    """activation(src * scale + shift) in float32, rounded once. scale, shift  f32 [c]."""
    return apply_activation(src * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), activation).to(src.dtype)


def scale_shift(src: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As `by_aten`, for src [mb, c, h, w] in one pass; the result is dense in the layout of src."""
    layout = next((layout for layout in Layout if holds(src, layout)), None)
    if layout is None or not src.numel() or not triton_works(src.device):
        return by_aten(src, scale, shift, activation)
    from convselect.kernels.triton import elementwise

    dst = torch.empty_like(src, memory_format=layout.memory_format)
    end = epilogue(activation, shift, None)
    start(elementwise.launches(src, dst, layout is Layout.NHWC, end, scale), src.device)
    return dst
