"""What a convolution's epilogue does, alone: after a convolution of somebody else's, or for a batch norm by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import finish
from convselect.kernels.triton.launch import Epilogue, Launch, blocks, unit

_ELEMENTS = 2048
"""A program: 16 a thread, two vectors of half precision."""


@triton.jit(do_not_specialize=["rows", "columns", "c"])
def elementwise(
    src,
    dst,
    scale,
    bias,
    residual,
    alpha,
    beta,
    rows,
    columns,
    c,
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACT: tl.constexpr,
):
    """dst = activation(src * scale + bias + residual) on a matrix of pixels x channels, or of channels x pixels.

    scale  f32 [c] or None: 1. In units: columns.
    """
    columns = columns * UNIT
    across = tl.cdiv(columns, BN)
    down = tl.program_id(0) // across
    m = (down.to(rows.dtype) * BM + tl.arange(0, BM))[:, None]
    n = ((tl.program_id(0) - down * across) * BN + tl.arange(0, BN))[None, :]
    offsets = m.to(tl.int64) * columns + n
    mask = (m < rows) & (n < columns)
    if NHWC:
        channels, used = n, n < columns
    else:
        channels, used = m % c, m < rows
    x = tl.load(src + offsets, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        x *= tl.load(scale + channels, mask=used, other=0.0)
    finish(x, dst, offsets, mask, bias, channels, used, residual, alpha, beta, ACT)


def launches(
    src: torch.Tensor, dst: torch.Tensor, nhwc: bool, end: Epilogue, scale: torch.Tensor | None = None
) -> list[Launch]:
    """src and dst [mb, c, h, w], both dense in one layout; they may be the same."""
    mb, c, h, w = src.shape
    rows, columns = (mb * h * w, c) if nhwc else (mb * c, h * w)
    bn = min(64 if nhwc else 512, triton.next_power_of_2(columns))
    n, bm = unit(src, columns), _ELEMENTS // bn
    constants = {"UNIT": n, "NHWC": nhwc, "BM": bm, "BN": bn, "ACT": end.act}
    args = (src, dst, scale, *end.args, rows, columns // n, c)
    return [Launch(elementwise, (blocks(rows, bm) * blocks(columns, bn),), args, constants)]
