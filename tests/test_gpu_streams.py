"""Streams, captures and memory on a GPU that is there."""

from __future__ import annotations

import pytest
import torch
from test_gpu_runs import BOUNDS, allow_tf32, compiled, error, exact, fresh, network, randn  # noqa: F401 (`fresh`)

from convselect.measure import cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA GPU")


def test_results_are_not_overwritten() -> None:
    model = network(torch.float16)
    fast = compiled(model)
    with torch.inference_mode():
        inputs = [randn(2, 3, 32, 32, dtype=torch.float16, seed=seed) for seed in range(4)]
        first = [fast(x) for x in inputs]
        kept = [y.clone() for y in first]
        for x in inputs[::-1]:
            fast(x)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_each_graph_on_its_own_device() -> None:
    allow_tf32(False)
    models = [network().to(f"cuda:{i}") for i in range(2)]
    fasts = [compiled(model) for model in models]
    with torch.inference_mode():
        for _ in range(3):
            for i, (model, fast) in enumerate(zip(models, fasts, strict=True)):
                x = randn(2, 3, 32, 32).to(f"cuda:{i}")
                assert error(fast(x), exact(model, x)) <= BOUNDS["float32"]


def test_a_capture_that_raises_leaves_the_stream_as_it_was() -> None:
    device, x = cuda.CudaClock(), torch.zeros(1, device="cuda")

    def broken() -> None:
        x.add_(1)
        raise LookupError("no engine")

    with pytest.raises(LookupError):
        device.capture(broken)
    replay = device.capture(lambda: x.add_(1))
    device.elapsed_ms(replay)
    assert x.item() == 1


def test_memory_of_graphs_that_are_gone_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda.CudaClock()
    device.elapsed_ms(device.capture(lambda: torch.zeros(2**28, device="cuda")))
    before = torch.cuda.memory_reserved()
    monkeypatch.setattr("convselect.measure.cuda._IDLE_PART", 1e9)
    device.free_memory()
    assert torch.cuda.memory_reserved() <= before - 2**30
