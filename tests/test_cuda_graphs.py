"""When a graph is captured and when replayed, what is copied, and what waits, by a device that only pretends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import Graph, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from convselect import streams
from convselect.runtime.cuda_graphs import MOST_MOVES, MOST_SHAPES, Cuda, CudaGraphs, refusal

CPU = torch.device("cpu")


class Pretended:
    """A replay computes again, and writes where the first results lie."""

    def __init__(self) -> None:
        self.current, self.last, self.waited, self.captures, self.replays = "a", None, [], 0, 0
        self.error: Exception | None = None
        self.is_busy = False

    def is_capturing(self) -> bool:
        return self.is_busy

    def wait(self) -> None:
        self.waited.append((self.current, self.last))

    def record(self) -> None:
        self.last = f"{self.current}{self.replays}"

    def capture(self, run: Callable[[], Sequence[Any]]) -> tuple[Sequence[Any], Callable[[], None]]:
        if self.error is not None:
            raise self.error
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


def test_many_shapes_end() -> None:
    case = Case()
    for rows in [*range(1, MOST_SHAPES + 4), 1]:
        case(torch.randn(rows, 4))
    assert case.device.captures == MOST_SHAPES
    assert case.device.replays == MOST_SHAPES + 1


@pytest.mark.parametrize("marked", [False, True])
def test_what_moves_at_each_call_is_copied_in_the_end(marked: bool) -> None:
    """A weight that is replaced, or two marked buffers in turn."""
    case, x = Case(), torch.randn(3, 4)
    buffers = [torch.randn(3, 4) for _ in range(2)]
    for buffer in buffers:
        torch._dynamo.mark_static_address(buffer)
    for i in range(3 * MOST_MOVES):
        if marked:
            case(buffers[i % 2])
        else:
            old, case.weight = case.weight, torch.randn(4)
            case(x)
            del old
    assert case.device.captures == 1 + MOST_MOVES + 1
    assert case.device.replays == 3 * MOST_MOVES
    case(buffers[0] if marked else x)
    assert case.device.captures == 1 + MOST_MOVES + 1
    assert not case.told


def test_a_replay_waits_for_the_last_and_for_nothing_later() -> None:
    case = Case()
    for stream in "aabba":
        case.device.current = stream
        case(torch.randn(3, 4))
        case.device.error = RuntimeError("not for this shape")
        case(torch.randn(2, 4))
    assert case.device.waited == [("a", None), ("a", "a1"), ("b", "a2"), ("b", "b3"), ("a", "b4")]


@pytest.mark.parametrize("switch", ["benchmark", "deterministic", "enabled"])
def test_cudnns_switches_are_kept_apart(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, x, cudnn = Case(), torch.randn(3, 4), torch.backends.cudnn
    case(x)
    with monkeypatch.context() as patch:
        patch.setattr(cudnn, switch, not getattr(cudnn, switch))
        case(x)
        case(x)
    case(x)
    assert case.device.captures == 2


def test_inside_the_callers_capture_nothing_is_captured() -> None:
    case = Case()
    case.device.is_busy = True
    case(torch.randn(3, 4))
    assert case.device.captures == 0


@pytest.mark.parametrize(
    "body",
    [
        lambda packed, x, weight: [y := packed[0] * x + weight, y.view(-1)],
        lambda packed, x, weight: [packed[0] * x + weight, x[1:]],
        lambda packed, x, weight: [packed[0] * x + weight, weight[2:]],
        lambda packed, x, weight: [packed[0] * x + weight, packed[0]],
    ],
)
def test_results_that_share_memory_are_not_captured(body: Callable[..., Sequence[Any]]) -> None:
    case = Case(body)
    for _ in range(3):
        x = torch.randn(3, 4)
        got, other = case.graphs(case.packed, x, case.weight)
        torch.testing.assert_close(got, 2 * x + 0.5)
        assert other.storage_offset() == body(case.packed, x, case.weight)[1].storage_offset()
    (told,) = case.told
    assert "shares memory" in told


class CompilationError(Exception):
    """Triton's do not derive from `RuntimeError`."""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of 2 GiB\nand so on"), CompilationError("of 2 GiB")])
def test_a_shape_that_fails_leaves_the_others(error: Exception) -> None:
    case = Case()
    case(torch.randn(3, 4))
    case.device.error = error
    for _ in range(2):
        case(torch.randn(5, 4))
    case.device.error = None
    for rows in (5, 3, 2):
        case(torch.randn(rows, 4))
    assert case.told == [
        f"inputs of 5x4 run without a CUDA graph, as capturing one failed: {type(error).__name__}: of 2 GiB"
    ]
    assert (case.device.captures, case.device.replays) == (2, 3)


def test_expanded_inputs_run_as_they_are() -> None:
    case = Case()
    case(torch.randn(1, 4).expand(3, 4))
    assert case.device.captures == 0


class PretendedCuda:
    """`torch.cuda` with one GPU. What `fails` is the call at which the capture ends."""

    class Stream(str):
        def wait_stream(self, other: str) -> None: ...

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made, self.pools = 0, 0
        self.now: str = self.Stream("caller")
        self.fails = False

    def make_stream(self) -> str:
        self.made += 1
        return self.Stream(f"side{self.made}")

    def current_stream(self, device: torch.device) -> str:
        return self.now

    def set_stream(self, stream: str) -> None:
        self.now = stream

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    @contextmanager
    def graph(self, graph: Any, *, pool: tuple[int, int], stream: str, capture_error_mode: str) -> Iterator[None]:
        assert streams.CAPTURES.locked()
        before, self.now, graph.pool = self.now, stream, lambda: pool
        self.log.append(f"capture in {pool[1]}")
        try:
            yield
        finally:
            if self.fails:
                raise RuntimeError("capture invalidated")
            self.now = before

    def run(self) -> list[torch.Tensor]:
        self.log.append(f"run on {self.now}")
        return [torch.zeros(1)]


def test_captures_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a stream and a pool; workspaces of cuBLAS come and go with each; one that fails leaves no trace."""
    here = PretendedCuda()
    pretended = SimpleNamespace(
        Stream=here.make_stream,
        Event=lambda: None,
        current_stream=here.current_stream,
        set_stream=here.set_stream,
        device=here.device,
        stream=here.stream,
        graph=here.graph,
        graph_pool_handle=here.graph_pool_handle,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
    )
    for name, says in (("clearCublasWorkspaces", "clear"), ("endAllocateToPool", "end"), ("releasePool", "release")):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda *_, says=says: here.log.append(says), raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cuda", pretended)
        cuda = Cuda(torch.device("cuda", 0))
        cuda.capture(here.run)
        warm_up = ["run on side1"] * 3
        assert here.log == [*warm_up, "clear", "capture in 1", "run on side1", "clear"]
        here.log.clear()
        here.fails = True
        with pytest.raises(RuntimeError, match="invalidated"):
            cuda.capture(here.run)
        assert here.log == [*warm_up, "clear", "capture in 1", "run on side1", "end", "release", "clear"]
        assert here.now == "caller"
        assert not streams.CAPTURES.locked()
        here.fails = False
        here.log.clear()
        for _ in range(2):
            cuda.capture(here.run)
        assert [line for line in here.log if "capture" in line] == ["capture in 2"] * 2
        assert here.made == 1


def traced(function: Callable[[torch.Tensor], Any], device: str = "cpu") -> Graph:
    graph = symbolic_trace(function).graph
    next(iter(graph.nodes)).meta["val"] = torch.empty(1, device=device)
    return graph


def test_refusals() -> None:
    aten = torch.ops.aten
    assert refusal(traced(lambda x: aten.relu.default(x)), CPU) is None
    assert "is on meta" in str(refusal(traced(lambda x: aten.relu.default(x), "meta"), CPU))
    assert "random" in str(refusal(traced(lambda x: aten.bernoulli.default(x)), CPU))
    assert "sizes" in str(refusal(traced(lambda x: aten._local_scalar_dense.default(x)), CPU))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_only_indices_that_decide_sizes_are_refused(dtype: torch.dtype) -> None:
    index = torch.ones(3, dtype=dtype)
    graph = make_fx(lambda x, index: x[index], tracing_mode="symbolic")(torch.randn(3, 4), index).graph
    reason = refusal(graph, CPU)
    assert reason is None if dtype == torch.int64 else "sizes" in str(reason)


def test_operators_that_are_marked_as_unsafe_are_refused() -> None:
    if not hasattr(torch.Tag, "cudagraph_unsafe"):
        pytest.skip("this torch has no such mark")
    with torch.library._scoped_library("convselect_test", "FRAGMENT") as library:
        library.define("unsafe(Tensor x) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))
        graph = Graph()
        graph.output(graph.call_function(torch.ops.convselect_test.unsafe.default, (graph.placeholder("x"),)))
        assert "unsafe" in str(refusal(graph, CPU))
