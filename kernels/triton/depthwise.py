"""One filter a channel, summed tap by tap.

packed  [kh * kw, c] for NHWC, [c, kh * kw] for NCHW
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import finish, shifted, split_index
from convselect.kernels.triton.launch import Block, Epilogue, Launch, blocks, unit
from convselect.problem import ConvProblem

_GEOMETRY = ["pixels", "c", "ih", "iw", "oh", "ow", "kh", "sh", "sw", "ph", "pw", "dh", "dw"]


@triton.jit(do_not_specialize=_GEOMETRY)
def depthwise_nhwc(
    src,
    packed,
    dst,
    bias,
    residual,
    alpha,
    beta,
    pixels,
    c,
    ih,
    iw,
    oh,
    ow,
    kh,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    KW: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    ACT: tl.constexpr,
):
    """Axis 0: pixels; axis 1: channels. In units: c."""
    c = c * UNIT
    rows = tl.program_id(0).to(pixels.dtype) * BM + tl.arange(0, BM)
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :] + 0 * rows[:, None]  # weights laid out as values are
    used = channels < c
    n, y, x = split_index(rows, oh, ow)
    y = y * sh - ph
    x = x * sw - pw
    src += ((n.to(tl.int64) * ih + y) * iw + x)[:, None] * c + channels
    y = tl.where(rows < pixels, y, ih)  # rows beyond the last are padding
    acc = tl.zeros((BM, BC), dtype=tl.float32)
    for ky in range(kh):
        for kx in tl.static_range(KW):
            inside, distance = shifted(y, x, ky * dh, kx * dw, ih, iw)
            value = tl.load(src + distance * c, mask=inside[:, None] & used, other=0.0)
            weight = tl.load(packed + (ky * KW + kx) * c + channels, mask=used, other=0.0)
            acc += value.to(tl.float32) * weight.to(tl.float32)
    offsets = rows.to(tl.int64)[:, None] * c + channels
    finish(acc, dst, offsets, (rows < pixels)[:, None] & used, bias, channels, used, residual, alpha, beta, ACT)


@triton.jit(do_not_specialize=_GEOMETRY)
def depthwise_nchw(
    src,
    packed,
    dst,
    bias,
    residual,
    alpha,
    beta,
    c,
    ih,
    iw,
    oh,
    ow,
    kh,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    KW: tl.constexpr,
    BM: tl.constexpr,
    ACT: tl.constexpr,
):
    """Pixels of one channel of one image, in order of n, c, pixels."""
    across = tl.cdiv(oh * ow, BM)
    plane = tl.program_id(0) // across
    rows = (tl.program_id(0) % across) * BM + tl.arange(0, BM)
    channel = plane % c
    y = rows // ow
    x = (rows - y * ow) * sw - pw
    y = y * sh - ph
    src += (plane.to(tl.int64) * ih + y) * iw + x
    y = tl.where(rows < oh * ow, y, ih)  # rows beyond the last are padding
    acc = tl.zeros((BM,), dtype=tl.float32)
    for ky in range(kh):
        for kx in tl.static_range(KW):
            inside, distance = shifted(y, x, ky * dh, kx * dw, ih, iw)
            value = tl.load(src + distance, mask=inside, other=0.0)
            acc += value.to(tl.float32) * tl.load(packed + (channel * kh + ky) * KW + kx).to(tl.float32)
    offsets = plane.to(tl.int64) * (oh * ow) + rows
    mask = rows < oh * ow
    finish(acc, dst, offsets, mask, bias, channel + 0 * rows, mask, residual, alpha, beta, ACT)


def launches(
    p: ConvProblem, block: Block, nhwc: bool, src: torch.Tensor, packed: torch.Tensor, dst: torch.Tensor, end: Epilogue
) -> list[Launch]:
    mb = src.shape[0]
    sizes = (p.ih, p.iw, p.oh, p.ow, p.kh, p.sh, p.sw, p.ph, p.pw, p.dh, p.dw)
    constants = {"KW": p.kw, "BM": block.pixels, "ACT": end.act}
    if nhwc:
        pixels = mb * p.oh * p.ow
        grid: tuple[int, ...] = (blocks(pixels, block.pixels), blocks(p.ic, block.channels))
        n = unit(src, p.ic)
        args = (src, packed, dst, *end.args, pixels, p.ic // n, *sizes)
        return [Launch(depthwise_nhwc, grid, args, {**constants, "UNIT": n, "BC": block.channels}, block.warps)]
    grid = (mb * p.ic * blocks(p.oh * p.ow, block.pixels),)
    return [Launch(depthwise_nchw, grid, (src, packed, dst, *end.args, p.ic, *sizes), constants, block.warps)]
