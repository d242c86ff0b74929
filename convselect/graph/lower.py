"""Lowering: the assigned graph becomes calls of primitives, with the layout transforms that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from convselect.graph.aliasing import may_alias
from convselect.graph.assign import Option, Where
from convselect.graph.capture import ConvSpec, convolution, kept, known_size, scale_shift, size_hint
from convselect.graph.nodes import args_of, call
from convselect.graph.operators import in_both, in_programs, is_activation, layout_of
from convselect.graph.results import Strides
from convselect.layout import Layout, dense, holds, strides
from convselect.primitive import ACTIVATIONS, Activation, Primitive
from convselect.primitives import upsampling
from convselect.primitives.gpu import norms
from convselect.primitives.pooling import ARGUMENTS, Arguments
from convselect.problem import ConvProblem


@dataclass
class Lowered:
    """`module` takes the constants, then the placeholders at `arguments` of the original graph."""

    module: GraphModule
    arguments: list[int]
    transforms: list[tuple[Node, Where, Layout, list[Node]]] = field(default_factory=list)
    """Value of the original graph, the layout it was in, the layout it is brought to, and who reads it so."""


class Call:
    """A primitive bound to its problem: what the lowered graph calls."""

    def __init__(self, primitive: Primitive, problem: ConvProblem, activation: Activation) -> None:
        self.primitive, self.problem, self.activation = primitive, problem, activation
        self.__name__ = primitive.name
        self.__module__ = "convselect"

    def __call__(
        self, src: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        return self.primitive.run(self.problem, self.activation, src, packed, bias, residual)


class ScaleShift:
    """The operator `scale_shift` with its activation: what the lowered graph calls."""

    __name__, __module__ = "scale_shift", "convselect"

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.arguments = (ACTIVATIONS.index(activation.kind), activation.alpha, activation.beta)

    def __call__(self, src: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        if not in_programs(src):
            return norms.scale_shift(src, scale, shift, self.activation)
        result: torch.Tensor = torch.ops.convselect.scale_shift(src, scale, shift, *self.arguments)
        return result


def to_layout(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`value`, dense in `layout`, with exactly its strides. Not a copy if it is dense already."""
    if holds(value, layout):
        return dense(value, layout)
    other = Layout.NCHW if layout is Layout.NHWC else Layout.NHWC
    if in_programs(value) and holds(value, other):
        changed: torch.Tensor = torch.ops.convselect.to_layout(value, layout is Layout.NHWC)
        return changed
    return value.contiguous(memory_format=layout.memory_format)


def with_strides(value: torch.Tensor, to: tuple[int, ...]) -> torch.Tensor:
    """A view of `value`, which is dense, with other strides for its dimensions of size 1."""
    return value.as_strided(value.shape, to)


def copied(value: torch.Tensor, to: tuple[int, ...]) -> torch.Tensor:
    """`value` with these strides: a copy, unless ATen gave them, of which tracing knew otherwise."""
    return value if value.stride() == to else value.new_empty_strided(value.shape, to).copy_(value)


class _Lowering:
    def __init__(self, graph: Graph, chosen: Mapping[Node, Option], constants: int) -> None:
        self.graph, self.chosen = graph, chosen
        self.new = Graph()
        self.constants = [self.new.placeholder(f"constant_{i}") for i in range(constants)]
        self.made: dict[Node, Node] = {}
        self.where: dict[Node, Where] = {}
        self.copies: dict[tuple[Node, Layout], Node] = {}
        self.readers: dict[tuple[Node, Layout], list[Node]] = {}
        self.lowered = Lowered(GraphModule({}, Graph()), [])

    def read(self, value: Node, layout: Where, reader: Node) -> Node:
        """The new node that holds `value` in `layout`; None takes it as it is."""
        if not is_activation(value.meta.get("val")) or layout is None:
            return self.made[value]
        if in_both(value.meta["val"]) and self.where[value] is not None:
            return self.made[value]
        if self.where[value] is layout:
            return self.made[value]
        if (value, layout) not in self.copies:
            self.readers[value, layout] = []
            self.lowered.transforms.append((value, self.where[value], layout, self.readers[value, layout]))
            copy = call(self.new, to_layout, self.made[value], layout)
            copy.meta["val"] = _empty(value.meta["val"], layout)
            self.copies[value, layout] = copy
        self.readers[value, layout].append(reader)
        return self.copies[value, layout]

    def _output(self, node: Node) -> None:
        """Results have eager's strides, also where sizes of 1 make them meaningless."""
        strides: Strides = node.meta.get("strides", {})
        results = [
            self._result(value, node, strides.get(position)) if isinstance(value, Node) else value
            for position, value in enumerate(args_of(node)[0])
        ]
        self.new.output(tuple(results))

    def _result(self, value: Node, output: Node, eager: tuple[int, ...] | None) -> Node:
        traced = value.meta.get("val")
        made = self.read(value, layout_of(traced) if is_activation(traced) else None, output)
        if not isinstance(traced, torch.Tensor):
            return made
        given = made.meta["val"]
        to = eager or tuple(known for stride in traced.stride() if (known := known_size(stride)) is not None)
        if len(to) < traced.dim() or given.stride() == to:
            return made
        alike = _alike(given, to)
        if not alike and may_alias(value):  # a copy would not be what it is a view of
            return made
        result = self.new.call_function(with_strides if alike else copied, (made, to))
        result.meta["val"] = torch.empty_strided(traced.shape, to, dtype=traced.dtype, device=traced.device)
        return result

    def run(self) -> Lowered:
        for position, node in enumerate(self.graph.find_nodes(op="placeholder")):
            if node.users or isinstance(node.meta.get("val"), torch.SymInt):  # which sizes depend on
                self.lowered.arguments.append(position)
                self._place(node, self.new.placeholder(node.name), node.meta.get("val"), self.chosen[node])
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            option = self.chosen[node]
            if node.target is kept:
                self._place(node, self.constants[node.meta["constants"][0]], node.meta["val"], option)
            elif node.op == "output":
                self._output(node)
            elif node.target is convolution:
                self._convolution(node, option)
            else:
                self._operator(node, option)
        # The captured module has the tensors made in `forward`.
        self.lowered.module = GraphModule(self.graph.owning_module or {}, self.new)
        return self.lowered

    def _place(self, node: Node, new: Node, value: Any, option: Option) -> None:
        """`new` computes `node`, as the fake `value`, which is brought to the layout that readers expect."""
        traced = node.meta.get("val")
        if isinstance(traced, torch.Tensor) and _hints(traced) != _hints(value):
            raise RuntimeError(f"{new.name} gives {_hints(value)} for {node.name}, which is {_hints(traced)}")
        new.meta |= {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        new.meta["val"] = value
        if is_activation(traced) and option.gives is not None and not holds(value, option.gives):
            new = call(self.new, to_layout, new, option.gives)
            new.meta["val"] = _empty(traced, option.gives)
        self.made[node], self.where[node] = new, option.gives

    def _convolution(self, node: Node, option: Option) -> None:
        src, _, _, residual = args_of(node)
        spec: ConvSpec = node.meta["conv"]
        weight, bias = node.meta["constants"]
        assert option.candidate is not None
        operands = (
            self.read(src, option.reads, node),
            self.constants[weight],
            None if bias is None else self.constants[bias],
            None if residual is None else self.read(residual, option.gives, node),
        )
        primitive, p = option.candidate.primitive, spec.problem
        new = self.new.call_function(Call(primitive, p, spec.activation), operands)
        new.meta["layer"] = spec.name
        size = (node.meta["val"].shape[0], p.oc, p.oh, p.ow)
        value = node.meta["val"].new_empty_strided(size, strides(size, primitive.dst_layout))
        self._place(node, new, value, option)

    def _operator(self, node: Node, option: Option) -> None:
        def operand(value: Node) -> Node:
            traced = value.meta.get("val")
            return self.read(value, option.reads or (layout_of(traced) if is_activation(traced) else None), node)

        if node.target is scale_shift:
            scale, shift = (self.constants[position] for position in node.meta["constants"])
            new = self.new.call_function(ScaleShift(node.meta["activation"]), (operand(args_of(node)[0]), scale, shift))
            value = _empty(node.meta["val"], layout_of(args_of(new)[0].meta["val"]) or Layout.NCHW)
        elif (pooling := _pooling(node, option)) is not None:
            new = self.new.call_function(torch.ops.convselect.pool2d.default, (operand(args_of(node)[0]), *pooling))
            value = _empty(node.meta["val"], Layout.NHWC)
        elif node.target in upsampling.ARGUMENTS and option.reads is Layout.NHWC and node.meta["val"].is_cpu:
            upsampled = upsampling.ARGUMENTS[node.target](*args_of(node)[1:], **node.kwargs)
            operands = torch.fx.map_arg((args_of(node)[0], *upsampled), operand)
            new = self.new.call_function(torch.ops.convselect.upsample2d.default, operands)
            value = _empty(node.meta["val"], Layout.NHWC)
        else:
            new = self.new.node_copy(node, operand)
            value = self._given(node, new)
        if option.reads is not None and is_activation(node.meta.get("val")):
            new.meta["operator"] = node.name
        self._place(node, new, value, option)

    def _given(self, node: Node, new: Node) -> Any:
        """What ATen's `new` gives: for operands other than those traced, ask it, as layouts are its decision."""
        pairs = zip(node.all_input_nodes, new.all_input_nodes, strict=True)
        same = all(_same_strides(source.meta.get("val"), made.meta.get("val")) for source, made in pairs)
        if same or node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            return node.meta.get("val")
        tags = getattr(node.target, "tags", ())
        if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
            return node.meta["val"]
        args, kwargs = torch.fx.map_arg((args_of(new), new.kwargs), lambda n: n.meta["val"])
        operator: Any = node.target
        return operator(*args, **kwargs)


def _pooling(node: Node, option: Option) -> Arguments | None:
    """What the operator that pools in NHWC takes after its source, where it computes `node`."""
    if node.target not in ARGUMENTS or option.reads is not Layout.NHWC:
        return None
    src = args_of(node)[0].meta["val"]
    sizes, out = ([known_size(size) for size in value.shape[1:]] for value in (src, node.meta["val"]))
    if not in_programs(src) or in_both(src) or None in (*sizes, *out):
        return None
    return ARGUMENTS[node.target]((0, *sizes), (0, *out), *args_of(node)[1:], **node.kwargs)


def _same_strides(value: Any, other: Any) -> bool:
    return value is other or (
        isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and value.stride() == other.stride()
    )


def _hints(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(map(size_hint, value.shape))


def _alike(value: torch.Tensor, to: tuple[int, ...]) -> bool:
    """Whether `value` has the strides `to` but for where sizes of 0 or 1 make them meaningless."""
    dimensions = zip(value.shape, value.stride(), to, strict=True)
    return 0 in value.shape or all(size == 1 or stride == other for size, stride, other in dimensions)


def _empty(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A fake tensor of the shape of the fake `value`, dense in `layout`."""
    return torch.empty_like(value, memory_format=layout.memory_format)


def lower(graph: Graph, chosen: Mapping[Node, Option], constants: int) -> Lowered:
    """Builds the module that runs `graph` as `chosen` says. Call under the fake mode of the graph's values."""
    return _Lowering(graph, chosen, constants).run()
