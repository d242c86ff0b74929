"""Whole networks against eager float64, with random weights and batch-norm statistics that are not trivial."""

from __future__ import annotations

import copy
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch

import convselect
from convselect.bench.networks import DEFAULT, build
from convselect.runtime.compiled import run_graphs

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="the networks are torchvision's"),
]

BOUNDS = {"default": 2e-5, "strict": 3e-6}
"""rel-L2 at the logits, by accuracy."""
CASES = {"default": ("alexnet", "mobilenet_v2"), "strict": ("resnet18",)}
"""What is tried by default."""


@lru_cache(maxsize=1)
def network(name: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The network, an input, and its output in float64."""
    model, x = build(name)
    with torch.inference_mode():
        return model, x, copy.deepcopy(model).double()(x.double())


@pytest.mark.usefixtures("solver_clock")
@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        pytest.param(name, accuracy, marks=[] if name in CASES[accuracy] else pytest.mark.slow)
        for name in DEFAULT
        for accuracy in BOUNDS
    ],
)
def test_logits(name: str, accuracy: str) -> None:
    torch._dynamo.reset()
    model, x, exact = network(name)
    fast = convselect.compile(model, accuracy=accuracy, calibrate="never", strict=True)
    graph = run_graphs(fast, [x])[0].graph
    with torch.inference_mode():
        error = ((fast(x) - exact).norm() / exact.norm()).item()
    assert error <= BOUNDS[accuracy]
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    used = [layer for layer in graph.plan.layers if layer.primitive != "aten"]
    assert len(used) == len(graph.plan.layers)
    assert len(used) <= convolutions
    assert len(used) >= convolutions - 4  # GoogLeNet's and Inception's auxiliary classifiers do not run
    assert graph.plan.gap_ms == 0
    parts = (*graph.plan.layers, *graph.plan.operators, *graph.plan.transforms)
    assert graph.plan.total_predicted_ms == pytest.approx(sum(part.predicted_ms for part in parts))
