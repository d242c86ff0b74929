"""What is particular to Winograd: the algebra, the growth of the error with the channels, tiles over the edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.primitive import IDENTITY, get
from convselect.problem import ConvProblem

F2 = ("winograd_f2x2_3x3_nhwc", "winograd_f2x2_3x3_staged_nhwc")
F4 = ("winograd_f4x4_3x3_nhwc", "winograd_f4x4_3x3_staged_nhwc")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem_of(src: torch.Tensor, weight: torch.Tensor, padding: int) -> ConvProblem:
    mb, ic, ih, iw = src.shape
    return ConvProblem(mb, 1, ic, ih, iw, weight.shape[0], 3, 3, ph=padding, pw=padding)


def run(name: str, src: torch.Tensor, weight: torch.Tensor, padding: int = 0) -> torch.Tensor:
    p = problem_of(src, weight, padding)
    primitive = get(name)
    packed = primitive.prepack(p, weight)
    return primitive.run(p, IDENTITY, src.contiguous(memory_format=torch.channels_last), packed, None, None)


def rel_l2(got: torch.Tensor, src: torch.Tensor, weight: torch.Tensor, padding: int = 0) -> float:
    expected = F.conv2d(src.double(), weight.double(), padding=padding)
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "tile"), [*((name, 4) for name in F2), *((name, 6) for name in F4)])
def test_cook_toom_identity(name: str, tile: int) -> None:
    """Every unit input with every unit filter: the sum over xi of A^T[y, xi] G[xi, k] B^T[xi, x] is 1 where x = y + k
    and 0 elsewhere, in both dimensions."""
    src = torch.eye(tile * tile).reshape(tile * tile, 1, tile, tile)
    weight = torch.eye(9).reshape(9, 1, 3, 3)
    torch.testing.assert_close(run(name, src, weight), F.conv2d(src, weight), rtol=0, atol=5e-6)


@pytest.mark.parametrize("channels", [64, 512])
@pytest.mark.parametrize("name", F2 + F4)
def test_error_by_channels(name: str, channels: int) -> None:
    """Measured 2.6e-7 / 6.7e-7 for F(2x2), 7.4e-7 / 2.0e-6 for F(4x4) at 64 / 512 channels."""
    src = randn(1, channels, 12, 12)
    weight = randn(64, channels, 3, 3, seed=1) * (2 / (9 * channels)) ** 0.5
    bound = {64: 5e-7, 512: 1.2e-6}[channels] if name in F2 else {64: 1.2e-6, 512: 3e-6}[channels]
    assert rel_l2(run(name, src, weight, 1), src, weight, 1) < bound


@pytest.mark.parametrize("name", F2 + F4)
def test_maps_of_every_size(name: str) -> None:
    """Each remainder of the tile in each direction, maps smaller than one, and padding wider than the filter."""
    weight = randn(20, 18, 3, 3, seed=1) * (2 / (9 * 18)) ** 0.5
    for ih in range(1, 10):
        for iw in (1, 2, 5, 8, 11):
            for padding in (0, 1, 3):
                if min(ih, iw) + 2 * padding >= 3:
                    src = randn(2, 18, ih, iw, seed=ih * 100 + iw)
                    assert rel_l2(run(name, src, weight, padding), src, weight, padding) < 5e-6, (ih, iw, padding)


@pytest.mark.parametrize("name", F2 + F4)
def test_threads_do_not_change_the_result(name: str, set_threads: Callable[[int], None]) -> None:
    src, weight = randn(1, 33, 30, 29), randn(70, 33, 3, 3, seed=1)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(run(name, src, weight, 1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", F2 + F4)
def test_non_finite_reaches_every_dependent_output(name: str, bad: float) -> None:
    weight = randn(5, 3, 3, 3, seed=1)
    for at in range(0, 81, 4):
        src = randn(1, 3, 9, 9)
        src.view(3, 81)[1, at] = bad
        dependent = ~F.conv2d(src, weight, padding=1).isfinite()
        assert dependent.any()
        assert not run(name, src, weight, 1)[dependent].isfinite().any()


def test_subnormal_weights_are_flushed() -> None:
    weight = torch.full((16, 16, 3, 3), 1e-41)
    for name in F2 + F4:
        packed = get(name).prepack(problem_of(torch.zeros(1, 16, 8, 8), weight, 1), weight)
        assert not packed.any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kh": 5}, "only 3x3 kernels are supported (kh=5, kw=3)"),
        ({"sh": 2}, "only stride 1 is supported (sh=2, sw=1)"),
        ({"dw": 2}, "dilation is not supported (dh=1, dw=2)"),
        ({"g": 4}, "groups are not supported (g=4)"),
    ],
)
def test_refusals(change: dict[str, int], reason: str) -> None:
    p = replace(ConvProblem(1, 1, 8, 14, 14, 8, 3, 3, ph=1, pw=1), **change)
    for name in F2 + F4:
        assert get(name).refusal(p, None) == reason
