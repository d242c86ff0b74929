"""When a graph is captured and when replayed, what is copied, and what waits, by a device that only pretends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, symbolic_trace

from convselect.cuda_graphs import MOST_CAPTURES, MOST_SHAPES, CudaGraphs, refusal
from convselect.graph.weights import Constants

CPU = torch.device("cpu")


class Pretended:
    """A replay computes again, and writes where the first results lie."""

    device = CPU

    def __init__(self) -> None:
        self.current, self.waited, self.captures, self.replays, self.fails = "a", [], 0, 0, False
        self.is_busy = False

    def is_capturing(self) -> bool:
        return self.is_busy

    def stream(self) -> str:
        return self.current

    def wait(self, stream: str) -> None:
        self.waited.append((self.current, stream))

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        results = list(run())

        def replay() -> None:
            self.replays += 1
            with torch.inference_mode():
                for kept, new in zip(results, run(), strict=True):
                    kept.copy_(new)

        return results, replay


class Case:
    """packed[0] * x + weight, for an input x and a weight."""

    def __init__(self, body: Callable[..., Sequence[Any]] | None = None) -> None:
        self.device, self.told = Pretended(), []
        self.packed, self.weight = (torch.full((4,), 2.0),), torch.full((4,), 0.5)
        self.body = body or (lambda packed, x, weight: [packed[0] * x + weight])
        self.graphs = CudaGraphs(self.body, self.device, [False, True], self.told.append)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (got,) = self.graphs(self.packed, x, self.weight)
        torch.testing.assert_close(got, self.packed[0] * x + self.weight)
        return got


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_captured_once_and_nothing_is_overwritten(mode: Callable[[], Any]) -> None:
    case = Case()
    with mode():
        inputs = [torch.randn(3, 4) for _ in range(4)]
        results = [case(x) for x in inputs]
    for x, got in zip(inputs, results, strict=True):
        torch.testing.assert_close(got, 2 * x + 0.5)
    assert (case.device.captures, case.device.replays) == (1, 4)


def test_modes_in_turn() -> None:
    case = Case()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            case(torch.randn(3, 4))
    assert case.device.captures == 1


def test_strides_are_kept() -> None:
    case = Case(lambda packed, x, weight: [(packed[0] * x + weight).t()[:, ::2]])
    x = torch.randn(4, 3).t()
    (got,) = case.graphs(case.packed, x, case.weight)
    (want,) = case.body(case.packed, x, case.weight)
    assert torch.equal(got, want)
    assert got.stride() == want.stride()


def test_weights() -> None:
    """Written in place they are seen by the same capture; another address needs another."""
    case, x = Case(), torch.randn(3, 4)
    case(x)
    case.weight.mul_(3)
    case.packed[0].add_(1)
    case(x)
    assert case.device.captures == 1
    case.weight = torch.randn(4)
    case(x)
    assert case.device.captures == 2
    case.packed = (torch.randn(4),)
    case(x)
    case(x)
    assert case.device.captures == 3


def test_marked_inputs_are_read_where_they_are() -> None:
    case, x = Case(), torch.randn(3, 4)
    torch._dynamo.mark_static_address(x)
    case(x)
    x.add_(1)
    case(x)
    assert case.device.captures == 1
    other = torch.randn(3, 4)
    torch._dynamo.mark_static_address(other)
    case(other)
    assert case.device.captures == 2


def test_many_shapes_and_many_captures_end() -> None:
    case = Case()
    for rows in [*range(1, MOST_SHAPES + 4), 1]:
        case(torch.randn(rows, 4))
    assert case.device.captures == MOST_SHAPES
    assert case.device.replays == MOST_SHAPES + 1
    for _ in range(2 * MOST_CAPTURES):
        old, case.weight = case.weight, torch.randn(4)
        case(torch.randn(1, 4))
        del old
    assert case.device.captures == MOST_CAPTURES
    (told,) = case.told
    assert "weights moved" in told


def test_a_replay_on_another_stream_waits_for_the_last() -> None:
    case = Case()
    for stream in "aabba":
        case.device.current = stream
        case(torch.randn(3, 4))
    assert case.device.waited == [("b", "a"), ("a", "b")]


def test_inside_the_callers_capture_nothing_is_captured() -> None:
    case = Case()
    case.device.is_busy = True
    case(torch.randn(3, 4))
    assert case.device.captures == 0


@pytest.mark.parametrize("body", [None, lambda packed, x, weight: [y := packed[0] * x + weight, y.view(-1)]])
def test_what_cannot_be_captured_runs_and_is_told_once(body: Callable[..., Sequence[Any]] | None) -> None:
    case = Case(body)
    case.device.fails = body is None
    for _ in range(3):
        x = torch.randn(3, 4)
        got = case.graphs(case.packed, x, case.weight)[0]
        torch.testing.assert_close(got, 2 * x + 0.5)
    (told,) = case.told
    assert ("not permitted" if body is None else "share memory") in told


def test_expanded_inputs_run_as_they_are() -> None:
    case = Case()
    case(torch.randn(1, 4).expand(3, 4))
    assert case.device.captures == 0


def test_weights_are_packed_again_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where captures know their addresses; also where the modes of the two calls differ."""

    class Ready:
        waits = 0

        def __init__(self, device: torch.device) -> None: ...

        def wait(self) -> None:
            Ready.waits += 1

    monkeypatch.setattr("convselect.graph.weights.Ready", Ready)
    graph = Graph()
    source = graph.placeholder("weight")
    graph.output((graph.call_function(torch.neg, (source,)), source))
    constants = Constants(GraphModule({}, graph), [lambda weight: weight.flatten().clone(), None], torch.device("cuda"))
    weight = torch.randn(3, 4)
    with torch.inference_mode():
        first = constants.current([weight])
    addresses = [tensor.data_ptr() for tensor in first]
    weight.mul_(2)
    again = constants.current([weight])
    assert again is first
    assert [tensor.data_ptr() for tensor in again] == addresses
    assert torch.equal(again[0], -weight.flatten())
    assert torch.equal(again[1], weight)
    assert constants.current([weight]) is first
    assert Ready.waits == 3


def traced(function: Callable[[torch.Tensor], Any], device: str = "cpu") -> Graph:
    graph = symbolic_trace(function).graph
    next(iter(graph.nodes)).meta["val"] = torch.empty(1, device=device)
    return graph


def test_refusals() -> None:
    aten = torch.ops.aten
    assert refusal(traced(lambda x: aten.relu.default(x)), CPU) is None
    assert "is on meta" in str(refusal(traced(lambda x: aten.relu.default(x), "meta"), CPU))
    assert "random" in str(refusal(traced(lambda x: aten.bernoulli.default(x)), CPU))
    assert "sizes" in str(refusal(traced(lambda x: aten.nonzero.default(x)), CPU))
    assert "sizes" in str(refusal(traced(lambda x: aten._local_scalar_dense.default(x)), CPU))
