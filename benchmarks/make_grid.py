"""Writes convselect/data/grid.txt: the problems that `convselect profile` times, one a line, in their grammar.

First the networks' own convolutions at batch 1, then a few at batch 2 and 8 and at other image sizes, then the paper's
grid: (ic, oc, ih) triplets of the networks x kernel sizes x strides, thinned. Each part is shuffled with a fixed seed,
so that any prefix is a useful sample. Needs torchvision: python benchmarks/make_grid.py
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from convselect.bench.networks import convolutions
from convselect.problem import ConvProblem

NETWORKS = {
    "alexnet": (224,),
    "vgg11": (224,),
    "vgg16": (224,),
    "googlenet": (224,),
    "inception_v3": (299,),
    "resnet18": (224, 160, 288),
    "resnet50": (224, 160, 256),
    "squeezenet1_1": (224, 128),
    "mobilenet_v2": (224, 160, 192),
    "mobilenet_v3_large": (224,),
    "efficientnet_b0": (224, 256),
    "densenet121": (224,),
    "shufflenet_v2_x1_0": (224,),
    "resnext50_32x4d": (224,),
    "regnet_y_400mf": (224,),
}
"""torchvision's name -> image sizes, the network's own first."""

BATCHES = {2: 90, 8: 90}
OTHER_SIZES = 220
GRID = 1100
DEPTHWISE = 150
"""How many problems of each further part."""
FLOPS_LIMIT = 8e9
"""Of the further parts: the largest would take most of the time and teach least."""
KERNELS = ((1, 1), (1, 2), (3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2))
"""(kernel, stride) of the grid."""


def unique(problems: Iterable[ConvProblem]) -> list[ConvProblem]:
    return list(dict.fromkeys(problems))


def sample(rng: random.Random, problems: list[ConvProblem], count: int, seen: set[ConvProblem]) -> list[ConvProblem]:
    """Up to `count` of those not seen and not too large, shuffled; marks them as seen."""
    rest = [problem for problem in unique(problems) if problem not in seen and problem.flops <= FLOPS_LIMIT]
    rng.shuffle(rest)
    seen.update(rest[:count])
    return rest[:count]


def grid() -> list[ConvProblem]:
    rng = random.Random(0)
    own = unique(p for name, sizes in NETWORKS.items() for p in convolutions(name, sizes[0]))
    rng.shuffle(own)
    seen = set(own)
    others = unique(p for name, sizes in NETWORKS.items() for size in sizes[1:] for p in convolutions(name, size))
    further = [p for mb, count in BATCHES.items() for p in sample(rng, [q.with_batch(mb) for q in own], count, seen)]
    further += sample(rng, others, OTHER_SIZES, seen)
    rng.shuffle(further)
    triplets = sorted({(p.ic, p.oc, p.ih) for p in own if p.g == 1})
    product = [
        ConvProblem(ic=ic, ih=ih, iw=ih, oc=oc, kh=k, kw=k, sh=s, sw=s, ph=k // 2, pw=k // 2)
        for ic, oc, ih in triplets
        for k, s in KERNELS
        if ih >= k
    ]
    # 3x3 is where the primitives differ most: take it first, then the others alike.
    square = sample(rng, [p for p in product if p.kh == 3], GRID // 2, seen)
    rest = sample(rng, [p for p in product if p.kh != 3], GRID - GRID // 2, seen)
    channels = sorted({(p.ic, p.ih) for p in own if p.is_depthwise})
    depthwise = [
        ConvProblem(g=c, ic=c, ih=ih, iw=ih, oc=c, kh=k, kw=k, sh=s, sw=s, ph=k // 2, pw=k // 2)
        for c, ih in channels
        for k in (3, 5, 7)
        for s in (1, 2)
        if ih >= k
    ]
    paper = square + rest + sample(rng, depthwise, DEPTHWISE, seen)
    rng.shuffle(paper)
    return own + further + paper


def main() -> None:
    out = Path(__file__).resolve().parents[1] / "convselect" / "data" / "grid.txt"
    problems = grid()
    out.parent.mkdir(exist_ok=True)
    out.write_text("".join(f"{problem}\n" for problem in problems))
    gflop = sum(problem.flops for problem in problems) / 1e9
    print(
        f"{out}: {len(problems)} problems, {gflop:.0f} GFLOP in all, largest {max(p.flops for p in problems) / 1e9:.1f}"
    )


if __name__ == "__main__":
    main()
