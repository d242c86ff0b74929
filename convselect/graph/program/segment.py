"""Programs: stretches of a lowered graph that run as one operator, no Python and no allocation between the steps."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from convselect.graph.nodes import args_of, call
from convselect.graph.program.arena import Buffer
from convselect.graph.program.slices import head_of
from convselect.graph.program.steps import (
    Address,
    Sizes,
    Steps,
    Value,
    gives_strides,
    is_nhwc,
    is_step,
    is_view,
    takes_strides,
    tensors_of,
)
from convselect.machine import cpu

aten = torch.ops.aten


@dataclass(frozen=True)
class Program:
    """What `convselect::run` takes, for one set of input sizes, one set of constants and one number of threads."""

    words: torch.Tensor
    arena_floats: int
    layers: tuple[str | None, ...]
    """The convolution that each step is, if it is one."""
    constants: tuple[torch.Tensor, ...]
    """Keeps alive what the words point to."""


class Segment:
    """A stretch of the graph: what its nodes compute from `inputs`, by programs made when first needed.

    A call takes the packed weights, the values of `symbols`, which sizes depend on, and the inputs.
    """

    __name__, __module__ = "program", "convselect"
    MOST = 64
    """Programs kept, for different batches."""

    def __init__(
        self,
        nodes: Sequence[Node],
        symbols: Sequence[Node],
        inputs: Sequence[Node],
        outputs: Sequence[Node],
        constants: list[Node],
    ) -> None:
        self.nodes, self.symbols, self.inputs, self.outputs = nodes, symbols, inputs, outputs
        self._constants = constants
        self._programs: tuple[object, dict[object, Program]] = ((), {})
        self._arenas: list[torch.Tensor] = []

    def __call__(
        self, packed: tuple[torch.Tensor, ...], symbols: tuple[int, ...], *inputs: torch.Tensor
    ) -> list[torch.Tensor]:
        return self._run(self.program(packed, symbols), inputs, None)

    def timed(
        self, packed: tuple[torch.Tensor, ...], symbols: tuple[int, ...], *inputs: torch.Tensor
    ) -> tuple[list[torch.Tensor], dict[str, float]]:
        """The results, and the milliseconds of each convolution."""
        program = self.program(packed, symbols)
        nanoseconds = torch.zeros(len(program.layers), dtype=torch.int64, device="cpu")
        results = self._run(program, inputs, nanoseconds)
        times: dict[str, float] = {}
        for layer, time in zip(program.layers, nanoseconds.tolist(), strict=True):
            if layer is not None:
                times[layer] = times.get(layer, 0.0) + 1e-6 * time
        return results, times

    def program(self, packed: tuple[torch.Tensor, ...], symbols: tuple[int, ...]) -> Program:
        constants, programs = self._programs
        if constants is not packed:
            self._programs = packed, programs = packed, {}
        key = (torch.get_num_threads(), symbols)
        program = programs.get(key)
        if program is None:
            if len(programs) >= self.MOST:
                programs.clear()
            program = programs[key] = self._build(packed, symbols)
        return program

    def _run(
        self, program: Program, inputs: Sequence[torch.Tensor], nanoseconds: torch.Tensor | None
    ) -> list[torch.Tensor]:
        # An arena serves one call at a time; calls from several threads find or make others.
        try:
            arena = self._arenas.pop()
        except IndexError:
            arena = None
        if arena is None or arena.numel() < program.arena_floats:
            with torch.inference_mode(False):
                arena = torch.empty(program.arena_floats, dtype=torch.float32, device="cpu")
        results: list[torch.Tensor] = torch.ops.convselect.run(program.words, arena, inputs, nanoseconds)
        self._arenas.append(arena)
        return results

    def _build(self, packed: tuple[torch.Tensor, ...], symbols: tuple[int, ...]) -> Program:
        sizes = _Sizes(self.symbols, symbols)
        values, buffers = place_values(self, sizes)
        steps = Steps(sizes, dict(zip(self._constants, packed, strict=True)), cpu(), values)
        layers: list[str | None] = []

        def emit(begin: int, end: int) -> None:
            for position in range(begin, end):
                steps.emit(self.nodes[position], position)
                layers.extend([self.nodes[position].meta.get("layer")] * (len(steps.records) - len(layers)))

        head = head_of(self.nodes, sizes, steps.constants, steps.machine.threads)
        inside = head.place(buffers)
        for first, images in head:
            steps.sizes = _of_slice(sizes, images)
            steps.values = head.values(values, inside, first)
            emit(0, head.count)
        steps.sizes, steps.values = sizes, values
        emit(head.count, len(self.nodes))
        words, arena = steps.words(buffers)
        header = [steps.machine.threads, arena, len(self.inputs), len(self.outputs), len(steps.records)]
        for node in (*self.inputs, *self.outputs):
            header += [node.meta["val"].dim(), *sizes(node), *sizes.strides(node)]
        with torch.inference_mode(False):
            program = torch.tensor(header + words, device="cpu")
        read = {source for node in self.nodes for source in node.all_input_nodes}
        constants = [tensor for node, tensor in steps.constants.items() if node in read]
        torch.ops.convselect.verify(program, constants)
        return Program(program, arena, tuple(layers), packed)


class _Sizes:
    """A node's sizes, with what is symbolic in them replaced by its value."""

    def __init__(self, symbols: Sequence[Node], values: Sequence[int]) -> None:
        self._known = {node.meta["val"].node.expr: value for node, value in zip(symbols, values, strict=True)}

    def __call__(self, node: Node) -> tuple[int, ...]:
        return tuple(self._number(size) for size in node.meta["val"].shape)

    def strides(self, node: Node) -> tuple[int, ...]:
        return tuple(self._number(stride) for stride in node.meta["val"].stride())

    def _number(self, size: int | torch.SymInt) -> int:
        return size if isinstance(size, int) else int(size.node.expr.subs(self._known))


def _of_slice(sizes: Sizes, images: int) -> Sizes:
    return lambda node: (images, *sizes(node)[1:])


def place_values(segment: Segment, sizes: Callable[[Node], tuple[int, ...]]) -> tuple[dict[Node, Value], list[Buffer]]:
    """Where each value of the segment lies, and the buffers with their lifetimes.

    A value has a buffer of its own, shares its source's (a view, both of which are dense), or lies in a range of the
    channels of the concatenation that it is for.
    """
    home = _homes(segment)
    given = {node: 2 + i for i, node in enumerate((*segment.inputs, *segment.outputs))}
    buffers: dict[Node, Buffer] = {}
    values: dict[Node, Value] = {}
    position = {node: i for i, node in enumerate(segment.nodes)}
    for node in (*segment.inputs, *segment.nodes):
        at = position.get(node, 0)
        if node in position and is_view(node):
            owner, address = node, values[args_of(node)[0]].address
            buffer = address.buffer
        else:
            owner, channel = home.get(node, (node, 0))
            buffer = buffers.setdefault(owner, Buffer(math.prod(sizes(owner)), at, at, given.get(owner, 1)))
            address = Address(buffer, channel)
        values[node] = Value(address, sizes(owner)[1] if len(sizes(owner)) == 4 else 0)
        buffer.last = max(buffer.last, at, *(position.get(user, 0) for user in node.users))
    return values, list(buffers.values())


def _homes(segment: Segment) -> dict[Node, tuple[Node, int]]:
    """Value -> the concatenation in whose memory it lies, and its first channel there.

    From the last concatenation to the first, so that one which is the beginning of a later one (as in DenseNet) is a
    part of that one's memory.
    """
    home: dict[Node, tuple[Node, int]] = {}
    inside = set(segment.nodes)
    for cat in reversed(segment.nodes):
        if cat.target is not aten.cat.default or not is_nhwc(cat):
            continue
        operands = args_of(cat)[0]
        places = [home[operand] for operand in operands if operand in home]
        if cat not in home and cat not in segment.outputs and len(places) == len(operands) and _free(cat):
            owner, channel = places[0]
            channels = [0, *itertools.accumulate(_channels(operand) for operand in operands)]
            if places == [(owner, channel + c) for c in channels[:-1]]:
                home[cat] = owner, channel
                continue
        owner, channel = home.get(cat, (cat, 0))
        for operand in operands:
            alone = operands.count(operand) == 1 and operand not in home and operand not in segment.outputs
            if alone and operand in inside and is_nhwc(operand) and gives_strides(operand) and _free(operand):
                home[operand] = owner, channel
            channel += _channels(operand)
    return home


def _free(node: Node) -> bool:
    """Whether every reader of `node` can find it in a range of channels."""
    return all(takes_strides(user) or _is_size(user) for user in node.users)


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat))


def _sizes_of_steps(graph: Graph) -> set[Node]:
    """Sizes that are computed for steps only, which know theirs: programs do not end there."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        for_steps = all(user in found or (is_step(user) and not is_view(user)) for user in node.users)
        if for_steps and node.op == "call_function" and _is_size(node):
            found.add(node)
    return found


def _is_worth_a_program(stretch: Sequence[Node]) -> bool:
    """Not one of torch's operators alone: calling it takes a few microseconds, a program 15 more."""
    computing = [node for node in stretch if not is_view(node)]
    return len(computing) > 1 or any(not isinstance(node.target, OpOverload) for node in computing)


def _channels(node: Node) -> int:
    return int(node.meta["val"].shape[1])


def split(module: GraphModule, constants: int) -> GraphModule:
    """`module`, whose first `constants` inputs are packed weights and biases, with its stretches of steps as segments.

    The result takes the tuple of constants, then the other inputs.
    """
    new, made = Graph(), {}
    placeholders = module.graph.find_nodes(op="placeholder")
    packed = new.placeholder("packed")
    for node in placeholders[constants:]:
        made[node] = new.placeholder(node.name)
    given = placeholders[:constants]
    symbols = [node for node in placeholders if isinstance(node.meta.get("val"), torch.SymInt)]
    known = {node.meta["val"].node.expr for node in symbols}
    idle = _sizes_of_steps(module.graph)

    def operand(node: Node) -> Node:
        if node in idle and node not in made:
            made[node] = new.node_copy(node, operand)
        elif node not in made:  # a constant that a node of no segment reads
            made[node] = new.call_function(operator.getitem, (packed, given.index(node)))
        return made[node]

    def close(stretch: list[Node]) -> None:
        if not _is_worth_a_program(stretch):
            for node in stretch:
                made[node] = new.node_copy(node, operand)
            return
        inside = {*stretch, *idle}
        outside: set[Node] = set()  # views that are read outside, and what they are views of
        for node in reversed(stretch):
            if is_view(node) and any(user not in inside or user in outside for user in node.users):
                outside.add(node)
        results = [n for n in stretch if n not in outside and any(u not in inside or u in outside for u in n.users)]
        if results:
            sources = dict.fromkeys(source for node in stretch for source in tensors_of(node))
            inputs = [n for n in sources if n not in inside and n not in given]
            values = packed, tuple(map(operand, symbols)), *map(operand, inputs)
            called = call(new, Segment(stretch, symbols, inputs, results, given), *values)
            for i, node in enumerate(results):
                made[node] = new.call_function(operator.getitem, (called, i))
        for node in stretch:
            if node in outside:
                made[node] = new.node_copy(node, operand)

    stretch: list[Node] = []
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in idle:
            continue
        if is_step(node) and free_symbols(node.meta["val"]) <= known:  # not of sizes that depend on data
            stretch.append(node)
            continue
        if stretch:
            close(stretch)
            stretch = []
        made[node] = new.node_copy(node, operand)
    return GraphModule(module, new)
