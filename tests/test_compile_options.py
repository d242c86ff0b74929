"""What the options of `compile` change."""

from __future__ import annotations

import pytest
import torch
from test_backend import X, assert_same, block, compiled, layers_of, randn
from torch import nn

import convselect
from convselect.runtime.compiled import run_graphs


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_the_remainder(remainder: str) -> None:
    model = nn.Sequential(block(nn.BatchNorm2d(16), nn.ReLU()), nn.MaxPool2d(2), nn.Conv2d(16, 4, 3, groups=4)).eval()
    fast = compiled(model, remainder=remainder, strict=True)
    with torch.inference_mode():
        assert_same(fast(X), model(X))
        with torch.no_grad():
            model[2].weight.mul_(2)
        assert_same(fast(X), model(X))
    assert len(layers_of(fast, X)) == 2


@pytest.mark.parametrize("select", ["model", "measure", "model+verify"])
def test_ways_to_select(select: str) -> None:
    model = block(nn.ReLU())
    with torch.inference_mode():
        assert_same(compiled(model, select=select, budget_s=0.2)(X), model(X))


def test_memory_is_bounded_or_refused() -> None:
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))).eval()
    x = randn(1, 64, 56, 56)
    free = run_graphs(compiled(model), [x])[0].graph.plan
    bound = 3 * 64 * 64 * 9 * 4 * 1.5 / 2**20
    with torch.inference_mode():
        fast = compiled(model, memory_mb=bound)
        assert_same(fast(x), model(x))
    plan = run_graphs(fast, [x])[0].graph.plan
    assert plan.packed_bytes + plan.workspace_bytes <= bound * 2**20
    assert plan.total_predicted_ms >= free.total_predicted_ms
    assert plan.packed_bytes == sum(layer.packed_bytes for layer in plan.layers) > 0
    text = str(convselect.explain(fast, x))
    assert f"together at most {bound:g}" in text
    assert plan.total_predicted_ms - plan.gap_ms >= free.total_predicted_ms - 1e-9
    assert ("above the least possible" in text) == (plan.gap_ms > 0)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"memory_mb is 0\.001"):
        compiled(model, memory_mb=0.001)(x)


def test_strict_accuracy_excludes_the_less_accurate() -> None:
    model = nn.Conv2d(64, 64, 3, padding=1).eval()
    x = randn(1, 64, 56, 56)
    (layer,) = layers_of(compiled(model, accuracy="strict"), x)
    assert convselect.primitives()
    classes = {primitive.name: primitive.accuracy for primitive in convselect.primitives()}
    assert classes[layer.primitive] == "strict"
    assert any("strict" in reason for reason in layer.refusals.values())
