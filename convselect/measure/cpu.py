"""Robust measurement of short calls; shared by calibration, profiling and benchmarks.

On a busy machine a thread that has lost its processor at a barrier shows up as a step of 8 or 16 ms, always upwards,
and for seconds on end. So candidates are timed interleaved, in several rounds, and the lower quartile counts; a timing
starts once all threads are seen to run, and is repeated if the kernel says that it took a processor away meanwhile.
(With compilers running on both of 2 cores, a 0.32 ms convolution read 12 to 16 ms in all of 5 rounds without this.)
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from convselect.machine import Machine
from convselect.primitive import Activation, Primitive
from convselect.problem import ConvProblem

Array = npt.NDArray[np.float64]
Run = Callable[[], object]

ABANDON = 5.0
"""A candidate that takes this many times the best one's time is not run again."""
_FIRST_CALL_MS = 30.0
"""What a first call may cost beyond its work: page faults, vendor libraries that generate code."""
_SETTLED_MS = 0.3
"""A parallel call of a few microseconds takes longer than this when one of its threads is not running."""
_SETTLE_TRIES = 3
_RETRIES = 2
_RETRY_BELOW_MS = 60.0
"""A step of 8 or 16 ms matters less in what takes longer, and repeating costs more."""
_FLUSH_LIMIT_BYTES = 64 * 2**20
_PROBE = torch.zeros(40_000, dtype=torch.float32, device="cpu")
"""Just more than what ATen gives to a single thread."""
_GENERATOR = torch.Generator("cpu")
_RELU = Activation("relu")


def interleaved(
    runs: Sequence[Run],
    *,
    rounds: int,
    before: Callable[[], None] | None = None,
    between: Callable[[int], None] | None = None,
    deadline: float | None = None,
    abandon: float | None = None,
) -> Array:
    """Times each of `runs` in turns, by the processor's clock; a timing that was disturbed is repeated.

    Args:
        between: called, untimed, with the index of the run, before each timing.
        rounds, before, deadline, abandon: see `in_turns`.

    Returns:
        f64 [rounds, len(runs)], milliseconds; NaN for what was not timed.
    """

    def measure(index: int) -> float:
        return _undisturbed(runs[index], index, between, deadline)

    return in_turns(measure, len(runs), rounds=rounds, before=before, deadline=deadline, abandon=abandon)


def in_turns(
    measure: Callable[[int], float],
    count: int,
    *,
    rounds: int,
    before: Callable[[], None] | None = None,
    deadline: float | None = None,
    abandon: float | None = None,
) -> Array:
    """Measures each of `count` runs once a round; each round starts one further, so none always follows the same.

    Args:
        measure: milliseconds of the run of an index.
        before: called, untimed, at the start of each round.
        deadline: `time.perf_counter()` seconds; nothing starts after it. None: no limit.
        abandon: a run whose every timing was more than this many times the best so far, the first two at least if it
            is a short one, which a thread without a processor makes long, is not timed again.

    Returns:
        f64 [rounds, count], milliseconds; NaN for what was not timed.
    """
    times = np.full((rounds, count), np.nan)
    best = np.inf
    least = np.full(count, np.inf)
    for number in range(rounds):
        if passed(deadline):
            break
        if before is not None:
            before()
        for step in range(count):
            index = (number + step) % count
            seen = number if least[index] < _RETRY_BELOW_MS else 2 * number
            hopeless = abandon is not None and seen >= 2 and least[index] > abandon * best
            if hopeless or passed(deadline):
                continue
            ms = measure(index)
            times[number, index] = ms
            best = min(best, ms)
            least[index] = min(least[index], ms)
    return times


def _undisturbed(run: Run, index: int, between: Callable[[int], None] | None, deadline: float | None) -> float:
    """Milliseconds of one call during which no thread of ours was preempted, or of the least disturbed of a few."""
    least = np.inf
    for _ in range(1 + _RETRIES):
        if between is not None:
            between(index)
        _settle()
        switches = _preemptions()
        start = time.perf_counter_ns()
        run()
        least = min(least, (time.perf_counter_ns() - start) * 1e-6)
        if _preemptions() == switches or least > _RETRY_BELOW_MS or passed(deadline):
            break
    return least


def _preemptions() -> int:
    """How often the kernel has taken a processor away from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _settle() -> None:
    """Waits, within reason, until all threads of the pool run: a short parallel call must take as long as it should."""
    for _ in range(_SETTLE_TRIES):
        start = time.perf_counter_ns()
        _PROBE.mul_(1.0)
        if time.perf_counter_ns() - start < _SETTLED_MS * 1e6:
            return


def robust_ms(times: npt.ArrayLike) -> Array:
    """The lower quartile over the rounds (of up to four, the minimum): f64 [rounds, n] to [n]; NaN where none."""
    table = np.sort(np.asarray(times, dtype=np.float64), axis=0)  # NaN sorts last
    count = np.isfinite(table).sum(axis=0)
    row = np.maximum(count - 1, 0) // 4
    result: Array = table[row, np.arange(table.shape[1])]
    return result


def draw(*size: int) -> torch.Tensor:
    """Uniform in [-0.5, 0.5), f32 `size`, by a generator of our own: timing must not move the user's random numbers."""
    return torch.rand(size, generator=_GENERATOR, dtype=torch.float32, device="cpu") - 0.5


class PrimitiveTimer:
    """Times primitives in the cache state of a network: weights cold, the source as just written by the layer before.

    Once a round a buffer larger than the last-level cache is streamed through by all threads; each candidate's packed
    weights are touched by no other, so they are cold when its turn comes. Epilogue: bias and ReLU. Times are those of
    `Primitive.prepared` with torch's current number of threads.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        nbytes = min(_FLUSH_LIMIT_BYTES, max(8 * 2**20, machine.l3_bytes * 3 // 2))
        self._buffer = torch.zeros(nbytes // 4, dtype=torch.float32, device="cpu")

    def flush(self) -> None:
        """Evicts what the caches hold."""
        self._buffer.sum()

    def time_primitives(
        self,
        problem: ConvProblem,
        primitives: Sequence[Primitive],
        *,
        rounds: int = 5,
        deadline: float | None = None,
        abandon: float = ABANDON,
    ) -> dict[str, float]:
        """Primitive -> milliseconds. The primitives must accept the problem.

        A candidate beyond `abandon` times the best keeps the little it was given: if its very first call, which also
        warms up, is that slow, then that call. After `deadline` (perf_counter seconds) nothing is started, and
        candidates that were not timed are left out.
        """
        with torch.inference_mode():
            return self._time(problem, primitives, rounds, deadline, abandon)

    def _time(
        self, problem: ConvProblem, primitives: Sequence[Primitive], rounds: int, deadline: float | None, abandon: float
    ) -> dict[str, float]:
        p = problem
        weight, bias, plain = draw(p.oc, p.ic // p.g, p.kh, p.kw), draw(p.oc), draw(p.mb, p.ic, p.ih, p.iw)
        layouts = {primitive.src_layout for primitive in primitives}
        sources = {layout: plain.contiguous(memory_format=layout.memory_format) for layout in layouts}

        result: dict[str, float] = {}
        timed: list[Primitive] = []
        runs: list[Run] = []
        best = np.inf
        for primitive in primitives:
            if passed(deadline):
                break
            src = sources[primitive.src_layout]
            run = primitive.prepared(p, _RELU, src, primitive.prepack(p, weight), bias)
            start = time.perf_counter_ns()
            run()
            ms = (time.perf_counter_ns() - start) * 1e-6
            if ms > abandon * best + _FIRST_CALL_MS:
                result[primitive.name] = ms
                continue
            best = min(best, ms)
            timed.append(primitive)
            runs.append(run)

        def warm_source(index: int) -> None:
            sources[timed[index].src_layout].mul_(1.0)

        times = interleaved(
            runs, rounds=rounds, before=self.flush, between=warm_source, deadline=deadline, abandon=abandon
        )
        measured = robust_ms(times)
        result |= {q.name: float(ms) for q, ms in zip(timed, measured, strict=True) if np.isfinite(ms)}
        return result


def passed(deadline: float | None) -> bool:
    """Whether `deadline`, in `time.perf_counter()` seconds, is over; None never is."""
    return deadline is not None and time.perf_counter() >= deadline
