"""The networks of the zoo by name, "torchvision/NAME", "timm/NAME" and "blocks/NAME": random weights, small inputs.

    python benchmarks/zoo_networks.py > benchmarks/zoo/timm.txt

chooses of each family of timm the architecture with the fewest parameters, and the smallest picture that it takes.
"""

from __future__ import annotations

import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo_blocks import BLOCKS, picture

from convselect.bench.networks import torchvision_models

Inputs = Callable[[int], tuple[Any, ...]]
"""The arguments of a call with that batch: random tensors."""

TIMM = Path(__file__).with_name("zoo") / "timm.txt"
"""Lines "module family architecture side"; the side is 0 for what runs on no picture of `SIDES`."""
SIDES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
"""Of square pictures, pixels, tried in this order."""

_SMALL = {"min_size": 96, "max_size": 128}
_DETECTION: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": _SMALL,
    "fasterrcnn_mobilenet_v3_large_fpn": _SMALL,
    "fasterrcnn_resnet50_fpn": _SMALL,
    "fasterrcnn_resnet50_fpn_v2": _SMALL,
    "fcos_resnet50_fpn": _SMALL,
    "keypointrcnn_resnet50_fpn": _SMALL,
    "maskrcnn_resnet50_fpn": _SMALL,
    "maskrcnn_resnet50_fpn_v2": _SMALL,
    "retinanet_resnet50_fpn": _SMALL,
    "retinanet_resnet50_fpn_v2": _SMALL,
    "ssd300_vgg16": {},
    "ssdlite320_mobilenet_v3_large": {},
}
_SEGMENTATION = ("deeplabv3", "fcn", "lraspp")
_VIDEO = {
    "mc3_18": (8, 64),
    "r3d_18": (8, 64),
    "r2plus1d_18": (8, 64),
    "s3d": (16, 224),
    "mvit_v1_b": (16, 224),
    "mvit_v2_s": (16, 224),
    "swin3d_b": (4, 64),
    "swin3d_s": (4, 64),
    "swin3d_t": (4, 64),
}
"""Pictures, and their side."""
_SIDE = {"inception_v3": 96, "quantized_inception_v3": 96, "maxvit_t": 224}


def names() -> list[str]:
    """All networks of the zoo."""
    models = torchvision_models()
    vision = [f"torchvision/{name}" for name in models.list_models()]
    heads = [f"torchvision/{name}:heads" for name in _DETECTION]
    timm = [f"timm/{line.split()[2]}" for line in TIMM.read_text().splitlines()]
    return [f"blocks/{name}" for name in BLOCKS] + sorted([*vision, *heads]) + timm


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The network in eval mode, with weights that depend on nothing but its name, and what makes its inputs."""
    torch.manual_seed(0)
    library, _, network = name.partition("/")
    model, inputs = {"blocks": _block, "torchvision": _vision, "timm": _timm}[library](network)
    vary(model.eval(), inputs(2))
    return model, inputs


def _block(name: str) -> tuple[nn.Module, Inputs]:
    factory, inputs = BLOCKS[name]
    return factory(), inputs


def _vision(name: str) -> tuple[nn.Module, Inputs]:
    models = torchvision_models()
    name, _, part = name.partition(":")
    make = models.get_model
    if name in _DETECTION:
        _define_box_operators()
        model = make(name, weights=None, weights_backbone=None, **_DETECTION[name])
        return (Heads(model) if part else model), lambda batch: ([torch.rand(3, 96, 110) for _ in range(batch)],)
    if name.startswith(_SEGMENTATION):
        return make(name, weights=None, weights_backbone=None), picture(64)
    if name.startswith("raft"):
        return make(name, weights=None), lambda batch: (torch.rand(batch, 3, 128, 128), torch.rand(batch, 3, 128, 128))
    if name in _VIDEO:
        frames, side = _VIDEO[name]
        return make(name, weights=None), lambda batch: (torch.randn(batch, 3, frames, side, side),)
    side = _SIDE.get(name, 64)
    more: dict[str, Any] = {}
    if name.startswith("vit"):
        side = 56 if name == "vit_h_14" else 64
        more = {"image_size": side}
    elif name.endswith(("googlenet", "inception_v3")):  # these two would draw their weights for seconds
        more = {"init_weights": False}
    if name.startswith("quantized"):
        more["quantize"] = False
    return make(name, weights=None, **more), picture(side)


def _timm(name: str) -> tuple[nn.Module, Inputs]:
    side = next(int(line.split()[3]) for line in TIMM.read_text().splitlines() if line.split()[2] == name)
    return timm_model(name, side), picture(side)


def timm_model(name: str, side: int) -> nn.Module:
    """For pictures of that side, where the architecture is told."""
    torchvision_models()
    import timm

    try:
        return timm.create_model(name, img_size=side).eval()
    except TypeError:  # it takes any
        return timm.create_model(name).eval()


class Heads(nn.Module):
    """What a detector's heads give, before boxes are sorted and suppressed: the last bit decides which of them stay.

    Heads that look at boxes are given the same four for each picture.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        self.register_buffer(
            "boxes", torch.tensor([[2, 3, 60, 50], [10, 8, 90, 80], [30, 5, 70, 95], [0, 0, 40, 44.0]])
        )

    def forward(self, pictures: list[Tensor]) -> list[Any]:
        detector = self.detector
        found, _ = detector.transform(pictures)
        features = detector.backbone(found.tensors)
        if not hasattr(detector, "rpn"):
            return [detector.head(list(features.values()))]
        results = [*detector.rpn.head(list(features.values()))]
        boxes, roi = [self.boxes] * len(pictures), detector.roi_heads
        for what in ("box", "mask", "keypoint"):
            pool = getattr(roi, f"{what}_roi_pool", None)
            if pool is not None:
                pooled = pool(features, boxes, found.image_sizes)
                results += tree_leaves(getattr(roi, f"{what}_predictor")(getattr(roi, f"{what}_head")(pooled)))
        return results


def _define_box_operators() -> None:
    """torchvision's operators where its library does not load, so that detectors run.

    Each is an operator to every system: in eager mode torchvision would compile its `roi_align` in Python by Inductor,
    and Dynamo would trace into it.
    """
    from torchvision import extension
    from torchvision.ops import boxes as module

    if extension._has_ops():
        return
    module._assert_has_ops = lambda: None
    library = torch.library.Library("torchvision", "IMPL")

    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        order = scores.argsort(descending=True, stable=True)
        overlaps = (module.box_iou(boxes[order], boxes[order]) > threshold).numpy()
        kept, removed = [], np.zeros(len(order), bool)
        for i, others in enumerate(overlaps):
            if not removed[i]:
                kept.append(i)
                removed |= others
        return order[kept]

    library.impl("nms", nms, "CPU")
    aligning = importlib.import_module("torchvision.ops.roi_align")
    in_python = aligning._roi_align.__wrapped__

    @torch.library.custom_op("zoo::roi_align", mutates_args=())
    def roi_align(
        src: Tensor, boxes: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
    ) -> Tensor:
        result: Tensor = in_python(src, boxes, scale, height, width, ratio, aligned)
        return result

    roi_align.register_fake(
        lambda src, boxes, scale, height, width, *_: src.new_empty(len(boxes), src.shape[1], height, width)
    )
    aligning._roi_align = roi_align
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []


@torch.no_grad()
def vary(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Draws anew what an initialisation leaves constant, in place: a branch that it scales by zero would hide errors.

    A batch norm divides by the root mean square of what `inputs` bring to it, and subtracts a tenth of that at random,
    as `convselect.bench.networks.randomise` explains.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.numel() or not parameter.is_floating_point():
                continue
            constant = parameter.flatten()[0].item()
            if not (parameter == constant).all():
                continue
            is_scale = name == "weight" and parameter.dim() == 1
            if abs(constant) < 1e-3 and not is_scale:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.uniform_(0.75, 1.25).mul_(constant if abs(constant) >= 1e-3 else 1.0)

    def set_statistics(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        rms = args[0].square().mean().sqrt().clamp(min=1e-3)
        norm.running_mean.normal_(0.0, 0.1).mul_(rms)
        norm.running_var.uniform_(0.75, 1.25).mul_(rms.square())

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    model(*inputs)
    for hook in hooks:
        hook.remove()


def families() -> Iterator[tuple[str, str, str]]:
    """(module, first word of the name, architecture with the fewest parameters) for all of timm."""
    torchvision_models()
    import timm
    from timm.models._registry import _model_to_module

    members: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in timm.list_models():
        found = re.match("[a-z]+", name)
        if found:
            members[_model_to_module[name], found[0]].append(name)

    def size(name: str) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())

    for (module, family), architectures in members.items():
        yield module, family, min(architectures, key=size)


@torch.no_grad()
def smallest_side(name: str) -> int:
    """The first of `SIDES` that the architecture runs on; 0 where that is none."""
    for side in SIDES:
        try:
            model = timm_model(name, side)
            model(torch.randn(1, 3, side, side))
        except (RuntimeError, AssertionError, ValueError, IndexError):  # each library module has its own way to refuse
            continue
        return side
    return 0


if __name__ == "__main__":
    for module, family, name in families():
        print(module, family, name, smallest_side(name), flush=True)
