"""Every primitive of the registry against float64, over problems of odd and of real shapes.

Nothing here names a primitive: one that is added is tested by being registered.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from conv_data import Data, activate, activation_of, error, run, to
from outliers import OUTLIERS, with_outliers
from problems import CORNERS, FEW, MACHINE, RANDOM, REAL, able, spread

from convselect.primitive import ACTIVATIONS, IDENTITY, Activation, primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

# Sums of small integers are exact in float32, whatever the order, where nothing but sums and products is done.
EXACT_FAMILIES = {"direct", "pointwise", "im2row", "im2col", "kn2row", "kn2col", "depthwise", "grouped", "mec"}
EXACT_ACTIVATIONS = {"identity", "relu", "clamp", "leaky_relu"}

# How many of the corners and the random problems a primitive of the family must accept, so that none passes by
# refusing.
LEAST_ACCEPTED = {
    "direct": 1000,
    "im2row": 2000,
    "im2col": 2000,
    "pointwise": 150,
    "kn2row": 800,
    "kn2col": 800,
    "onednn": 2000,
    "aten": 2000,
    "depthwise": 150,
    "winograd": 15,
    "mec": 1000,
}
LEAST_ACCEPTED_DEFAULT = 15


def test_the_real_shapes_are_there() -> None:
    assert len(REAL) > 1500


class Case(NamedTuple):
    """What a problem is computed with. With `wider`, dst is a part of a tensor with so many more channels."""

    integers: bool = False
    bias: bool = False
    residual: bool = False
    activation: Activation = IDENTITY
    wider: int = 0


def drawn(p: ConvProblem) -> Case:
    """By chance, but always the same for `p`. A residual lies in the layout of dst, so dst is dense beside one."""
    draw = random.Random(str(p))
    bias, residual = draw.random() < 0.7, draw.random() < 0.4
    wider = 0 if residual else draw.choice((0, 1, 3, 8))
    if draw.random() < 0.3:
        return Case(True, bias, residual, draw.choice((IDENTITY, Activation("relu"))), wider)
    return Case(False, bias, residual, activation_of(draw.choice(ACTIVATIONS)), wider)


def check(p: ConvProblem, case: Case) -> None:
    """Every primitive against float64; exactly, where integers are summed in any order."""
    data = Data(p, case.integers)
    bias, residual = data.bias if case.bias else None, data.residual if case.residual else None
    want = data.conv
    if bias is not None:
        want = want + bias.double()[:, None, None]
    if residual is not None:
        want = want + residual
    want = activate(want, case.activation)
    slack = 0.0 if case.activation.kind in EXACT_ACTIVATIONS else 5e-7
    for primitive in able(p):
        exact = primitive.family in EXACT_FAMILIES
        if case.integers and not exact:
            continue
        got = run(primitive, p, data.src, data.weight, bias, residual, case.activation, case.wider)
        if case.integers:
            assert torch.equal(got.double(), want), primitive.name
        else:
            assert error(got, want) <= primitive.error_bound + slack, primitive.name


@pytest.mark.parametrize("p", CORNERS, ids=str)
def test_corners(p: ConvProblem) -> None:
    check(p, Case())
    check(p, Case(integers=True, bias=True, residual=True))
    check(p, Case(bias=True, residual=True, activation=Activation("relu")))
    check(p, Case(bias=True, wider=1 + p.ih % 8))


def mostly_slow(problems: list[ConvProblem], by_default: list[ConvProblem]) -> list[object]:
    taken = set(by_default)
    return [*by_default, *(pytest.param(p, marks=pytest.mark.slow) for p in problems if p not in taken)]


@pytest.mark.parametrize("p", mostly_slow(RANDOM, RANDOM[:300]) + mostly_slow(REAL, spread(REAL, 300)), ids=str)
def test_every_primitive_agrees_with_float64(p: ConvProblem) -> None:
    check(p, drawn(p))


def test_what_is_drawn_covers_everything() -> None:
    cases = [drawn(p) for p in RANDOM[:300] + spread(REAL, 300)]
    assert {case.activation.kind for case in cases} == set(ACTIVATIONS)
    assert {case[:3] for case in cases} == set(itertools.product((False, True), repeat=3))
    assert {case.wider for case in cases} == {0, 1, 3, 8}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    activation = activation_of(kind)
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


# Some windows of each see the outliers and some do not; every family has one that it takes.
_MAP = ConvProblem(mb=2, g=1, ic=8, ih=17, iw=18, oc=12, kh=3, kw=3, ph=1, pw=1)
MAPS = [
    _MAP,
    replace(_MAP, sh=2, sw=2, dh=2, dw=2),
    replace(_MAP, kh=1, kw=1, ph=0, pw=0),
    replace(_MAP, kh=5, kw=5, ph=2),
    replace(_MAP, kh=1, kw=7, ph=0, pw=3),
    replace(_MAP, kh=3, kw=1, pw=0),
    replace(_MAP, kh=9, kw=9, ph=4, pw=4),
    replace(_MAP, g=8, oc=8),
    replace(_MAP, g=4),
    replace(_MAP, g=2, kh=1, kw=1, ph=0, pw=0),
]


@pytest.mark.parametrize("p", MAPS, ids=str)
@pytest.mark.parametrize("value", OUTLIERS)
def test_strict_feels_outliers_only_where_the_kernel_reaches(p: ConvProblem, value: str) -> None:
    data = Data(p)
    src, free = with_outliers(p, data, OUTLIERS[value])
    assert free.any()
    assert not free.all()
    for primitive in able(p):
        if primitive.accuracy == "strict":
            got = run(primitive, p, src, data.weight)
            assert error(got[free], data.conv[free]) <= primitive.error_bound, primitive.name


def test_every_strict_family_meets_outliers() -> None:
    strict = {primitive.family for primitive in primitives() if primitive.accuracy == "strict"}
    assert strict == {q.family for p in MAPS for q in able(p) if q.accuracy == "strict"}
    assert not strict & {"winograd", "fft"}


@pytest.mark.parametrize("p", FEW[::2], ids=str)
def test_another_batch_than_planned(p: ConvProblem) -> None:
    data = Data(p.with_batch(3))
    for primitive in able(p):
        packed = primitive.prepack(p, data.weight)
        got = primitive.run(p, IDENTITY, to(data.src, primitive.src_layout), packed, data.bias, None)
        assert error(got, data.conv + data.bias.double()[:, None, None]) <= primitive.error_bound, primitive.name


# One that each kernel can take.
PLAIN = [
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
DENORMAL_OPERAND = 1 << 1
"""Of MXCSR, an x86-64 processor's register: an operand of some instruction was subnormal since the bit was cleared."""


def reads_subnormals(call: Callable[[], object]) -> bool:
    """Whether this thread computed with subnormal numbers, which takes some processors a hundred times longer."""
    libm, environment = ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()  # x87's 28 bytes, then MXCSR
    libm.fegetenv(environment)
    environment[7] &= ~DENORMAL_OPERAND
    libm.fesetenv(environment)
    call()
    libm.fegetenv(environment)
    return bool(environment[7] & DENORMAL_OPERAND)


@pytest.mark.parametrize("p", PLAIN, ids=str)
def test_no_packed_weight_is_subnormal(p: ConvProblem) -> None:
    """Whether a weight was, or a transform of normal ones makes it so."""
    data = Data(p)
    least = torch.finfo(torch.float32).tiny
    for primitive in able(p):
        for scale in (SUBNORMAL, least) if isinstance(primitive, KernelPrimitive) else ():
            packed = primitive.prepack(p, data.weight * scale)
            assert not ((packed != 0) & (packed.abs() < least)).any(), primitive.name


@pytest.mark.skipif(
    (platform.machine(), platform.libc_ver()[0]) != ("x86_64", "glibc"), reason="reads a register of x86-64 by glibc"
)
@pytest.mark.parametrize("p", PLAIN, ids=str)
def test_no_kernel_computes_with_subnormal_numbers(p: ConvProblem, set_threads: Callable[[int], None]) -> None:
    """Of the weights, nor of memory that it has not written to yet."""
    set_threads(1)
    data, ones = Data(p), torch.ones(8)
    assert reads_subnormals(lambda: ones * SUBNORMAL * ones), "it can be told"
    for primitive in able(p):
        if isinstance(primitive, KernelPrimitive):
            src = to(data.src, primitive.src_layout)
            for scale in (1.0, SUBNORMAL):
                packed = primitive.prepack(p, data.weight * scale)
                call = primitive.prepared(p, IDENTITY, src, packed, torch.zeros(p.oc))
                dst, workspace = call.args[:2]
                for memory in (dst, workspace):
                    memory.fill_(0.0 if MACHINE.isa == "avx512" else SUBNORMAL)  # where this was not tried yet
                assert not reads_subnormals(call), f"{primitive.name}, weights times {scale}"


def test_each_kernel_takes_a_plain_problem() -> None:
    kernels = {primitive for primitive in primitives() if isinstance(primitive, KernelPrimitive)}
    assert kernels == {primitive for p in PLAIN for primitive in able(p)} & kernels


def test_each_primitive_accepts_enough() -> None:
    problems = CORNERS + RANDOM
    for primitive in primitives():
        reasons = [primitive.refusal(p, MACHINE) for p in problems]
        least = LEAST_ACCEPTED.get(primitive.family, LEAST_ACCEPTED_DEFAULT)
        if primitive.family == "onednn" and not torch.backends.mkldnn.is_available():
            least = 0
        assert reasons.count(None) >= least, primitive.name
        assert all(reason is None or len(reason.split()) > 2 for reason in reasons), f"{primitive.name}: not a sentence"
        assert reasons == [primitive.refusal(p, MACHINE) for p in problems], f"{primitive.name}: refusal is not pure"
