"""What a captured graph consists of: static inputs (weights), constants computed from them, and convolutions."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._functorch._aot_autograd.descriptors import BufferAOTInput, ParamAOTInput
from torch._guards import GuardSource
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from convselect.graph.nodes import args_of
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

    AOTAutograd says what each of its placeholders is (`desc`): an attribute of Dynamo's module, as weights are where
    Inductor's `freezing` is on, or an input of it, by its index. Dynamo's inputs know where they came from. A tensor
    that is an argument of the call is not static.
    """
    static: set[Node] = set()
    for node in graph.find_nodes(op="placeholder"):
        origin = node.meta.get("desc")
        if isinstance(origin, (ParamAOTInput, BufferAOTInput)):
            static.add(node)
            continue
        index = getattr(origin, "idx", None)
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
    """`static` and every node computed from nothing else, by operators without side effects.

    From nothing at all too: a kernel that `forward` makes by `torch.ones` is constant.
    """
    constant = set(static)
    for node in graph.nodes:
        if node.op == "get_attr":  # a tensor that `forward` made of numbers
            constant.add(node)
        if node.op != "call_function" or node.is_impure() or _is_random(node):
            continue
        if all(source in constant for source in node.all_input_nodes):
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
        reason = target if isinstance(target, str) else _reason_against(node, constant, target)
        problem = _problem(node, int) if reason is None else None
        if problem is None:
            reason = reason or "its input or its result is empty"
            others.append(Unconverted(node, name, str(_problem(node, size_hint) or ""), reason))
            continue
        with graph.inserting_before(node):
            new = graph.call_function(convolution, (*args_of(node)[:3], None))
        new.meta = dict(node.meta)
        new.meta["conv"] = ConvSpec(name, problem)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return others


def _reason_against(node: Node, constant: set[Node], target: Target) -> str | None:
    src, weight, bias, stride, padding, dilation, transposed, _, groups = args_of(node)
    value = src.meta["val"]
    if transposed:
        return "transposed convolutions are not supported"
    if value.dim() != 4:
        return f"only two spatial dimensions are supported (this has {value.dim() - 2})"
    for what, operand in (("input", src), ("weight", weight), ("bias", bias)):
        if operand is None:
            continue
        if (reason := target.refusal(what, operand.meta["val"])) is not None:
            return reason
        if operand is not src and operand not in constant:
            return f"the {what} is computed from the call's arguments, so it cannot be packed ahead"
    sizes = (*value.shape, *map(value_of, (*stride, *padding, *dilation, groups)))
    if free_unbacked_symbols(sizes):
        return "its sizes depend on data"
    if marked_dynamic(sizes[1:]):
        return (
            "its height or width is marked as dynamic (torch._dynamo.mark_dynamic), and sizes other than the batch "
            "are fixed where it is captured"
        )
    return None


def _problem(node: Node, number: Callable[[int | torch.SymInt], int]) -> ConvProblem | None:
    """The problem of an `aten.convolution`; None if it is transposed, not of two dimensions, or of empty tensors.

    number: makes an integer of a symbolic size. `int` specialises: it adds a guard. The batch is always a hint, as it
    may change from call to call.
    """
    src, weight, _, stride, padding, dilation, transposed, _, groups = args_of(node)
    if transposed or src.meta["val"].dim() != 4:
        return None
    mb, *sizes = src.meta["val"].shape
    oc, _, *kernel = weight.meta["val"].shape
    window = (kernel, stride, padding, dilation)
    pairs = [[number(value_of(length)) for length in lengths] for lengths in window]
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = ((pair[0], pair[-1]) for pair in pairs)  # one number serves both
    ic, ih, iw = map(number, sizes)
    g, oc = number(value_of(groups)), number(oc)
    try:
        return ConvProblem(
            mb=size_hint(mb), g=g, ic=ic, ih=ih, iw=iw, oc=oc, kh=kh, kw=kw, sh=sh, sw=sw, ph=ph, pw=pw, dh=dh, dw=dw
        )
    except ValueError:
        return None


def value_of(argument: Any) -> Any:
    """What an argument of a node is when the graph is traced: its value if it is a node, else itself."""
    return argument.meta["val"] if isinstance(argument, Node) else argument


def size_hint(size: int | torch.SymInt) -> int:
    """The size in the example at hand, without a guard: the batch may change from call to call. 0 if data decide it."""
    return size if isinstance(size, int) else int(size.node.hint) if size.node.has_hint() else 0


def known_size(size: int | torch.SymInt) -> int | None:
    """The size where it is the same in each call of the graph, without a new guard."""
    known: int | None = size if isinstance(size, int) else size.node.maybe_as_int()
    return known


def expressions(sizes: Iterable[Any]) -> list[Any]:
    """Numbers, or expressions of the graph's symbols, which are equal or not without a guard."""
    values = map(value_of, sizes)
    return [value.node.expr if isinstance(value, torch.SymInt) else value for value in values]


def marked_dynamic(sizes: Iterable[int | torch.SymInt]) -> bool:
    """Whether the caller has said of one of them that it must not be specialised (`torch._dynamo.mark_dynamic`)."""
    symbolic = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    if not symbolic:
        return False
    marked = set()
    for tracked in symbolic[0].shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            if constraint is not None and not constraint.warn_only and isinstance(size, torch.SymInt):
                marked |= size.node.expr.free_symbols
    return any(marked & node.expr.free_symbols for node in symbolic)


def nbytes(node: Node) -> int:
    """Bytes of the node's value, 0 if that is no tensor."""
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
