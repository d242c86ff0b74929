"""The assignment under a bound on memory: packed weights, which add up, and one workspace that serves all.

For a workspace of at most w bytes, only primitives that need no more are left, and the packed weights get the rest of
the memory: with a price on their bytes the assignment is a PBQP instance (Lagrangian relaxation). The price is found by
cuts: of two assignments, one too large and one that fits, the price at which both cost the same either gives an
assignment that costs less, which replaces one of them, or is the best price. What the bound leaves unused is then
spent on the primitives that save most time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch.fx import Graph, Node

from convselect.graph.assign import Assignment, Candidate, Instance, OperatorCosts, assign
from convselect.selection import solve

Candidates = Mapping[Node, Sequence[Candidate]]

_DEAR = 1e3
"""ms a byte: time no longer matters, even where primitives differ by a few bytes."""
_ROUNDING = 1e-9
"""Costs that differ by less, relatively, are the same."""


def assign_within(graph: Graph, candidates: Candidates, costs: OperatorCosts, memory_bytes: float) -> Assignment:
    """The least total time within `memory_bytes`; `gap_ms` is what it may lie above the optimum.

    Raises `ValueError` when nothing fits.
    """

    def instance(workspace: float, price: float) -> Instance:
        left = {node: [c for c in every if c.workspace_bytes <= workspace] for node, every in candidates.items()}
        return Instance.of(graph, left, costs, lambda c: price * c.packed_bytes)

    def at(workspace: float, price: float) -> Assignment:
        return instance(workspace, price).solved()

    best = assign(graph, candidates, costs)
    if memory(best) <= memory_bytes:
        return best
    needed = max(min(c.workspace_bytes for c in every) for every in candidates.values())
    found, price = None, 0.0
    bound = least = math.inf
    for workspace, below in itertools.pairwise([*_workspaces(candidates, needed), needed]):
        # Assignments of a workspace between the two: `most` is the room that their packed weights may have.
        most = memory_bytes - below
        if found and _bound(instance(workspace, price), price, most) >= found.total_ms:
            continue
        small = instance(workspace, _DEAR).solved()
        least = min(least, memory(small))
        if _packed(small) > most:
            continue
        room = memory_bytes - workspace
        trial, trial_price = _cheapest(partial(at, workspace), small, room if _packed(small) <= room else most)
        bound = min(bound, _bound(instance(workspace, trial_price), trial_price, most))
        if memory(trial) <= memory_bytes and (found is None or trial.total_ms < found.total_ms):
            found, price = trial, trial_price
    if found is None:
        raise ValueError(
            f"memory_mb is {memory_bytes / 2**20:.4g}, but the least that this model's primitives need is "
            f"{least / 2**20:.4g}"
        )
    found = _filled(found, candidates, memory_bytes)
    gap_ms = found.total_ms - max(bound, best.total_ms - best.gap_ms)
    return replace(found, gap_ms=gap_ms if gap_ms > _ROUNDING * found.total_ms else 0.0)


def _workspaces(candidates: Candidates, needed: int) -> list[int]:
    """Bounds on the workspace to try: the largest that a primitive asks for, and from there half each time."""
    sizes = sorted({c.workspace_bytes for every in candidates.values() for c in every if c.workspace_bytes >= needed})
    tried = [sizes[-1]]
    while tried[-1] > needed:
        tried.append(max(size for size in (needed, *sizes) if size == needed or size <= tried[-1] // 2))
    return tried


def _bound(instance: Instance, price: float, room: float) -> float:
    """What no assignment of the instance whose packed weights have `room` takes less than, ms."""
    return solve(instance.nodes, instance.edges).lower_bound - price * room


def _cheapest(at: Callable[[float], Assignment], small: Assignment, room: float) -> tuple[Assignment, float]:
    """The assignment of least time whose packed weights fit that a price gives, and the price, ms a byte."""
    large = at(0.0)
    if _packed(large) <= room:
        return large, 0.0
    while True:
        price = (small.total_ms - large.total_ms) / (_packed(large) - _packed(small))
        between = at(price)
        cost, least = (a.total_ms + price * _packed(a) for a in (small, between))
        if least >= cost - _ROUNDING * cost:
            return small, price
        if _packed(between) <= room:
            small = between
        else:
            large = between


def _filled(assignment: Assignment, candidates: Candidates, memory_bytes: float) -> Assignment:
    """With faster primitives in the same layouts, the one that saves most first, as far as the memory goes."""
    while True:
        swaps = [
            (chosen.ms - c.ms, node, c)
            for node, every in candidates.items()
            for c in every
            if c.ms < (chosen := assignment.chosen[node]).ms
            and (c.primitive.src_layout, c.primitive.dst_layout) == (chosen.reads, chosen.gives)
        ]
        for saved, node, c in sorted(swaps, key=lambda swap: -swap[0]):
            option = replace(assignment.chosen[node], ms=c.ms, candidate=c)
            trial = Assignment({**assignment.chosen, node: option}, assignment.total_ms - saved, assignment.gap_ms)
            if memory(trial) <= memory_bytes:
                assignment = trial
                break
        else:
            return assignment


def _packed(assignment: Assignment) -> int:
    return sum(option.candidate.packed_bytes for option in assignment.chosen.values() if option.candidate)


def memory(assignment: Assignment) -> int:
    """Packed weights and the largest workspace, bytes."""
    used = [option.candidate for option in assignment.chosen.values() if option.candidate]
    return _packed(assignment) + max((c.workspace_bytes for c in used), default=0)
