"""Matrix products: pointwise convolutions, the products of Winograd's algorithm, those of a matrix of patches.

    dst[i, m, n] = sum over k of a[i, m, k] * b[i, k, n]

Rows lie `*_row` elements apart, matrices `*_batch` (0: the same for all). Elements of a row are adjacent, but those of
b may lie `b_column` apart, where elements of a column are adjacent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import finish
from convselect.kernels.triton.launch import NOTHING, Epilogue, Launch, Tile, blocks, dot_precision, unit


@triton.jit(do_not_specialize=["rows", "columns", "inner", "a_row", "dst_row"])
def gemm(
    a, b, dst, bias, residual, alpha, beta,
    rows, columns, inner, a_batch, a_row, b_batch, b_row, b_column, dst_batch, dst_row,
    UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, ACT: tl.constexpr,
    BIAS_OF_ROWS: tl.constexpr,
):  # fmt: skip
    """A program a tile; within a matrix, columns count fastest. In units: inner, a_row; columns, dst_row."""
    inner, a_row, columns, dst_row = inner * UNIT_K, a_row * UNIT_K, columns * UNIT_N, dst_row * UNIT_N
    across = tl.cdiv(columns, BN)
    tiles = tl.cdiv(rows, BM) * across
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = (tile // across).to(rows.dtype) * BM + tl.arange(0, BM)
    n = (tile % across) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a += batch * a_batch + m.to(tl.int64)[:, None] * a_row + k[None, :]
    b += batch * b_batch + k.to(tl.int64)[:, None] * b_row + n.to(tl.int64)[None, :] * b_column
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for begin in range(0, inner, BK):
        left = tl.load(a, mask=(m < rows)[:, None] & (k < inner - begin)[None, :], other=0.0)
        right = tl.load(b, mask=(k < inner - begin)[:, None] & (n < columns)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += BK
        b += BK * b_row
    offsets = batch * dst_batch + m.to(tl.int64)[:, None] * dst_row + n[None, :]
    used_m, used_n = (m < rows)[:, None], (n < columns)[None, :]
    if BIAS_OF_ROWS:
        finish(acc, dst, offsets, used_m & used_n, bias, m[:, None], used_m, residual, alpha, beta, ACT)
    else:
        finish(acc, dst, offsets, used_m & used_n, bias, n[None, :], used_n, residual, alpha, beta, ACT)


class Matrices(NamedTuple):
    """Matrices in a tensor."""

    data: torch.Tensor
    row: int
    batch: int = 0
    column: int = 1


def factors(packed: torch.Tensor) -> Matrices:
    """Of `right_factor`: [k, n] or [batch, k, n]."""
    return Matrices(packed, packed.stride(-2), packed.stride(0) if packed.dim() == 3 else 0, packed.stride(-1))


def launches(
    tile: Tile, size: tuple[int, int, int, int], a: Matrices, b: Matrices, dst: Matrices, tf32: bool,
    end: Epilogue = NOTHING, bias_of_rows: bool = False,
) -> list[Launch]:  # fmt: skip
    """`size`: number of products, rows, columns, inner."""
    batch, rows, columns, inner = size
    k, n = unit(a.data, inner, a.row), unit(a.data, columns, dst.row)
    args = (
        a.data, b.data, dst.data, *end.args, rows, columns // n, inner // k, a.batch, a.row // k,
        b.batch, b.row, b.column, dst.batch, dst.row // n,
    )  # fmt: skip
    constants = {
        "UNIT_K": k, "UNIT_N": n,
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth(a.data.element_size()),
        "PRECISION": dot_precision(a.data, tf32), "ACT": end.act, "BIAS_OF_ROWS": bias_of_rows,
    }  # fmt: skip
    grid = batch * blocks(rows, tile.rows) * blocks(columns, tile.columns)
    return [Launch(gemm, (grid,), args, constants, tile.warps, tile.stages)]
