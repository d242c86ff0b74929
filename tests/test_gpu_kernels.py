"""Every Triton primitive against float64: on the GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from conv_data import Data, activate, error
from gpu import DEVICE, DTYPES, TRITON, able, run
from triton.runtime import interpreter

from convselect.primitive import ACTIVATIONS, Activation
from convselect.primitives.gpu.base import TritonPrimitive
from convselect.problem import ConvProblem

_SQUARE = ConvProblem(1, 1, 17, 6, 9, 33, 3, 3, 1, 1, 1, 1)
_ONE = ConvProblem(2, 1, 24, 7, 5, 40, 1, 1)
_DEPTHWISE = ConvProblem(2, 18, 18, 5, 6, 18, 3, 3, 1, 1, 1, 1)
PROBLEMS = [
    _SQUARE, replace(_SQUARE, mb=2, ic=70, oc=36, ih=3, iw=5), replace(_SQUARE, ph=0, pw=2, sh=2, sw=1),
    replace(_SQUARE, dh=2, dw=3, ph=2, pw=2), replace(_SQUARE, ih=1, iw=7), replace(_SQUARE, kh=1, kw=5, ph=0, pw=2),
    replace(_SQUARE, mb=2, ic=16, oc=16, ih=4, iw=8), replace(_SQUARE, ic=1, oc=1, ih=4, iw=4),
    _ONE, replace(_ONE, ic=1, oc=3), replace(_ONE, ic=130, oc=130, ih=3), replace(_ONE, sh=2, sw=2),
    replace(_ONE, ph=1, pw=1),
    ConvProblem(2, 1, 3, 7, 5, 20, 7, 7, 2, 2, 3, 3), ConvProblem(1, 1, 4, 8, 8, 65, 3, 3, 2, 2, 1, 1),
    _DEPTHWISE, replace(_DEPTHWISE, g=3, ic=3, oc=3, kh=5, kw=5, sh=2, sw=2, ph=2, pw=2),
    replace(_DEPTHWISE, mb=1, dh=2, dw=2, ph=0, pw=3, kh=2),
    ConvProblem(2, 3, 18, 6, 5, 12, 3, 3, 1, 1, 1, 1), ConvProblem(1, 2, 70, 4, 4, 132, 3, 3, 2, 2, 1, 1),
    ConvProblem(1, 8, 32, 5, 5, 16, 3, 3, 1, 1, 1, 1),
]  # fmt: skip
"""Edges, strides, dilation, groups, odd channels, several images; each small, since the interpreter is slow."""
FEW = [PROBLEMS[i] for i in (0, 2, 10, 12, 13, 17, 20)]
EXACT_FAMILIES = {"igemm", "pointwise", "depthwise", "stem", "im2row", "grouped"}


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 matrices as if they were integers; here it widens them first.

    That is what matrix units do: products of bfloat16 are exact in float32.
    """
    if DEVICE.type != "cpu":
        return
    plain = interpreter.InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def share(p: ConvProblem, parts: int, precision: str = "float32") -> list[TritonPrimitive]:
    """One in `parts` of the primitives that take `p`, others for the next problem; all of few ones, and on a GPU."""
    primitives = able(p, precision)
    every = DEVICE.type == "cuda" or len(primitives) <= 6
    return primitives if every else primitives[PROBLEMS.index(p) % parts :: parts]


def rounded(data: Data, precision: str) -> Data:
    """`data` as a primitive of this precision sees it: half precision rounds the operands."""
    dtype = DTYPES[precision]
    for name in ("src", "weight", "bias", "residual"):
        setattr(data, name, getattr(data, name).to(dtype).float())
    return data


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_agrees_with_float64(p: ConvProblem) -> None:
    data = Data(p)
    for primitive in share(p, 2):
        got = run(primitive, p, "float32", data.src, data.weight)
        assert error(got, data.conv) <= primitive.error_bound, primitive.name


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "tf32"])
@pytest.mark.parametrize("p", FEW, ids=str)
def test_other_precisions_with_an_epilogue(p: ConvProblem, precision: str) -> None:
    data = rounded(Data(p), precision)
    want = data.convolve(p, data.src) + data.bias.double()[:, None, None] + data.residual
    for primitive in share(p, 3, precision):
        got = run(
            primitive, p, precision, data.src, data.weight, data.bias, data.residual, Activation("relu")
        )  # fmt: skip
        assert error(got, want.relu()) <= primitive.error_bound_at(precision), primitive.name


@pytest.mark.parametrize("p", PROBLEMS[1::3], ids=str)
def test_integers_are_exact(p: ConvProblem) -> None:
    data = Data(p, integers=True)
    for primitive in share(p, 2):
        if primitive.family in EXACT_FAMILIES:
            got = run(primitive, p, "float32", data.src, data.weight, data.bias, data.residual)
            assert torch.equal(got, data.sum), primitive.name


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str) -> None:
    """All families share one epilogue; those that end in another kernel than a product are taken one by one."""
    activation = Activation(kind, *{"clamp": (-0.5, 1.5), "leaky_relu": (0.1, 0.0)}.get(kind, (0.0, 0.0)))
    names = {"igemm_64x64_nhwc", "igemm_64x64_split4_nhwc", "winograd_f2x2_3x3_64x64_nhwc"}
    p = replace(_SQUARE, ih=4, iw=5)
    data = Data(p)
    want = activate(data.conv + data.bias.double()[:, None, None], activation)
    used = [primitive for primitive in able(p) if primitive.name in names]
    assert len(used) == len(names)
    for primitive in used:
        got = run(primitive, p, "float32", data.src, data.weight, data.bias, None, activation)
        assert error(got, want) <= primitive.error_bound + 5e-7, primitive.name


@pytest.mark.parametrize("p", FEW, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_non_finite_in_non_finite_out(p: ConvProblem, value: float) -> None:
    data = Data(p)
    src = data.src.clone()
    src[-1, p.ic // 2, p.ih // 2, p.iw // 2] = value
    reached = ~data.convolve(p, src).isfinite()
    for primitive in share(p, 3):
        got = run(primitive, p, "float32", src, data.weight, data.bias, None, Activation("relu"))
        assert got[reached & (data.convolve(p, src) != float("-inf"))].isfinite().sum() == 0, primitive.name
        if primitive.family in EXACT_FAMILIES and primitive.name != "grouped_merged_nhwc":
            assert got[~reached].isfinite().all(), f"{primitive.name} spreads {value}"


@pytest.mark.parametrize("p", FEW[1::3], ids=str)
def test_another_batch_than_planned(p: ConvProblem) -> None:
    data = Data(p.with_batch(3))
    for primitive in share(p, 2):
        got = run(primitive, p, "float32", data.src, data.weight, data.bias)
        assert error(got, data.conv + data.bias.double()[:, None, None]) <= primitive.error_bound, primitive.name


def test_each_primitive_is_run() -> None:
    for primitive in TRITON:
        precision = primitive.precisions[0]
        problems, parts = (PROBLEMS, 2) if precision == "float32" else (FEW, 3)
        assert any(primitive in share(p, parts, precision) for p in problems), primitive.name


def test_an_empty_batch() -> None:
    p = _SQUARE
    for primitive in able(p):
        src = torch.empty(0, p.ic, p.ih, p.iw)
        assert run(primitive, p, "float32", src, Data(p).weight).shape == (0, p.oc, p.oh, p.ow), primitive.name
