"""Calibration: the few timings that tell most about this machine, chosen by what not knowing them may cost.

A timing is worth the regret that it is expected to avoid: for a candidate, how much faster than the problem's best it
may turn out (expected improvement of a log-normal prediction); for the best itself, how much slower than the second.
Large layers and close or uncertain candidates so come first by themselves; what the prediction rules out never comes.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

import convselect.primitives  # noqa: F401  (fills the registry)
from convselect.costs import Costs, Model, Samples, model_for, store
from convselect.data import COMMON, read_problems
from convselect.machine import Machine
from convselect.measure.progress import Report, reporting
from convselect.measure.timers import Timer, timer_on, transforms_on
from convselect.primitive import Primitive, candidates
from convselect.problem import ConvProblem

Array = npt.NDArray[np.float64]

RULED_OUT = 2.0
"""A candidate is never timed if even one standard deviation better than predicted it is this many times the best."""

_ROUNDS = 3
_TRANSFORMS_SHARE = 0.1
_REFIT_SHARE = 0.2
"""At most this share of the wall-clock time goes into adapting the model between timings."""
_OVERHEAD_MS = 4.0
"""What a problem costs beside its timings on an idle machine: weights, packing, flushes of the cache."""
_AT_ONCE = 5
"""Candidates of one problem that are timed in one go; interleaved, they compare best."""
_PROBLEM_SHARE = 0.15
"""At most this share of the wall-clock time goes into one problem at a time while others can be timed."""
_COMPILING = 4.0
"""Times the budget is what a calibration on a GPU may take, where kernels are compiled before they are timed."""
_ENOUGH = 0.95
"""The part of the budget after which nothing is worth beginning."""
_NEGLIGIBLE = 1e-3
"""Calibration ends once the regret it could avoid is less than this part of the predicted total."""

C = TypeVar("C", bound="AdaptiveCosts")


class AdaptiveCosts(Protocol):
    """What calibration asks of `costs.Costs`."""

    def predict(self, problems: Sequence[ConvProblem], candidates: Sequence[tuple[str, str]]) -> tuple[Array, Array]:
        """ms and log standard deviation, f64 [problems, candidates]; candidates are (primitive, family)."""

    def with_samples(self: C, samples: Samples) -> C:
        """Adapted also to `samples`."""


class TimesPrimitives(Protocol):
    """What a `Calibrator` asks of a timer."""

    def time_primitives(
        self, problem: ConvProblem, primitives: Sequence[Primitive], *, rounds: int, deadline: float | None
    ) -> dict[str, float]: ...


def calibrate(
    budget_s: float = 2.0,
    device: str = "cpu",
    problems: Sequence[ConvProblem] | None = None,
    *,
    able: Mapping[ConvProblem, Sequence[Primitive]] | None = None,
    model: Model | None = None,
    timer: Timer | None = None,
    progress: bool | None = None,
) -> Samples:
    """Times for `budget_s` seconds, stores the samples with those of this machine at hand, and returns them all.

    Args:
        budget_s: wall-clock seconds, everything included; kept within 20% as no timing starts that would break it.
            On a GPU four times as long, since kernels have to be compiled, one of which may still exceed it.
        device: "cpu", or "cuda" for the first GPU, in float32 (TF32 where torch's switch allows it).
        problems: what the machine is to be fast at; a repeated problem counts as often. Default `data.COMMON`.
        able: the primitives to time for each problem; None stands for all that may be chosen by default.
        model: what the samples are chosen for; None stands for the shipped one.
        timer: of another machine than `device` names.
        progress: a progress bar on stderr; None when it is a terminal.

    Ctrl-C raises `KeyboardInterrupt` as ever, and what was timed is stored.
    """
    if not (isinstance(budget_s, (int, float)) and 0 < budget_s < math.inf):
        raise ValueError(f"budget_s is {budget_s!r}, must be a positive number of seconds")
    start = time.perf_counter()
    timer = timer or timer_on(device)
    machine = timer.machine
    if machine.device == "cuda":
        budget_s *= _COMPILING
    counts = Counter(read_problems(COMMON) if problems is None else problems)
    if able is None:
        able = {problem: candidates(problem, machine, "default")[0] for problem in counts}
    known = store.load(machine) or Samples()
    calibrator = Calibrator(Costs(model or model_for(machine), known, machine), counts, able, timer, machine)
    deadline = start + budget_s
    try:
        with reporting("calibrating", budget_s, progress) as report:
            if not known.operators:
                _time_transforms(timer, calibrator.samples, counts, start + _TRANSFORMS_SHARE * budget_s)
            calibrator.run(deadline, lambda _, what: report(time.perf_counter() - start, what))
            report(budget_s, f"{len(calibrator.samples.timings)} timings")
    finally:
        calibrator.samples.seconds = time.perf_counter() - start
        samples = store.save(machine, calibrator.samples)
    return samples


def ensure(
    budget_s: float,
    machine: Machine,
    problems: Sequence[ConvProblem],
    able: Mapping[ConvProblem, Sequence[Primitive]],
    timer: Callable[[], Timer],
) -> Samples:
    """The samples of `machine`, after calibrating for what earlier runs have left of `budget_s` seconds."""
    known = store.load(machine) or Samples()
    if known.seconds >= _ENOUGH * budget_s:
        return known
    with store.calibrating():
        known = store.load(machine) or Samples()  # another thread or process may have spent it meanwhile
        if known.seconds >= _ENOUGH * budget_s:
            return known
        return calibrate(budget_s - known.seconds, problems=problems, able=able, timer=timer())


def _time_transforms(timer: Timer, samples: Samples, problems: Mapping[ConvProblem, int], deadline: float) -> None:
    """Layout transforms of sources over the problems' range of sizes."""
    shapes = sorted({(p.mb, p.ic, p.ih, p.iw) for p in problems if p.ic > 1 < p.ih * p.iw}, key=math.prod)
    spread = [shapes[i] for i in sorted({0, len(shapes) // 3, 2 * len(shapes) // 3, len(shapes) - 1})] if shapes else []
    for row in transforms_on(timer, spread[::-1], _ROUNDS, deadline):
        samples.add_operator(*row)


class Calibrator:
    """Chooses what to time next, times it and adapts `costs`, until a deadline or until nothing is worth it.

    Attributes:
        costs: adapted to all that was timed.
        samples: what this object has timed.
    """

    def __init__(
        self,
        costs: AdaptiveCosts,
        problems: Mapping[ConvProblem, int],
        able: Mapping[ConvProblem, Sequence[Primitive]],
        timer: TimesPrimitives,
        machine: Machine,
    ) -> None:
        self.costs, self.samples = costs, Samples()
        self._problems = [p for p in problems if able[p]]
        self._weights = np.array([problems[p] for p in self._problems], dtype=np.float64)
        named = {q.name: q for p in self._problems for q in able[p]}
        self._primitives = list(named.values())
        self._candidates = [(q.name, q.family) for q in self._primitives]
        accepts = [{q.name for q in able[p]} for p in self._problems]
        self._open = np.array([[q.name in names for q in self._primitives] for names in accepts], dtype=np.bool_)
        self._able = self._open.copy()
        self._timer, self._threads = timer, machine.threads
        self._families = {family for _, family in self._candidates}
        self._pace = 1.0
        self._reported = 0

    def run(self, deadline: float, report: Report = lambda done, what: None) -> None:
        """Times until `deadline` (perf_counter seconds); `report` gets the number of timings."""
        if not self._problems:
            return
        ms, std = self._predict()
        refit_s, refitted_at = 0.0, time.perf_counter()
        pending = False
        share_ms = 1e3 * _PROBLEM_SHARE * (deadline - time.perf_counter())
        while time.perf_counter() < deadline:
            left_ms = 1e3 * (deadline - time.perf_counter())
            chosen = self._choose(ms, std, min(share_ms, left_ms)) or self._choose(ms, std, left_ms)
            if chosen is None:
                if not pending:
                    break
            else:
                row, columns = chosen
                limit = min(deadline, time.perf_counter() + 2e-3 * share_ms)
                self._time(row, columns, ms, std, limit)
                pending = True
                report(len(self.samples.timings), f"{len(self.samples.timings)} timings")
            now = time.perf_counter()
            if chosen is None or now - refitted_at > refit_s / _REFIT_SHARE:
                ms, std = self._predict()
                refitted_at = time.perf_counter()
                refit_s, pending = refitted_at - now, False

    def _predict(self) -> tuple[Array, Array]:
        """ms and log std [n, c] with all samples; a candidate that a problem refuses costs inf."""
        fresh = Samples(self.samples.timings[self._reported :])
        if fresh:
            self.costs = self.costs.with_samples(fresh)
            self._reported = len(self.samples.timings)
        ms, std = self.costs.predict(self._problems, self._candidates)
        return np.where(self._able, ms, np.inf), np.maximum(std, 1e-6)

    def _choose(self, ms: Array, std: Array, limit_ms: float) -> tuple[int, list[int]] | None:
        """A problem and the candidates to time on it, in order of predicted time, in at most `limit_ms` by prediction.

        None if nothing is worth it.
        """
        best = ms.min(axis=1, keepdims=True)
        wanted = self._open & (ms * np.exp(-std) <= RULED_OUT * best)
        gain = np.where(wanted, expected_regret(ms, std), 0.0) * self._weights[:, None]
        unseen = np.array([family in self._families for _, family in self._candidates])
        news = np.where(unseen[None, :], gain, 0.0)
        if news.max() > 0:  # families not timed here yet come first, each beside the predicted best
            gain = np.where(self._open & (ms == best), news.max(axis=1, keepdims=True), news)
        elif not gain.sum() > _NEGLIGIBLE * float((best[:, 0] * self._weights).sum()):
            return None
        gain[gain < 0.05 * gain.max(axis=1, keepdims=True)] = 0.0
        # Of each problem the candidates that are worth most, as far as its share of the time goes.
        order = np.argsort(-gain, axis=1)[:, :_AT_ONCE]
        worth = np.take_along_axis(gain, order, axis=1)
        once = np.cumsum(np.where(worth > 0, np.take_along_axis(ms, order, axis=1), 0.0), axis=1)
        worth[self._cost_ms(once) > limit_ms] = 0.0
        taken = worth > 0
        cost = self._cost_ms(np.where(taken, once, 0.0).max(axis=1))
        rate = worth.sum(axis=1) / cost
        row = int(rate.argmax())
        if not rate[row] > 0:  # nothing fits into the time
            if not news.max() > 0:
                return None
            self._families.clear()
            return self._choose(ms, std, limit_ms)
        columns = order[row][taken[row]]
        return row, [int(c) for c in columns[np.argsort(ms[row, columns])]]

    def _time(self, row: int, columns: list[int], ms: Array, std: Array, deadline: float) -> None:
        """Times, adds to the samples, and puts what was measured into the predictions."""
        start = time.perf_counter()
        problem = self._problems[row]
        expected_ms = self._cost_ms(float(ms[row, columns].sum()))
        times = self._timer.time_primitives(
            problem, [self._primitives[c] for c in columns], rounds=_ROUNDS, deadline=deadline
        )
        for c in columns:
            name, family = self._candidates[c]
            if name in times:
                self._open[row, c] = False
                self.samples.add(problem, name, self._threads, times[name])
                ms[row, c], std[row, c] = times[name], 1e-6
                self._families.discard(family)
        if not times:  # not even one fits into the time there is
            self._open[row] = False
        elif time.perf_counter() < deadline:  # what has no time then cannot be timed
            self._open[row, columns] = False
        self._pace *= math.sqrt(max(0.1, 1e3 * (time.perf_counter() - start) / expected_ms))

    def _cost_ms(self, once_ms: Array | float) -> Any:
        """Wall-clock time that timing candidates takes which together take `once_ms` to run, as it went so far."""
        return self._pace * (_OVERHEAD_MS + (1 + _ROUNDS) * once_ms)


def expected_regret(ms: Array, std: Array) -> Array:
    """How much choosing by prediction is expected to lose for not knowing each candidate's time, f64 [n, c] ms.

    With t log-normal of median `ms` and log deviation `std`, and b the best other candidate's ms: E max(0, b - t) for
    a candidate behind b, E max(0, t - b) for the best.
    """
    n, c = ms.shape
    if c == 1:
        return np.zeros((n, 1))
    ordered = np.sort(ms, axis=1)
    leads = ms <= ordered[:, :1]
    other = np.where(leads, ordered[:, 1:2], ordered[:, :1])
    finite = np.isfinite(ms) & np.isfinite(other)
    t, b = np.where(finite, ms, 1.0), np.where(finite, other, 1.0)
    mean = t * np.exp(0.5 * std**2)
    d = (np.log(b) - np.log(t)) / std
    below = b * _normal_cdf(d) - mean * _normal_cdf(d - std)
    above = below + mean - b
    return np.where(finite, np.maximum(0.0, np.where(leads, above, below)), 0.0)


def _normal_cdf(x: Array) -> Array:
    """The standard normal distribution function."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    result: Array = 0.5 * (1.0 + erf(x / math.sqrt(2.0)))
    return result
