"""The graph pass on small models: whatever writes a convolution, and whatever surrounds it."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convselect
from convselect.runtime.compiled import run_graphs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, **options: object):
    torch._dynamo.reset()
    return convselect.compile(model, **{"calibrate": "never", **options})


def assert_same(got, expected) -> None:
    """Same shapes, strides and, within float32 rounding, values."""
    if not isinstance(got, torch.Tensor):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
        return
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * scale)


def layers_of(fast, x: torch.Tensor) -> list:
    return [layer for run in run_graphs(fast, [x]) for layer in run.graph.plan.layers]


def block(*tail: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), *tail).eval()


class Functional(nn.Module):
    """F.conv2d with a parameter and with a plain tensor attribute; clamps; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(8, 8, 3, 3, seed=1))
        self.kernel = randn(8, 8, 1, 1, seed=2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.conv2d(x, self.weight, padding=1).clamp(min=-1)
        return (x + F.conv2d(y, self.kernel)).clamp_(max=2), y


class Residual(nn.Module):
    """relu(bn(conv) + conv), where one operand becomes the other's residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.b(F.relu(self.a(x)))) + self.shortcut(x))


class Reshapes(nn.Module):
    """Views, a channel shuffle, slices and concatenations between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        a, b = y.chunk(2, 1)
        y = torch.cat([b, a], 1)
        z = self.depthwise(y)
        return z.mean([2, 3]), self.depthwise(y[:, :, 1:, 1:]), F.interpolate(z, scale_factor=2), z.flatten(1)


class PreActivation(nn.Module):
    """Batch norm that no convolution precedes, and one tensor read by several."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(x))
        for conv in self.convs:
            x = torch.cat([x, conv(x)], 1)
        return F.max_pool2d(x, 3, 2, 1)


X = randn(2, 8, 16, 16)
MODELS = {
    "conv-bn-relu": block(nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
    "no affine": block(nn.BatchNorm2d(16, affine=False)),
    "stride, dilation, groups": nn.Conv2d(8, 12, (3, 5), (2, 1), (2, 3), (2, 1), groups=4),
    "same, even kernel": nn.Conv2d(8, 4, 2, padding="same"),
    "reflect padding": nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
    "functional": Functional(),
    "weight norm": block(nn.ReLU(), torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 4, 3))),
    "residual": Residual(),
    "reshapes": Reshapes(),
    "pre-activation": PreActivation(),
    "classifier": block(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_write_a_convolution(name: str) -> None:
    model = MODELS[name].eval()
    fast = compiled(model, strict=True)
    with torch.inference_mode():
        assert_same(fast(X), model(X))
    layers = layers_of(fast, X)
    assert layers
    assert all(layer.primitive != "aten" for layer in layers)


@pytest.mark.parametrize(
    "x",
    [
        X.to(memory_format=torch.channels_last),
        randn(2, 16, 32, 32)[:, ::2, ::2, ::2],
        randn(1, 8, 1, 16).expand(2, 8, 16, 16),
        randn(2, 16, 16, 8).permute(0, 3, 1, 2),
        randn(8, 16, 16),
        randn(1, 8, 1, 1),
    ],
    ids=["channels_last", "sliced", "expanded", "permuted", "unbatched", "one pixel"],
)
def test_every_kind_of_input(x: torch.Tensor) -> None:
    model = block(nn.ReLU(), nn.Conv2d(16, 4, 1))
    with torch.inference_mode():
        assert_same(compiled(model)(x), model(x))


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "sigmoid": nn.Sigmoid(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "hardtanh": nn.Hardtanh(-2, 3),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_fused(name: str) -> None:
    model = block(ACTIVATIONS[name])
    fast = compiled(model, strict=True)
    with torch.inference_mode():
        assert_same(fast(3 * X), model(3 * X))
    graph = run_graphs(fast, [X])[0].graph
    fused = {"relu6": "clamp", "hardtanh": "clamp"}.get(name, name)
    assert graph.plan.layers[0].activation == fused
    assert not graph.plan.operators


class DynamicWeight(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, x[:1, :, :3, :3])


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.ConvTranspose2d(8, 4, 2), X, "transposed"),
        (nn.Conv1d(8, 4, 3), randn(2, 8, 16), "two spatial dimensions"),
        (nn.Conv3d(2, 4, 3), X.view(2, 2, 4, 16, 16), "two spatial dimensions"),
        (nn.Conv2d(8, 4, 3).double(), X.double(), "float64"),
        (nn.Conv2d(8, 4, 3).bfloat16(), X.bfloat16(), "bfloat16"),
        (DynamicWeight(), X, "computed from the call's arguments"),
        (nn.Conv2d(8, 4, 3), X[:0], "empty"),
    ],
    ids=["transposed", "1d", "3d", "float64", "bfloat16", "dynamic weight", "empty batch"],
)
def test_what_no_primitive_takes_runs_in_aten(model: nn.Module, x: torch.Tensor, reason: str) -> None:
    fast = compiled(model)
    with torch.inference_mode():
        with pytest.warns(convselect.ConvselectWarning, match=reason):
            got = fast(x)
        assert_same(got, model(x))
    (layer,) = layers_of(fast, x)
    assert layer.primitive == "aten"
    assert any(reason in sentence for sentence in layer.refusals.values())
    with torch.inference_mode(), pytest.raises(convselect.UnconvertedError, match=reason):
        compiled(model, strict=True)(x)


def test_batch_norm_in_training_mode_still_updates_its_statistics() -> None:
    model = block(nn.BatchNorm2d(16), nn.ReLU()).train()
    other = copy.deepcopy(model)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            assert_same(fast(X), other(X))
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)


def test_batches_in_turn_compile_at_most_twice() -> None:
    model = block(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 3))
    fast = compiled(model)
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for batch in (1, 2, 7, 3, 1, 5):
            x = randn(batch, 8, 16, 16, seed=batch)
            assert_same(fast(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_spatial_sizes_in_turn() -> None:
    model = block(nn.ReLU(), nn.MaxPool2d(2))
    fast = compiled(model)
    with torch.inference_mode():
        for size in ((16, 16), (20, 16), (24, 20), (16, 16)):
            x = randn(1, 8, *size)
            assert_same(fast(x), model(x))
            assert {f"ih{size[0]}iw{size[1]}" in layer.problem for layer in layers_of(fast, x)} == {True}


@pytest.mark.skipif("isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="before torch 2.12")
def test_many_models_of_one_class_and_many_sizes_stay_converted() -> None:
    torch._dynamo.reset()
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU()).eval()
        fast = convselect.compile(model, calibrate="never", strict=True)
        assert len(layers_of(fast, X)) == 1
    for side in range(10, 22):
        assert len(layers_of(fast, randn(1, 8, side, side))) == 1


def test_gradients_are_right_and_announced() -> None:
    model = block(nn.ReLU())
    fast = compiled(model)
    with pytest.warns(convselect.ConvselectWarning, match="inference_mode"):
        fast(X).sum().backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    model(X).sum().backward()
    assert_same(got, model[0].weight.grad)
    with torch.no_grad():
        assert_same(fast(X), model(X))
    with pytest.raises(convselect.UnconvertedError, match="gradients are enabled"):
        compiled(model, strict=True)(X)


def test_torch_compile_by_name_does_the_same() -> None:
    model = block(nn.BatchNorm2d(16), nn.ReLU())
    torch._dynamo.reset()
    named = torch.compile(model, backend="convselect", options={"calibrate": "never"})
    with torch.inference_mode():
        first = named(X)
        layers = layers_of(named, X)
        fast = compiled(model)
        assert torch.equal(first, fast(X))
    assert [layer.primitive for layer in layers] == [layer.primitive for layer in layers_of(fast, X)]


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_module() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()).eval()
    with pytest.raises(ValueError, match=r"'0\.weight' is not initialised"):
        convselect.compile(model)
    model(X)
    with torch.inference_mode():
        assert_same(compiled(model, strict=True)(X), model(X))


def test_explain_needs_a_graph_of_ours() -> None:
    with pytest.raises(ValueError, match="ran no graph"):
        convselect.explain(block(), X)


def test_nothing_warns_on_an_ordinary_model() -> None:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        compiled(block(nn.BatchNorm2d(16), nn.ReLU()))(X)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_result_of_one_pixel_has_eagers_strides(layout: torch.memory_format, batch: int) -> None:
    model = block(nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    x = randn(batch, 8, 16, 16).contiguous(memory_format=layout)
    with torch.inference_mode():
        assert_same(compiled(model)(x), model(x))
