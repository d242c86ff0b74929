"""Times systems on a network in one process, in turn.

The protocol, and why (ResNet-18, two threads on two cores of an AMD EPYC, medians of 15 rounds, milliseconds). Runtimes
keep their idle worker threads spinning for a while after a run, on the cores that the next system wants. Changing the
system after every run therefore times that disturbance: ONNX Runtime 17.0, OpenVINO 16.4, Inductor 20.9. In blocks
of six runs with the first two left out they take 9.5, 9.2 and 10.6, as they do alone; a pause before each block makes
all of them slower by 2 to 10 %, since caches and clocks cool down. So: rounds of blocks without a pause, the first runs
of each block left out, the order rotated from round to round; a round gives the median of its block, and the result
is the median over the rounds.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from convselect.bench.peers import Call, Peer

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Protocol:
    """How often: `rounds` blocks of `runs` each for every system, of which the first `dropped` do not count."""

    rounds: int = 15
    runs: int = 8
    dropped: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, must be at least 1")
        if not 0 <= self.dropped < self.runs:
            raise ValueError(f"dropped is {self.dropped}, must be at least 0 and below runs={self.runs}")


@dataclass(frozen=True)
class Result:
    """One system on one network. Either the times are there, or `absent` says why not."""

    peer: str
    median_ms: float | None = None
    min_ms: float | None = None
    rel_l2: float | None = None
    """Of the first output, against eager in float64."""
    prepare_s: float | None = None
    """From a model in memory to the first result: export, compilation, calibration."""
    absent: str | None = None


def reference(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The network's output in float64."""
    with torch.inference_mode():
        y = copy.deepcopy(model).double()(x.double())
    return y if isinstance(y, torch.Tensor) else next(iter(y))


def rel_l2(y: torch.Tensor, exact: torch.Tensor) -> float:
    """|y - exact| / |exact|; infinite where the shapes differ or `y` is not finite."""
    if y.shape != exact.shape or not torch.isfinite(y).all():
        return float("inf")
    return float((y.double() - exact).norm() / exact.norm())


def block_ms(call: Call, runs: int, dropped: int) -> float:
    """Median time of `call` over consecutive `runs`, without the first `dropped`."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[dropped:])


def interleave(calls: dict[str, Call], protocol: Protocol, progress: Progress | None = None) -> dict[str, list[float]]:
    """For each call the block medians of all rounds, in milliseconds."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(protocol.rounds):
        first = round_ % max(len(names), 1)
        for name in names[first:] + names[:first]:
            times[name].append(block_ms(calls[name], protocol.runs, protocol.dropped))
        if progress:
            progress(f"round {round_ + 1} of {protocol.rounds}")
    return times


def compare(
    model: nn.Module,
    x: torch.Tensor,
    peers: Sequence[Peer],
    protocol: Protocol,
    progress: Progress | None = None,
) -> list[Result]:
    """Time `peers` on `model` with torch's current number of threads. Frees what they hold before it returns.

    A peer that is missing or cannot take the network has a sentence in place of its times. What `convselect` itself
    raises is raised.
    """
    tell = progress or (lambda _: None)
    exact = reference(model, x)
    calls: dict[str, Call] = {}
    found: dict[str, Result] = {}
    for peer in peers:
        if reason := peer.absence():
            found[peer.name] = Result(peer.name, absent=reason)
            continue
        tell(f"{peer.label}: preparing")
        start = time.perf_counter()
        try:
            call = peer.prepare(model, x)
            y = call()
        except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
            if peer.name == "convselect":
                raise
            found[peer.name] = Result(peer.name, absent=f"{peer.label} failed: {_first_line(error)}")
            continue
        seconds = time.perf_counter() - start
        found[peer.name] = Result(peer.name, rel_l2=rel_l2(y, exact), prepare_s=seconds)
        calls[peer.name] = call
    times = interleave(calls, protocol, tell)
    for name, blocks in times.items():
        result = found[name]
        found[name] = Result(name, statistics.median(blocks), min(blocks), result.rel_l2, result.prepare_s)
    calls.clear()
    torch.compiler.reset()
    gc.collect()
    return [found[peer.name] for peer in peers]


def pin_threads(threads: int) -> None:
    """Give torch, and by it every peer, this many threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise ValueError(f"threads is {threads}, must be between 1 and the {cores} cores of this machine")
    torch.set_num_threads(threads)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
