"""Measurement: interleaving, robustness, early abandon, deadlines."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from clock import Clock

from convselect.layout import Layout, holds
from convselect.machine import Machine, cpu
from convselect.measure import cpu as cpu_timing
from convselect.measure.cpu import PrimitiveTimer, interleaved, robust_ms
from convselect.measure.operators import OPERATORS, time_operators, time_transforms
from convselect.primitive import Activation, Primitive
from convselect.problem import ConvProblem

PROBLEM = ConvProblem(ic=16, ih=14, iw=14, oc=16, kh=3, kw=3, ph=1, pw=1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """And no thread loses its processor."""
    monkeypatch.setattr(cpu_timing, "_preemptions", lambda: 0)
    return Clock.of(monkeypatch, cpu_timing)


class Sleeper(Primitive):
    """Takes `ms` by `clock`, and checks what it is given."""

    def __init__(self, clock: Clock, name: str, ms: float, layout: Layout = Layout.NHWC) -> None:
        self.clock, self.name, self.family, self.ms = clock, name, "sleeper", ms
        self.src_layout = self.dst_layout = layout
        self.runs = 0

    def refusal(self, problem: ConvProblem, machine: Machine) -> str | None:
        return None

    def workspace_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return 0

    def packed_bytes(self, problem: ConvProblem, machine: Machine) -> int:
        return problem.weight_bytes

    def prepack(self, problem: ConvProblem, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()

    def run(
        self,
        problem: ConvProblem,
        activation: Activation,
        src: torch.Tensor,
        packed: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        assert activation.kind == "relu"
        assert bias is not None
        assert bias.shape == (problem.oc,)
        assert src.shape == (problem.mb, problem.ic, problem.ih, problem.iw)
        assert holds(src, self.src_layout)
        assert packed.shape == (problem.oc, problem.ic // problem.g, problem.kh, problem.kw)
        assert torch.is_inference_mode_enabled()
        self.runs += 1
        self.clock.sleep(self.ms * 1e-3)
        return src


def test_interleaved_starts_each_round_one_further(clock: Clock) -> None:
    order: list[str] = []
    runs = [lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")]
    times = interleaved(runs, rounds=2, before=lambda: order.append("|"))
    assert "".join(order) == "|abc|bca"
    assert times.shape == (2, 3)
    assert np.isfinite(times).all()


def test_interleaved_starts_nothing_after_the_deadline(clock: Clock) -> None:
    times = interleaved([lambda: clock.sleep(0.03)] * 3, rounds=5, deadline=clock.now_s + 0.04)
    assert times[0, :2] == pytest.approx([30, 30])
    assert np.isfinite(times).sum() == 2
    assert np.isnan(interleaved([lambda: None], rounds=3, deadline=clock.now_s)).all()


def test_interleaved_abandons_the_hopeless(clock: Clock) -> None:
    calls = [0, 0]

    def run(index: int, ms: float) -> None:
        calls[index] += 1
        clock.sleep(ms * 1e-3)

    times = interleaved([lambda: run(0, 1), lambda: run(1, 80)], rounds=4, abandon=5.0)
    assert np.isfinite(times[:, 0]).all()
    assert np.isfinite(times[:, 1]).tolist() == [True, False, False, False]
    assert calls[1] == 1


def test_one_slow_timing_is_not_hopeless(clock: Clock) -> None:
    pauses = iter([0.02, 0.001, 0.001, 0.001])
    times = interleaved([lambda: clock.sleep(1e-3), lambda: clock.sleep(next(pauses))], rounds=4, abandon=5.0)
    assert np.isfinite(times).all()


def test_a_preempted_timing_is_repeated(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([0, 1, 1, 1])  # the kernel takes a processor away during the first call, not during the second
    monkeypatch.setattr(cpu_timing, "_preemptions", lambda: next(counts))
    pauses = iter([0.03, 0.001])
    times = interleaved([lambda: clock.sleep(next(pauses))], rounds=1)
    assert times == pytest.approx(np.array([[1.0]]))


def test_robust_is_the_lower_quartile_of_what_was_timed() -> None:
    nan = np.nan
    times = np.array([[3.0, 9.0, nan], [1.0, nan, nan], [2.0, nan, nan], [16.0, nan, nan], [5.0, nan, nan]])
    estimate = robust_ms(times)
    assert estimate[:2].tolist() == [2.0, 9.0]
    assert np.isnan(estimate[2])


def test_primitives_are_timed_in_their_own_layout(clock: Clock) -> None:
    candidates = [Sleeper(clock, "fast", 2, Layout.NCHW), Sleeper(clock, "slow", 6), Sleeper(clock, "hopeless", 100)]
    times = PrimitiveTimer(cpu()).time_primitives(PROBLEM, candidates, rounds=3)
    assert times == pytest.approx({"fast": 2, "slow": 6, "hopeless": 100})
    assert [candidate.runs for candidate in candidates] == [4, 4, 1], "the first call of the last was its only one"


def test_primitives_without_time_are_left_out(clock: Clock) -> None:
    candidates = [Sleeper(clock, "a", 20), Sleeper(clock, "b", 20), Sleeper(clock, "c", 20)]
    timer, start = PrimitiveTimer(cpu()), clock.now_s
    times = timer.time_primitives(PROBLEM, candidates, rounds=50, deadline=start + 0.09)
    assert times == pytest.approx({"a": 20, "b": 20}), "three first calls, then two timings are begun"
    assert clock.now_s - start == pytest.approx(0.1)
    assert timer.time_primitives(PROBLEM, candidates, deadline=start) == {}


def test_time_primitives_on_a_kernel_of_ours() -> None:
    from convselect import primitive

    problem = ConvProblem(ic=32, ih=14, iw=14, oc=64, kh=1, kw=1)
    times = PrimitiveTimer(cpu()).time_primitives(problem, [primitive.get("pointwise_nhwc")], rounds=2)
    assert times["pointwise_nhwc"] > 0


def test_operators_are_timed_in_both_layouts() -> None:
    rows = time_operators([(1, 8, 8, 8)], rounds=1)
    assert {row.key for row in rows} == {"to_nhwc", "to_nchw"} | {
        f"{key}.{layout}" for key, _, _ in OPERATORS for layout in ("nchw", "nhwc")
    }
    assert all(row.ms > 0 and row.threads == torch.get_num_threads() for row in rows)
    nbytes = {row.key: row.nbytes for row in rows}
    assert nbytes["to_nhwc"] == nbytes["elementwise.nchw"] == 2 * 4 * 512
    assert nbytes["add.nhwc"] == 3 * 4 * 512
    assert nbytes["cat.nhwc"] == 4 * 4 * 512
    assert nbytes["mean.nchw"] == 4 * (512 + 8)


def test_transforms_alone() -> None:
    rows = time_transforms([(1, 8, 8, 8), (2, 16, 5, 7)], rounds=1)
    assert [(row.key, row.nbytes) for row in rows] == [
        ("to_nchw", 4096),
        ("to_nhwc", 4096),
        ("to_nchw", 8960),
        ("to_nhwc", 8960),
    ]
    assert all(row.ms > 0 for row in rows)


@pytest.mark.parametrize("measure", [time_operators, time_transforms])
def test_operators_keep_the_deadline(measure: object) -> None:
    assert measure([(1, 8, 8, 8)], deadline=0.0) == []  # type: ignore[operator]


def test_a_large_result_of_a_kernel_costs_no_page_faults() -> None:
    """As in a plan, whose arena stays; a library's result is new at each call there too."""
    from convselect import primitive

    p = ConvProblem(ic=8, ih=224, iw=224, oc=256, kh=1, kw=1)  # dst has 49 MiB
    kernel = primitive.get("pointwise_nhwc")
    src = torch.randn(1, 8, 224, 224).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(256, 8, 1, 1), torch.randn(256)
    run = kernel.prepared(p, Activation("relu"), src, kernel.prepack(p, weight), bias)
    with torch.inference_mode():
        run()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        run()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000
        want = kernel.run(p, Activation("relu"), src, kernel.prepack(p, weight), bias, None)
    assert torch.equal(run.args[0], want)


def test_timing_leaves_the_users_random_numbers_and_defaults_alone(clock: Clock) -> None:
    candidates = [Sleeper(clock, "a", 1)]
    state = torch.get_rng_state()
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            assert PrimitiveTimer(cpu()).time_primitives(PROBLEM, candidates, rounds=1) == pytest.approx({"a": 1})
            assert time_operators([(1, 8, 8, 8)], rounds=1)
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
