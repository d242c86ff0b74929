"""The contract of a primitive, and the registry.

A primitive is one way to compute a convolution with its epilogue. It says whether it *can* run a problem
(`refusal`); whether it *should* is the business of `costs` and `selection`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch

from convselect.errors import unknown_choice
from convselect.layout import Layout
from convselect.machine import Machine
from convselect.problem import ConvProblem

ACCURACIES = ("strict", "default", "fast")
"""Accuracy classes, from the tightest; a primitive may be used for its own class and those after it.

They bound the error in float32 by 2e-6, 5e-6 and 2e-5. What is "strict" computes an output from those inputs only that
its kernel reaches.
"""

ACTIVATIONS = (
    "identity",
    "relu",
    "clamp",
    "leaky_relu",
    "silu",
    "sigmoid",
    "hardswish",
    "hardsigmoid",
    "gelu",
    "gelu_tanh",
)
"""Activations an epilogue can hold, in the order of the kernels' enumeration `Act`."""


class Activation(NamedTuple):
    """`kind` is one of `ACTIVATIONS`. clamp: alpha = min, beta = max. leaky_relu: alpha = slope below zero."""

    kind: str = "identity"
    alpha: float = 0.0
    beta: float = 0.0


IDENTITY = Activation()


class Primitive(ABC):
    """One algorithm in one pair of layouts. Stateless; `name` is stable, caches and models are keyed by it.

    Attributes:
        name: family, variant and layout, e.g. "winograd_f4x4_3x3_nhwc".
        family: e.g. "winograd"; an untrained primitive inherits its family's prior.
        traceable: whether `run` calls operators only, which torch can trace.
        src_layout, dst_layout: of the tensors given to and returned by `run`.
        accuracy: the tightest class of `ACCURACIES` it is allowed in.
        error_bound: rel-L2 error against float64 that the tests hold it to, for ic * kh * kw / g <= 4608,
            normal inputs and He weights.
    """

    name: str
    family: str
    device: ClassVar[str] = "cpu"
    traceable: ClassVar[bool] = True
    src_layout: Layout
    dst_layout: Layout
    accuracy: str = "strict"
    error_bound: float = 2e-6

    def error_bound_at(self, precision: str) -> float:
        """`error_bound`, at one of `machine.PRECISIONS`."""
        return self.error_bound

    @abstractmethod
    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        """Why this primitive cannot run `problem` on `machine`, as a sentence; None if it can. Total and pure."""

    @abstractmethod
    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        """Scratch memory of one call with `machine`'s threads, at its precision."""

    @abstractmethod
    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        """Memory of `prepack`'s result at `machine`'s precision."""

    @abstractmethod
    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [oc, ic/g, kh, kw] in the primitive's own order: f32, or src's type on a GPU. Does not alias it."""

    @abstractmethod
    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """activation(conv(src) + bias + residual), f32.

        Args:
            src: f32 [mb', ic, ih, iw], dense in `src_layout`; mb' may differ from `problem.mb`.
            packed: from `prepack` for the same problem.
            bias: f32 [oc] or None.
            residual: f32 [mb', oc, oh, ow], dense in `dst_layout`, or None.

        Returns:
            f32 [mb', oc, oh, ow], dense in `dst_layout`.
        """

    def prepared(
        self, problem: ConvProblem, activation: Activation, src: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor
    ) -> Callable[[], object]:
        """`run` without a residual as a plan calls it, to be timed: what needs no new memory there needs none here."""
        return partial(self.run, problem, activation, src, packed, bias, None)

    def __repr__(self) -> str:
        return f"<{self.name}: {self.src_layout} -> {self.dst_layout}, {self.accuracy}>"


_REGISTRY: dict[str, Primitive] = {}


def register(*primitives: Primitive) -> None:
    for primitive in primitives:
        if primitive.name in _REGISTRY:
            raise ValueError(f"a primitive named {primitive.name!r} is registered already")
        _REGISTRY[primitive.name] = primitive


def primitives(device: str = "cpu") -> list[Primitive]:
    """All registered primitives of `device`, "cpu" or "cuda", in order of registration."""
    if device not in ("cpu", "cuda"):
        raise unknown_choice("device", device, ("cpu", "cuda"))
    return [primitive for primitive in _REGISTRY.values() if primitive.device == device]


def get(name: str) -> Primitive:
    """The primitive of that name. Raises `ValueError` naming the nearest one."""
    if name not in _REGISTRY:
        raise unknown_choice("primitive", name, _REGISTRY)
    return _REGISTRY[name]


def candidates(
    problem: ConvProblem, machine: Machine, accuracy: str, left_out: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Primitive], dict[str, str]]:
    """The primitives that may be chosen for `problem`, and for each other one the sentence that says why it may not.

    `left_out` has such a sentence for whole families. ATen is a candidate only where there is no other.
    """
    found: list[Primitive] = []
    last_resort: list[Primitive] = []
    refusals: dict[str, str] = {}
    for primitive in primitives(machine.device):
        reason = primitive.refusal(problem, machine) or left_out.get(primitive.family)
        if reason is None and ACCURACIES.index(primitive.accuracy) > ACCURACIES.index(accuracy):
            reason = f'its accuracy class is "{primitive.accuracy}", and "{accuracy}" was asked for'
        if primitive.family == "aten":
            last_resort += [primitive] if reason is None else []
        elif reason is None:
            found.append(primitive)
        else:
            refusals[primitive.name] = reason
    return found or last_resort, refusals
