"""What a plan leaves to ATen because of its type or its device, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_gpu_plans import fake, moved
from torch import nn

import convselect
from convselect import backend
from convselect.runtime.compiled import run_graphs


class Mixed(nn.Module):
    """Three convolutions, the last in `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.dtype = dtype

    def to(self, dtype: torch.dtype) -> Mixed:
        for conv in self.convs[:2]:
            conv.to(dtype)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs[2](self.convs[1](self.convs[0](x)).to(self.dtype))


def test_of_several_types_the_commonest_is_converted() -> None:
    (prepared,) = fake(torch.float16, make=Mixed)
    (other,) = prepared.others
    assert len(prepared.convs) == 2
    assert other.reason == "the graph's convolutions run in torch.float16 (the input is torch.float32)"


not_there = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where torch finds a GPU, even a fake tensor allocates on its device, for real"
)


@pytest.mark.parametrize(
    ("device", "last", "hip", "reason"),
    [
        pytest.param("cuda:0", "cuda:1", None, "several devices (cuda:0, cuda:1)", marks=not_there),
        ("cpu", "cuda:0", None, "several devices (cpu, cuda:0)"),
        pytest.param("xpu:0", None, None, "xpu:0, a device of Intel's", marks=not_there),
        ("cuda:0", None, "6.4", "cuda:0, a device of AMD's"),
    ],
)
def test_other_devices_stay_with_aten(
    device: str, last: str | None, hip: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("convselect.backend.target_of", partial(moved, device=device, last=last))
    torch._dynamo.reset()
    model, x = Mixed().eval(), torch.randn(1, 3, 8, 8)
    fast = convselect.compile(model)
    with torch.inference_mode(), pytest.warns(convselect.ConvselectWarning, match="runs in ATen") as told:
        torch.testing.assert_close(fast(x), model(x))
    assert len(told) == 3
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
    (run,) = run_graphs(fast, [x])
    assert len(run.graph.plan.layers) == 3
    for layer in run.graph.plan.layers:
        assert layer.primitive == "aten"
        assert reason in layer.refusals["every primitive"]
    assert reason in str(convselect.explain(fast, x))
    torch._dynamo.reset()
    with (
        torch.inference_mode(),
        pytest.raises(convselect.UnconvertedError, match=r"several devices|only CPUs and NVIDIA"),
    ):
        convselect.compile(model, strict=True)(x)


@pytest.mark.parametrize(("device", "hip"), [("xpu:0", None), ("cuda:0", "6.4")])
def test_a_graph_without_convolutions_stays_there_too(
    device: str, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr("convselect.backend.target_of", partial(moved, device=device))
    torch._dynamo.reset()
    model, x = (
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    fast = convselect.compile(model, strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
    (run,) = run_graphs(fast, [x])
    assert run.graph.plan.machine == device
    assert not [node for node in run.graph.module.graph.nodes if "convselect" in str(node.target)]


def test_inductor_runs_also_what_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_remainder(*args: object) -> Callable[..., object]:
        compiled.append(backend_s_own(*args))
        return compiled[-1]

    backend_s_own = backend.compile_remainder
    monkeypatch.setattr(backend, "compile_remainder", compile_remainder)
    monkeypatch.setattr(backend, "target_of", lambda graph: "nothing is converted in this test")
    torch._dynamo.reset()
    model, x = Mixed().eval(), torch.randn(1, 3, 8, 8)
    fast = convselect.compile(model, remainder="inductor")
    with torch.inference_mode(), pytest.warns(convselect.ConvselectWarning, match="runs in ATen"):
        torch.testing.assert_close(fast(x), model(x))
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
    (run,) = run_graphs(fast, [x])
    assert compiled == [run.graph.body]
