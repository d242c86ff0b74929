"""Convolution in NHWC as a matrix product whose left factor, pixels x (taps, channels), is never stored.

    dst[m, o] = sum over tap, c of src[pixel(m, tap), c] * packed[tap, c, o]

src     [mb, ih, iw, g * icg]
packed  [g, kh * kw * icp, ocp], icp and ocp rounded up to whole tiles with zeros
dst     [mb, oh, ow, g * ocg]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from convselect.kernels.triton.common import finish, shifted, split_index
from convselect.kernels.triton.launch import Epilogue, Launch, Tile, blocks, dot_precision, right_factor, rounded, unit
from convselect.problem import ConvProblem

_GEOMETRY = [
    "pixels",
    "icg",
    "ocg",
    "g",
    "ih",
    "iw",
    "oh",
    "ow",
    "kh",
    "kw",
    "sh",
    "sw",
    "ph",
    "pw",
    "dh",
    "dw",
    "parts",
]
"""Triton need not compile again for particular values of these."""
_FLATTEN = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7))
"""Loops in loops become one, so that the next tile loads while the last is stored; Triton 3.6 would not pipeline it."""


@triton.jit
def _place(tile, pixels, ocp, BM: tl.constexpr, BN: tl.constexpr):
    """The rows and columns of a tile; columns count fastest, so that a tile of src is read while it is in the L2."""
    across = ocp // BN
    down = tile // across
    rows = down.to(pixels.dtype) * BM + tl.arange(0, BM)
    return rows, (tile - down * across) * BN + tl.arange(0, BN)


@triton.jit
def _product(
    src,
    packed,
    group,
    rows,
    columns,
    first,
    last,
    pixels,
    icg,
    g,
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
    icp,
    ocp,
    b_row,
    b_column,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """f32 [BM, BN], the sum over the steps `first` to `last`; a step is `BK` channels of a tap.

    What differs from row to row is computed once; a tap is that and a distance which all rows share.
    """
    n, y, x = split_index(rows, oh, ow)
    y = y * sh - ph
    x = x * sw - pw
    k = tl.arange(0, BK)
    corner = ((n.to(tl.int64) * ih + y) * iw + x) * (g * icg) + group * icg
    y = tl.where(rows < pixels, y, ih)  # rows beyond the last are padding
    packed += group.to(tl.int64) * (kh * kw * icp) * ocp
    column = columns.to(tl.int64) * b_column
    per_tap = icp // BK
    tap = first // per_tap
    begin = (first - tap * per_tap) * BK
    ky = tap // kw
    kx = tap - ky * kw
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for step in range(first, last):
        c = begin + k
        inside, distance = shifted(y, x, ky * dh, kx * dw, ih, iw)
        mask = inside[:, None] & (c < icg)[None, :]
        a = tl.load(src + (corner + distance * (g * icg))[:, None] + c[None, :], mask=mask, other=0.0)
        b = tl.load(packed + ((step * BK + k).to(tl.int64) * b_row)[:, None] + column[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        begin += BK
        kx = tl.where(begin == icp, kx + 1, kx)
        begin = tl.where(begin == icp, 0, begin)
        ky = tl.where(kx == kw, ky + 1, ky)
        kx = tl.where(kx == kw, 0, kx)
    return acc


@triton.jit(do_not_specialize=_GEOMETRY)
def igemm(
    src,
    packed,
    dst,
    bias,
    residual,
    alpha,
    beta,
    pixels,
    icg,
    ocg,
    g,
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
    icp,
    ocp,
    b_row,
    b_column,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACT: tl.constexpr,
):
    """A program a tile (axis 0) and group (axis 1). In units: icg, ocg."""
    icg, ocg = icg * UNIT, ocg * UNIT
    group = tl.program_id(1)
    rows, columns = _place(tl.program_id(0), pixels, ocp, BM, BN)
    acc = _product(
        src,
        packed,
        group,
        rows,
        columns,
        0,
        kh * kw * (icp // BK),
        pixels,
        icg,
        g,
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
        icp,
        ocp,
        b_row,
        b_column,
        BM,
        BN,
        BK,
        PRECISION,
    )
    channels = (group * ocg + columns)[None, :]
    used = (columns < ocg)[None, :]
    offsets = rows.to(tl.int64)[:, None] * (g * ocg) + channels
    finish(acc, dst, offsets, (rows < pixels)[:, None] & used, bias, channels, used, residual, alpha, beta, ACT)


@triton.jit(do_not_specialize=_GEOMETRY)
def igemm_persistent(
    src,
    packed,
    dst,
    bias,
    residual,
    alpha,
    beta,
    pixels,
    icg,
    ocg,
    g,
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
    icp,
    ocp,
    b_row,
    b_column,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    ACT: tl.constexpr,
):
    """As `igemm`, ungrouped; each program computes several tiles, one after another."""
    icg, ocg = icg * UNIT, ocg * UNIT
    tiles = (pixels + BM - 1) // BM * (ocp // BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=_FLATTEN):
        rows, columns = _place(tile, pixels, ocp, BM, BN)
        acc = _product(
            src,
            packed,
            tl.program_id(1),
            rows,
            columns,
            0,
            kh * kw * (icp // BK),
            pixels,
            icg,
            g,
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
            icp,
            ocp,
            b_row,
            b_column,
            BM,
            BN,
            BK,
            PRECISION,
        )
        used = (columns < ocg)[None, :]
        offsets = rows.to(tl.int64)[:, None] * ocg + columns[None, :]
        mask = (rows < pixels)[:, None] & used
        finish(acc, dst, offsets, mask, bias, columns[None, :], used, residual, alpha, beta, ACT)


@triton.jit(do_not_specialize=_GEOMETRY)
def igemm_part(
    src,
    packed,
    partial,
    pixels,
    icg,
    ocg,
    g,
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
    icp,
    ocp,
    b_row,
    b_column,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `igemm`, ungrouped; axis 1 divides the steps. partial  f32 [parts, pixels, ocp]."""
    icg = icg * UNIT
    part = tl.program_id(1)
    rows, columns = _place(tl.program_id(0), pixels, ocp, BM, BN)
    steps = kh * kw * (icp // BK)
    share = (steps + tl.num_programs(1) - 1) // tl.num_programs(1)
    acc = _product(
        src,
        packed,
        0 * part,
        rows,
        columns,
        part * share,
        tl.minimum((part + 1) * share, steps),
        pixels,
        icg,
        g,
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
        icp,
        ocp,
        b_row,
        b_column,
        BM,
        BN,
        BK,
        PRECISION,
    )
    offsets = (part.to(tl.int64) * pixels + rows)[:, None] * ocp + columns[None, :]
    tl.store(partial + offsets, acc, mask=(rows < pixels)[:, None])


@triton.jit(do_not_specialize=_GEOMETRY)
def add_parts(
    partial,
    dst,
    bias,
    residual,
    alpha,
    beta,
    pixels,
    ocg,
    ocp,
    parts,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACT: tl.constexpr,
):
    """dst = epilogue of the sum over the parts, always in the same order. In units: ocg."""
    oc = ocg * UNIT
    rows = tl.program_id(0).to(pixels.dtype) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    used = (columns < oc)[None, :]
    mask = (rows < pixels)[:, None] & used
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for part in range(parts):
        offsets = (part * pixels.to(tl.int64) + rows)[:, None] * ocp + columns[None, :]
        acc += tl.load(partial + offsets, mask=mask, other=0.0)
    offsets = rows.to(tl.int64)[:, None] * oc + columns[None, :]
    channels = columns[None, :] + 0 * rows[:, None]  # bias laid out as dst is
    finish(acc, dst, offsets, mask, bias, channels, used, residual, alpha, beta, ACT)


def pack(weight: torch.Tensor, shape: tuple[int, ...], matrix_units: bool) -> torch.Tensor:
    """`weight` [g * ocg, icg, kh, kw] in `shape`, that of packed."""
    g, (oc, icg, kh, kw) = shape[0], weight.shape
    packed = right_factor(weight, shape, matrix_units)
    taps = packed.unflatten(1, (kh * kw, -1))
    groups = rounded(weight, matrix_units).reshape(g, oc // g, icg, kh * kw)
    taps[:, :, :icg, : oc // g] = groups.permute(0, 3, 2, 1)
    return packed


def launches(
    p: ConvProblem,
    tile: Tile,
    src: torch.Tensor,
    packed: torch.Tensor,
    dst: torch.Tensor,
    end: Epilogue,
    tf32: bool,
    *,
    programs: int = 0,
    parts: int = 1,
) -> list[Launch]:
    """`programs`: of a persistent kernel, 0 for a program a tile. `parts`: of the depth, summed by a second kernel."""
    pixels, (_, depth, ocp) = src.shape[0] * p.oh * p.ow, packed.shape
    n = unit(src, p.ic // p.g, p.oc // p.g)
    sizes = (
        pixels,
        p.ic // p.g // n,
        p.oc // p.g // n,
        p.g,
        p.ih,
        p.iw,
        p.oh,
        p.ow,
        p.kh,
        p.kw,
        p.sh,
        p.sw,
        p.ph,
        p.pw,
        p.dh,
        p.dw,
        depth // (p.kh * p.kw),
        ocp,
        packed.stride(1),
        packed.stride(2),
    )
    tiles = blocks(pixels, tile.rows) * (ocp // tile.columns)
    constants = {
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth(src.element_size()),
        "PRECISION": dot_precision(src, tf32),
        "UNIT": n,
    }
    if parts == 1:
        kernel, grid = (igemm_persistent, min(tiles, programs)) if programs else (igemm, tiles)
        args = (src, packed, dst, *end.args, *sizes)
        return [Launch(kernel, (grid, p.g), args, {**constants, "ACT": end.act}, tile.warps, tile.stages)]
    partial = src.new_empty((parts, pixels, ocp), dtype=torch.float32)
    return [
        Launch(igemm_part, (tiles, parts), (src, packed, partial, *sizes), constants, tile.warps, tile.stages),
        Launch(
            add_parts,
            (blocks(pixels, 8), blocks(p.oc, 128)),
            (partial, dst, *end.args, pixels, p.oc // n, ocp, parts),
            {"UNIT": n, "BM": 8, "BN": 128, "ACT": end.act},
        ),
    ]
