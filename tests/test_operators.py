"""`torch.ops.convselect.*` as operators: schemas, fake results, and what they say about tensors they cannot take."""

from __future__ import annotations

import pytest
import torch

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.layout import Layout
from convselect.machine import cpu
from convselect.pooling import ARGUMENTS
from convselect.primitive import ACTIVATIONS, primitives
from convselect.primitives.kernel import KernelPrimitive
from convselect.problem import ConvProblem

OPS = torch.ops.convselect
PROBLEM = ConvProblem(mb=2, ic=4, ih=9, iw=8, oc=6, kh=3, kw=3, ph=1, pw=1)


def one_of_each_layout() -> list[KernelPrimitive]:
    found = {(k.src_layout, k.dst_layout): k for k in primitives()
             if isinstance(k, KernelPrimitive) and k.refusal(PROBLEM, None) is None}  # fmt: skip
    return list(found.values())


def arguments(primitive: KernelPrimitive, src: torch.Tensor) -> tuple:
    packed = primitive.prepack(PROBLEM, torch.randn(6, 4, 3, 3))
    return src, packed, torch.randn(6), None, primitive.kernel, PROBLEM.geometry, 1, 0.0, 0.0


def source(layout: Layout, mb: int = 2) -> torch.Tensor:
    return torch.randn(mb, 4, 9, 8).contiguous(memory_format=layout.memory_format)


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
@pytest.mark.parametrize("mb", [2, 1, 0])
def test_opcheck_of_conv(primitive: KernelPrimitive, mb: int) -> None:
    args = arguments(primitive, source(primitive.src_layout, mb))
    torch.library.opcheck(OPS.conv.default, args)
    dst = torch.empty(mb, 6, 9, 8).contiguous(memory_format=primitive.dst_layout.memory_format)
    workspace = torch.empty(primitive.workspace_bytes(PROBLEM, cpu()) // 4)
    torch.library.opcheck(OPS.conv_out.default, (dst, workspace, *args))


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
def test_opcheck_of_pack(primitive: KernelPrimitive) -> None:
    weight = torch.randn(6, 4, 3, 3)
    torch.library.opcheck(OPS.pack.default, (weight, primitive.kernel, [2, 4, 9, 8], PROBLEM.geometry))


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (0, 3, 4, 5), (1, 40, 7, 9), (2, 1, 3, 3), (2, 5, 1, 1)])
def test_opcheck_of_to_layout(nhwc: bool, size: tuple[int, ...]) -> None:
    src = torch.randn(size).contiguous(memory_format=(Layout.NCHW if nhwc else Layout.NHWC).memory_format)
    torch.library.opcheck(OPS.to_layout.default, (src, nhwc))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 16, 17, 33, 64])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 13), (16, 16), (31, 33)])
def test_to_layout_keeps_the_values(channels: int, size: tuple[int, int]) -> None:
    src = torch.randn(2, channels, *size)
    there = OPS.to_layout(src, True)
    assert torch.equal(there, src)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(OPS.to_layout(there, False), src)


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: torch.cat([x, x], 2)[:, :, ::2],
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["sliced", "expanded", "transposed"],
)
def test_a_tensor_that_is_not_dense_is_refused(primitive: KernelPrimitive, spoil) -> None:
    src, *rest = arguments(primitive, source(primitive.src_layout))
    with pytest.raises(RuntimeError, match="src must be dense in"):
        OPS.conv(spoil(src), *rest)


@pytest.mark.parametrize("primitive", one_of_each_layout(), ids=lambda k: k.name)
def test_invalid_arguments_are_named(primitive: KernelPrimitive) -> None:
    src, packed, bias, *rest = arguments(primitive, source(primitive.src_layout))
    other = Layout.NHWC if primitive.src_layout is Layout.NCHW else Layout.NCHW
    for message, bad in {
        "src must be dense in": (source(other), packed, bias),
        "src must be a float32 tensor": (src.double(), packed, bias),
        "packed has": (src, packed[..., :-1], bias),
        "bias must be contiguous": (src, packed, bias[:-1]),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            OPS.conv(*bad, *rest)


@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (1, 64, 14, 14), (1, 100, 6, 6), (3, 16, 1, 5)])
@pytest.mark.parametrize("arguments", [(3, 2, 1), (2, 2, 0), (3, 1, 1), ((3, 2), (1, 2), (1, 0)), (5, 3, 2)])
@pytest.mark.parametrize("ceil", [False, True])
def test_pooling(shape: tuple[int, ...], arguments: tuple, ceil: bool) -> None:
    """Exactly torch's maximum, NaN included, and its average within rounding, in each way of counting."""
    kernel = arguments[0]
    high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = arguments[2] if isinstance(arguments[2], tuple) else (arguments[2],) * 2
    if shape[2] + 2 * pad[0] < high or shape[3] + 2 * pad[1] < wide:
        pytest.skip("the window does not fit")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float("nan")
    aten = torch.ops.aten
    calls = [(aten.max_pool2d.default, (*arguments, 1, ceil))]
    calls += [
        (aten.avg_pool2d.default, (*arguments, ceil, count, over)) for count in (False, True) for over in (None, 7)
    ]
    for operator, rest in calls:
        expected = operator(x, *rest)
        got = torch.ops.convselect.pool2d(x, *ARGUMENTS[operator](expected.shape, *rest))
        exact = operator is aten.max_pool2d.default
        torch.testing.assert_close(got, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 7), (10, 64), (1000, 513), (33, 1280)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(rows: int, n: int, k: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, k, generator=generator), torch.randn(n, k, generator=generator)
    shift = torch.randn(n, generator=generator) if bias else None
    got = torch.ops.convselect.linear(x, weight, shift, ACTIVATIONS.index("relu"), 0.0, 0.0)
    expected = torch.nn.functional.linear(x.double(), weight.double(), shift.double() if bias else None).relu()
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (1, 64, 14, 14), (1, 100, 1, 1)])
def test_scale_shift(layout: Layout, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=layout.memory_format)
    scale, shift = torch.randn(shape[1], generator=generator), torch.randn(shape[1], generator=generator)
    got = torch.ops.convselect.scale_shift(x, scale, shift, ACTIVATIONS.index("clamp"), -1.0, 2.0)
    torch.testing.assert_close(got, (x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).clamp(-1, 2))
    assert got.stride() == x.stride()
