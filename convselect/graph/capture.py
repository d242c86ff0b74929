"""What a captured graph consists of: static inputs (weights), constants computed from them, and convolutions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._guards import GuardSource
from torch.fx import Graph, Node

from convselect.graph.target import Target
from convselect.primitive import IDENTITY, Activation
from convselect.problem import ConvProblem

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvSpec:
    """A convolution of the graph as the rest of the pass sees it: kept in `node.meta["conv"]`."""

    name: str
    problem: ConvProblem
    activation: Activation = IDENTITY


def convolution(
    src: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """The graph's node for `activation(conv(src) + bias + residual)`; `ConvSpec` says the rest. Never called."""
    raise NotImplementedError("a convolution that was not lowered")


def scale_shift(src: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The node for `activation(src * scale + shift)` by channel; `meta["activation"]` says which. Never called."""
    raise NotImplementedError("a batch norm that was not lowered")


def kept() -> torch.Tensor:
    """The node for a constant that was computed ahead; `meta["constants"]` says which. Never called."""
    raise NotImplementedError("a constant that was not lowered")


@dataclass(frozen=True)
class Unconverted:
    """A convolution that stays with ATen, and why."""

    node: Node
    name: str
    problem: str
    reason: str


def static_inputs(graph: Graph, dynamo_placeholders: Sequence[Node]) -> set[Node]:
    """The placeholders of `graph` that hold weights: parameters, buffers and other tensors kept by a module.

    AOTAutograd tells for each of its placeholders the index of Dynamo's (`desc.idx`); Dynamo's know where they came
    from. A tensor that is an argument of the call is not static.
    """
    static: set[Node] = set()
    for node in graph.find_nodes(op="placeholder"):
        index = getattr(node.meta.get("desc"), "idx", None)
        if index is None or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        grapharg = dynamo_placeholders[index].meta.get("grapharg")
        source = getattr(grapharg, "source", None)
        if source is None:
            continue
        origin = source.guard_source
        kept_by_module = origin.is_unspecialized_nn_module() or origin.is_specialized_nn_module()
        is_global = origin is GuardSource.GLOBAL
        if kept_by_module or is_global or isinstance(grapharg.example, torch.nn.Parameter):
            static.add(node)
    return static


def constants(graph: Graph, static: set[Node]) -> set[Node]:
    """`static` and every node computed from nothing else, by operators without side effects."""
    constant = set(static)
    for node in graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        if not all(source in constant for source in node.all_input_nodes):
            continue
        if not node.is_impure() and not _is_random(node):
            constant.add(node)
    return constant


def _is_random(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def find_convolutions(graph: Graph, constant: set[Node], target: Target | str) -> list[Unconverted]:
    """Replaces each `aten.convolution` that primitives may take by `convolution`; returns the others.

    `target`: where all of them run, or the sentence that says why none is replaced.
    """
    others = []
    seen: Counter[str] = Counter()
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        name = qualified_name(node)
        seen[name] += 1
        if seen[name] > 1:  # a module that is called again
            name = f"{name}#{seen[name]}"
        src, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        reason = target if isinstance(target, str) else _reason_against(node, constant, target)
        problem = None
        if not (transposed or len(stride) != 2 or src.meta["val"].dim() != 4):
            problem = _problem(src.meta["val"], weight.meta["val"], stride, padding, dilation, groups)
        if reason is None and problem is None:
            reason = "the batch is empty"
        if reason is not None or problem is None:
            others.append(Unconverted(node, name, str(problem or ""), reason or ""))
            continue
        with graph.inserting_before(node):
            new = graph.call_function(convolution, (src, weight, bias, None))
        new.meta = dict(node.meta)
        new.meta["conv"] = ConvSpec(name, problem)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return others


def _reason_against(node: Node, constant: set[Node], target: Target) -> str | None:
    src, weight, bias, stride, _, _, transposed, _, _ = node.args
    value = src.meta["val"]
    if transposed:
        return "transposed convolutions are not supported"
    if len(stride) != 2 or value.dim() != 4:
        return f"only two spatial dimensions are supported (this has {len(stride)})"
    for what, operand in (("input", src), ("weight", weight), ("bias", bias)):
        if operand is None:
            continue
        if (reason := target.refusal(what, operand.meta["val"])) is not None:
            return reason
        if operand is not src and operand not in constant:
            return f"the {what} is computed from the call's arguments, so it cannot be packed ahead"
    return None


def _problem(
    src: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> ConvProblem | None:
    """None for an empty batch. Spatial sizes specialise: `int` of a symbolic size adds a guard."""
    batch = size_hint(src.shape[0])
    if batch == 0:
        return None
    _, ic, ih, iw = (batch, *(int(size) for size in src.shape[1:]))
    oc, _, kh, kw = (int(size) for size in weight.shape)
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    return ConvProblem(
        mb=batch, g=groups, ic=ic, ih=ih, iw=iw, oc=oc, kh=kh, kw=kw, sh=sh, sw=sw, ph=ph, pw=pw, dh=dh, dw=dw
    )


def size_hint(size: int | torch.SymInt) -> int:
    """The size in the example at hand, without a guard: the batch may change from call to call."""
    return size if isinstance(size, int) else int(size.node.hint)


def nbytes(node: Node) -> int:
    """Of the node's value, 0 if that is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(size_hint(size) for size in value.shape) * value.element_size()


def qualified_name(node: Node) -> str:
    """Where in the module tree the node comes from, e.g. "layer1.0.conv1"; else the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.name)
    path = next(reversed(stack.values()))[0]
    path = re.sub(r"\._(?:modules|parameters)\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\['([^']*)'\]", r".\1", path)
    parts = [part for part in path.split(".") if part and part != "_orig_mod"]
    return ".".join(parts[2:]) or str(node.name)
