"""The least kernel: whether Triton can build and launch one at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.launch import Launch, start


@triton.jit
def one(dst):
    tl.store(dst, 1.0)


def works(device: torch.device) -> bool:
    dst = torch.zeros(1, device=device)
    start([Launch(one, (1,), (dst,), {}, warps=1)], device)
    return dst.item() == 1
