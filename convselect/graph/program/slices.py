"""Large batches in slices: the head of a program runs on a few images at a time, so that caches hold what it makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from convselect.graph.lower import Call
from convselect.graph.nodes import args_of
from convselect.graph.program.arena import Buffer
from convselect.graph.program.steps import Address, Sizes, Value, is_view, tensors_of

CACHE = 2 << 20
"""Bytes that a step of the head may read and write, for each thread: its part of the caches, roughly."""


@dataclass(frozen=True)
class Head:
    """The first `count` nodes run on a slice of the `mb` images after the other, `slices` in all."""

    count: int
    slices: int
    mb: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The first image of each slice, and how many it has."""
        bounds = [i * self.mb // self.slices for i in range(self.slices + 1)]
        return ((first, end - first) for first, end in itertools.pairwise(bounds))

    def place(self, buffers: Sequence[Buffer]) -> set[Buffer]:
        """Shrinks the buffers that only the head uses to one slice, and returns them: the slices share them.

        What is read later is written by each slice in turn, and so lives from the start.
        """
        inside = {buffer for buffer in buffers if buffer.base == 1 and buffer.last < self.count}
        for buffer in buffers:
            if buffer in inside:
                buffer.floats = buffer.floats // self.mb * -(-self.mb // self.slices)
            elif buffer.first < self.count:
                buffer.first = 0
        return inside

    def values(self, values: Mapping[Node, Value], inside: set[Buffer], first: int) -> dict[Node, Value]:
        """Where the values of the slice lie whose first image is `first`."""

        def moved(value: Value) -> Value:
            buffer, offset = value.address.buffer, value.address.offset
            return replace(value, address=Address(buffer, offset + first * (buffer.floats // self.mb)))

        return {node: v if v.address.buffer in inside else moved(v) for node, v in values.items()}


def head_of(nodes: Sequence[Node], sizes: Sizes, constants: Mapping[Node, torch.Tensor], threads: int) -> Head:
    """The head of a program.

    Where it ends: each of its slices reads the weights again; of the rest, each step finds the activations of a whole
    batch, which no cache has kept. The head's weights and an image's activations in the rest are least together.
    """
    mb = next(iter(sizes(nodes[0])), 0)
    if mb == 0:
        return Head(0, 1, 1)
    saved, most_saved, largest = 0, 0, 0  # bytes
    head = Head(0, 1, mb)
    for i, node in enumerate(nodes):
        sources = [source for source in tensors_of(node) if source not in constants]
        if any(len(sizes(value)) != 4 or sizes(value)[0] != mb for value in (node, *sources)):
            break
        if is_view(node):
            continue
        image = sum(4 * math.prod(sizes(value)[1:]) for value in (node, *sources))
        weights = constants[args_of(node)[1]].nbytes if isinstance(node.target, Call) else 0
        saved += image - weights
        largest = max(largest, image)
        if saved > most_saved:
            images = max(1, CACHE * threads // largest)
            most_saved, head = saved, Head(i + 1, -(-mb // images), mb)
    return head if head.slices > 1 else Head(0, 1, mb)
