"""Networks to time: torchvision's by name, or a user's own as MODULE:FACTORY, with random but sane weights."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from convselect.errors import unknown_choice
from convselect.problem import ConvProblem

DEFAULT = tuple(
    (
        "alexnet vgg11 vgg16 googlenet inception_v3 resnet18 resnet50 squeezenet1_1 mobilenet_v2 efficientnet_b0 "
        "densenet121"
    ).split()
)
"""The networks of `make bench`."""

_LIBRARIES: list[torch.library.Library] = []


@lru_cache(maxsize=1)
def torchvision_models() -> ModuleType:
    """`torchvision.models`. Raises `ModuleNotFoundError` saying how to install it.

    The package index may have no torchvision for a CPU build of torch. Its networks are plain Python, though; what
    fails to load is a library of box operators, and the package imports once two of their names are defined.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the networks come from torchvision, which is not installed: "
            "`pip install --no-deps torchvision==0.28.0` (for torch 2.13), and `pip install pillow`"
        )
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob("_C*.so"))
    try:
        for path in libraries:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError:
        libraries = []
    if not libraries:
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            library.define(schema)  # type: ignore[no-untyped-call]
        _LIBRARIES.append(library)
    return importlib.import_module("torchvision.models")


def parse_shape(text: str) -> tuple[int, ...]:
    """ "1x3x224x224" -> (1, 3, 224, 224)."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text):
        raise ValueError(f"input is {text!r}, must be sizes joined by 'x', such as 1x3x224x224")
    return tuple(int(size) for size in text.split("x"))


def side_of(name: str) -> int:
    """Height and width of the images that a network of torchvision is made for."""
    return 299 if name == "inception_v3" else 224


def build(name: str, batch: int = 1, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """torchvision's network `name` in eval mode with random weights, and an input for it.

    Deterministic in `seed`; the weights do not depend on the batch.
    """
    check(name)
    model = torchvision_models().get_model(name, weights=None, **_without_weights(name))
    side = side_of(name)
    generator = torch.Generator().manual_seed(seed)
    randomise(model, torch.randn(2, 3, side, side, generator=generator), generator)
    return model, torch.randn(batch, 3, side, side, generator=generator)


def executed(name: str, side: int, batch: int = 1) -> list[tuple[nn.Module, torch.Size, torch.Size]]:
    """torchvision's network `name` on images of `side` x `side`: its convolutions and linear layers in the order of
    execution, repeats included, each with the sizes of its input and its output. Nothing is computed.
    """
    found = []

    def record(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.append((module, inputs[0].shape, output.shape))

    # RegNet computes its widths with tensors, which have no values on the meta device.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision_models().get_model(name, weights=None, **_without_weights(name)).eval().to("meta")
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(record)
    with torch.inference_mode():
        model(torch.empty(batch, 3, side, side, device="meta"))
    return found


def convolutions(name: str, side: int) -> Iterator[ConvProblem]:
    """The problems of torchvision's network `name` for one image, in order of execution, repeats included."""
    for module, src, dst in executed(name, side):
        if isinstance(module, nn.Conv2d):
            (mb, ic, ih, iw), (_, oc, oh, ow) = src, dst
            assert not isinstance(module.padding, str)
            (kh, kw), (sh, sw), (ph, pw), (dh, dw) = module.kernel_size, module.stride, module.padding, module.dilation
            problem = ConvProblem(
                mb=mb,
                g=module.groups,
                ic=ic,
                ih=ih,
                iw=iw,
                oc=oc,
                kh=kh,
                kw=kw,
                sh=sh,
                sw=sw,
                ph=ph,
                pw=pw,
                dh=dh,
                dw=dw,
            )
            assert (problem.oh, problem.ow) == (oh, ow), f"{name}: {problem} gives {oh}x{ow}"
            yield problem


def _without_weights(name: str) -> dict[str, bool]:
    """Two networks would draw their weights from scipy's truncated normal, in seconds."""
    return {"init_weights": False} if name in ("googlenet", "inception_v3") else {}


def convolution_flops(model: nn.Module, x: torch.Tensor) -> int:
    """Operations of all convolutions in one run, as the direct algorithm counts: two for each multiply-add."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(x.shape))
    return int(counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0))


def check(target: str, shape: str | None = None) -> None:
    """Raises the `ValueError` or `ModuleNotFoundError` that `load` would, as far as one can tell without building."""
    if shape is not None:
        parse_shape(shape)
        factory_of(target)
        return
    models = torchvision_models()
    names = models.list_models(module=models)
    if target not in names:
        raise unknown_choice("network", target, names)


def load(target: str, shape: str | None = None, batch: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """torchvision's network `target`; or, if the `shape` of an input is given, the one that MODULE:FACTORY makes."""
    if shape is None:
        return build(target, batch)
    return from_factory(target), torch.randn(parse_shape(shape), generator=torch.Generator().manual_seed(0))


def factory_of(target: str) -> Callable[[], object]:
    """What MODULE:FACTORY names."""
    module_name, _, factory_name = target.partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"{target!r} must read MODULE:FACTORY, such as torchvision.models:resnet18")
    if module_name.split(".")[0] == "torchvision":
        torchvision_models()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{target!r}: {error}") from error
    factory: object = getattr(module, factory_name, None)
    if not callable(factory):
        raise ValueError(f"{target!r}: {module_name} has no callable named {factory_name!r}")
    return factory


def from_factory(target: str) -> nn.Module:
    """The module that MODULE:FACTORY returns, in eval mode, with its own weights."""
    model = factory_of(target)()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target!r} returned {type(model).__name__}, must return a torch.nn.Module")
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, sample: torch.Tensor, generator: torch.Generator) -> None:
    """Draw He weights and batch-norm parameters that are not trivial, in place; leaves `model` in eval mode.

    A batch norm divides by the root mean square over all channels of what `sample` brings to it, off by up to an
    eighth, so that activations neither grow nor vanish with depth; and it subtracts a tenth of that at random.
    Statistics of each channel would magnify rounding: behind random weights some channels are nearly constant, or zero.
    """

    def normal(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(mean + deviation * torch.randn(tensor.shape, generator=generator))

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))

    def set_statistics(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            rms = args[0].square().mean().sqrt()
            normal(norm.running_mean, 0.0, 0.1)
            norm.running_mean.mul_(rms)
            uniform(norm.running_var, 0.75, 1.25)
            norm.running_var.mul_(rms.square())

    model.eval()
    hooks = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0
            normal(module.weight, 0.0, math.sqrt(gain / module.weight[0].numel()))
            if module.bias is not None:
                normal(module.bias, 0.0, 0.05)
        elif isinstance(module, nn.BatchNorm2d):
            if module.affine:
                uniform(module.weight, 0.5, 1.5)
                normal(module.bias, 0.0, 0.1)
            hooks.append(module.register_forward_pre_hook(set_statistics))
    model(sample)
    for hook in hooks:
        hook.remove()
