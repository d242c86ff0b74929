"""What AOTAutograd would take apart stays whole, and models with interpolation run in one program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from behaviour import check
from made_up import choose
from torch import Tensor, nn
from torch.nn import functional as F

import convselect
from convselect.graph.lower import to_layout
from convselect.graph.program.segment import Segment
from convselect.graph.undecomposed import _WHOLE, undecomposed
from convselect.runtime.compiled import run_graphs

aten = torch.ops.aten
LAYOUTS = [torch.contiguous_format, torch.channels_last]
APIS: dict[str, Callable[[nn.Module], Callable[..., object]]] = {
    "compile": lambda model: convselect.compile(model, calibrate="never", strict=True),
    "backend": lambda model: torch.compile(model, backend="convselect", options={"calibrate": "never", "strict": True}),
    "dynamic": lambda model: torch.compile(
        model, backend="convselect", dynamic=True, options={"calibrate": "never", "strict": True}
    ),
}


class Model(nn.Module):
    """`function(layers, x)`."""

    def __init__(self, function: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> object:
        return self.function(self.layers, x)


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)))


def nodes(fast: Callable[..., object], x: Tensor) -> Iterator[torch.fx.Node]:
    """What runs, those within programs too."""
    for run in run_graphs(fast, [x]):
        for node in run.graph.module.graph.nodes:
            yield from node.target.nodes if isinstance(node.target, Segment) else [node]


def up(**options: object) -> Callable[[object, Tensor], Tensor]:
    return lambda _, x: F.interpolate(x, **options)


WHOLE: dict[str, tuple[str, Callable[[object, Tensor], object]]] = {
    "scale": ("upsample_nearest2d", up(scale_factor=2)),
    "other scale": ("upsample_nearest2d", up(scale_factor=1.5)),
    "scale, recomputed": ("upsample_nearest2d", up(scale_factor=1.5, recompute_scale_factor=True)),
    "size": ("upsample_nearest2d", lambda _, x: F.interpolate(x, (2 * x.shape[2], 3 * x.shape[3]))),
    "scale of sizes": ("upsample_nearest2d", lambda _, x: F.interpolate(x, scale_factor=16 / x.shape[2])),
    "nearest-exact": ("_upsample_nearest_exact2d", up(scale_factor=1.7, mode="nearest-exact")),
    "bilinear": ("upsample_bilinear2d", up(scale_factor=2, mode="bilinear")),
    "corners": ("upsample_bilinear2d", up(size=(16, 17), mode="bilinear", align_corners=True)),
    "bilinear, smaller": ("upsample_bilinear2d", up(scale_factor=(0.5, 0.7), mode="bilinear")),
    "bicubic": ("upsample_bicubic2d", up(scale_factor=1.7, mode="bicubic")),
    "antialias": ("_upsample_bilinear2d_aa", up(size=(5, 5), mode="bilinear", antialias=True)),
    "nearest of 1": ("upsample_nearest1d", lambda _, x: F.interpolate(x[0], scale_factor=2)),
    "exact of 1": ("_upsample_nearest_exact1d", lambda _, x: F.interpolate(x[0], 9, mode="nearest-exact")),
    "linear": ("upsample_linear1d", lambda _, x: F.interpolate(x[0], scale_factor=2, mode="linear")),
    "nearest of 3": ("upsample_nearest3d", lambda _, x: F.interpolate(x[None], scale_factor=2)),
    "exact of 3": ("_upsample_nearest_exact3d", lambda _, x: F.interpolate(x[None], 9, mode="nearest-exact")),
    "trilinear": ("upsample_trilinear3d", lambda _, x: F.interpolate(x[None], scale_factor=2, mode="trilinear")),
    "module": ("upsample_bilinear2d", lambda _, x: nn.Upsample(scale_factor=2, mode="bilinear")(x)),
    "torch._C._nn": ("upsample_nearest2d", lambda _, x: torch._C._nn.upsample_nearest2d(x, (16, 16))),
    "aten": ("upsample_bilinear2d", lambda _, x: aten.upsample_bilinear2d(x, (16, 16), True)),
    "aten, of scales": ("upsample_nearest2d", lambda _, x: aten.upsample_nearest2d(x, None, (2.0, 2.0))),
    "circular padding": ("pad_circular", lambda _, x: F.pad(x, (1, 2, 3, 1), mode="circular")),
    "circular padding of 1": ("pad_circular", lambda _, x: F.pad(x[0], (1, 2), mode="circular")),
    "hardshrink": ("hardshrink", lambda _, x: F.hardshrink(x)),
    "softshrink": ("softshrink", lambda _, x: F.softshrink(x)),
    "rrelu": ("leaky_relu", lambda _, x: F.rrelu(x)),
}
"""ATen's operator, or what stands for it, and code that leads to it."""


@pytest.mark.parametrize(("api", "name"), list(zip(itertools.cycle(APIS), WHOLE)))
def test_stays_whole(api: str, name: str) -> None:
    """As eager, at another size in the other layout too, and one operator computes it."""
    torch._dynamo.reset()
    operator, function = WHOLE[name]
    model = Model(function).eval()
    fast = APIS[api](model)
    same = {f"{operator}.default"} | ({"upsample2d.default"} if operator.startswith("upsample") else set())
    with torch.inference_mode():
        for size, layout in zip(((2, 4, 8, 8), (3, 4, 9, 10)), LAYOUTS, strict=True):
            x = drawn(*size).contiguous(memory_format=layout)
            got = check(model, [x], fast, lambda: torch.compile(model, backend="aot_eager"))
            assert name == "rrelu" or got.tensors[-1].stride() == model(x).stride()  # torch's own are not eager's there
            ran = [node.target.__name__ for node in nodes(fast, x) if isinstance(node.target, torch._ops.OpOverload)]
            assert sum(name in same for name in ran) == 1, ran
            assert not [name for name in ran if "index" in name or "arange" in name or "scatter" in name]


def test_dropout_is_nothing() -> None:
    """As in eager: not a copy, and a result that is the input."""
    torch._dynamo.reset()
    model = Model(lambda _, x: F.dropout(F.dropout(x + 1, 0.5, False) * 2, 0.5, False)).eval()
    fast = APIS["compile"](model)
    x = drawn(2, 4, 8, 8)
    with torch.inference_mode():
        assert torch.equal(fast(x), model(x))
    ran = [str(node.target) for node in nodes(fast, x) if node.op == "call_function"]
    assert not [name for name in ran if "clone" in name]
    fast = APIS["compile"](Model(lambda _, x: F.dropout(x, 0.5, False)).eval())
    with torch.inference_mode():
        assert fast(x) is x


def test_random_numbers_are_those_of_eager() -> None:
    """Of layers in training mode, of which torch's registry is changed too."""
    torch._dynamo.reset()
    model = Model(lambda _, x: F.rrelu(F.dropout(x, 0.5, True), training=True))
    x = drawn(2, 4, 8, 8)
    fast = APIS["compile"](model)
    with torch.inference_mode():
        torch.manual_seed(0)
        want = model(x)
        torch.manual_seed(0)
        assert torch.equal(fast(x), want)


def test_the_registry_is_as_before() -> None:
    """Also after an error."""
    before = {operator: dict(operator.py_kernels) for operator in _WHOLE}
    with undecomposed():
        assert {operator: dict(operator.py_kernels) for operator in _WHOLE} != before
    with pytest.raises(ZeroDivisionError), undecomposed():
        raise ZeroDivisionError
    assert {operator: dict(operator.py_kernels) for operator in _WHOLE} == before
    x = drawn(1, 4, 8, 8)
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        from torch._dynamo.backends.common import aot_autograd

        def compiler(traced: torch.fx.GraphModule, _: object) -> Callable[..., object]:
            seen.extend(str(node.target) for node in traced.graph.nodes)
            return traced.forward

        return aot_autograd(fw_compiler=compiler, inference_compiler=compiler)(gm, inputs)

    with torch.no_grad():
        torch.compile(up(scale_factor=2), backend=backend)(None, x)
    assert "aten.upsample_nearest2d.default" not in seen, "torch does not take it apart any more: this file can go"


def conv(ic: int, oc: int, kernel: int = 3, **options: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(ic, oc, kernel, padding=kernel // 2, **options), nn.ReLU())


def unet(m: nn.ModuleDict, x: Tensor, **options: object) -> Tensor:
    a = m["a"](x)
    b = m["b"](F.max_pool2d(a, 2))
    c = m["c"](F.max_pool2d(b, 2))
    y = m["d"](torch.cat([b, F.interpolate(c, scale_factor=2, **options)], 1))
    return m["f"](m["e"](torch.cat([F.interpolate(y, size=a.shape[2:], **options), a], 1)))


UNET = {
    "a": conv(3, 16),
    "b": conv(16, 24),
    "c": conv(24, 33),
    "d": conv(57, 24),
    "e": conv(40, 16),
    "f": nn.Conv2d(16, 5, 1),
}


def lraspp(m: nn.ModuleDict, x: Tensor) -> Tensor:
    low = m["low"](x)
    high = m["high"](low)
    y = m["gate"](high) * torch.sigmoid(m["scale"](F.adaptive_avg_pool2d(high, 1)))
    y = F.interpolate(y, size=low.shape[2:], mode="bilinear", align_corners=False)
    y = m["low classes"](low) + m["high classes"](y)
    return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


def fpn(m: nn.ModuleDict, x: Tensor) -> tuple[Tensor, ...]:
    a = m["a"](x)
    b = m["b"](a)
    c = m["c"](b)
    lateral = m["lateral c"](c)
    out = [m["out c"](lateral)]
    for name, source in (("b", b), ("a", a)):
        lateral = m[f"lateral {name}"](source) + F.interpolate(lateral, size=source.shape[2:])
        out.append(m[f"out {name}"](lateral))
    return (*out, F.max_pool2d(out[0], 1, 2))


def aspp(m: nn.ModuleDict, x: Tensor) -> Tensor:
    """A map of one pixel, brought to the size of the others."""
    y = m["a"](x)
    pooled = F.interpolate(m["pooled"](F.adaptive_avg_pool2d(y, 1)), size=y.shape[2:], mode="bilinear")
    return m["b"](torch.cat([m["c"](y), pooled], 1))


def masks(m: nn.ModuleDict, x: Tensor) -> Tensor:
    """One channel."""
    return torch.sigmoid(F.interpolate(m["mask"](m["a"](x)), scale_factor=4, mode="bilinear"))


GRAPHS: dict[str, tuple[Callable[..., object], dict[str, nn.Module]]] = {
    "unet, nearest": (unet, UNET),
    "unet, bilinear": (lambda m, x: unet(m, x, mode="bilinear"), UNET),
    "unet, corners": (lambda m, x: unet(m, x, mode="bilinear", align_corners=True), UNET),
    "lraspp": (
        lraspp,
        {
            "low": conv(3, 16, stride=2),
            "high": conv(16, 32, stride=2),
            "gate": conv(32, 24, 1),
            "scale": nn.Conv2d(32, 24, 1),
            "low classes": nn.Conv2d(16, 21, 1),
            "high classes": nn.Conv2d(24, 21, 1),
        },
    ),
    "fpn": (
        fpn,
        {
            "a": conv(3, 8, stride=2),
            "b": conv(8, 16, stride=2),
            "c": conv(16, 24, stride=2),
            **{f"lateral {n}": nn.Conv2d(c, 20, 1) for n, c in (("a", 8), ("b", 16), ("c", 24))},
            **{f"out {n}": conv(20, 20) for n in "abc"},
        },
    ),
    "aspp": (aspp, {"a": conv(3, 16), "b": conv(23, 8), "c": conv(16, 13, 1), "pooled": conv(16, 10, 1)}),
    "masks": (masks, {"a": conv(3, 16), "mask": nn.Conv2d(16, 1, 1)}),
}


@pytest.mark.parametrize(("name", "api"), list(zip(GRAPHS, itertools.cycle(["compile", "dynamic"]))))
@torch.inference_mode()
def test_graphs(name: str, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As eager in either layout, in one program but for transforms of results, whether sizes are fixed or not."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    choose(monkeypatch, "direct_nhwc")
    function, layers = GRAPHS[name]
    model = Model(function, **layers).eval()
    fast = APIS[api](model)
    for size, layout in zip(((2, 3, 24, 32), (1, 3, 40, 16)), LAYOUTS, strict=True):
        x = drawn(*size).contiguous(memory_format=layout)
        check(model, [x], fast, lambda: torch.compile(model, backend="aot_eager"))
        (run,) = run_graphs(fast, [x])
        segments = [n.target.nodes for n in run.graph.module.graph.nodes if isinstance(n.target, Segment)]
        computing = [steps for steps in segments if any(step.target is not to_layout for step in steps)]
        assert len(computing) == 1, run.graph.module.graph


@torch.inference_mode()
def test_concatenations_take_it_where_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step copies what was interpolated for a concatenation."""
    torch._dynamo.reset()
    choose(monkeypatch, "direct_nhwc")
    fast = APIS["compile"](Model(unet, **UNET).eval())
    x = drawn(1, 3, 24, 32)
    (run,) = run_graphs(fast, [x])
    (segment,) = [n.target for n in run.graph.module.graph.nodes if isinstance(n.target, Segment)]
    (program,) = segment._programs[1].values()
    convolutions, poolings, interpolations, transforms = 6, 2, 2, 2  # of the input to NHWC, of the result to NCHW
    copies = 2  # of a and b, which a pooling reads as well
    assert len(program.layers) == convolutions + poolings + interpolations + transforms + copies


@torch.inference_mode()
def test_inductor_gets_atens_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the assignment leaves it in NCHW."""
    torch._dynamo.reset()
    model = Model(lambda m, x: m["a"](F.interpolate(x.cumsum(2), scale_factor=2, mode="bilinear")), a=conv(3, 8)).eval()
    choose(monkeypatch, "direct_nchw")
    fast = convselect.compile(model, calibrate="never", remainder="inductor")
    x = drawn(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), model(x))
