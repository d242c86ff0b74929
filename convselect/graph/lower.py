"""Lowering: the assigned graph becomes calls of primitives, with the layout transforms that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, GraphModule, Node

from convselect.graph.assign import Option, Where
from convselect.graph.capture import ConvSpec, convolution, kept, scale_shift
from convselect.graph.operators import in_both, is_activation, layout_of
from convselect.layout import Layout, dense, holds
from convselect.pooling import ARGUMENTS, Arguments
from convselect.primitive import ACTIVATIONS, Activation, Primitive
from convselect.primitives.gpu import norms
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
        primitive = self.primitive
        if primitive.device != "cpu":  # what ATen's operators give there, tracing does not always tell
            src = dense(src, primitive.src_layout)
            residual = None if residual is None else dense(residual, primitive.dst_layout)
        return primitive.run(self.problem, self.activation, src, packed, bias, residual)


class ScaleShift:
    """The operator `scale_shift` with its activation: what the lowered graph calls."""

    __name__, __module__ = "scale_shift", "convselect"

    def __init__(self, activation: Activation) -> None:
        self.activation = activation
        self.arguments = (ACTIVATIONS.index(activation.kind), activation.alpha, activation.beta)

    def __call__(self, src: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        if src.device.type != "cpu":
            return norms.scale_shift(src, scale, shift, self.activation)
        return torch.ops.convselect.scale_shift(src, scale, shift, *self.arguments)


def to_layout(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`value`, dense in `layout`. Not a copy if it is already."""
    if holds(value, layout):
        return value
    other = Layout.NCHW if layout is Layout.NHWC else Layout.NHWC
    if value.device.type == "cpu" and holds(value, other):
        return torch.ops.convselect.to_layout(value, layout is Layout.NHWC)
    return value.contiguous(memory_format=layout.memory_format)


def with_strides(value: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A view of `value`, which is dense, with other strides for its dimensions of size 1."""
    return value.as_strided(value.shape, strides)


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
            return self._as_traced(value) if reader.op == "output" else self.made[value]
        if self.where[value] is layout:
            return self.made[value]
        if (value, layout) not in self.copies:
            self.readers[value, layout] = []
            self.lowered.transforms.append((value, self.where[value], layout, self.readers[value, layout]))
            copy = self.new.call_function(to_layout, (self.made[value], layout))
            copy.meta["val"] = _empty(value.meta["val"], layout)
            self.copies[value, layout] = copy
        self.readers[value, layout].append(reader)
        return self.copies[value, layout]

    def _as_traced(self, value: Node) -> Node:
        """A result of the graph has the strides of eager's, also where dimensions of size 1 make them meaningless."""
        made, traced = self.made[value], value.meta["val"]
        if made.meta["val"].stride() == traced.stride():
            return made
        view = self.new.call_function(with_strides, (made, tuple(int(stride) for stride in traced.stride())))
        view.meta["val"] = traced
        return view

    def run(self) -> Lowered:
        for position, node in enumerate(self.graph.find_nodes(op="placeholder")):
            if node.users or isinstance(node.meta.get("val"), torch.SymInt):  # which sizes depend on
                self.lowered.arguments.append(position)
                self.made[node] = self.new.placeholder(node.name)
                self._place(node, self.chosen[node].gives)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                continue
            option = self.chosen[node]
            if node.target is kept:
                self.made[node] = self.constants[node.meta["constants"][0]]
                self._place(node, option.gives)
            elif node.target is convolution:
                self._convolution(node, option)
            else:
                self._operator(node, option)
        self.lowered.module = GraphModule(
            self.graph.owning_module or {}, self.new
        )  # which has tensors made in `forward`
        return self.lowered

    def _place(self, node: Node, layout: Where) -> None:
        self.where[node] = layout
        self.made[node].meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self.made[node].meta["val"] = node.meta.get("val")

    def _convolution(self, node: Node, option: Option) -> None:
        src, _, _, residual = node.args
        spec: ConvSpec = node.meta["conv"]
        weight, bias = node.meta["constants"]
        assert option.candidate is not None
        operands = (
            self.read(src, option.reads, node),
            self.constants[weight],
            None if bias is None else self.constants[bias],
            None if residual is None else self.read(residual, option.gives, node),
        )
        call = Call(option.candidate.primitive, spec.problem, spec.activation)
        self.made[node] = self.new.call_function(call, operands)
        self._place(node, option.gives)
        self.made[node].meta |= {"val": _empty(node.meta["val"], option.gives), "layer": spec.name}

    @staticmethod
    def _pooling(node: Node, option: Option) -> Arguments | None:
        """What the operator that pools in NHWC takes after its source, where it computes `node`."""
        if node.target not in ARGUMENTS or option.reads is not Layout.NHWC:
            return None
        src = node.args[0].meta["val"]
        if src.device.type != "cpu" or in_both(src):
            return None
        return ARGUMENTS[node.target](src.shape, node.meta["val"].shape, *node.args[1:], **node.kwargs)

    def _operator(self, node: Node, option: Option) -> None:
        def operand(value: Node) -> Node:
            traced = value.meta.get("val")
            return self.read(value, option.reads or (layout_of(traced) if is_activation(traced) else None), node)

        if node.target is scale_shift:
            scale, shift = (self.constants[position] for position in node.meta["constants"])
            new = self.new.call_function(ScaleShift(node.meta["activation"]), (operand(node.args[0]), scale, shift))
        elif (pooling := self._pooling(node, option)) is not None:
            new = self.new.call_function(torch.ops.convselect.pool2d.default, (operand(node.args[0]), *pooling))
        else:
            new = self.new.node_copy(node, operand)
        self.made[node] = new
        self._place(node, option.gives)
        if node.target is scale_shift:
            new.meta |= {"val": _empty(node.meta["val"], option.gives), "operator": node.name}
            return
        if node.op == "output" or option.reads is None or not is_activation(node.meta.get("val")):
            return
        # Which layout an operator's result has is ATen's decision: ask it, and mend the result where it differs.
        args = torch.fx.map_arg(new.args, lambda n: n.meta["val"])
        kwargs = torch.fx.map_arg(new.kwargs, lambda n: n.meta["val"])
        value = new.target(*args, **kwargs)
        if option.gives is not None and not holds(value, option.gives):
            new.meta["val"] = value
            new = self.new.call_function(to_layout, (new, option.gives))
            self.made[node] = new
        new.meta["val"] = _empty(node.meta["val"], option.gives)
        new.meta["operator"] = node.name


def _empty(value: torch.Tensor, layout: Where) -> torch.Tensor:
    """A fake tensor of the shape of the fake `value`, dense in `layout`."""
    assert layout is not None
    return torch.empty_like(value, memory_format=layout.memory_format)


def lower(graph: Graph, chosen: Mapping[Node, Option], constants: int) -> Lowered:
    """Builds the module that runs `graph` as `chosen` says. Call under the fake mode of the graph's values."""
    return _Lowering(graph, chosen, constants).run()
