"""Compiled networks on a GPU: against float64, with weights that change, streams, autocast and layouts."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from test_gpu_plans import Small
from torch import nn

import convselect
from convselect import machine
from convselect.primitive import get
from convselect.primitives.gpu.base import no_triton
from convselect.runtime.compiled import run_graphs
from convselect.runtime.cuda_graphs import CAPTURED, Cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA GPU")

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BOUNDS = {"float32": 2e-5, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""rel-L2 of the results, against float64 with weights and input rounded alike."""


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    torch._dynamo.reset()
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def allow_tf32(allowed: bool) -> None:
    precision = "tf32" if allowed else "ieee"
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = precision


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Small().eval()
    for norm in (model.norm, model.alone):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.to("cuda", dtype)


def randn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return copy.deepcopy(model).double()(x.double())


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def compiled(model: nn.Module, **options: object):
    return convselect.compile(model, **{"calibrate": "never", "strict": True, **options})


@pytest.mark.parametrize("cuda_graphs", ["auto", "never"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
def test_agrees_with_float64(precision: str, channels_last: bool, cuda_graphs: str) -> None:
    allow_tf32(precision == "tf32")
    model, x = network(DTYPES[precision]), randn(4, 3, 64, 64, dtype=DTYPES[precision])
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    fast = compiled(model, cuda_graphs=cuda_graphs)
    with torch.inference_mode():
        for seed in range(3):
            x = x.copy_(randn(*x.shape, dtype=x.dtype, seed=seed))
            assert error(fast(x), exact(model, x)) <= BOUNDS[precision]
    (run,) = run_graphs(fast, [x])
    assert precision in run.graph.plan.machine
    assert (run.graph.plan.cuda_graph == CAPTURED) == (cuda_graphs == "auto")
    assert {get(layer.primitive).device for layer in run.graph.plan.layers} == {"cuda"}
    assert all(layer.measured_ms for layer in convselect.explain(fast, x).layers)


@pytest.mark.parametrize("select", ["model", "measure", "model+verify"])
def test_calibrates_and_measures(select: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path))
    allow_tf32(False)
    model, x = network(), randn(2, 3, 32, 32)
    fast = convselect.compile(model, calibrate="always", budget_s=1.0, select=select, strict=True)
    with torch.inference_mode():
        assert error(fast(x), exact(model, x)) <= BOUNDS["float32"]
    assert list(tmp_path.glob("*.safetensors"))


def test_a_changed_weight_is_seen_by_the_next_call() -> None:
    allow_tf32(False)
    model, x = network(), randn(2, 3, 32, 32)
    fast = compiled(model)

    def in_place() -> None:
        with torch.no_grad():
            model.a.weight.mul_(2)

    def replace() -> None:
        model.c.weight = nn.Parameter(model.c.weight.detach() * 3)

    def load() -> None:
        model.load_state_dict({k: v + 0.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})

    with torch.inference_mode():
        fast(x)
    for change in (in_place, replace, load, lambda: model.head.bias.data.add_(1.0)):
        change()
        with torch.inference_mode():
            assert error(fast(x), exact(model, x)) <= BOUNDS["float32"]


def test_weights_made_under_inference_mode() -> None:
    allow_tf32(False)
    with torch.inference_mode():
        model, x = network(), randn(2, 3, 32, 32)
        fast = compiled(model)
        fast(x)
        model.a.weight[3, 3, 1, 1] += 100
        assert error(fast(x), exact(model, x)) <= BOUNDS["float32"]


def test_weights_made_under_inference_mode_cost_one_wait_and_may_be_captured() -> None:
    allow_tf32(False)
    with torch.inference_mode():
        model, x = network(), randn(2, 3, 32, 32)
        fast = compiled(model)
        fast(x)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                fast(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len([wait for wait in waits if "synchronizing" in str(wait.message)]) == 1
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fast(x)
        x.copy_(randn(2, 3, 32, 32, seed=1))
        graph.replay()
        assert error(y, exact(model, x)) <= BOUNDS["float32"]


def test_a_capture_that_becomes_invalid_leaves_no_trace() -> None:
    here = Cuda(torch.device("cuda", torch.cuda.current_device()))
    x, breaks = torch.zeros(1000, device="cuda"), True

    def run() -> list[torch.Tensor]:
        if breaks and torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return [x + 1]

    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for breaks in (False, True, False):
                if breaks:
                    with pytest.raises(RuntimeError):
                        here.capture(run)
                else:
                    (result,), replay = here.capture(run)
                assert torch.cuda.current_stream() == stream
                x.add_(1)
                replay()
                assert torch.equal(result, x + 1)
    torch.cuda.empty_cache()


def test_nobody_elses_memory_is_a_workspace() -> None:
    """Inductor has all of cuBLAS's workspaces freed; what a replay then writes to must still be its own."""
    allow_tf32(False)
    model, x = network(), randn(4, 3, 64, 64)
    model.head = nn.Linear(32, 4096).to("cuda")
    fast = compiled(model)
    with torch.inference_mode():
        fast(x)
        torch._C._cuda_clearCublasWorkspaces()
        others = [torch.zeros(2**18, device="cuda") for _ in range(256)]
        assert error(fast(x), exact(model, x)) <= BOUNDS["float32"]
    assert not any(other.any() for other in others)


def test_first_calls_in_several_threads() -> None:
    allow_tf32(False)
    models = [network() for _ in range(4)]
    fasts, x = [compiled(model) for model in models], randn(2, 3, 32, 32)
    wanted, failed = exact(models[0], x), []

    def run(fast) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    assert error(fast(x), wanted) <= BOUNDS["float32"]
        except BaseException as raised:
            failed.append(raised)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(fast,)) for fast in fasts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(run_graphs(fast, [x])[0].graph.plan.cuda_graph == CAPTURED for fast in fasts)


def test_a_replaced_weight_waits_for_other_streams() -> None:
    """They may still be reading what was packed from the last one."""
    allow_tf32(False)
    model = network().requires_grad_(False)
    fast = compiled(model)
    x, streams = randn(32, 3, 256, 256), [torch.cuda.Stream() for _ in range(2)]
    with torch.inference_mode():
        fast(x)
        torch.cuda.synchronize()
        got, wanted = [], []
        for i in range(6):
            with torch.inference_mode(False):
                weights = {
                    name: value * 1.5 if name == "a.weight" else value for name, value in model.state_dict().items()
                }
                model.load_state_dict(weights, assign=True)
            with torch.cuda.stream(streams[i % 2]):
                streams[i % 2].wait_stream(torch.cuda.default_stream())
                got.append(fast(x))
            wanted.append(copy.deepcopy(model))
        torch.cuda.synchronize()
        assert max(error(a, exact(b, x)) for a, b in zip(got, wanted, strict=True)) <= BOUNDS["float32"]


def test_marked_inputs_in_turn() -> None:
    allow_tf32(False)
    model = network()
    fast = compiled(model)
    inputs = [randn(2, 3, 32, 32, seed=seed) for seed in range(2)]
    for x in inputs:
        torch._dynamo.mark_static_address(x)
    with torch.inference_mode():
        for i in range(20):
            x = inputs[i % 2].mul_(1.01)
            assert error(fast(x), exact(model, x)) <= BOUNDS["float32"]


def test_triton_works_here() -> None:
    here = machine.gpu(0)
    assert here.index == 0
    assert no_triton(here) is None


def test_two_streams() -> None:
    """The second stream's first call comes while the first one may still be packing."""
    allow_tf32(False)
    model = network()
    fast = compiled(model)
    inputs = [randn(4, 3, 64, 64, seed=seed) for seed in range(6)]
    wanted = [exact(model, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    with torch.inference_mode():
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                got.append(fast(x))
    torch.cuda.synchronize()
    assert max(map(error, got, wanted)) <= BOUNDS["float32"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    model, x = network(), randn(4, 3, 64, 64)
    fast = compiled(model)
    precision = str(dtype).removeprefix("torch.")
    for _ in range(2):
        with torch.inference_mode(), torch.autocast("cuda", dtype):
            got = fast(x)
            assert got.dtype == model(x).dtype
        assert error(got, exact(model, x)) <= 2 * BOUNDS[precision]
        with torch.no_grad():
            model.a.weight.mul_(1.5)
    allow_tf32(False)
    with torch.inference_mode():
        assert error(fast(x), exact(model, x)) <= BOUNDS["float32"]


@pytest.mark.parametrize("cuda_graphs", ["auto", "never"])
def test_inductor_runs_the_remainder(cuda_graphs: str) -> None:
    model, x = network(torch.float16), randn(4, 3, 64, 64, dtype=torch.float16)
    fast = compiled(model, remainder="inductor", cuda_graphs=cuda_graphs)
    with torch.inference_mode():
        for seed in range(3):
            x.copy_(randn(*x.shape, dtype=x.dtype, seed=seed))
            assert error(fast(x), exact(model, x)) <= BOUNDS["float16"]
    with torch.no_grad():
        model.a.weight.mul_(2)
        assert error(fast(x), exact(model, x)) <= BOUNDS["float16"]
