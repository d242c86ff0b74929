"""A multiply-add a channel with an activation: a batch norm that no convolution absorbs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import activate
from convselect.kernels.triton.launch import Epilogue, Launch, blocks


@triton.jit
def scale_shift(src, dst, scale, shift, alpha, beta, size, c, inner, BLOCK: tl.constexpr, ACT: tl.constexpr):
    """dst[i] = activation(src[i] * scale[k] + shift[k]), k = i // inner % c; scale and shift are f32 [c]."""
    i = tl.program_id(0).to(size.dtype) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    k = i // inner % c
    x = tl.load(src + i, mask=mask, other=0.0).to(tl.float32)
    x = x * tl.load(scale + k, mask=mask, other=0.0) + tl.load(shift + k, mask=mask, other=0.0)
    tl.store(dst + i, activate(x, alpha, beta, ACT).to(dst.dtype.element_ty), mask=mask)


def launches(
    src: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dst: torch.Tensor, nhwc: bool, end: Epilogue
) -> list[Launch]:
    """src and dst [mb, c, h, w], both dense in one layout."""
    c, inner = src.shape[1], 1 if nhwc else src.shape[2] * src.shape[3]
    args = (src, dst, scale, shift, end.alpha, end.beta, src.numel(), c, inner)
    return [Launch(scale_shift, (blocks(src.numel(), 1024),), args, {"BLOCK": 1024, "ACT": end.act})]
