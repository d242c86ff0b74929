"""Steps: what a node of a lowered graph is to a program, as the fields that the kernels read."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from convselect.graph.fuse import activation_of
from convselect.graph.lower import Call, ScaleShift, to_layout
from convselect.graph.nodes import args_of
from convselect.graph.operators import in_programs, layout_of
from convselect.graph.program.arena import Buffer, place
from convselect.layout import Layout, holds
from convselect.machine import Machine
from convselect.primitive import ACTIVATIONS, IDENTITY, Activation
from convselect.primitives.kernel import KernelPrimitive

aten = torch.ops.aten
ops = torch.ops.convselect

STEPS = ("conv", "to_layout", "scale_shift", "linear", "pool", "upsample")
"""In the order of the kernels' enumeration `Step`."""

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dims, aten.alias.default)


def is_step(node: Node) -> bool:
    """Whether a program can run `node`; a view costs it nothing."""
    if node.op != "call_function" or not in_programs(node.meta.get("val")):
        return False
    value, target = node.meta["val"], node.target
    sources = tensors_of(node)
    if isinstance(target, Call):
        return isinstance(target.primitive, KernelPrimitive)
    if not all(in_programs(source.meta.get("val")) and _is_dense(source) for source in sources):
        return False
    if target is to_layout:
        return True
    if isinstance(target, ScaleShift) or target in (ops.pool2d.default, ops.upsample2d.default, ops.linear.default):
        return True
    if target in _VIEWS:
        return bool(sources[0].meta["val"].is_contiguous() and value.is_contiguous())
    if target is aten.cat.default:
        return value.dim() == 4 and args_of(node)[1:] in ((1,), (-3,)) and _same_layout(node, args_of(node)[0])
    if target is aten.mul.Tensor:
        return excited(node) is not None
    if target is aten.add.Tensor:
        return len(sources) == 2 and not node.kwargs and value.dim() == 4 and _same_layout(node, sources, shape=True)
    if activation_of(node) is not None:
        return value.is_contiguous() or _same_layout(node, sources)
    return False


def tensors_of(node: Node) -> list[Node]:
    """The operands of `node` that are tensors; others are sizes."""
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), torch.Tensor)]


def is_view(node: Node) -> bool:
    """Whether `node`, a step, is the bytes of its source."""
    if node.target is to_layout:
        return holds(args_of(node)[0].meta["val"], args_of(node)[1])
    return node.target in _VIEWS


def excited(node: Node) -> tuple[Node, Node] | None:
    """(x, s) where `node` is x [mb, c, h, w] times s [mb, c, 1, 1] by channel; None if it is another product."""
    for x, s in (args_of(node), args_of(node)[::-1]):
        if not (isinstance(x, Node) and isinstance(s, Node)):
            return None
        if not (isinstance(x.meta["val"], torch.Tensor) and isinstance(s.meta["val"], torch.Tensor)):  # sizes
            return None
        shapes = x.meta["val"].shape, s.meta["val"].shape
        if len(shapes[0]) == 4 and shapes[1] == (*shapes[0][:2], 1, 1) and _same_layout(node, [x], shape=True):
            return x, s
    return None


def takes_strides(node: Node) -> bool:
    """Whether `node` can read its first source from a range of the channels of a wider NHWC tensor."""
    return isinstance(node.target, ScaleShift) or node.target is aten.cat.default


def gives_strides(node: Node) -> bool:
    """Whether `node` can write into a range of the channels of a wider NHWC tensor."""
    if isinstance(node.target, Call):
        return node.target.primitive.dst_layout is Layout.NHWC and args_of(node)[3] is None
    return node.target in (ops.pool2d.default, ops.upsample2d.default) or takes_strides(node)


def is_nhwc(node: Node) -> bool:
    """Also for a value that is dense in both layouts."""
    return bool(node.meta["val"].dim() == 4 and holds(node.meta["val"], Layout.NHWC))


def _is_dense(node: Node) -> bool:
    value = node.meta["val"]
    return layout_of(value) is not None if value.dim() == 4 else bool(value.is_contiguous())


def _same_layout(node: Node, sources: Sequence[Node], shape: bool = False) -> bool:
    layout = layout_of(node.meta["val"]) if node.meta["val"].dim() == 4 else None
    values = [source.meta["val"] for source in sources]
    return layout is not None and all(
        value.dim() == 4 and holds(value, layout) and (not shape or value.shape == node.meta["val"].shape)
        for value in values
    )


@dataclass(frozen=True)
class Address:
    """`offset` floats into `buffer`."""

    buffer: Buffer
    offset: int = 0


@dataclass(frozen=True)
class Value:
    """Where a node's value is: `stride` floats from pixel to pixel if it is 4-d in NHWC."""

    address: Address
    stride: int


Word = int | float | Address | None


Sizes = Callable[[Node], tuple[int, ...]]


@dataclass
class Steps:
    """The steps of a program under construction. `sizes` gives a node's sizes, `values` where it lies."""

    sizes: Sizes
    constants: Mapping[Node, torch.Tensor]
    machine: Machine
    values: Mapping[Node, Value]
    records: list[list[Word]] = field(default_factory=list)
    workspaces: dict[int, Buffer] = field(default_factory=dict)
    """By position: a node that runs on slices of the batch has one for all of them."""
    position: int = 0
    """The position of the node at hand: the time that buffers live by."""

    def emit(self, node: Node, position: int) -> None:
        """Appends the steps of `node`, the one at `position`."""
        self.position = position
        target, sizes = node.target, self.sizes(node)
        if 0 in sizes or is_view(node):
            return
        if isinstance(target, Call):
            self._conv(node, target)
        elif target is to_layout:
            mb, channels, h, w = sizes
            addresses = self.values[args_of(node)[0]].address, self.values[node].address
            self._add("to_layout", int(args_of(node)[1] is Layout.NHWC), mb, channels, h * w, *addresses)
        elif isinstance(target, ScaleShift):
            code, alpha, beta = target.arguments
            scale, shift = (self._constant(constant) for constant in args_of(node)[1:])
            self._scale_shift(
                node, args_of(node)[0], Activation(ACTIVATIONS[code], alpha, beta), scale=scale, shift=shift
            )
        elif target is ops.linear.default:
            self._linear(node)
        elif target is ops.pool2d.default:
            self._pool(node)
        elif target is ops.upsample2d.default:
            self._upsample(node)
        elif target is aten.cat.default:
            self._cat(node)
        elif target is aten.mul.Tensor:
            factors = excited(node)
            assert factors is not None, "otherwise it is no step"
            x, s = factors
            self._scale_shift(node, x, IDENTITY, scale=self.values[s].address, scale_stride=sizes[1])
        elif target is aten.add.Tensor:
            self._scale_shift(node, args_of(node)[0], IDENTITY, addend=self.values[args_of(node)[1]].address)
        else:
            activation = activation_of(node)
            assert activation is not None, "otherwise it is no step"
            self._scale_shift(node, args_of(node)[0], activation)

    def _add(self, kind: str, *words: Word) -> None:
        self.records.append([STEPS.index(kind), len(words) + 2, *words])

    def _constant(self, node: Node | None) -> int | None:
        return None if node is None else self.constants[node].data_ptr()

    def _conv(self, node: Node, call: Call) -> None:
        src, packed, bias, residual = args_of(node)
        mb, ic, ih, iw = self.sizes(src)
        problem = call.problem.with_batch(mb)
        assert isinstance(call.primitive, KernelPrimitive)
        floats = call.primitive.workspace_bytes(problem, self.machine) // 4
        workspace = self.workspaces.setdefault(self.position, Buffer(floats, self.position, self.position))
        workspace.floats = max(workspace.floats, floats)
        value = self.values[node]
        self._add(
            "conv",
            call.primitive.kernel,
            mb,
            ic,
            ih,
            iw,
            *problem.geometry,
            self.values[src].address,
            self._constant(packed),
            value.address,
            value.stride,
            Address(workspace),
            self._constant(bias),
            None if residual is None else self.values[residual].address,
            *_activation(call.activation),
        )

    def _scale_shift(
        self,
        node: Node,
        src: Node,
        activation: Activation,
        *,
        scale: Word = None,
        shift: Word = None,
        addend: Word = None,
        scale_stride: int = 0,
        dst: Value | None = None,
    ) -> None:
        """`dst` other than the node's own value: a part of it."""
        sizes, nhwc = self.sizes(src), is_nhwc(src)
        mb, channels, pixels = (*sizes[:2], sizes[2] * sizes[3]) if len(sizes) == 4 else (1, 1, math.prod(sizes))
        dst = dst or self.values[node]
        self._add(
            "scale_shift",
            mb,
            channels,
            pixels,
            int(nhwc),
            self.values[src].address,
            scale,
            shift,
            addend,
            dst.address,
            self.values[src].stride,
            dst.stride,
            scale_stride,
            *_activation(activation),
        )

    def _linear(self, node: Node) -> None:
        x, weight, bias, code, alpha, beta = args_of(node)
        (m, k), n = self.sizes(x), self.sizes(node)[1]
        addresses = [None if v is None else self.values[v].address for v in (x, weight, bias)]
        activation = _activation(Activation(ACTIVATIONS[code], alpha, beta))
        self._add("linear", m, n, k, *addresses, self.values[node].address, *activation)

    def _pool(self, node: Node) -> None:
        src, geometry, maximum, include_pad, divisor = args_of(node)
        mb, channels, ih, iw = self.sizes(src)
        value = self.values[node]
        self._add(
            "pool",
            mb,
            channels,
            ih,
            iw,
            *geometry[8:],
            *geometry[:8],
            int(maximum),
            int(include_pad),
            divisor,
            self.values[src].address,
            value.address,
            value.stride,
        )

    def _upsample(self, node: Node) -> None:
        src, _, linear, align_corners, *scales = args_of(node)
        mb, channels, ih, iw = self.sizes(src)
        value = self.values[node]
        self._add(
            "upsample",
            mb,
            channels,
            ih,
            iw,
            *self.sizes(node)[2:],
            int(linear),
            int(align_corners),
            *(-1.0 if scale is None else 1 / scale for scale in scales),
            self.values[src].address,
            value.address,
            value.stride,
        )

    def _cat(self, node: Node) -> None:
        """Copies the operands that were not written in place."""
        whole, first, nhwc = self.values[node], 0, is_nhwc(node)
        mb, channels, h, w = self.sizes(node)
        for operand in args_of(node)[0]:
            count = self.sizes(operand)[1]
            if count == 0:
                continue
            value = self.values[operand]
            if nhwc:
                dst = Value(Address(whole.address.buffer, whole.address.offset + first), whole.stride)
                if value != dst:
                    self._scale_shift(node, operand, IDENTITY, dst=dst)
            else:  # an image's channels are one run
                run = count * h * w
                to = Address(whole.address.buffer, whole.address.offset + first * h * w)
                strides = run, channels * h * w, 0
                self._add("scale_shift", 1, run, mb, 1, value.address, None, None, None, to, *strides, *_IDENTITY)
            first += count

    def words(self, buffers: Sequence[Buffer]) -> tuple[list[int], int]:
        """All records as 64-bit words, and the arena's floats; places the `buffers` that are in the arena."""
        arena = place([b for b in (*buffers, *self.workspaces.values()) if b.base == 1])
        return [_word(word) for record in self.records for word in record], arena


def _activation(activation: Activation) -> tuple[int, float, float]:
    return ACTIVATIONS.index(activation.kind), float(activation.alpha), float(activation.beta)


_IDENTITY = _activation(IDENTITY)


def _word(word: Word) -> int:
    if isinstance(word, Address):
        return word.buffer.base << 48 | 4 * (word.buffer.offset + word.offset)
    if isinstance(word, float):
        return int(struct.unpack("<q", struct.pack("<d", word))[0])
    return word or 0
