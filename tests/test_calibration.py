"""Calibration against a machine and costs that are made up, so that what should happen is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from clock import Clock
from made_up import Costs

from convselect.costs import Samples, store
from convselect.layout import Layout
from convselect.machine import Machine, cpu
from convselect.measure import calibration, operators
from convselect.measure import cpu as cpu_timing
from convselect.measure.calibration import RULED_OUT, Calibrator, expected_regret
from convselect.measure.operators import OperatorTime
from convselect.primitive import Activation, Primitive, candidates, primitives
from convselect.problem import ConvProblem

LARGE = ConvProblem(ic=64, ih=56, iw=56, oc=64, kh=3, kw=3, ph=1, pw=1)
SMALL = ConvProblem(ic=64, ih=7, iw=7, oc=64, kh=3, kw=3, ph=1, pw=1)
MACHINE = Machine("cpu", "made up", "avx2", 2, 2, 0, 0, 0)


class Named(Primitive):
    """A primitive that never runs."""

    src_layout = dst_layout = Layout.NHWC

    def __init__(self, name: str) -> None:
        self.name, self.family = name, name.partition("_")[0]

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        return None

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return 0

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return 0

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        raise NotImplementedError


class Timer:
    """By which primitives take what `truth` says, and what a calibration expects beside that; no longer than asked."""

    def __init__(self, truth: Costs, clock: Clock) -> None:
        self.truth, self.clock = truth, clock
        self.calls: list[tuple[ConvProblem, list[str]]] = []

    def time_primitives(
        self, problem: ConvProblem, primitives: Sequence[Primitive], *, rounds: int, deadline: float | None
    ) -> dict[str, float]:
        assert rounds >= 2
        assert deadline is not None
        self.calls.append((problem, [q.name for q in primitives]))
        times = {}
        self.clock.sleep(calibration._OVERHEAD_MS * 1e-3)
        for q in primitives:
            if self.clock.now_s >= deadline:
                break
            times[q.name] = float(self.truth.predict([problem], [(q.name, q.family)])[0][0, 0])
            self.clock.sleep(times[q.name] * 1e-3 * (rounds + 1))
        return times

    @property
    def timed(self) -> list[tuple[ConvProblem, str]]:
        return [(problem, name) for problem, names in self.calls for name in names]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock.of(monkeypatch, calibration)


def calibrated(
    model: Costs, truth: Costs, problems: dict[ConvProblem, int], clock: Clock, seconds: float = 5.0
) -> tuple[Calibrator, Timer]:
    """After a calibration of `model` that finds `truth`."""
    timer = Timer(truth, clock)
    able = {problem: [Named(name) for name in model.factors] for problem in problems}
    calibrator = Calibrator(model, problems, able, timer, MACHINE)
    calibrator.run(clock.now_s + seconds)
    return calibrator, timer


def test_what_is_ruled_out_is_never_timed(clock: Clock) -> None:
    model = Costs({"a_1": 1.0, "a_2": 1.2, "b_1": 1.5, "naive_1": 4.0, "naive_2": 1000.0}, std=0.3)
    truth = Costs({"a_1": 1.0, "a_2": 1.0, "b_1": 1.0, "naive_1": 0.1, "naive_2": 0.1})
    _, timer = calibrated(model, truth, {LARGE: 1, SMALL: 1}, clock)
    assert {name for _, name in timer.timed} == {"a_1", "a_2", "b_1"}
    assert 4.0 * np.exp(-0.3) > RULED_OUT


def test_uncertainty_brings_in_what_is_predicted_slow(clock: Clock) -> None:
    factors = {"a_1": 1.0, "b_1": 3.0}
    _, timer = calibrated(Costs(factors, std=0.8), Costs(factors), {LARGE: 1}, clock)
    assert (LARGE, "b_1") in timer.timed


def test_nothing_is_timed_twice_and_known_samples_not_at_all(clock: Clock) -> None:
    factors = {"a_1": 1.0, "a_2": 1.05, "b_1": 1.1}
    known = Samples()
    known.add(LARGE, "a_1", 2, 1e-8 * LARGE.flops)
    known.add(LARGE, "a_2", 2, 1.5e-8 * LARGE.flops)
    known.add(LARGE, "b_1", 2, 1.5e-8 * LARGE.flops)
    calibrator, timer = calibrated(Costs(factors, samples=known), Costs(factors), {LARGE: 1, SMALL: 50}, clock)
    timings = calibrator.samples.timings
    assert len(timer.timed) == len(set(timer.timed))
    assert {problem for problem, _ in timer.timed} == {SMALL}
    assert {(t.problem, t.primitive) for t in timings} == {(str(p), name) for p, name in timer.timed}
    assert all(t.threads == MACHINE.threads for t in timings)


def test_the_largest_layer_comes_first(clock: Clock) -> None:
    model = Costs({"a_1": 1.0, "a_2": 1.1})
    _, timer = calibrated(model, model, {SMALL: 1, LARGE: 1}, clock)
    assert timer.calls[0][0] == LARGE


def test_every_family_that_matters_is_seen_early(clock: Clock) -> None:
    factors = {f"{family}_{i}": 1.0 + 0.1 * n for n, family in enumerate("abcdefgh") for i in range(2)}
    problems = {ConvProblem(ic=c, ih=28, iw=28, oc=c, kh=3, kw=3, ph=1, pw=1): 1 for c in range(32, 256, 16)}
    _, timer = calibrated(Costs(factors), Costs(factors), problems, clock)
    early = {name[0] for _, names in timer.calls[:6] for name in names}
    assert early == set("abcdefgh")


def test_a_certain_model_ends_early(clock: Clock) -> None:
    factors = {"a_1": 1.0, "b_1": 1.5}
    _, timer = calibrated(Costs(factors, std=0.02), Costs(factors), {LARGE: 1}, clock, seconds=100.0)
    assert timer.calls == []


def test_a_surprise_changes_what_is_timed_next(clock: Clock) -> None:
    """a_1 turns out 2.5 times slower than predicted, so b_1, ruled out at first, is timed after all."""
    model = Costs({"a_1": 1.0, "a_2": 1.05, "b_1": 2.4}, std=0.1)
    _, timer = calibrated(model, Costs({"a_1": 2.5, "a_2": 2.6, "b_1": 2.4}), {LARGE: 1}, clock)
    assert [name for _, name in timer.timed] == ["a_1", "a_2", "b_1"]


@pytest.mark.parametrize("budget", [0.1, 0.4])
def test_the_budget_is_kept(budget: float, clock: Clock) -> None:
    factors = {f"a_{i}": 1.0 + 0.01 * i for i in range(8)}
    problems = {ConvProblem(ic=c, ih=28, iw=28, oc=c, kh=3, kw=3, ph=1, pw=1): 1 for c in range(8, 96, 2)}
    start = clock.now_s
    _, timer = calibrated(Costs(factors), Costs(factors), problems, clock, budget)
    assert 0.5 * budget < clock.now_s - start < 1.2 * budget
    assert len(timer.calls) > 2


def test_expected_regret() -> None:
    ms = np.array([[1.0, 1.2, np.inf], [2.0, 2.0, 2.0]])
    std = np.full(ms.shape, 0.3)
    rng = np.random.default_rng(0)
    t = ms[:, :, None] * np.exp(0.3 * rng.standard_normal((2, 3, 400_000)))
    regret = expected_regret(ms, std)
    assert regret[0, 0] == pytest.approx(np.maximum(0, t[0, 0] - 1.2).mean(), rel=0.02)
    assert regret[0, 1] == pytest.approx(np.maximum(0, 1.0 - t[0, 1]).mean(), rel=0.02)
    assert regret[0, 2] == 0
    assert regret[1] == pytest.approx(np.maximum(0, t[1] - 2.0).mean(axis=1), rel=0.02)
    assert (expected_regret(np.ones((2, 1)), np.ones((2, 1))) == 0).all()


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cost model for the registered primitives, a cache of the test's own, and a clock that goes at each look."""
    Clock.of(monkeypatch, calibration, operators, cpu_timing, look_s=1e-3)
    names = {q.name: 1.0 + 0.02 * i for i, q in enumerate(primitives())}
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "model_for", lambda machine: None)
    monkeypatch.setattr(calibration, "Costs", lambda model, samples, machine: Costs(names, samples=samples))


@pytest.mark.usefixtures("made_up")
def test_calibrate_times_and_stores() -> None:
    problem = ConvProblem(ic=16, ih=14, iw=14, oc=16, kh=1, kw=1)
    assert store.load(cpu()) is None
    samples = calibration.calibrate(0.5, problems=[problem, problem], progress=False)
    able, _ = candidates(problem, cpu(), "default")
    assert samples.timings
    assert {t.problem for t in samples.timings} == {str(problem)}
    assert {t.primitive for t in samples.timings} <= {q.name for q in able}
    assert {t.key for t in samples.operators} <= {"to_nhwc", "to_nchw"}
    stored = store.load(cpu())
    assert stored is not None
    assert sorted(stored.timings) == sorted(samples.timings)


@pytest.mark.usefixtures("made_up")
def test_calibrate_keeps_what_was_timed_before_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Calibrator, *args: object) -> None:
        self.samples.add(SMALL, "pointwise_nhwc", 2, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibrator, "run", interrupted)
    monkeypatch.setattr(calibration, "transforms_on", lambda *a, **k: [OperatorTime("to_nhwc", 8, 2, 0.1)])
    with pytest.raises(KeyboardInterrupt):
        calibration.calibrate(0.2, progress=False)
    stored = store.load(cpu())
    assert stored is not None
    assert [t.ms for t in stored.timings] == [1.0]
    assert [t.key for t in stored.operators] == ["to_nhwc"]


def test_calibrate_refuses_nonsense() -> None:
    for budget in (0, float("inf"), "2"):
        with pytest.raises(ValueError, match="budget_s"):
            calibration.calibrate(budget)
    with pytest.raises(ValueError, match="device"):
        calibration.calibrate(1.0, device="tpu")


@pytest.mark.usefixtures("made_up")
def test_calibrate_times_only_what_may_be_chosen() -> None:
    problem = ConvProblem(ic=16, ih=14, iw=14, oc=16, kh=1, kw=1)
    able, _ = candidates(problem, cpu(), "default", {"onednn": "it is left out"})
    samples = calibration.calibrate(0.5, problems=[problem], able={problem: able}, progress=False)
    assert samples.timings
    assert not [t.primitive for t in samples.timings if t.primitive.startswith("onednn")]


def test_aten_is_a_candidate_only_where_there_is_no_other() -> None:
    for problem in (LARGE, SMALL):
        able, _ = candidates(problem, cpu(), "default")
        assert able, f"nothing takes {problem}"
        assert len(able) == 1 or all(q.family != "aten" for q in able)
