"""First layers, of few channels: a matrix product over (taps, channels) as one dimension, and the matrix of patches.

    k = (ky * kw + kx) * ic + c

src of any strides; packed  [kp, ocp], of `right_factor`, kp and ocp rounded up to whole tiles with zeros; dst NHWC.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import finish, split_index
from convselect.kernels.triton.launch import Epilogue, Launch, Tile, blocks, dot_precision, right_factor, rounded
from convselect.problem import ConvProblem

_GEOMETRY = ["pixels", "ih", "iw", "oh", "ow", "kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw"]


@triton.jit
def _corners(rows, pixels, ih, oh, ow, sh, sw, ph, pw, s_n, s_y, s_x):
    """The offsets of the first elements of the patches `rows` in src, and their y and x there."""
    n, y, x = split_index(rows, oh, ow)
    y = y * sh - ph
    x = x * sw - pw
    corner = n.to(tl.int64) * s_n + y.to(tl.int64) * s_y + x.to(tl.int64) * s_x
    return corner, tl.where(rows < pixels, y, ih), x  # rows beyond the last are padding


@triton.jit
def _patches(src, corner, y, x, k, ic, ih, iw, kh, kw, pw, dh, dw, s_c, s_y, s_x, PLANAR: tl.constexpr):
    """[rows, k] of the matrix of patches, zero outside of it.

    Neighbours in a warp read along k, where channels are adjacent in memory, and along rows, where src is PLANAR.
    """
    tap = k // ic
    c = k - tap * ic
    ky = tap // kw
    dy, dx = ky * dh, (tap - ky * kw) * dw
    distance = dy.to(tl.int64) * s_y + dx.to(tl.int64) * s_x + c.to(tl.int64) * s_c
    dx = tl.where(tap < kh * kw, dx, iw + pw)  # taps beyond the last are padding
    if PLANAR:
        y, x, offsets = y[None, :] + dy[:, None], x[None, :] + dx[:, None], corner[None, :] + distance[:, None]
    else:
        y, x, offsets = y[:, None] + dy[None, :], x[:, None] + dx[None, :], corner[:, None] + distance[None, :]
    a = tl.load(src + offsets, mask=(y >= 0) & (y < ih) & (x >= 0) & (x < iw), other=0.0)
    return tl.trans(a) if PLANAR else a


@triton.jit(do_not_specialize=_GEOMETRY)
def stem(
    src,
    packed,
    dst,
    bias,
    residual,
    alpha,
    beta,
    pixels,
    ic,
    oc,
    ih,
    iw,
    oh,
    ow,
    kh,
    kw,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    s_n,
    s_c,
    s_y,
    s_x,
    kp,
    b_row,
    b_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACT: tl.constexpr,
    PLANAR: tl.constexpr,
):
    """Axis 0: pixels; axis 1: output channels."""
    rows = tl.program_id(0).to(pixels.dtype) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    corner, y, x = _corners(rows, pixels, ih, oh, ow, sh, sw, ph, pw, s_n, s_y, s_x)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for begin in range(0, kp, BK):
        k = begin + tl.arange(0, BK)
        a = _patches(src, corner, y, x, k, ic, ih, iw, kh, kw, pw, dh, dw, s_c, s_y, s_x, PLANAR)
        b = tl.load(packed + k[:, None] * b_row + columns[None, :] * b_column)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    used = (columns < oc)[None, :]
    offsets = rows.to(tl.int64)[:, None] * oc + columns[None, :]
    mask = (rows < pixels)[:, None] & used
    finish(acc, dst, offsets, mask, bias, columns[None, :], used, residual, alpha, beta, ACT)


@triton.jit(do_not_specialize=_GEOMETRY)
def im2row(
    src,
    patches,
    pixels,
    ic,
    ih,
    iw,
    oh,
    ow,
    kh,
    kw,
    sh,
    sw,
    ph,
    pw,
    dh,
    dw,
    s_n,
    s_c,
    s_y,
    s_x,
    kp,
    BM: tl.constexpr,
    BK: tl.constexpr,
    PLANAR: tl.constexpr,
):
    """patches  [pixels, kp]. Axis 0: pixels; axis 1: k."""
    rows = tl.program_id(0).to(pixels.dtype) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    corner, y, x = _corners(rows, pixels, ih, oh, ow, sh, sw, ph, pw, s_n, s_y, s_x)
    a = _patches(src, corner, y, x, k, ic, ih, iw, kh, kw, pw, dh, dw, s_c, s_y, s_x, PLANAR)
    offsets = rows.to(tl.int64)[:, None] * kp + k[None, :]
    tl.store(patches + offsets, a, mask=(rows < pixels)[:, None] & (k < kp)[None, :])


def pack(weight: torch.Tensor, shape: tuple[int, int], matrix_units: bool) -> torch.Tensor:
    """`weight` [oc, ic, kh, kw] in `shape`, that of packed."""
    packed = right_factor(weight, shape, matrix_units)
    packed[: weight[0].numel(), : len(weight)] = rounded(weight, matrix_units).permute(2, 3, 1, 0).flatten(0, 2)
    return packed


def _sizes(p: ConvProblem) -> tuple[int, ...]:
    return p.ih, p.iw, p.oh, p.ow, p.kh, p.kw, p.sh, p.sw, p.ph, p.pw, p.dh, p.dw


def launches(
    p: ConvProblem, tile: Tile, src: torch.Tensor, packed: torch.Tensor, dst: torch.Tensor, end: Epilogue, tf32: bool
) -> list[Launch]:
    pixels = src.shape[0] * p.oh * p.ow
    args = (src, packed, dst, *end.args, pixels, p.ic, p.oc, *_sizes(p), *src.stride(), len(packed), *packed.stride())
    constants = {
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth(src.element_size()),
        "PRECISION": dot_precision(src, tf32),
        "ACT": end.act,
        "PLANAR": src.stride(1) != 1,
    }
    grid = (blocks(pixels, tile.rows), blocks(p.oc, tile.columns))
    return [Launch(stem, grid, args, constants, tile.warps, tile.stages)]


def im2row_launches(p: ConvProblem, src: torch.Tensor, patches: torch.Tensor) -> list[Launch]:
    pixels, kp = patches.shape
    args = (src, patches, pixels, p.ic, *_sizes(p), *src.stride(), kp)
    constants = {"BM": 32, "BK": 64, "PLANAR": src.stride(1) != 1}
    return [Launch(im2row, (blocks(pixels, 32), blocks(kp, 64)), args, constants)]
