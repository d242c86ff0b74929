"""Matrix products: pointwise convolutions, the products of Winograd's algorithm, those of a matrix of patches.

    dst[i, m, n] = sum over k of a[i, m, k] * b[i, k, n]

Matrices lie `*_batch` elements apart (0: the same for all), and their rows `*_line`, whose elements are adjacent. Of a
`DEPTH_FIRST` b columns do, with adjacent elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import finish
from convselect.kernels.triton.launch import NOTHING, Epilogue, Launch, Tile, blocks, dot_precision, unit

_GEOMETRY = ["rows", "columns", "inner", "a_batch", "a_line", "b_batch", "b_line", "dst_batch", "dst_line"]


@triton.jit(do_not_specialize=_GEOMETRY)
def gemm(
    a,
    b,
    dst,
    bias,
    residual,
    alpha,
    beta,
    rows,
    columns,
    inner,
    a_batch,
    a_line,
    b_batch,
    b_line,
    dst_batch,
    dst_line,
    UNIT_K: tl.constexpr,
    UNIT_N: tl.constexpr,
    DEPTH_FIRST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACT: tl.constexpr,
    BIAS_OF_ROWS: tl.constexpr,
):
    """A program a tile; within a matrix, columns count fastest.

    In units of UNIT_K: inner, a_*, and b_* if DEPTH_FIRST; in units of UNIT_N: columns, dst_*, and b_* otherwise.
    """
    UNIT_B: tl.constexpr = UNIT_K if DEPTH_FIRST else UNIT_N
    inner, columns = inner * UNIT_K, columns * UNIT_N
    b_line = b_line.to(tl.int64) * UNIT_B
    across = tl.cdiv(columns, BN)
    tiles = tl.cdiv(rows, BM) * across
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = (tile // across).to(rows.dtype) * BM + tl.arange(0, BM)
    n = (tile % across) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a += batch * a_batch * UNIT_K + m.to(tl.int64)[:, None] * (a_line * UNIT_K) + k[None, :]
    b += batch * b_batch * UNIT_B
    if DEPTH_FIRST:
        b += k[:, None] + n[None, :] * b_line
        b_step = BK
    else:
        b += k[:, None] * b_line + n[None, :]
        b_step = BK * b_line
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for begin in range(0, inner, BK):
        left = tl.load(a, mask=(m < rows)[:, None] & (k < inner - begin)[None, :], other=0.0)
        right = tl.load(b, mask=(k < inner - begin)[:, None] & (n < columns)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += BK
        b += b_step
    offsets = batch * dst_batch * UNIT_N + m.to(tl.int64)[:, None] * (dst_line * UNIT_N) + n[None, :]
    used_m, used_n = (m < rows)[:, None], (n < columns)[None, :]
    if BIAS_OF_ROWS:
        finish(acc, dst, offsets, used_m & used_n, bias, m[:, None], used_m, residual, alpha, beta, ACT)
    else:
        finish(acc, dst, offsets, used_m & used_n, bias, n[None, :], used_n, residual, alpha, beta, ACT)


class Matrices(NamedTuple):
    """Matrices in a tensor, whose lines are rows, or columns of those that are `depth_first`."""

    data: torch.Tensor
    line: int
    batch: int = 0
    depth_first: bool = False


def factors(packed: torch.Tensor) -> Matrices:
    """The matrices of what `right_factor` made: [k, n] or [batch, k, n]."""
    depth_first = packed.stride(-1) != 1
    batch = packed.stride(0) if packed.dim() == 3 else 0
    return Matrices(packed, packed.stride(-1 if depth_first else -2), batch, depth_first)


def launches(
    tile: Tile,
    size: tuple[int, int, int, int],
    a: Matrices,
    b: Matrices,
    dst: Matrices,
    tf32: bool,
    end: Epilogue = NOTHING,
    bias_of_rows: bool = False,
) -> list[Launch]:
    """`size`: number of products, rows, columns, inner."""
    batch, rows, columns, inner = size
    along_k, along_n = [inner, a.line, a.batch], [columns, dst.line, dst.batch]
    (along_k if b.depth_first else along_n).extend((b.line, b.batch))
    k, n = unit(a.data, *along_k), unit(a.data, *along_n)
    of_b = k if b.depth_first else n
    args = (
        a.data,
        b.data,
        dst.data,
        *end.args,
        rows,
        columns // n,
        inner // k,
        a.batch // k,
        a.line // k,
        b.batch // of_b,
        b.line // of_b,
        dst.batch // n,
        dst.line // n,
    )
    constants = {
        "UNIT_K": k,
        "UNIT_N": n,
        "DEPTH_FIRST": b.depth_first,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth(a.data.element_size()),
        "PRECISION": dot_precision(a.data, tf32),
        "ACT": end.act,
        "BIAS_OF_ROWS": bias_of_rows,
    }
    grid = batch * blocks(rows, tile.rows) * blocks(columns, tile.columns)
    return [Launch(gemm, (grid,), args, constants, tile.warps, tile.stages)]
