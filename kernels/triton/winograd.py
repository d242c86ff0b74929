"""Winograd F(m x m, 3 x 3): y = A^T [(G w G^T) * (B^T d B)] A on tiles of t x t = (m + 2)^2 inputs, m x m outputs.

v        [t * t, tiles, cp]   B^T d B, in src's element type
packed   [t * t, cp, ocp]     G w G^T
product  f32 [t * t, tiles, ocp]
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from convselect.kernels.triton import gemm
from convselect.kernels.triton.common import finish, source_pixel, split_index
from convselect.kernels.triton.launch import Epilogue, Launch, Tile, blocks, right_factor, rounded, unit
from convselect.problem import ConvProblem

Matrix = tuple[tuple[float, ...], ...]
_POINTS = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2)),
}
_GEOMETRY = ["tiles", "c", "oc", "ih", "iw", "oh", "ow", "th", "tw", "ph", "pw"]


class Transform(NamedTuple):
    """A^T [m, t], G [t, 3], B^T [t, t]."""

    a: Matrix
    g: Matrix
    b: Matrix


@cache
def transform(m: int) -> Transform:
    """Toom and Cook's algorithm for F(m, 3), transposed; its points are finite ones and infinity."""
    points = _POINTS[m]

    def product(roots: list[Fraction]) -> list[Fraction]:
        """The coefficients of the polynomial with these roots, lowest first."""
        coefficients = [Fraction(1)]
        for root in roots:
            shifted, scaled = [Fraction(0), *coefficients], [root * c for c in coefficients] + [Fraction(0)]
            coefficients = [s - r for s, r in zip(shifted, scaled, strict=True)]
        return coefficients

    a, g, b = [], [], []
    for point in points:
        others = [other for other in points if other != point]
        scale = Fraction(1)
        for other in others:
            scale *= point - other
        a.append([point**i for i in range(m)])
        g.append([point**i / scale for i in range(3)])
        b.append([*product(others), Fraction(0)])
    a.append([Fraction(int(i == m - 1)) for i in range(m)])
    g.append([Fraction(int(i == 2)) for i in range(3)])
    b.append(product(list(points)))

    def floats(rows: list[list[Fraction]]) -> Matrix:
        return tuple(tuple(float(x) for x in row) for row in rows)

    return Transform(floats([list(column) for column in zip(*a, strict=True)]), floats(g), floats(b))


@triton.jit
def _row(MATRIX: tl.constexpr, ROW: tl.constexpr, v):
    """One row of MATRIX times the tuple of blocks v."""
    x = tl.zeros_like(v[0])
    for j in tl.static_range(len(MATRIX[ROW])):
        if MATRIX[ROW][j] != 0:
            x += MATRIX[ROW][j] * v[j]
    return x


@triton.jit
def _times(MATRIX: tl.constexpr, v):
    """MATRIX times the tuple of blocks v."""
    result = ()
    for i in tl.static_range(len(MATRIX)):
        result = result + (_row(MATRIX, i, v),)
    return result


@triton.jit
def _both_sides(MATRIX: tl.constexpr, columns):
    """MATRIX d MATRIX^T, by rows, of the blocks of MATRIX d, by columns."""
    result = ()
    for i in tl.static_range(len(MATRIX)):
        line = ()
        for j in tl.static_range(len(MATRIX[0])):
            line = line + (columns[j * len(MATRIX) + i],)
        result = result + _times(MATRIX, line)
    return result


@triton.jit(do_not_specialize=_GEOMETRY)
def transform_source(
    src,
    v,
    tiles,
    c,
    cp,
    ih,
    iw,
    th,
    tw,
    ph,
    pw,
    M: tl.constexpr,
    B: tl.constexpr,
    UNIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Axis 0: tiles; axis 1: channels. In units: c."""
    c = c * UNIT
    t = tl.program_id(0).to(tiles.dtype) * BT + tl.arange(0, BT)
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    n, y, x = split_index(t, th, tw)
    y = y * M - ph
    x = x * M - pw
    columns = ()
    for j in tl.static_range(len(B)):
        column = ()
        for i in tl.static_range(len(B)):
            pixel, inside = source_pixel(n, y + i, x + j, ih, iw)
            mask = (inside & (t < tiles))[:, None] & (channels < c)
            column = column + (tl.load(src + pixel[:, None] * c + channels, mask=mask, other=0.0).to(tl.float32),)
        columns = columns + _times(B, column)
    result = _both_sides(B, columns)
    offsets = t.to(tl.int64)[:, None] * cp + channels
    mask = (t < tiles)[:, None] & (channels < cp)
    for i in tl.static_range(len(B) * len(B)):
        tl.store(v + i * tiles.to(tl.int64) * cp + offsets, result[i].to(v.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_GEOMETRY)
def transform_product(
    product,
    dst,
    bias,
    residual,
    alpha,
    beta,
    tiles,
    oc,
    ocp,
    oh,
    ow,
    th,
    tw,
    M: tl.constexpr,
    A: tl.constexpr,
    UNIT: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    ACT: tl.constexpr,
):
    """Axis 0: tiles; axis 1: output channels. In units: oc."""
    oc = oc * UNIT
    t = tl.program_id(0).to(tiles.dtype) * BT + tl.arange(0, BT)
    channels = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    used = channels < oc
    shift = 0.0
    if bias is not None:
        shift = tl.load(bias + channels + 0 * t[:, None], mask=used, other=0.0).to(tl.float32)
    offsets = t.to(tl.int64)[:, None] * ocp + channels
    columns = ()
    for j in tl.static_range(len(A[0])):
        column = ()
        for i in tl.static_range(len(A[0])):
            plane = (i * len(A[0]) + j) * tiles.to(tl.int64) * ocp
            column = column + (tl.load(product + plane + offsets, mask=(t < tiles)[:, None] & used, other=0.0),)
        columns = columns + _times(A, column)
    result = _both_sides(A, columns)
    n, y, x = split_index(t, th, tw)
    for i in tl.static_range(M):
        for j in tl.static_range(M):
            pixel, inside = source_pixel(n, y * M + i, x * M + j, oh, ow)
            mask = (inside & (t < tiles))[:, None] & used
            finish(
                result[i * M + j] + shift,
                dst,
                pixel[:, None] * oc + channels,
                mask,
                None,
                channels,
                used,
                residual,
                alpha,
                beta,
                ACT,
            )


def pack(weight: torch.Tensor, m: int, shape: tuple[int, int, int], matrix_units: bool) -> torch.Tensor:
    """`weight` [oc, ic, 3, 3], transformed in float64, in `shape`, that of packed."""
    g = torch.tensor(transform(m).g, dtype=torch.float64, device=weight.device)
    oc, ic, _, _ = weight.shape
    packed = right_factor(weight, shape, matrix_units)
    planes = torch.einsum("ik,ockl,jl->ijco", g, weight.double(), g).flatten(0, 1)
    packed[:, :ic, :oc] = rounded(planes.to(weight.dtype), matrix_units)
    return packed


def launches(
    p: ConvProblem,
    m: int,
    tile: Tile,
    src: torch.Tensor,
    packed: torch.Tensor,
    dst: torch.Tensor,
    end: Epilogue,
    tf32: bool,
) -> list[Launch]:
    matrices, (planes, cp, ocp) = transform(m), packed.shape
    th, tw = blocks(p.oh, m), blocks(p.ow, m)
    tiles = src.shape[0] * th * tw
    v = src.new_empty((planes, tiles, cp))
    product = src.new_empty((planes, tiles, ocp), dtype=torch.float32)
    bt = 8 if m == 2 else 4  # a thread has 8 channels of 16 values, or 4 of 36
    block = {"M": m, "BT": bt, "BC": 64}
    c, o = unit(src, p.ic), unit(src, p.oc)
    first = Launch(
        transform_source,
        (blocks(tiles, bt), blocks(cp, 64)),
        (src, v, tiles, p.ic // c, cp, p.ih, p.iw, th, tw, p.ph, p.pw),
        {**block, "B": matrices.b, "UNIT": c},
        warps=2,
    )
    products = gemm.launches(
        tile,
        (planes, tiles, ocp, cp),
        gemm.Matrices(v, cp, tiles * cp),
        gemm.factors(packed),
        gemm.Matrices(product, ocp, tiles * ocp),
        tf32,
    )
    last = Launch(
        transform_product,
        (blocks(tiles, bt), blocks(p.oc, 64)),
        (product, dst, *end.args, tiles, p.oc // o, ocp, p.oh, p.ow, th, tw),
        {**block, "A": matrices.a, "UNIT": o, "ACT": end.act},
        warps=2,
    )
    return [first, *products, last]
