"""Small models of ordinary code, each of which once gave a wrong answer or an exception, against eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from behaviour import check
from torch import Tensor, nn
from torch.nn import functional as F

import convselect
from convselect.runtime import changes
from convselect.runtime.compiled import run_graphs

CHANNELS_LAST = torch.channels_last


class Model(nn.Module):
    """`function(self, *inputs)`, with `modules` and parameters as attributes."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self._function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs: Any) -> Any:
        return self._function(self, *inputs)


def conv(ic: int, oc: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(ic, oc, kernel, **{"padding": kernel // 2, **options})


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def excited(m: Any, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    return x * torch.sigmoid(m.fc(x.mean((2, 3))).view(n, c, 1, 1))


def kept_before_a_write(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    t = x.view(x.shape[0], -1).clone()
    x.mul_(2)
    return m.conv(x), t.view_as(x)


def pooled_to_the_same_size(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = m.conv(x)
    return y, F.adaptive_avg_pool2d(y, 8), F.adaptive_avg_pool2d(x, 8)


def grouped_by_batch(m: Any, x: Tensor) -> Tensor:
    n = x.shape[0]
    y = F.conv2d(x.reshape(1, -1, 8, 8), m.weight.repeat(n, 1, 1, 1), groups=n)
    return y.view(n, 4, 6, 6)


def unpooled(m: Any, x: Tensor) -> Tensor:
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    return m.conv(F.max_unpool2d(y, indices, 2))


def attention(m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    q, k, v = (f(m.norm(x)).reshape(b, c, h * w) for f in (m.q, m.k, m.v))
    weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c**-0.5, -1)
    return x + m.out(torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, h, w))


def lstm_cell(m: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, o, g = m.conv(torch.cat([x, h], 1)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


WEIGHT = nn.Parameter(drawn(4, 3, 3, 3))
IMAGE, LAST = (drawn(2, 3, 8, 8),), (drawn(2, 8, 6, 6).to(memory_format=CHANNELS_LAST),)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    # Views that a program holds, of vectors and of maps with fewer channels.
    "linear, 4-d": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU()), (drawn(1, 1, 3, 8),)),
    "squeeze and excitation": (lambda: Model(excited, fc=nn.Linear(8, 8)), (drawn(2, 8, 5, 5),)),
    "view, batch norm": (
        lambda: Model(lambda m, x: m.norm(x.view(-1, 4, 3, 3)), norm=nn.BatchNorm2d(4)),
        (drawn(2, 36),),
    ),
    "view, sum": (lambda: Model(lambda m, x: x.view(-1, 4, 3, 3) + x.view(-1, 4, 3, 3).relu()), (drawn(2, 36),)),
    "cat of no channels": (
        lambda: Model(lambda m, x: torch.cat([x[:, :0], m.conv(x)], 1), conv=conv(3, 4)),
        (drawn(2, 3, 8, 8),),
    ),
    "view, cat": (
        lambda: Model(lambda m, x: torch.cat([x.view(-1, 4, 3, 3), m.conv(x.view(-1, 4, 3, 3))], 1), conv=conv(4, 4)),
        (drawn(2, 36),),
    ),
    "one channel, view": (
        lambda: Model(lambda m, x: F.hardsigmoid(m.conv(x).view(-1, 4, 3, 3)) + 1, conv=conv(4, 1)),
        (drawn(2, 4, 6, 6),),
    ),
    # Geometry that `aten.convolution` carries in lists of one.
    "padding valid": (
        lambda: nn.Sequential(conv(3, 8, padding="valid"), nn.ReLU(), conv(8, 4, padding="valid")),
        IMAGE,
    ),
    "padding same": (lambda: nn.Sequential(conv(3, 8, 4, padding="same"), nn.ReLU()), IMAGE),
    "padding (3,)": (lambda: nn.Sequential(conv(3, 8, padding=(3,)), nn.ReLU()), IMAGE),
    "dilation (2,)": (lambda: nn.Sequential(conv(3, 8, dilation=(2,)), nn.ReLU()), IMAGE),
    "stride (2,)": (lambda: nn.Sequential(conv(3, 8, stride=(2,)), nn.ReLU()), IMAGE),
    "circular padding": (lambda: conv(3, 8, padding_mode="circular"), IMAGE),
    # Copies, and what shares memory.
    "a copy before a write": (lambda: Model(kept_before_a_write, conv=conv(3, 4)), IMAGE),
    "pooling to the same size": (lambda: Model(pooled_to_the_same_size, conv=conv(3, 4)), IMAGE),
    "a weight's cast, returned": (
        lambda: Model(lambda m, x: (m.conv.weight.to(torch.bfloat16), m.conv(x)), conv=conv(3, 4)),
        IMAGE,
    ),
    # Nothing to compute.
    "batch 0, linear": (lambda: nn.Linear(4, 2), (drawn(0, 4),)),
    "batch 0": (lambda: nn.Sequential(conv(3, 4), nn.ReLU()), (drawn(0, 3, 8, 8),)),
    "batch 0 in the middle": (lambda: Model(lambda m, x: m.b(m.a(x)[:0]), a=conv(3, 4), b=conv(4, 4)), IMAGE),
    # Sizes among the arguments.
    "times the batch": (lambda: Model(lambda m, x: m.conv(x) * x.shape[0], conv=conv(3, 4)), IMAGE),
    "groups from the batch": (lambda: Model(grouped_by_batch, weight=WEIGHT), IMAGE),
    "padding from the batch": (
        lambda: Model(lambda m, x: F.conv2d(x, m.weight, padding=x.shape[0]), weight=WEIGHT),
        IMAGE,
    ),
    "slope from the batch": (
        lambda: Model(lambda m, x: F.leaky_relu(m.conv(x), 1 / x.shape[0]), conv=conv(3, 4)),
        IMAGE,
    ),
    "slope 2": (lambda: Model(lambda m, x: F.leaky_relu(m.conv(x), 2), conv=conv(3, 4)), IMAGE),
    "bound from the batch": (lambda: Model(lambda m, x: m.conv(x).clamp(0, x.shape[0]), conv=conv(3, 4)), IMAGE),
    # Layouts that meet.
    "sum of two layouts": (
        lambda: Model(
            lambda m, x: F.relu(F.group_norm(x + m.conv(x.to(memory_format=CHANNELS_LAST)), 2)), conv=conv(8, 8)
        ),
        (drawn(2, 8, 6, 6),),
    ),
    "attention": (
        lambda: nn.Sequential(
            conv(3, 8),
            Model(
                attention, norm=nn.GroupNorm(2, 8), q=conv(8, 8, 1), k=conv(8, 8, 1), v=conv(8, 8, 1), out=conv(8, 8, 1)
            ),
            nn.GroupNorm(2, 8),
            nn.SiLU(),
            conv(8, 3),
        ),
        IMAGE,
    ),
    "roll": (
        lambda: Model(lambda m, x: (m.a(torch.roll(x, 1, 2)), torch.roll(m.a(x), 1, 2).relu()), a=conv(8, 8)),
        LAST,
    ),
    "channel shuffle": (
        lambda: Model(lambda m, x: (m.a(nn.ChannelShuffle(2)(x)), nn.ChannelShuffle(2)(m.a(x)).relu()), a=conv(8, 8)),
        LAST,
    ),
    "max_unpool2d": (lambda: Model(unpooled, conv=conv(8, 8)), LAST),
    "batch norm of a transpose": (
        lambda: Model(lambda m, x: m.norm(x.transpose(2, 3)), norm=nn.BatchNorm2d(3)),
        (drawn(2, 3, 5, 6),),
    ),
    "ConvLSTM": (lambda: Model(lstm_cell, conv=conv(8, 16)), (drawn(2, 4, 6, 6), drawn(2, 4, 6, 6), drawn(2, 4, 6, 6))),
    # Weights that are no parameters.
    "weight: a mean": (
        lambda: Model(lambda m, x: F.conv2d(x, m.weight.mean((2, 3), keepdim=True)), weight=WEIGHT),
        IMAGE,
    ),
    "weight: ones": (lambda: Model(lambda m, x: F.conv2d(x, torch.ones(4, 3, 3, 3))), IMAGE),
    "weight: eye": (lambda: Model(lambda m, x: F.conv2d(x, torch.eye(3).view(3, 3, 1, 1))), IMAGE),
    "weight: numbers": (
        lambda: Model(lambda m, x: F.conv2d(x[:, :1], torch.tensor([[1.0, 2], [-1, -2]])[None, None])),
        IMAGE,
    ),
    # Strides where sizes of one leave them open, and those of operators in place.
    "one pixel": (lambda: nn.Sequential(conv(3, 1), nn.ReLU()), (drawn(1, 3, 1, 1),)),
    "one channel, channels_last": (
        lambda: Model(lambda m, x: (m.conv(x) + 1, m.conv(x).relu()), conv=conv(8, 1)),
        LAST,
    ),
    "one channel in and out": (
        lambda: nn.Sequential(conv(1, 1), nn.ReLU()),
        (drawn(2, 1, 5, 5).to(memory_format=CHANNELS_LAST),),
    ),
    "masked_fill_": (lambda: Model(lambda m, x: m.conv(x).masked_fill_(x[:, :1] > 0, 0.0), conv=conv(8, 8)), LAST),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What stays with ATen is announced; an error of ours that does so is an error here."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* runs in ATen: ", convselect.errors.ConvselectWarning)
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths", UserWarning)
        yield


def other_batch(inputs: Sequence[Tensor]) -> list[Tensor]:
    if not inputs[0].numel():
        return [drawn(2, *each.shape[1:]) for each in inputs]
    contiguous = torch.contiguous_format
    return [
        torch.cat([each, each[:1] + 1]).to(memory_format=contiguous if each.is_contiguous() else CHANNELS_LAST)
        for each in inputs
    ]


@pytest.mark.parametrize("name", MODELS)
def test_as_eager(name: str) -> None:
    """On two calls, and with another batch, which makes it symbolic, and with the first one again."""
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    fast = convselect.compile(model, calibrate="never")
    with torch.inference_mode():
        for given in (inputs, inputs, other_batch(inputs), inputs):
            check(model, given, fast, lambda: torch.compile(model, backend="aot_eager"))


def test_sizes_that_data_decide() -> None:
    model = Model(lambda m, x: m.conv(x[x[:, 0, 0, 0] > 0]), conv=conv(3, 4)).eval()
    x = drawn(8, 3, 8, 8)
    with torch.inference_mode(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(convselect.compile(model, calibrate="never")(x), model(x))


def test_dimensions_marked_as_dynamic() -> None:
    model = nn.Sequential(conv(3, 4), nn.ReLU()).eval()
    for dimension in (0, 2):
        torch._dynamo.reset()
        fast = convselect.compile(model, calibrate="never")
        for size in (8, 9):
            x = drawn(size, 3, size, size)
            torch._dynamo.mark_dynamic(x, dimension)
            with torch.inference_mode():
                torch.testing.assert_close(fast(x), model(x))


def test_inductors_freezing() -> None:
    """It makes weights attributes of what Dynamo captures; they are converted, and never stale."""
    model, (x,) = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4)).eval(), IMAGE
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        fast = convselect.compile(model, calibrate="never", strict=True)
        torch.testing.assert_close(fast(x), model(x))
        model[0].weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x))


class Image(Tensor):
    """As `tv_tensors.Image`: operators give plain tensors."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass that does nothing, whose operators give its own kind."""


@pytest.mark.parametrize("kind", [Image, Tagged])
def test_subclasses_of_tensors(kind: type[Tensor]) -> None:
    model, (x,) = nn.Sequential(conv(3, 4), nn.ReLU()).eval(), IMAGE
    x = x.as_subclass(kind)
    fast = convselect.compile(model, calibrate="never")
    with torch.inference_mode():
        for _ in range(2):
            got, want = fast(x), model(x)
            assert type(got) is type(want)
            torch.testing.assert_close(got.as_subclass(Tensor), want.as_subclass(Tensor))


def test_swapped_weights() -> None:
    model, (x,) = conv(3, 4).eval(), IMAGE
    fast = convselect.compile(model, calibrate="never")
    with torch.no_grad():
        fast(x), fast(x)
        other = nn.Parameter(drawn(4, 3, 3, 3))
        torch.utils.swap_tensors(model.weight, other)
        torch.testing.assert_close(fast(x), model(x))
        del other
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict: bool) -> None:
    model, (x,) = nn.Sequential(conv(3, 4), nn.ReLU()).eval(), IMAGE
    with torch.no_grad():
        exported = torch.export.export(convselect.compile(model, calibrate="never"), (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), model(x))


def test_part_of_another_compiled_model() -> None:
    inner, (x,) = nn.Sequential(conv(3, 4), nn.ReLU()).eval(), IMAGE
    outer = Model(lambda m, x: m.inner(x) + 1, inner=convselect.compile(inner, calibrate="never")).eval()
    with torch.inference_mode():
        fast = torch.compile(outer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(fast(x), inner(x) + 1)


@pytest.mark.parametrize("first", [torch.compile, partial(convselect.compile, calibrate="never")])
def test_compiled_before(first: Callable[[nn.Module], nn.Module]) -> None:
    model, (x,) = nn.Sequential(conv(3, 4), nn.ReLU()).eval(), IMAGE
    fast = convselect.compile(first(model), calibrate="never", accuracy="strict")
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
        assert [run.graph.plan.accuracy for run in run_graphs(fast, [x])] == ["strict"]


def test_arguments_in_containers_need_no_guards(guarded: list[int]) -> None:
    def forward(m: Any, x: Tensor, state: tuple[Tensor, list[Tensor]], options: dict[str, Any]) -> Tensor:
        return (m.conv(x) + state[0] + state[1][0]) * options["scale"]

    model, (x,) = Model(forward, conv=conv(3, 4)).eval(), IMAGE
    fast = convselect.compile(model, calibrate="never")
    with torch.inference_mode():
        for scale, most in ((2.0, 1), (2.0, 2), (2.0, 2), (3.0, 3)):
            arguments = (x, (drawn(2, 4, 8, 8), [drawn(8)]), {"scale": scale})
            torch.testing.assert_close(fast(*arguments), model(*arguments))
            assert len(guarded) <= most or changes.missing()
