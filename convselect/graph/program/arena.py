"""Memory of a program, planned once: which bytes of one arena each value lives in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 16
"""In floats: buffers begin on cache lines."""


@dataclass(eq=False)
class Buffer:
    """`floats` that are written by step `first` and last read by step `last`, both included.

    `base` and `offset` (in floats) say where it lies: base 1 is the arena, others are given from outside.
    """

    floats: int
    first: int
    last: int
    base: int = 1
    offset: int = 0


def place(buffers: Sequence[Buffer]) -> int:
    """Sets the offsets, so that no two buffers alive in the same step overlap; returns the arena's floats.

    Largest first, each at the lowest offset that is free (Pisarchyk and Lee, arXiv 2001.03288, "greedy by size").
    """
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: (-b.floats, b.first)):
        rivals = [b for b in placed if b.first <= buffer.last and buffer.first <= b.last]
        offset = 0
        for rival in sorted(rivals, key=lambda b: b.offset):
            if offset + buffer.floats <= rival.offset:
                break
            offset = max(offset, _aligned(rival.offset + rival.floats))
        buffer.offset = offset
        placed.append(buffer)
    return max((_aligned(b.offset + b.floats) for b in placed), default=0)


def _aligned(floats: int) -> int:
    return -(-floats // ALIGNMENT) * ALIGNMENT
