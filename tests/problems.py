"""The problems that primitives are tested on: corners, random ones, and those of real networks made small."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect import machine
from convselect.data import GRID, read_problems
from convselect.primitive import Primitive, primitives
from convselect.problem import DIMENSIONS, ConvProblem

SHAPES = Path(__file__).parents[2] / "shared" / "data" / "conv_shapes.csv"
"""More layers of real networks, where somebody has them; a checkout of its own does not."""
MAX_MACS = 8_000_000
MAX_RANDOM_MACS = 1_000_000


def corner_problems() -> list[ConvProblem]:
    """Each a corner that some kernel could get wrong."""
    square = ConvProblem(ic=17, ih=13, iw=13, oc=33, kh=3, kw=3, ph=1, pw=1)
    one = ConvProblem(ic=24, ih=9, iw=11, oc=100, kh=1, kw=1)
    wide = ConvProblem(mb=2, ic=3, ih=19, iw=23, oc=16, kh=7, kw=7, sh=2, sw=2, ph=3, pw=3)
    depthwise = ConvProblem(g=24, ic=24, ih=14, iw=15, oc=24, kh=3, kw=3, ph=1, pw=1)
    small = replace(square, ic=5, oc=12)
    filters = ((1, 3), (3, 1), (1, 5), (5, 1), (1, 7), (7, 1), (5, 5), (7, 7))
    maps = ((9, 11), (14, 6), (3, 20))
    return [
        *(replace(small, ih=h, iw=w, kh=kh, kw=kw, ph=kh // 2, pw=kw // 2) for kh, kw in filters for h, w in maps),
        square,
        replace(square, mb=7),
        replace(square, ph=0, pw=0),
        replace(square, ph=3, pw=3),
        replace(square, sh=2, sw=2),
        replace(square, sh=3, sw=1),
        replace(square, dh=2, dw=2, ph=2, pw=2),
        replace(square, dh=1, dw=3),
        replace(square, ih=1, iw=1),
        replace(square, ih=1, iw=29),
        replace(square, ic=64, oc=64, ih=14, iw=14),
        replace(square, ic=16, oc=16, ih=8, iw=8),
        replace(square, ic=128, oc=48, ih=7, iw=7),
        replace(square, ic=1, oc=1),
        replace(square, ic=64, oc=5, ih=28),
        replace(square, ic=32, oc=96, ih=6, iw=10, mb=2),
        replace(square, kh=5, kw=5, ph=2, pw=2),
        replace(square, kh=1, kw=7, ph=0, pw=3),
        replace(square, kh=7, kw=1, ph=3, pw=0),
        replace(square, kh=2, kw=2, ph=1, pw=1),
        replace(square, ic=512, oc=32, ih=5, iw=5),
        replace(square, ih=13, iw=13, kh=13, kw=13, ph=0, pw=0),
        one,
        replace(one, mb=2, sh=2, sw=2),
        replace(one, ih=1, iw=1),
        replace(one, ic=1, oc=1),
        replace(one, ic=1100, oc=17, ih=7, iw=7),
        replace(one, ic=3, oc=130, ih=30),
        replace(one, ph=1, pw=1),
        replace(one, mb=2, ih=1, iw=1, sw=2, pw=1),
        replace(one, g=2, ic=48),
        replace(one, ih=49, iw=1),
        replace(one, mb=7, ic=64, oc=16, ih=14, iw=14),
        wide,
        replace(wide, ic=4, oc=64),
        replace(wide, kh=11, kw=11, sh=4, sw=4, ph=2, pw=2, ih=40, iw=41),
        replace(wide, kh=3, kw=3, ph=1, pw=1),
        replace(wide, ic=1),
        depthwise,
        replace(depthwise, sh=2, sw=2),
        replace(depthwise, kh=5, kw=5, ph=2, pw=2),
        replace(depthwise, g=3, ic=3, oc=3),
        replace(depthwise, mb=2, dh=2, dw=2, ph=2, pw=2),
        replace(depthwise, ih=1, iw=1),
        replace(depthwise, g=100, ic=100, oc=100, ih=7, iw=7, sh=2, sw=1),
        replace(depthwise, oc=48),
        replace(depthwise, g=8, ic=24, oc=40),
        replace(depthwise, g=2, ic=34, oc=66),
        replace(depthwise, g=16, ic=16, oc=16, ih=30, iw=40),
        replace(depthwise, kh=7, kw=7, ph=3, pw=3),
        replace(depthwise, g=6),
        replace(depthwise, g=6, mb=2, sh=2, sw=2),
        replace(depthwise, g=12, oc=48, ih=3, iw=3),
        replace(depthwise, g=5, ic=40, oc=15, ph=0, pw=2),
        replace(depthwise, g=3, ic=48, oc=48, mb=2, ih=7, iw=7),
        replace(depthwise, kh=31, kw=31, ph=15, pw=15),
        replace(depthwise, g=2, ic=34, oc=66, kh=7, kw=7, ph=3, pw=3),
        replace(square, ic=2, oc=3, kh=9, kw=9, ph=9, pw=8, dh=2),
        replace(square, kh=5, kw=13, ph=5, pw=12, mb=2),
        replace(square, ic=3, oc=4, kh=7, kw=9, ih=40, iw=200),
        replace(square, kh=11, kw=11, ph=5, pw=5, mb=2),
        ConvProblem(mb=2, ic=1, ih=23, iw=1, oc=16, kh=3, kw=3, sw=2, ph=1, pw=1),
    ]


def random_problems(count: int) -> list[ConvProblem]:
    """Four in ten plain (no stride, dilation or groups), as most fast algorithms want them; one in ten depthwise."""
    draw, found = random.Random(0), dict[ConvProblem, None]()
    while len(found) < count:
        kind = draw.choices(("plain", "depthwise", "any"), (4, 1, 5))[0]
        g = {"plain": 1, "depthwise": draw.choice((2, 7, 16, 33, 80)), "any": draw.choice((1, 1, 1, 2, 3))}[kind]
        ic, oc = (draw.choice((1, 3, 17, 24, 64)), draw.choice((1, 5, 16, 33, 100))) if kind != "depthwise" else (1, 1)
        kh = draw.choice((1, 1, 2, 3, 3, 5, 7))
        kw = draw.choice((kh, kh, kh, 1, 3, 7))
        sh, sw = (1, 1) if kind == "plain" else draw.choice(((1, 1), (2, 2), (1, 2), (3, 1), (2, 3)))
        dh, dw = (1, 1) if kind == "plain" else draw.choice(((1, 1), (1, 1), (2, 2), (1, 3), (2, 1)))
        try:
            problem = ConvProblem(
                mb=draw.choice((1, 1, 2, 7)),
                g=g,
                ic=g * ic,
                ih=draw.choice((1, 5, 7, 10, 14, 23, 56)),
                iw=draw.choice((1, 4, 7, 11, 14, 37, 56)),
                oc=g * oc,
                kh=kh,
                kw=kw,
                sh=sh,
                sw=sw,
                ph=draw.choice((0, kh // 2, kh)),
                pw=draw.choice((0, kw // 2, kw)),
                dh=dh,
                dw=dw,
            )
        except ValueError:
            continue
        if problem.flops <= 2 * MAX_RANDOM_MACS:
            found[problem] = None
    return list(found)


def shrunk(p: ConvProblem) -> ConvProblem:
    """`p` with less batch, then fewer pixels, then fewer channels, until float64 computes it in no time."""

    def fits(size: int, kernel: int, dilation: int) -> bool:
        return size > max(16, 2 * dilation * kernel)

    p = p.with_batch(min(p.mb, 2))
    while p.flops > 2 * MAX_MACS:
        if fits(p.ih, p.kh, p.dh) or fits(p.iw, p.kw, p.dw):
            ih = p.ih // 2 + 1 if fits(p.ih, p.kh, p.dh) else p.ih
            p = replace(p, ih=ih, iw=p.iw // 2 + 1 if fits(p.iw, p.kw, p.dw) else p.iw)
        elif p.mb > 1:
            p = p.with_batch(1)
        elif p.g == 1 and max(p.ic, p.oc) > 2:
            p = replace(p, ic=p.ic // 2 + 1, oc=p.oc // 2 + 1)
        else:
            break
    return p


def real_problems() -> list[ConvProblem]:
    """Of the grid that profiles time, and of `SHAPES`."""
    rows = read_problems(GRID)
    if SHAPES.exists():
        with SHAPES.open() as file:
            rows += [ConvProblem(**{name: int(row[name]) for name in DIMENSIONS}) for row in csv.DictReader(file)]
    return list(dict.fromkeys(map(shrunk, rows)))


def spread(problems: list[ConvProblem], count: int) -> list[ConvProblem]:
    """Up to `count` of them, from all over the list."""
    return problems[:: -(-len(problems) // count)]


CORNERS = corner_problems()
RANDOM = random_problems(2000)
REAL = real_problems()
FEW = CORNERS[::3]
MACHINE = machine.cpu()


def able(p: ConvProblem) -> list[Primitive]:
    return [primitive for primitive in primitives() if primitive.refusal(p, MACHINE) is None]
