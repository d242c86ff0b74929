"""Every Triton primitive against float64: on the GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from conv_data import Data, activate, activation_of, error
from gpu import DEVICE, DTYPES, TRITON, able, epilogue, here, run, to
from outliers import OUTLIERS, with_outliers
from triton._C.libtriton import ir
from triton.runtime import interpreter

from convselect.kernels.triton import elementwise, launch
from convselect.layout import Layout
from convselect.machine import PRECISIONS
from convselect.primitive import ACTIVATIONS, Activation
from convselect.primitives.gpu import base, igemm
from convselect.primitives.gpu.base import TritonPrimitive, resident
from convselect.problem import ConvProblem

_SQUARE = ConvProblem(ic=17, ih=6, iw=9, oc=33, kh=3, kw=3, ph=1, pw=1)
_ONE = ConvProblem(mb=2, ic=24, ih=7, iw=5, oc=40, kh=1, kw=1)
_DEPTHWISE = ConvProblem(mb=2, g=18, ic=18, ih=5, iw=6, oc=18, kh=3, kw=3, ph=1, pw=1)
PROBLEMS = [
    _SQUARE,
    replace(_SQUARE, mb=2, ic=70, oc=36, ih=3, iw=5),
    replace(_SQUARE, ph=0, pw=2, sh=2, sw=1),
    replace(_SQUARE, dh=2, dw=3, ph=2, pw=2),
    replace(_SQUARE, ih=1, iw=7),
    replace(_SQUARE, kh=1, kw=5, ph=0, pw=2),
    replace(_SQUARE, mb=2, ic=16, oc=16, ih=4, iw=8),
    replace(_SQUARE, ic=1, oc=1, ih=4, iw=4),
    _ONE,
    replace(_ONE, ic=1, oc=3),
    replace(_ONE, ic=130, oc=130, ih=3),
    replace(_ONE, sh=2, sw=2),
    replace(_ONE, ph=1, pw=1),
    ConvProblem(mb=2, ic=3, ih=7, iw=5, oc=20, kh=7, kw=7, sh=2, sw=2, ph=3, pw=3),
    ConvProblem(ic=4, ih=8, iw=8, oc=65, kh=3, kw=3, sh=2, sw=2, ph=1, pw=1),
    _DEPTHWISE,
    replace(_DEPTHWISE, g=3, ic=3, oc=3, kh=5, kw=5, sh=2, sw=2, ph=2, pw=2),
    replace(_DEPTHWISE, mb=1, dh=2, dw=2, ph=0, pw=3, kh=2),
    ConvProblem(mb=2, g=3, ic=18, ih=6, iw=5, oc=12, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(g=2, ic=70, ih=4, iw=4, oc=132, kh=3, kw=3, sh=2, sw=2, ph=1, pw=1),
    ConvProblem(g=8, ic=32, ih=5, iw=5, oc=16, kh=3, kw=3, ph=1, pw=1),
]
"""Edges, strides, dilation, groups, odd channels, several images; each small, since the interpreter is slow."""
FEW = [PROBLEMS[i] for i in (0, 2, 10, 12, 13, 17, 20)]
LARGE = [
    ConvProblem(mb=8, ic=256, ih=28, iw=28, oc=256, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(mb=32, ic=64, ih=56, iw=56, oc=128, kh=3, kw=3, ph=1, pw=1),
    ConvProblem(mb=32, ic=256, ih=14, iw=14, oc=512, kh=1, kw=1),
    ConvProblem(mb=8, ic=3, ih=224, iw=224, oc=64, kh=7, kw=7, sh=2, sw=2, ph=3, pw=3),
    ConvProblem(mb=8, g=144, ic=144, ih=56, iw=56, oc=144, kh=5, kw=5, sh=2, sw=2, ph=2, pw=2),
    ConvProblem(mb=8, g=32, ic=256, ih=28, iw=28, oc=256, kh=3, kw=3, ph=1, pw=1),
]
"""Like those of real networks: full vectors, more steps than stages, several tiles for each multiprocessor."""
SEVERAL_TILES = ConvProblem(mb=2, ic=72, ih=14, iw=14, oc=40, kh=3, kw=3, ph=1, pw=1)
PARTS = {"float32": 6, "float16": 6, "bfloat16": 6, "tf32": 6}
"""Each primitive is run on one in so many of its problems: the interpreter is slow."""
SLOW = [] if DEVICE.type == "cuda" else [pytest.mark.slow]
EXACT_FAMILIES = {"igemm", "pointwise", "depthwise", "stem", "im2row", "grouped"}


@pytest.fixture(autouse=True)
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter products are those of matrix units: exact in float32, of TF32 without the last 13 bits.

    Left alone, it would multiply all bits of TF32, and those of bfloat16 as if they were integers.
    """
    if DEVICE.type != "cpu":
        return
    plain = interpreter.InterpreterBuilder.create_dot

    def factor(x: Any, tf32: bool) -> Any:
        if x.dtype.scalar == tl.bfloat16:
            bits = x.data.astype(np.uint32) << 16
        elif tf32:
            bits = x.data.view(np.uint32) & 0xFFFFE000
        else:
            return x
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, *rest: Any) -> Any:
        tf32 = a.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32
        return plain(self, factor(a, tf32), factor(b, tf32), acc, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@cache
def takes(precision: str) -> list[tuple[TritonPrimitive, list[ConvProblem]]]:
    """The problems of each primitive."""
    problems = PROBLEMS if precision == "float32" else FEW
    return [(primitive, [p for p in problems if primitive in able(p, precision)]) for primitive in TRITON]


def share(p: ConvProblem, precision: str = "float32", fewer: int = 1) -> list[TritonPrimitive]:
    """The primitives that are run on `p`: each on one in `PARTS` times `fewer` of its problems; on a GPU on all."""
    if DEVICE.type == "cuda":
        return able(p, precision)
    return [
        primitive
        for number, (primitive, problems) in enumerate(takes(precision))
        if p in problems and (problems.index(p) + number) % min(fewer * PARTS[precision], len(problems)) == 0
    ]


def rounded(data: Data, precision: str) -> Data:
    """`data` as a primitive of this precision sees it: half precision rounds the operands."""
    dtype = DTYPES[precision]
    for name in ("src", "weight", "bias", "residual"):
        setattr(data, name, getattr(data, name).to(dtype).float())
    return data


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_agrees_with_float64(p: ConvProblem) -> None:
    data = Data(p)
    for primitive in share(p):
        got = run(primitive, p, "float32", data.src, data.weight)
        assert error(got, data.conv) <= primitive.error_bound, primitive.name


@pytest.mark.parametrize("precision", ["float16", *(pytest.param(name, marks=SLOW) for name in ("bfloat16", "tf32"))])
@pytest.mark.parametrize("p", FEW, ids=str)
def test_other_precisions_with_an_epilogue(p: ConvProblem, precision: str) -> None:
    data = rounded(Data(p), precision)
    want = data.convolve(p, data.src) + data.bias.double()[:, None, None] + data.residual
    for primitive in share(p, precision):
        got = run(primitive, p, precision, data.src, data.weight, data.bias, data.residual, Activation("relu"))
        assert error(got, want.relu()) <= primitive.error_bound_at(precision), primitive.name


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter would take hours")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("p", LARGE, ids=str)
def test_large_problems(p: ConvProblem, precision: str) -> None:
    data = rounded(Data(p), precision)
    want = data.convolve(p, data.src) + data.bias.double()[:, None, None] + data.residual
    for primitive in able(p, precision):
        got = run(primitive, p, precision, data.src, data.weight, data.bias, data.residual, Activation("relu"))
        assert error(got, want.relu()) <= primitive.error_bound_at(precision), primitive.name


@pytest.mark.parametrize(
    "precision", ["float32", "float16", *(pytest.param(name, marks=SLOW) for name in ("bfloat16", "tf32"))]
)
@pytest.mark.parametrize("p", [SEVERAL_TILES, *(LARGE[:2] if DEVICE.type == "cuda" else [])], ids=str)
def test_persistent_programs(p: ConvProblem, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two computes several tiles, also on a GPU that could take all of them at once."""
    monkeypatch.setattr(igemm, "resident", lambda device, shared_bytes: 2)
    data = rounded(Data(p), precision)
    want = data.convolve(p, data.src) + data.bias.double()[:, None, None]
    persistent = [primitive for primitive in able(p, precision) if getattr(primitive, "persistent", False)]
    assert persistent
    for primitive in persistent:
        got = run(primitive, p, precision, data.src, data.weight, data.bias)
        assert error(got, want) <= primitive.error_bound_at(precision), primitive.name


def test_how_many_persistent_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    h200 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=233472)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    found = {
        p.name: resident.__wrapped__(torch.device("cuda"), p.shared_bytes()) for p in TRITON if p.family == "igemm"
    }
    assert found["igemm_128x64_persistent_nhwc"] == 2 * 132
    assert found["igemm_128x128_persistent_nhwc"] == 132


def test_weights_are_rounded_to_the_nearest_tf32() -> None:
    """Where matrix units multiply them: these drop the bits that float32 has more."""
    largest = torch.finfo(torch.float32).max
    weight = torch.tensor([1 + 2**-11, 1 + 2**-12, -1 - 3 * 2**-12, 2**-149, largest, -largest, float("inf")])
    want = torch.tensor([1 + 2**-10, 1, -1 - 2**-10, 0, largest, -largest, float("inf")])
    assert torch.equal(launch.rounded(weight, True), want)
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert launch.rounded(nans, True).isnan().all()
    assert launch.rounded(weight, False) is weight


@pytest.mark.parametrize("p", FEW, ids=str)
def test_packed_weights_have_the_bits_of_tf32(p: ConvProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "tf32_allowed", lambda: True)
    weight = Data(p).weight
    for primitive in able(p, "tf32"):
        packed = primitive.prepack(p, weight.clone())
        computed_in_float32 = primitive.family == "depthwise" or primitive.name.startswith("winograd_f4x4")
        assert bool((packed.view(torch.int32) & 0x1FFF).any()) == computed_in_float32, primitive.name


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("size", [(2, 24, 7, 9), (3, 70, 1, 1), (1, 3, 30, 30), (1, 1, 1, 1)], ids=str)
def test_the_epilogue_alone(size: tuple[int, int, int, int], layout: Layout) -> None:
    """In place, as after cuDNN."""
    for dtype in (torch.float32, torch.float16):
        dst, residual = (to(torch.randn(size), layout, dtype) for _ in range(2))
        bias = torch.randn(size[1]).to(DEVICE, dtype)
        want = (dst.double() + bias.double()[:, None, None] + residual.double()).relu()
        end = epilogue(Activation("relu"), bias, residual)
        launch.start(elementwise.launches(dst, dst, layout is Layout.NHWC, end), DEVICE)
        assert error(dst.cpu().double(), want.cpu()) <= (2e-7 if dtype == torch.float32 else 5e-4)


@pytest.mark.parametrize("p", PROBLEMS[1::3], ids=str)
def test_integers_are_exact(p: ConvProblem) -> None:
    data = Data(p, integers=True)
    for primitive in share(p, fewer=2):
        if primitive.family in EXACT_FAMILIES:
            got = run(primitive, p, "float32", data.src, data.weight, data.bias, data.residual)
            assert torch.equal(got, data.sum), primitive.name


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    """All families share one epilogue; those that end in another kernel than a product are taken one by one."""
    activation = activation_of(kind)
    names = {"igemm_64x64_nhwc", "igemm_64x64_split4_nhwc", "winograd_f2x2_3x3_64x64_nhwc"}
    p = replace(_SQUARE, ih=4, iw=5)
    data = Data(p)
    want = activate(data.conv + data.bias.double()[:, None, None], activation)
    used = [primitive for primitive in able(p) if primitive.name in names]
    assert len(used) == len(names)
    for primitive in used:
        got = run(primitive, p, "float32", data.src, data.weight, data.bias, None, activation)
        assert error(got, want) <= primitive.error_bound + 5e-7, primitive.name


@pytest.mark.parametrize(("p", "value"), list(zip(FEW, cycle([float("nan"), float("inf")]))), ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_non_finite_in_non_finite_out(p: ConvProblem, value: float) -> None:
    data = Data(p)
    src = data.src.clone()
    src[-1, p.ic // 2, p.ih // 2, p.iw // 2] = value
    reached = ~data.convolve(p, src).isfinite()
    for primitive in share(p, fewer=2):
        got = run(primitive, p, "float32", src, data.weight, data.bias, None, Activation("relu"))
        assert got[reached & (data.convolve(p, src) != float("-inf"))].isfinite().sum() == 0, primitive.name
        if primitive.family in EXACT_FAMILIES and primitive.name != "grouped_merged_nhwc":
            assert got[~reached].isfinite().all(), f"{primitive.name} spreads {value}"


@pytest.mark.parametrize("p", FEW[1::3], ids=str)
def test_another_batch_than_planned(p: ConvProblem) -> None:
    data = Data(p.with_batch(3))
    for primitive in share(p, fewer=2):
        got = run(primitive, p, "float32", data.src, data.weight, data.bias)
        assert error(got, data.conv + data.bias.double()[:, None, None]) <= primitive.error_bound, primitive.name


def test_each_primitive_is_run() -> None:
    for primitive in TRITON:
        if primitive.shared_bytes() > here().shared_bytes:
            continue  # on a smaller GPU than the H200 that is assumed where there is none
        precision = primitive.precisions[0]
        assert any(primitive in share(p, precision) for p in PROBLEMS), primitive.name


def test_an_empty_batch() -> None:
    p = _SQUARE
    for primitive in able(p):
        src = torch.empty(0, p.ic, p.ih, p.iw)
        assert run(primitive, p, "float32", src, Data(p).weight).shape == (0, p.oc, p.oh, p.ow), primitive.name


@pytest.mark.parametrize(("p", "value"), list(zip(FEW, cycle(OUTLIERS.values()))), ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_strict_feels_outliers_only_where_the_kernel_reaches(p: ConvProblem, value: float) -> None:
    data = Data(p)
    src, free = with_outliers(p, data, value)
    for primitive in share(p, fewer=2):
        if primitive.accuracy == "strict":
            got = run(primitive, p, "float32", src, data.weight)
            assert error(got[free], data.conv[free]) <= primitive.error_bound, primitive.name
