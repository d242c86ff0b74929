"""What is particular to depthwise convolutions: blocks of pixels that overlap, reach over the edge, or fit nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.layout import Layout
from convselect.primitive import Activation, get
from convselect.problem import ConvProblem

NAMES = ("depthwise_nhwc", "depthwise_nchw")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(mb: int, channels: int, ih: int, iw: int, **rest: int) -> ConvProblem:
    return ConvProblem(mb=mb, g=channels, ic=channels, ih=ih, iw=iw, oc=channels, **rest)


def run(name: str, p: ConvProblem, src: torch.Tensor, weight: torch.Tensor, kind: str = "identity") -> torch.Tensor:
    primitive = get(name)
    order = torch.channels_last if primitive.src_layout == Layout.NHWC else torch.contiguous_format
    packed = primitive.prepack(p, weight)
    return primitive.run(p, Activation(kind), src.contiguous(memory_format=order), packed, None, None)


def check(name: str, p: ConvProblem) -> None:
    src, weight = randn(p.mb, p.ic, p.ih, p.iw), randn(p.oc, 1, p.kh, p.kw, seed=1)
    expected = F.conv2d(src.double(), weight.double(), None, (p.sh, p.sw), (p.ph, p.pw), (p.dh, p.dw), p.g)
    error = (run(name, p, src, weight) - expected).norm() / expected.norm()
    assert error < 1e-6, str(p)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_maps_of_every_width(name: str, kernel: int, stride: int) -> None:
    """The specialised filters: rows shorter than a block, of whole blocks, and with a last block that overlaps."""
    for padding in (0, kernel // 2, kernel):
        for iw in range(max(1, kernel - 2 * padding), 19):
            ih = max(kernel, 20 - iw)
            check(name, problem(1, 21, ih, iw, kh=kernel, kw=kernel, sh=stride, sw=stride, ph=padding, pw=padding))


@pytest.mark.parametrize("name", NAMES)
def test_any_filter(name: str) -> None:
    for kh, kw, sh, sw, ph, pw, dh, dw in (
        (1, 1, 1, 1, 0, 0, 1, 1),
        (2, 2, 2, 2, 0, 0, 1, 1),
        (7, 7, 4, 4, 3, 3, 1, 1),
        (3, 3, 1, 1, 4, 4, 4, 4),
        (3, 3, 2, 1, 1, 2, 1, 2),
        (1, 9, 3, 5, 0, 8, 1, 2),
        (11, 11, 1, 1, 5, 5, 1, 1),
    ):
        check(name, problem(2, 33, 17, 23, kh=kh, kw=kw, sh=sh, sw=sw, ph=ph, pw=pw, dh=dh, dw=dw))


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_exact(name: str) -> None:
    p = problem(1, 40, 15, 15, kh=3, kw=3, ph=1, pw=1)
    src, weight = randn(1, 40, 15, 15).mul(8).round(), randn(40, 1, 3, 3, seed=1).mul(8).round()
    assert torch.equal(run(name, p, src, weight), F.conv2d(src, weight, padding=1, groups=40))


@pytest.mark.parametrize("kind", ["relu", "silu"])
@pytest.mark.parametrize("name", NAMES)
def test_threads_do_not_change_the_result(name: str, kind: str, set_threads: Callable[[int], None]) -> None:
    """With 7x7 maps, whose channels are split over the threads, and activations inside and after the kernel."""
    p = problem(1, 330, 7, 7, kh=5, kw=5, ph=2, pw=2)
    src, weight = randn(1, 330, 7, 7), randn(330, 1, 5, 5, seed=1)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(run(name, p, src, weight, kind))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", NAMES)
def test_refuses_other_groups(name: str) -> None:
    reason = "only one filter a channel is supported (g=4, ic=8, oc=8)"
    assert get(name).refusal(ConvProblem(g=4, ic=8, ih=9, iw=9, oc=8, kh=3, kw=3), None) == reason
    assert get(name).refusal(ConvProblem(g=8, ic=8, ih=9, iw=9, oc=16, kh=3, kw=3), None) is not None


def test_nhwc_refuses_huge_filters() -> None:
    p = problem(1, 8, 20, 20, kh=12, kw=12)
    assert get("depthwise_nhwc").refusal(p, None) == "at most 121 filter taps are supported (kh=12, kw=12)"
    assert get("depthwise_nchw").refusal(p, None) is None
