"""`Plan`: what was chosen for one graph, and why. Plain data, which `to_json` writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class LayerPlan:
    """One convolution of the graph. Times in milliseconds, sizes in bytes."""

    name: str
    """Qualified name of the module, or of the graph's node where there is none."""
    problem: str
    """In `ConvProblem`'s grammar; empty for a convolution that is not two-dimensional."""
    primitive: str
    """Name in the registry; "aten" where no primitive takes it."""
    family: str
    src_layout: str
    dst_layout: str
    activation: str
    residual: bool
    predicted_ms: float | None
    runner_up: str | None
    runner_up_ms: float | None
    packed_bytes: int = 0
    workspace_bytes: int = 0
    refusals: dict[str, str] = field(default_factory=dict)
    """Primitive -> the sentence that says why it could not run here."""
    measured_ms: float | None = None
    """Filled in by `explain`."""
    interval_ms: tuple[float, float] | None = None
    """Holds the chosen primitive's time with 90% probability, by the model; narrow where it was timed."""


@dataclass(frozen=True)
class TransformPlan:
    """A change of layout that the plan inserts: the tensor `value` (a node of the graph), before its `consumers`."""

    value: str
    consumers: tuple[str, ...]
    shape: tuple[int, ...]
    src_layout: str
    dst_layout: str
    predicted_ms: float


@dataclass(frozen=True)
class OperatorPlan:
    """An operator between convolutions that the assignment gave a layout."""

    name: str
    operator: str
    layout: str
    predicted_ms: float


@dataclass(frozen=True)
class Plan:
    machine: str
    fingerprint: str
    accuracy: str
    select: str
    calibrated: bool
    layers: tuple[LayerPlan, ...]
    transforms: tuple[TransformPlan, ...]
    operators: tuple[OperatorPlan, ...]
    total_predicted_ms: float
    """Layers, transforms and operators together."""
    gap_ms: float
    """The assignment is proven to cost at most this much more than the least possible; 0 is exact."""
    select_ms: float
    """Time that prediction and selection took."""
    edges: tuple[tuple[str, str], ...] = ()
    """Producer -> consumer, over the names of layers and operators; for the picture."""
    memory_mb: float | None = None
    """The bound that was asked for on packed weights and workspace together."""
    cuda_graph: str = ""
    """On a GPU: whether it is captured, and if not, why."""

    @property
    def packed_bytes(self) -> int:
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def workspace_bytes(self) -> int:
        return max((layer.workspace_bytes for layer in self.layers), default=0)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def merged(plans: Sequence[Plan]) -> Plan:
    """One plan for a model that capture has split into several graphs, one after the other. Where those with
    convolutions differ in what holds for a whole graph, it says all of it.
    """
    plans = [plan for plan in plans if plan.layers] or plans

    def chain(name: str) -> tuple[Any, ...]:
        return tuple(item for plan in plans for item in getattr(plan, name))

    changes: dict[str, Any] = {name: chain(name) for name in ("layers", "transforms", "operators", "edges")}
    for name in ("total_predicted_ms", "gap_ms", "select_ms"):
        changes[name] = sum(getattr(plan, name) for plan in plans)
    for name in ("machine", "fingerprint", "cuda_graph"):
        changes[name] = "; ".join(dict.fromkeys(filter(None, (getattr(plan, name) for plan in plans))))
    return replace(plans[0], **changes)
