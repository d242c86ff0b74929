"""What is particular to Winograd: the algebra, the growth of the error with the channels, tiles over the edge."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.machine import cpu
from convselect.primitive import IDENTITY, get, primitives
from convselect.problem import ConvProblem

NAMES = [primitive.name for primitive in primitives() if primitive.family == "winograd"]
FAMILY = re.compile(r"winograd_f(\d+)(?:x(\d+))?_(\d+)x(\d+)")

ERRORS = {
    "f2x2_3x3": (2.6e-7, 6.9e-7),
    "f2x4_3x3": (4.5e-7, 1.2e-6),
    "f4x4_3x3": (7.5e-7, 2.0e-6),
    "f6x6_3x3": (3.2e-6, 8.3e-6),
    "f2x2_5x5": (9.0e-7, 2.4e-6),
    "f4x4_5x5": (3.1e-6, 8.0e-6),
    "f2x2_7x7": (4.0e-6, 1.0e-5),
    "f4_1x3": (3.4e-7, 9.1e-7),
    "f4_3x1": (3.4e-7, 9.1e-7),
    "f4_1x7": (1.7e-6, 4.4e-6),
    "f4_7x1": (1.7e-6, 4.4e-6),
    "f6_1x7": (4.1e-6, 1.1e-5),
    "f6_7x1": (4.1e-6, 1.1e-5),
}
"""Tile and filter -> measured rel-L2 error at 64 and at 512 channels."""


def shape(name: str) -> tuple[int, int, int, int]:
    """Rows and columns of the tile, kh and kw."""
    match = FAMILY.match(name)
    assert match
    m, n, kh, kw = (int(group) if group else 0 for group in match.groups())
    return (m, n, kh, kw) if n else (m if kh > 1 else 1, m if kw > 1 else 1, kh, kw)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def he(oc: int, ic: int, kh: int, kw: int) -> torch.Tensor:
    return randn(oc, ic, kh, kw, seed=1) * (2 / (ic * kh * kw)) ** 0.5


def same(name: str) -> tuple[int, int]:
    """The padding that keeps the size."""
    _, _, kh, kw = shape(name)
    return kh // 2, kw // 2


def problem_of(src: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> ConvProblem:
    (mb, ic, ih, iw), (oc, _, kh, kw), (ph, pw) = src.shape, weight.shape, padding
    return ConvProblem(mb=mb, ic=ic, ih=ih, iw=iw, oc=oc, kh=kh, kw=kw, ph=ph, pw=pw)


def run(name: str, src: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int] = (0, 0)) -> torch.Tensor:
    p = problem_of(src, weight, padding)
    primitive = get(name)
    packed = primitive.prepack(p, weight)
    return primitive.run(p, IDENTITY, src.contiguous(memory_format=torch.channels_last), packed, None, None)


def rel_l2(got: torch.Tensor, src: torch.Tensor, weight: torch.Tensor, padding: tuple[int, int]) -> float:
    expected = F.conv2d(src.double(), weight.double(), padding=padding)
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NAMES)
def test_cook_toom_identity(name: str) -> None:
    """Every unit input with every unit filter: the sum over xi of A^T[y, xi] G[xi, k] B^T[xi, x] is 1 where x = y + k
    and 0 elsewhere, in both dimensions."""
    m, n, kh, kw = shape(name)
    ih, iw = m + kh - 1, n + kw - 1
    src = torch.eye(ih * iw).reshape(ih * iw, 1, ih, iw)
    weight = torch.eye(kh * kw).reshape(kh * kw, 1, kh, kw)
    bound = 10 * get(name).error_bound
    torch.testing.assert_close(run(name, src, weight), F.conv2d(src, weight), rtol=0, atol=bound)


@pytest.mark.parametrize("channels", [64, 512])
@pytest.mark.parametrize("name", NAMES)
def test_error_by_channels(name: str, channels: int) -> None:
    """That it is what was measured holds the choice of the points."""
    _, _, kh, kw = shape(name)
    src, weight = randn(1, channels, 13, 14), he(64, channels, kh, kw)
    tile = next(tile for tile in ERRORS if tile in name)
    assert rel_l2(run(name, src, weight, same(name)), src, weight, same(name)) < 1.15 * ERRORS[tile][channels == 512]


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_every_size(name: str) -> None:
    """Each remainder of the tile in each direction, maps smaller than one, and padding wider than the filter."""
    _, _, kh, kw = shape(name)
    weight = he(20, 18, kh, kw)
    for ih in range(1, 10):
        for iw in (1, 2, 5, 8, 11):
            for padding in ((0, 0), same(name), (kh // 2 * 3, kw // 2 * 3)):
                if ih + 2 * padding[0] >= kh and iw + 2 * padding[1] >= kw:
                    src = randn(2, 18, ih, iw, seed=ih * 100 + iw)
                    got = run(name, src, weight, padding)
                    assert rel_l2(got, src, weight, padding) < get(name).error_bound, (ih, iw, padding)


@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_the_result(name: str, set_threads: Callable[[int], None]) -> None:
    _, _, kh, kw = shape(name)
    src, weight = randn(1, 33, 30, 29), he(70, 33, kh, kw)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(run(name, src, weight, same(name)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_non_finite_reaches_every_dependent_output(name: str, bad: float) -> None:
    _, _, kh, kw = shape(name)
    weight = he(5, 3, kh, kw)
    for at in range(0, 81, 4):
        src = randn(1, 3, 9, 9)
        src.view(3, 81)[1, at] = bad
        dependent = ~F.conv2d(src, weight, padding=same(name)).isfinite()
        assert dependent.any()
        assert not run(name, src, weight, same(name))[dependent].isfinite().any()


@pytest.mark.parametrize("name", NAMES)
def test_subnormal_weights_are_flushed(name: str) -> None:
    _, _, kh, kw = shape(name)
    weight = torch.full((16, 16, kh, kw), 1e-41)
    packed = get(name).prepack(problem_of(torch.zeros(1, 16, 8, 8), weight, same(name)), weight)
    assert not packed.any()


def test_the_lean_schedule_packs_no_more_than_the_weights() -> None:
    p = ConvProblem(ic=512, ih=7, iw=7, oc=512, kh=3, kw=3, ph=1, pw=1)
    assert get("winograd_f4x4_3x3_lean_nhwc").packed_bytes(p, cpu()) == p.weight_bytes
    assert get("winograd_f4x4_3x3_nhwc").packed_bytes(p, cpu()) == 4 * p.weight_bytes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kh": 9}, "only {} kernels are supported (kh=9, kw={})"),
        ({"sh": 2}, "only stride 1 is supported (sh=2, sw=1)"),
        ({"dw": 2}, "dilation is not supported (dh=1, dw=2)"),
        ({"g": 4}, "groups are not supported (g=4)"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_refusals(name: str, change: dict[str, int], reason: str) -> None:
    _, _, kh, kw = shape(name)
    p = replace(ConvProblem(ic=8, ih=18, iw=18, oc=8, kh=kh, kw=kw, ph=1, pw=1), **change)
    assert get(name).refusal(p, None) == reason.format(f"{kh}x{kw}", kw)
