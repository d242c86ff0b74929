"""Times systems on a network in one process, in turn.

The protocol, and why (two threads on two cores of an AMD EPYC, medians of 14 or 15 rounds, milliseconds). Runtimes keep
their idle worker threads spinning for a while after a run, on the cores that the next system wants; ONNX Runtime for
about 75 ms. Changing the system after every run times that disturbance. ResNet-18: ONNX Runtime 17.0, OpenVINO 16.4,
Inductor 20.9; in blocks of six runs with the first two left out they take 9.5, 9.2 and 10.6. Runs of a block in turn,
MobileNet-v2: eager, after ONNX Runtime, 23.5 18.2 21.5 12.9 9.4 9.4, OpenVINO 6.1 3.4 2.3 2.2 2.2. A pause before
each block makes all of them slower by 2 to 10 %, since caches and clocks cool down. So: no pauses; in each round every
system runs without being timed for 100 ms, then a few times for the clock, and the order is drawn anew each round, so
that no system always follows the same one. A round gives the median of its runs, and the result is the median over the
rounds. A network that would take too long gets fewer rounds, and one that takes too long even so fewer runs in each.
"""

from __future__ import annotations

import copy
import gc
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from convselect import streams
from convselect.bench.peers import Call, Peer
from convselect.machine import cpu

Progress = Callable[[str], None]
Clock = Callable[[Callable[[], object]], float]
"""Milliseconds of one call."""

LEAST_ROUNDS = 5
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Protocol:
    """`rounds` blocks for every system: untimed runs for `settle_ms`, at least one, then `runs` timed ones."""

    rounds: int = 15
    runs: int = 5
    settle_ms: float = 100.0
    budget_s: float | None = None
    """For the rounds of one network, as far as `LEAST_ROUNDS` rounds of one run allow."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("runs", 1), ("settle_ms", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")

    def within_budget(self, call_ms: Sequence[float]) -> Protocol:
        """For systems of which a call takes so long: first fewer rounds, down to `LEAST_ROUNDS`, then fewer runs."""
        if self.budget_s is None:
            return self

        def round_s(runs: int) -> float:
            return sum(self.settle_ms + (1 + runs) * ms for ms in call_ms) / 1e3

        least = min(self.rounds, LEAST_ROUNDS)
        runs = next((r for r in range(self.runs, 1, -1) if least * round_s(r) <= self.budget_s), 1)
        rounds = next((r for r in range(self.rounds, least, -1) if r * round_s(runs) <= self.budget_s), least)
        return replace(self, rounds=rounds, runs=runs)


@dataclass(frozen=True)
class Result:
    """One system on one network. Either the times are there, or `absent` says why not."""

    peer: str
    median_ms: float | None = None
    min_ms: float | None = None
    rel_l2: float | None = None
    """Relative L2 error of the first output, against eager in float64."""
    prepare_s: float | None = None
    """From a model in memory to the first result: export, compilation, calibration."""
    absent: str | None = None
    rounds: int = 0
    runs: int = 0
    """Timed: rounds, and runs in each."""


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


def host_ms(call: Callable[[], object]) -> float:
    """By the host's clock."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def event_ms(call: Callable[[], object]) -> float:
    """From when the current stream of a GPU comes to the call until it has done what the call put there."""
    with streams.Interval() as interval:
        call()
    return interval.ms()


def block_ms(call: Call, protocol: Protocol, clock: Clock = host_ms) -> float:
    """Median time of the timed runs of one block."""
    settled = time.perf_counter() + protocol.settle_ms / 1e3
    call()
    while time.perf_counter() < settled:
        call()
    return statistics.median(clock(call) for _ in range(protocol.runs))


def interleave(
    calls: dict[str, Call], protocol: Protocol, progress: Progress | None = None, clock: Clock = host_ms
) -> dict[str, list[float]]:
    """For each call the block medians of all rounds, in milliseconds."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(protocol.rounds):
        for name in random.Random(round_).sample(names, len(names)):
            times[name].append(block_ms(calls[name], protocol, clock))
        if progress:
            progress(f"round {round_ + 1} of {protocol.rounds}")
    return times


def compare(
    model: nn.Module,
    x: torch.Tensor,
    peers: Sequence[Peer],
    protocol: Protocol,
    progress: Progress | None = None,
    exports: Path | None = None,
    device: torch.device = _CPU,
    dtype: torch.dtype = torch.float32,
) -> list[Result]:
    """Time `peers` on `model` with torch's current number of threads. Frees what they hold before it returns.

    `model` and `x`, in float32 on the CPU, are brought to `device` and `dtype` first; on a GPU times are by events.

    The files made for peers are kept in the folder `exports`, and used again if they are there; None forgets them.
    A peer that is missing or cannot take the network has a sentence in place of its times. What `convselect` itself
    raises is raised.
    """
    if exports is None:
        with tempfile.TemporaryDirectory() as folder:
            return compare(model, x, peers, protocol, progress, Path(folder), device, dtype)
    tell = progress or (lambda _: None)
    if device.type != "cpu":
        model, x = copy.deepcopy(model).to(device, dtype), x.to(device, dtype)
        torch.backends.cudnn.benchmark = True  # cuDNN's best, whoever calls it
    clock = host_ms if device.type == "cpu" else event_ms
    exact = reference(model, x)
    calls: dict[str, Call] = {}
    found: dict[str, Result] = {}
    for peer in peers:
        if reason := peer.absence(device.type):
            found[peer.name] = Result(peer.name, absent=reason)
            continue
        tell(f"{peer.label}: preparing")
        start = time.perf_counter()
        try:
            call = peer.prepare(model, x, exports)
            y = call()
            if device.type != "cpu":
                streams.finish(device)
        except (RuntimeError, ValueError, ImportError, NotImplementedError, subprocess.CalledProcessError) as error:
            if peer.name == "convselect":
                raise
            found[peer.name] = Result(peer.name, absent=f"{peer.label} failed: {_first_line(error)}")
            continue
        seconds = time.perf_counter() - start
        found[peer.name] = Result(peer.name, rel_l2=rel_l2(y, exact), prepare_s=seconds)
        calls[peer.name] = call
    protocol = protocol.within_budget([clock(call) for call in calls.values()])
    for name, blocks in interleave(calls, protocol, tell, clock).items():
        found[name] = replace(
            found[name],
            median_ms=statistics.median(blocks),
            min_ms=min(blocks),
            rounds=protocol.rounds,
            runs=protocol.runs,
        )
    calls.clear()
    torch.compiler.reset()
    gc.collect()
    return [found[peer.name] for peer in peers]


def pin_threads(threads: int) -> None:
    """Give torch, and by it every peer, this many threads."""
    cores = cpu().cores
    if not 1 <= threads <= cores:
        raise ValueError(f"threads is {threads}, must be between 1 and the {cores} cores of this machine")
    torch.set_num_threads(threads)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
