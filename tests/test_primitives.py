"""Every primitive of the registry against float64, over problems of odd and of real shapes.

Nothing here names a primitive: one that is added is tested by being registered.
"""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect import machine
from convselect.layout import strides
from convselect.primitive import ACTIVATIONS, IDENTITY, Activation, Primitive, primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

SHAPES = Path(__file__).parents[2] / "shared" / "data" / "conv_shapes.csv"
SAMPLE = int(os.environ.get("CONVSELECT_TEST_SAMPLE", "0"))  # run this many problems of each kind; 0: all
MAX_MACS = 1_000_000 if SAMPLE else 8_000_000

# Sums of small integers are exact in float32, whatever the order, where nothing but sums and products is done.
EXACT_FAMILIES = {"direct", "pointwise", "im2row", "im2col", "kn2row", "kn2col", "depthwise"}

# How many of PROBLEMS a primitive of the family must accept, so that none passes by refusing.
LEAST_ACCEPTED = {"direct": 90, "im2row": 150, "im2col": 150, "pointwise": 15, "kn2row": 40, "kn2col": 40,
                  "onednn": 150, "aten": 150, "depthwise": 8, "winograd": 8}  # fmt: skip
LEAST_ACCEPTED_DEFAULT = 5


def corner_problems() -> list[ConvProblem]:
    """Each a corner that some kernel could get wrong."""
    square = ConvProblem(1, 1, 17, 13, 13, 33, 3, 3, 1, 1, 1, 1)
    one = ConvProblem(1, 1, 24, 9, 11, 100, 1, 1)
    wide = ConvProblem(2, 1, 3, 19, 23, 16, 7, 7, 2, 2, 3, 3)
    depthwise = ConvProblem(1, 24, 24, 14, 15, 24, 3, 3, 1, 1, 1, 1)
    return [
        square, replace(square, mb=7), replace(square, ph=0, pw=0), replace(square, ph=3, pw=3),
        replace(square, sh=2, sw=2), replace(square, sh=3, sw=1), replace(square, dh=2, dw=2, ph=2, pw=2),
        replace(square, dh=1, dw=3), replace(square, ih=1, iw=1), replace(square, ih=1, iw=29),
        replace(square, ic=64, oc=64, ih=14, iw=14), replace(square, ic=16, oc=16, ih=8, iw=8),
        replace(square, ic=128, oc=48, ih=7, iw=7), replace(square, ic=1, oc=1), replace(square, ic=64, oc=5, ih=28),
        replace(square, ic=32, oc=96, ih=6, iw=10, mb=2), replace(square, kh=5, kw=5, ph=2, pw=2),
        replace(square, kh=1, kw=7, ph=0, pw=3), replace(square, kh=7, kw=1, ph=3, pw=0),
        replace(square, kh=2, kw=2, ph=1, pw=1), replace(square, ic=512, oc=32, ih=5, iw=5),
        replace(square, ih=13, iw=13, kh=13, kw=13, ph=0, pw=0),
        one, replace(one, mb=2, sh=2, sw=2), replace(one, ih=1, iw=1), replace(one, ic=1, oc=1),
        replace(one, ic=1100, oc=17, ih=7, iw=7), replace(one, ic=3, oc=130, ih=30), replace(one, ph=1, pw=1),
        replace(one, mb=2, ih=1, iw=1, sw=2, pw=1),
        replace(one, g=2, ic=48), replace(one, ih=49, iw=1), replace(one, mb=7, ic=64, oc=16, ih=14, iw=14),
        wide, replace(wide, ic=4, oc=64), replace(wide, kh=11, kw=11, sh=4, sw=4, ph=2, pw=2, ih=40, iw=41),
        replace(wide, kh=3, kw=3, ph=1, pw=1), replace(wide, ic=1),
        depthwise, replace(depthwise, sh=2, sw=2), replace(depthwise, kh=5, kw=5, ph=2, pw=2),
        replace(depthwise, g=3, ic=3, oc=3), replace(depthwise, mb=2, dh=2, dw=2, ph=2, pw=2),
        replace(depthwise, ih=1, iw=1), replace(depthwise, g=100, ic=100, oc=100, ih=7, iw=7, sh=2, sw=1),
        replace(depthwise, oc=48), replace(depthwise, g=8, ic=24, oc=40), replace(depthwise, g=2, ic=34, oc=66),
        replace(depthwise, g=16, ic=16, oc=16, ih=30, iw=40), replace(depthwise, kh=7, kw=7, ph=3, pw=3),
    ]  # fmt: skip


def filter_problems() -> list[ConvProblem]:
    """Stride 1 and a filter that only few kernels take."""
    problems = []
    for kh, kw in ((5, 5), (7, 7), (1, 3), (3, 1), (1, 7), (7, 1)):
        base = ConvProblem(1, 1, 17, 13, 14, 33, kh, kw, 1, 1, kh // 2, kw // 2)
        problems += [
            base, replace(base, ph=0, pw=0), replace(base, ph=kh, pw=kw), replace(base, mb=3, ih=7, iw=8),
            replace(base, ih=17, iw=17, ic=40, oc=48), replace(base, ih=1, iw=1), replace(base, ic=1, oc=70, iw=31),
            replace(base, ic=130, oc=16, ih=5, iw=4), replace(base, ih=12, iw=9, oc=1),
        ]  # fmt: skip
    return problems


def random_problems(count: int) -> list[ConvProblem]:
    draw, found = random.Random(0), []
    while len(found) < count:
        g, kh = draw.choice((1, 1, 1, 1, 2, 3)), draw.choice((1, 1, 2, 3, 3, 5, 7))
        kw = draw.choice((kh, kh, kh, 1, 3))
        try:
            problem = ConvProblem(
                draw.choice((1, 2, 7)), g, g * draw.choice((1, 3, 17, 24, 64)), draw.choice((1, 5, 7, 14, 23, 56)),
                draw.choice((1, 4, 7, 14, 37, 56)), g * draw.choice((1, 5, 16, 33, 100)), kh, kw,
                draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3)), draw.choice((0, kh // 2, kh)),
                draw.choice((0, kw // 2, kw)), draw.choice((1, 1, 2)), draw.choice((1, 1, 2)),
            )  # fmt: skip
        except ValueError:
            continue
        if problem.flops <= 2 * MAX_MACS:
            found.append(problem)
    return found


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
    if not SHAPES.exists():
        return []
    names = [field.name for field in fields(ConvProblem)]
    with SHAPES.open() as file:
        rows = [ConvProblem(**{name: int(row[name]) for name in names}) for row in csv.DictReader(file)]
    return list(dict.fromkeys(shrunk(p) for p in rows))


def some(problems: list[ConvProblem]) -> list[ConvProblem]:
    return problems[:: max(1, len(problems) // SAMPLE)] if SAMPLE else problems


ODD = corner_problems() + filter_problems() + random_problems(120)
REAL = real_problems()
PROBLEMS = some(ODD) + some(REAL)
FEW = corner_problems()[:: 9 if SAMPLE else 3]
MACHINE = machine.cpu()


def able(p: ConvProblem) -> list[Primitive]:
    return [primitive for primitive in primitives() if primitive.refusal(p, MACHINE) is None]


class Data:
    """Inputs of a problem and its convolution in float64: normal with He weights, or small integers."""

    def __init__(self, p: ConvProblem, integers: bool = False, seed: int = 0) -> None:
        random_ = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            if integers:
                return torch.randint(-3, 4, size, generator=random_).float()
            return torch.randn(size, generator=random_)

        k = p.ic // p.g * p.kh * p.kw
        self.src, self.weight = draw(p.mb, p.ic, p.ih, p.iw), draw(p.oc, p.ic // p.g, p.kh, p.kw)
        if not integers:
            self.weight *= (2 / k) ** 0.5
        self.bias, self.residual = draw(p.oc), draw(p.mb, p.oc, p.oh, p.ow)
        self.conv = self.convolve(p, self.src)

    def convolve(self, p: ConvProblem, src: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(src.double(), self.weight.double(), None, (p.sh, p.sw), (p.ph, p.pw), (p.dh, p.dw), p.g)

    @property
    def sum(self) -> torch.Tensor:
        return self.conv + self.bias.double()[:, None, None] + self.residual


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    kind, alpha, beta = activation
    return {
        "identity": lambda: x, "relu": lambda: F.relu(x), "clamp": lambda: x.clamp(alpha, beta),
        "leaky_relu": lambda: F.leaky_relu(x, alpha), "silu": lambda: F.silu(x), "sigmoid": lambda: x.sigmoid(),
        "hardswish": lambda: F.hardswish(x), "hardsigmoid": lambda: F.hardsigmoid(x), "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
    }[kind]()  # fmt: skip


def to(x: torch.Tensor, layout: object) -> torch.Tensor:
    """`x` dense in `layout`, with its exact strides."""
    return x.new_empty_strided(x.shape, strides(x.shape, layout)).copy_(x)


class Guarded:
    """A buffer between two guard regions. `pattern`, an int32, fills all of it."""

    GUARD = 1024

    def __init__(self, floats: int, pattern: int) -> None:
        self.pattern = pattern
        self.whole = torch.full((floats + 2 * self.GUARD,), pattern, dtype=torch.int32)
        self.inner = self.whole[self.GUARD : self.GUARD + floats].view(torch.float32)

    def intact(self) -> bool:
        return all(bool((end == self.pattern).all()) for end in (self.whole[: self.GUARD], self.whole[-self.GUARD :]))


QUIET_NAN, GARBAGE = 0x7FC00000, 0xA5A5A5A5 - 2**32


def run(
    primitive: Primitive,
    p: ConvProblem,
    src: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation = IDENTITY,
) -> torch.Tensor:
    """One run; a kernel of our own between guards, on a dst of NaN and a workspace of garbage."""
    src = to(src, primitive.src_layout)
    residual = None if residual is None else to(residual, primitive.dst_layout)
    weight = weight.clone()
    packed = primitive.prepack(p, weight)
    weight.fill_(float("nan"))  # packed must not alias it
    size = (src.shape[0], p.oc, p.oh, p.ow)
    if not isinstance(primitive, KernelPrimitive):
        dst = primitive.run(p, activation, src, packed, bias, residual)
        assert dst.stride() == strides(size, primitive.dst_layout), f"{primitive.name} returned strides {dst.stride()}"
        return dst
    kind, alpha, beta = activation
    buffer = Guarded(size[0] * p.oc * p.oh * p.ow, QUIET_NAN)
    workspace = Guarded(primitive.workspace_bytes(p.with_batch(size[0]), torch.get_num_threads()) // 4, GARBAGE)
    dst = buffer.inner.as_strided(size, strides(size, primitive.dst_layout), buffer.inner.storage_offset())
    torch.ops.convselect.conv_out(
        dst, workspace.inner, src, packed, bias, residual, primitive._kernel, p.geometry, ACTIVATIONS.index(kind),
        alpha, beta,
    )  # fmt: skip
    assert buffer.intact(), f"{primitive.name} wrote outside dst"
    assert workspace.intact(), f"{primitive.name} wrote outside its workspace"
    return dst


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Rel-L2. Values are of order 1: the floor keeps a few outputs that cancel from counting as a large error."""
    return float((got.double() - want).norm() / max(float(want.norm()), 0.5 * want.numel() ** 0.5))


@pytest.mark.skipif(not SHAPES.exists(), reason=f"{SHAPES} is absent")
def test_the_real_shapes_are_there() -> None:
    assert len(REAL) > 300


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_every_primitive_agrees_with_float64(p: ConvProblem) -> None:
    data = Data(p)
    plain, full = data.conv, F.relu(data.sum)
    for primitive in able(p):
        got = run(primitive, p, data.src, data.weight)
        assert error(got, plain) <= primitive.error_bound, primitive.name
        got = run(primitive, p, data.src, data.weight, data.bias, data.residual, Activation("relu"))
        assert error(got, full) <= primitive.error_bound, f"{primitive.name} with its epilogue"


@pytest.mark.parametrize("p", some(ODD), ids=str)
def test_integers_are_exact(p: ConvProblem) -> None:
    data = Data(p, integers=True)
    for primitive in able(p):
        if primitive.family in EXACT_FAMILIES:
            got = run(primitive, p, data.src, data.weight, data.bias, data.residual)
            assert torch.equal(got.double(), data.sum), primitive.name


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
            first, second = (run(primitive, p, data.src, data.weight, data.bias) for _ in range(2))
            assert torch.equal(first, second), f"{primitive.name} is not reproducible on {threads} threads"
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


@pytest.mark.skipif(bool(SAMPLE), reason="counted over all problems")
def test_each_primitive_accepts_enough() -> None:
    for primitive in primitives():
        reasons = [primitive.refusal(p, MACHINE) for p in ODD]
        least = LEAST_ACCEPTED.get(primitive.family, LEAST_ACCEPTED_DEFAULT)
        if primitive.family == "onednn" and not torch.backends.mkldnn.is_available():
            least = 0
        assert reasons.count(None) >= least, primitive.name
        assert all(reason is None or len(reason.split()) > 2 for reason in reasons), f"{primitive.name}: not a sentence"
        assert reasons == [primitive.refusal(p, MACHINE) for p in ODD], f"{primitive.name}: refusal is not pure"


@pytest.mark.skipif(bool(SAMPLE), reason="is itself a reduced run")
@pytest.mark.skipif(MACHINE.isa in ("portable", "neon"), reason="there is only one build")
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_the_other_builds(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__,
         "-k", "float64 or exact or activations"],
        env={**os.environ, "CONVSELECT_ISA": isa, "CONVSELECT_TEST_SAMPLE": "25"}, cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
