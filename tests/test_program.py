"""Programs: many small graphs, each against the model itself; where values lie must never change what they are."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from made_up import choose
from torch import nn

import convselect
from convselect.graph.program.arena import Buffer, place
from convselect.graph.program.segment import Segment
from convselect.runtime.compiled import run_graphs

X = torch.randn(2, 3, 12, 13, generator=torch.Generator().manual_seed(0))


def conv(ic: int, oc: int, k: int = 3, **kwargs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ic, oc, k, padding=k // 2, **kwargs), nn.ReLU())


class Graph(nn.Module):
    """Layers by name, and what to do with them."""

    def __init__(self, body: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.body = body

    def forward(self, x: torch.Tensor) -> object:
        return self.body(self.layers, x)


def dense_block(m: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    features = [m["a"](x)]
    for name in ("b", "c", "d"):
        features.append(m[name](torch.cat(features, 1)))
    return torch.cat(features, 1)


def norm_relu(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(norm, nn.ReLU(), nn.Conv2d(channels, 8, 3, padding=1))


def squeeze_excite(m: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    y = m["a"](x)
    s = torch.sigmoid(m["up"](F.silu(m["down"](F.adaptive_avg_pool2d(y, 1)))))
    return m["b"](y * s)


def classifier(m: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    y = F.dropout(m["a"](x).mean((2, 3)), 0.5, training=False)
    return m["fc"](torch.flatten(y, 1))


GRAPHS: dict[str, tuple[Callable[..., object], dict[str, nn.Module]]] = {
    "chain": (lambda m, x: m["b"](m["a"](x)), {"a": conv(3, 16), "b": conv(16, 5)}),
    "cat": (
        lambda m, x: m["c"](torch.cat([m["a"](x), m["b"](x)], 1)),
        {"a": conv(3, 16), "b": conv(3, 7, 1), "c": conv(23, 8)},
    ),
    "cat is the result": (lambda m, x: torch.cat([m["a"](x), m["b"](x)], 1), {"a": conv(3, 16), "b": conv(3, 7)}),
    "cat with the input": (lambda m, x: m["a"](torch.cat([x, m["b"](x)], 1)), {"a": conv(10, 6), "b": conv(3, 7)}),
    "cat twice the same": (lambda m, x: m["b"](torch.cat([y := m["a"](x), y], 1)), {"a": conv(3, 8), "b": conv(16, 8)}),
    "cat of a cat": (
        lambda m, x: m["c"](torch.cat([torch.cat([m["a"](x), m["b"](x)], 1), m["d"](x)], 1)),
        {"a": conv(3, 8), "b": conv(3, 5), "c": conv(22, 8), "d": conv(3, 9, 1)},
    ),
    "operand of two cats": (
        lambda m, x: torch.cat([y := m["a"](x), m["b"](torch.cat([m["c"](x), y], 1))], 1),
        {"a": conv(3, 8), "b": conv(13, 4), "c": conv(3, 5)},
    ),
    "operand read by a convolution": (
        lambda m, x: torch.cat([y := m["a"](x), m["b"](y)], 1),
        {"a": conv(3, 8), "b": conv(8, 8)},
    ),
    "operand is a result too": (
        lambda m, x: (y := m["a"](x), torch.cat([y, m["b"](x)], 1)),
        {"a": conv(3, 8), "b": conv(3, 8)},
    ),
    "cat after a pool": (
        lambda m, x: m["c"](torch.cat([F.max_pool2d(m["a"](x), 3, 2), m["b"](x)], 1)),
        {"a": conv(3, 16), "b": nn.Conv2d(3, 16, 3, stride=2), "c": conv(32, 4)},
    ),
    "cat of rows": (lambda m, x: m["b"](torch.cat([m["a"](x), m["a"](x + 1)], 2)), {"a": conv(3, 8), "b": conv(8, 8)}),
    "dense block": (dense_block, {"a": conv(3, 8), "b": norm_relu(8), "c": norm_relu(16), "d": norm_relu(24)}),
    "residual": (lambda m, x: m["c"](m["b"](y := m["a"](x)) + y), {"a": conv(3, 8), "b": conv(8, 8), "c": conv(8, 3)}),
    "residual over a cat": (
        lambda m, x: torch.cat([y := m["a"](x), m["b"](y) + y], 1),
        {"a": conv(3, 8), "b": nn.Conv2d(8, 8, 3, padding=1)},
    ),
    "sum of pools": (lambda m, x: F.relu(F.avg_pool2d(y := m["a"](x), 2) + F.max_pool2d(y, 2)), {"a": conv(3, 24)}),
    "squeeze and excite": (
        squeeze_excite,
        {"a": conv(3, 40), "down": nn.Conv2d(40, 4, 1), "up": nn.Conv2d(4, 40, 1), "b": conv(40, 8)},
    ),
    "classifier": (classifier, {"a": conv(3, 20), "fc": nn.Linear(20, 7)}),
    "hidden layer": (
        lambda m, x: m["fc2"](F.relu(m["fc"](m["a"](x).flatten(1)))),
        {"a": nn.Conv2d(3, 4, 5, stride=4), "fc": nn.Linear(24, 30), "fc2": nn.Linear(30, 5)},
    ),
    "adaptive": (lambda m, x: m["b"](F.adaptive_avg_pool2d(m["a"](x), (4, 13))), {"a": conv(3, 8), "b": conv(8, 8)}),
    "adaptive, uneven": (lambda m, x: F.adaptive_avg_pool2d(m["a"](x), (5, 5)), {"a": conv(3, 8)}),
    "view is a result": (lambda m, x: (y := m["a"](x), y.flatten(1)), {"a": conv(3, 8)}),
    "an operator of ATen": (lambda m, x: m["b"](m["a"](x).cumsum(2)), {"a": conv(3, 8), "b": conv(8, 8)}),
    "one pixel, sliced": (lambda m, x: m["a"](x[:, :, :1, :1]), {"a": nn.Conv2d(3, 8, 1)}),
    "one pixel, of more channels": (
        lambda m, x: m["a"](x.flatten(2).mean(2).repeat(1, 2)[:, :3, None, None]),
        {"a": nn.Conv2d(3, 8, 1)},
    ),
}


def compiled(name: str) -> tuple[nn.Module, Callable[..., object]]:
    torch.manual_seed(0)
    body, layers = GRAPHS[name]
    model = Graph(body, **layers).eval()
    return model, compiled_as_it_is(model)


def compiled_as_it_is(model: nn.Module) -> Callable[..., object]:
    torch._dynamo.reset()
    return convselect.compile(model, calibrate="never", strict=True)


def close(got: object, want: object) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", GRAPHS)
@torch.inference_mode()
def test_as_the_model(name: str) -> None:
    model, fast = compiled(name)
    for x in (X, X[:1].clone(), torch.cat([X, X, X[:1]]), X.contiguous(memory_format=torch.channels_last), X):
        close(fast(x), model(x))


def segments(fast: Callable[..., object], x: torch.Tensor) -> list[Segment]:
    graphs = [run.graph for run in run_graphs(fast, [x])]
    return [n.target for graph in graphs for n in graph.module.graph.nodes if isinstance(n.target, Segment)]


def steps(fast: Callable[..., object], x: torch.Tensor) -> int:
    return sum(len(program.layers) for s in segments(fast, x) for program in s._programs[1].values())


@pytest.mark.parametrize("name", ["dense block", "cat of a cat", "squeeze and excite", "classifier"])
@torch.inference_mode()
def test_one_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "direct_nhwc")
    _, fast = compiled(name)
    (graph,) = (run.graph for run in run_graphs(fast, [X]))
    calls = [node.target for node in graph.module.graph.nodes if node.op == "call_function"]
    assert sum(isinstance(target, Segment) for target in calls) == 1
    assert all(isinstance(target, Segment) or target.__name__ == "getitem" for target in calls)


@torch.inference_mode()
def test_concatenations_are_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three norms and four convolutions are all that the dense block runs, beside its result's layout."""
    choose(monkeypatch, "direct_nhwc")
    _, fast = compiled("dense block")
    run = run_graphs(fast, [X])[0]
    (segment,) = (n.target for n in run.graph.module.graph.nodes if isinstance(n.target, Segment))
    program = next(iter(segment._programs[1].values()))
    assert len(program.layers) <= 3 + 4 + 2


@torch.inference_mode()
def test_threads_may_change_between_calls(set_threads: Callable[[int], None]) -> None:
    model, fast = compiled("squeeze and excite")
    for threads in (1, 2, 3, 1):
        set_threads(threads)
        close(fast(X), model(X))


def test_calls_from_several_threads() -> None:
    model, fast = compiled("dense block")
    inputs = [torch.randn_like(X) for _ in range(4)]
    with torch.inference_mode():
        want = [model(x) for x in inputs]
        fast(X)
    failures: list[object] = []

    def work(i: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                try:
                    close(fast(inputs[i]), want[i])
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Several(nn.Module):
    """Batches that are several times the input's, a part of it, and two inputs' together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flipped = torch.relu(self.conv(torch.cat([x, x.flip(3)])))
        half = self.conv(x.chunk(2, 0)[0])
        return flipped, half, self.conv(torch.cat([x, y])).mean((2, 3)), flipped.unflatten(0, (2, -1)).mean(0)


@torch.inference_mode()
def test_batches_that_are_computed_from_the_inputs() -> None:
    torch._dynamo.reset()
    model = Several().eval()
    fast = convselect.compile(model, calibrate="never", strict=True, dynamic=True)
    for a, b in ((4, 3), (5, 2), (8, 6), (4, 3)):
        inputs = torch.randn(a, 3, 12, 12), torch.randn(b, 3, 12, 12)
        for got, want in zip(fast(*inputs), model(*inputs), strict=True):
            close(got, want)


class MakesTensors(nn.Module):
    """In `forward`, from numbers: constants of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)) * torch.tensor(2.0)) + torch.tensor([1.0, 3.0])[1]


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
@torch.inference_mode()
def test_tensors_made_in_forward(remainder: str) -> None:
    torch._dynamo.reset()
    model = MakesTensors().eval()
    fast = convselect.compile(model, calibrate="never", strict=True, remainder=remainder)
    close(fast(X), model(X))


@torch.inference_mode()
def test_default_types_and_devices_do_not_matter() -> None:
    model, fast = compiled("classifier")
    want = model(X)
    torch.set_default_dtype(torch.float64)
    try:
        close(fast(X), want)
        with torch.device("meta"):
            close(fast(X), want)
        close(compiled_as_it_is(model)(X), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_living_buffers_do_not_overlap() -> None:
    random = torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(1, most, (), generator=random))

    for _ in range(50):
        buffers = [Buffer(draw(200), first := draw(20), first + draw(8)) for _ in range(draw(30))]
        total = place(buffers)
        for i, a in enumerate(buffers):
            assert a.offset % 16 == 0
            assert a.offset + a.floats <= total
            for b in buffers[:i]:
                alive_together = a.first <= b.last and b.first <= a.last
                apart = a.offset + a.floats <= b.offset or b.offset + b.floats <= a.offset
                assert apart or not alive_together
