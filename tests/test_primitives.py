"""Every primitive of the registry against float64, over problems of odd and of real shapes.

Nothing here names a primitive: one that is added is tested by being registered.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conv_data import Data, activate, error, run, to
from problems import CORNERS, FEW, MACHINE, RANDOM, REAL, SAMPLE, SHAPES, able, some
from torch.nn import functional as F

from convselect.primitive import ACTIVATIONS, IDENTITY, Activation, primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

# Sums of small integers are exact in float32, whatever the order, where nothing but sums and products is done.
EXACT_FAMILIES = {"direct", "pointwise", "im2row", "im2col", "kn2row", "kn2col", "depthwise", "grouped", "mec"}

# How many of the corners and the random problems a primitive of the family must accept, so that none passes by
# refusing.
LEAST_ACCEPTED = {"direct": 1000, "im2row": 2000, "im2col": 2000, "pointwise": 150, "kn2row": 800, "kn2col": 800,
                  "onednn": 2000, "aten": 2000, "depthwise": 150, "winograd": 15, "mec": 1000}  # fmt: skip
LEAST_ACCEPTED_DEFAULT = 15


@pytest.mark.skipif(not SHAPES.exists(), reason=f"{SHAPES} is absent")
def test_the_real_shapes_are_there() -> None:
    assert len(REAL) > 300


@pytest.mark.parametrize("p", some(CORNERS) + some(RANDOM) + some(REAL), ids=str)
def test_every_primitive_agrees_with_float64(p: ConvProblem) -> None:
    data = Data(p)
    for primitive in able(p):
        got = run(primitive, p, data.src, data.weight)
        assert error(got, data.conv) <= primitive.error_bound, primitive.name


@pytest.mark.parametrize("p", some(CORNERS) + some(RANDOM[::5]) + some(REAL), ids=str)
def test_with_an_epilogue(p: ConvProblem) -> None:
    data = Data(p)
    want = F.relu(data.sum)
    for primitive in able(p):
        got = run(primitive, p, data.src, data.weight, data.bias, data.residual, Activation("relu"))
        assert error(got, want) <= primitive.error_bound, primitive.name


@pytest.mark.parametrize("p", some(CORNERS) + some(RANDOM[1::5]), ids=str)
def test_integers_are_exact(p: ConvProblem) -> None:
    data = Data(p, integers=True)
    for primitive in able(p):
        if primitive.family in EXACT_FAMILIES:
            got = run(primitive, p, data.src, data.weight, data.bias, data.residual)
            assert torch.equal(got.double(), data.sum), primitive.name


@pytest.mark.parametrize("p", some(CORNERS) + some(RANDOM[2::20]), ids=str)
def test_dst_in_a_wider_tensor(p: ConvProblem) -> None:
    data = Data(p)
    want = data.conv + data.bias.double()[:, None, None]
    for primitive in able(p):
        got = run(primitive, p, data.src, data.weight, data.bias, wider=1 + p.ih % 8)
        assert error(got, want) <= primitive.error_bound, primitive.name


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    activation = Activation(kind, *{"clamp": (-0.5, 1.5), "leaky_relu": (0.1, 0.0)}.get(kind, (0.0, 0.0)))
    for p in FEW:
        data = Data(p)
        for primitive in able(p):
            got = run(primitive, p, data.src, data.weight, data.bias, None, activation)
            want = activate(data.conv + data.bias.double()[:, None, None], activation)
            assert error(got, want) <= primitive.error_bound + 5e-7, f"{primitive.name} on {p}"
            got = run(primitive, p, data.src, data.weight, None, data.residual, activation)
            want = activate(data.conv + data.residual, activation)
            assert error(got, want) <= primitive.error_bound + 5e-7, f"{primitive.name} on {p} with a residual"


@pytest.mark.parametrize("p", FEW, ids=str)
def test_threads_change_rounding_at_most(p: ConvProblem, set_threads) -> None:
    data = Data(p)
    for primitive in able(p):
        results = {}
        for threads in (1, 2):
            set_threads(threads)
            first, *others = (run(primitive, p, data.src, data.weight, data.bias) for _ in range(2 * threads))
            assert all(torch.equal(first, other) for other in others), (
                f"{primitive.name} is not reproducible on {threads} threads"
            )
            results[threads] = first
        assert error(results[2], results[1].double()) <= primitive.error_bound, primitive.name


@pytest.mark.parametrize("p", FEW, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_in_non_finite_out(p: ConvProblem, value: float) -> None:
    data = Data(p)
    src = data.src.clone()
    src[-1, p.ic // 2, p.ih // 2, p.iw // 2] = value
    reached = ~data.convolve(p, src).isfinite()
    for primitive in able(p):
        got = run(primitive, p, src, data.weight, data.bias)
        assert not got[reached].isfinite().any(), primitive.name
        if primitive.family in EXACT_FAMILIES:
            assert got[~reached].isfinite().all(), f"{primitive.name} spreads {value}"


@pytest.mark.parametrize("p", FEW[::2], ids=str)
def test_another_batch_than_planned(p: ConvProblem) -> None:
    data = Data(p.with_batch(3))
    for primitive in able(p):
        packed = primitive.prepack(p, data.weight)
        got = primitive.run(p, IDENTITY, to(data.src, primitive.src_layout), packed, data.bias, None)
        assert error(got, data.conv + data.bias.double()[:, None, None]) <= primitive.error_bound, primitive.name


# One that each kernel can take; about 1 MMAC, so that a run is long enough to be timed and short enough to repeat.
TIMED = [
    ConvProblem(ic=32, ih=12, iw=12, oc=32, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(ic=32, ih=28, iw=28, oc=32, kh=1, kw=1),
    ConvProblem(g=64, ic=64, ih=28, iw=28, oc=64, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(ic=16, ih=20, iw=20, oc=16, kh=1, kw=7, pw=3),
    ConvProblem(ic=16, ih=20, iw=20, oc=16, kh=7, kw=1, ph=3),
    ConvProblem(ic=16, ih=20, iw=20, oc=16, kh=1, kw=3, pw=1),
    ConvProblem(ic=16, ih=20, iw=20, oc=16, kh=3, kw=1, ph=1),
    ConvProblem(ic=16, ih=20, iw=20, oc=16, kh=5, kw=5, ph=2, pw=2),
    ConvProblem(ic=16, ih=14, iw=14, oc=16, kh=7, kw=7, ph=3, pw=3),
]
SUBNORMAL = 1e-40


def slowdown(call: Callable[[], object], other: Callable[[], object]) -> float:
    """Of `other` against `call`, by the fastest of 20 runs each in turn."""
    calls, fastest = (call, other), [float("inf")] * 2
    for i in (0, 1) * 20:
        begin = time.perf_counter()
        calls[i]()
        fastest[i] = min(fastest[i], time.perf_counter() - begin)
    return fastest[1] / fastest[0]


@pytest.mark.parametrize("p", TIMED, ids=str)
def test_subnormal_weights_cost_no_time(p: ConvProblem) -> None:
    """A factor of 1.5 in the fastest of many runs; where it is missed, the comparison is made again, up to five times.

    Not every processor is slow on subnormal numbers, so the packed weights are looked at too: none may be subnormal,
    whether a weight was or a transform of normal ones makes it so.
    """
    data = Data(p)
    least = torch.finfo(torch.float32).tiny
    for primitive in able(p):
        if not isinstance(primitive, KernelPrimitive):
            continue
        src = to(data.src, primitive.src_layout)
        for scale in (SUBNORMAL, least):
            packed = primitive.prepack(p, data.weight * scale)
            assert not ((packed != 0) & (packed.abs() < least)).any(), primitive.name
        both = [primitive.prepack(p, weight) for weight in (data.weight, data.weight * SUBNORMAL)]
        calls = [partial(primitive.run, p, IDENTITY, src, packed, None, None) for packed in both]
        assert any(slowdown(*calls) < 1.5 for _ in range(5)), primitive.name


def test_each_kernel_is_timed() -> None:
    kernels = {primitive for primitive in primitives() if isinstance(primitive, KernelPrimitive)}
    assert kernels == {primitive for p in TIMED for primitive in able(p)} & kernels


@pytest.mark.skipif(bool(SAMPLE), reason="counted over all problems")
def test_each_primitive_accepts_enough() -> None:
    problems = CORNERS + RANDOM
    for primitive in primitives():
        reasons = [primitive.refusal(p, MACHINE) for p in problems]
        least = LEAST_ACCEPTED.get(primitive.family, LEAST_ACCEPTED_DEFAULT)
        if primitive.family == "onednn" and not torch.backends.mkldnn.is_available():
            least = 0
        assert reasons.count(None) >= least, primitive.name
        assert all(reason is None or len(reason.split()) > 2 for reason in reasons), f"{primitive.name}: not a sentence"
        assert reasons == [primitive.refusal(p, MACHINE) for p in CORNERS + RANDOM], (
            f"{primitive.name}: refusal is not pure"
        )


@pytest.mark.skipif(bool(SAMPLE), reason="is itself a reduced run")
@pytest.mark.skipif(MACHINE.isa in ("portable", "neon"), reason="there is only one build")
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_the_other_builds(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__,
         "-k", "float64 or epilogue or exact or activations or wider"],
        env={**os.environ, "CONVSELECT_ISA": isa, "CONVSELECT_TEST_SAMPLE": "25"}, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
