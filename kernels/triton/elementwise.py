"""The epilogue alone, in place, after a convolution of somebody else's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import finish
from convselect.kernels.triton.launch import Epilogue, Launch, blocks


@triton.jit
def epilogue(dst, bias, residual, alpha, beta, size, oc, inner, BLOCK: tl.constexpr, ACT: tl.constexpr):
    """The channel of element i is i // inner % oc; an inner of 1, in NHWC, costs no division."""
    i = tl.program_id(0).to(size.dtype) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x = tl.load(dst + i, mask=mask, other=0.0).to(tl.float32)
    finish(x, dst, i, mask, bias, i // inner % oc, mask, residual, alpha, beta, ACT)


def launches(dst: torch.Tensor, nhwc: bool, end: Epilogue) -> list[Launch]:
    """dst [mb, oc, oh, ow], dense."""
    oc, inner = dst.shape[1], 1 if nhwc else dst.shape[2] * dst.shape[3]
    args = (dst, *end.args, dst.numel(), oc, inner)
    return [Launch(epilogue, (blocks(dst.numel(), 1024),), args, {"BLOCK": 1024, "ACT": end.act})]
