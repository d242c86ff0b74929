"""The kernels that run between convolutions: pooling, linear, scale and shift."""

from __future__ import annotations

import pytest
import torch
from conv_data import activate, activation_of

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.layout import Layout
from convselect.primitive import ACTIVATIONS
from convselect.primitives.pooling import ARGUMENTS

OPS = torch.ops.convselect


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
        got = torch.ops.convselect.pool2d(x, *ARGUMENTS[operator](x.shape, expected.shape, *rest))
        exact = operator is aten.max_pool2d.default
        torch.testing.assert_close(got, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, equal_nan=True)


@pytest.mark.parametrize("size", [7, 56, 1024, 2048])
def test_the_average_of_a_large_map(size: int) -> None:
    """Of constants, in which rounding errors add up, and of a picture."""
    constants = [0.1, 1 / 3, 0.7310586, 3.1415927, 16777215.0, -1e-30]
    x = torch.empty(1, len(constants) + 2, size, size, memory_format=torch.channels_last)
    x[0, :-2] = torch.tensor(constants)[:, None, None]
    x[0, -2:] = torch.rand(2, size, size, generator=torch.Generator().manual_seed(0))
    got = OPS.pool2d(x, [size, size, size, size, 0, 0, 1, 1, 1, 1], False, True, 0)
    want = x.double().mean((2, 3), keepdim=True)
    assert ((got - want) / want).abs().max() <= 5e-7


@pytest.mark.parametrize("size", [7, 28, 29, 56, 113])
@pytest.mark.parametrize(
    "special", [{}, {0: torch.nan}, {0: torch.inf}, {1: -torch.inf}, {0: torch.inf, 1: -torch.inf}], ids=str
)
def test_the_average_of_what_is_not_finite(size: int, special: dict[int, float]) -> None:
    """As the sum has it: infinities of two signs make NaN, and a channel's neighbours see nothing of it."""
    x = torch.rand(2, 21, size, size).contiguous(memory_format=torch.channels_last)
    for i, value in special.items():
        x[1, 2, -1 - i, size // 2] = value
    got = OPS.pool2d(x, [size, size, size, size, 0, 0, 1, 1, 1, 1], False, True, 0)
    torch.testing.assert_close(got, x.double().mean((2, 3), keepdim=True).float(), equal_nan=True, rtol=5e-7, atol=0)


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


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_of_any_size(kind: str) -> None:
    """From the least to the largest values, and of what is not finite."""
    sizes = torch.logspace(-38, 38.5, 3000, dtype=torch.float64).float()
    x = torch.cat([-sizes, torch.linspace(-100, 100, 3001), sizes, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    activation = activation_of(kind)
    x = x.view(1, 4, -1, 1).contiguous(memory_format=torch.channels_last)
    got = OPS.scale_shift(x, torch.ones(4), torch.zeros(4), ACTIVATIONS.index(kind), *activation[1:])
    torch.testing.assert_close(got.double(), activate(x.double(), activation), rtol=1e-6, atol=1e-6, equal_nan=True)
