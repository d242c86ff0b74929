"""What timings on a machine make of a cost model that was trained on another one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from test_costs import CANDIDATES, PRIMITIVES, machine, problems, trained, true_ms  # noqa: F401 (`trained` is the fixture `model`)

from convselect.costs import CostModel, Costs, Samples
from convselect.costs.metrics import mdrae, quality
from convselect.costs.transfer import Adapted


def sampled(scale: dict[str, float], count: int, seed: int, threads: int = 1) -> Samples:
    samples = Samples()
    for problem in problems(count, seed):
        for name, (family, _, _) in PRIMITIVES.items():
            ms = true_ms(problem, name, threads) * scale[family]
            if np.isfinite(ms):
                samples.add(problem, name, threads, ms)
    return samples


def test_adaptation_finds_what_another_machine_scales(model: CostModel) -> None:
    scale = {"direct": 3.0, "im2col": 0.8, "im2row": 1.5, "winograd": 6.0}
    target = problems(100, seed=5)
    measured = np.array([[true_ms(p, n, 1) * scale[f] for n, (f, _, _) in PRIMITIVES.items()] for p in target])
    before = quality(model.predict(target, CANDIDATES, 1), measured)
    errors = []
    for count in (1, 5, 20):
        mean, std = Adapted(model, sampled(scale, count, seed=77)).log_predict(target, CANDIDATES, 1)
        errors.append(mdrae(np.exp(mean), measured))
    inside = np.abs(mean - np.log(measured)) <= 1.645 * std
    assert errors[0] < 0.6 * before.mdrae
    assert errors[1] < 0.25 * before.mdrae
    assert errors[2] < 0.08
    assert quality(np.exp(mean), measured).slowdown_total < before.slowdown_total
    assert inside[np.isfinite(measured)].mean() > 0.8


def test_one_disturbed_timing_does_not_move_the_rest(model: CostModel) -> None:
    scale = dict.fromkeys(("direct", "im2col", "im2row", "winograd"), 2.0)
    samples = sampled(scale, 10, seed=3)
    worst = samples.timings[0]
    samples.timings[0] = worst._replace(ms=worst.ms * 16)
    target = problems(40, seed=6)
    calm = Adapted(model, sampled(scale, 10, seed=3)).log_predict(target, CANDIDATES, 1)[0]
    disturbed = Adapted(model, samples).log_predict(target, CANDIDATES, 1)[0]
    assert np.median(np.abs(calm - disturbed)) < 0.05


def test_a_slow_spell_does_not_favour_what_was_not_timed(model: CostModel) -> None:
    at_home = replace(model, info={**model.info, "machines": [str(machine(threads=2))]})
    (target,), half = problems(1), CANDIDATES[::2]
    before = model.predict([target], CANDIDATES, 2)[0]
    samples = Samples()
    for (name, _), ms in zip(half, before[::2], strict=True):
        samples.add(target, name, 2, 1.4 * float(ms))
    shift = Costs(at_home, samples, machine(threads=2)).predict([target], CANDIDATES)[0][0] / before
    assert shift[::2].max() / shift[1::2].min() < 1.1


def test_a_timing_and_the_prediction_together(model: CostModel) -> None:
    """A timing counts for what it is worth: little where it alone is far slower than sure predictions, else much."""
    target = problems(12)
    before = model.predict(target, CANDIDATES, 2)
    at_home = replace(model, info={**model.info, "machines": [str(machine(threads=2))]})

    def ratio(factor: float, model: CostModel) -> float:
        """Of the first problem's first candidate after it was timed so many times slower, the others as predicted."""
        samples = Samples()
        for i, problem in enumerate(target):
            for j, (name, _) in enumerate(CANDIDATES):
                samples.add(problem, name, 2, float(before[i, j]) * (factor if i == j == 0 else 1.0))
        adapted = Costs(model, samples, machine(threads=2))
        return float(adapted.predict(target, CANDIDATES)[0][0, 0] / before[0, 0])

    assert ratio(2.0, at_home) < 1.3
    assert ratio(0.5, at_home) < 0.95
    assert -math.log(ratio(0.5, at_home)) > 1.5 * math.log(ratio(2.0, at_home))  # nothing errs to the fast side
    assert ratio(1.2, model) > ratio(1.2, at_home) > 1


def test_a_timing_is_of_its_number_of_threads(model: CostModel) -> None:
    some, samples = problems(3), Samples()
    samples.add(some[1], "direct_nhwc", 2, 123.0)
    std, other = (Costs(model, samples, machine(threads=threads)).predict(some, CANDIDATES)[1] for threads in (2, 1))
    assert std[1, 1] < 0.5 * min(std[0, 1], other[1, 1])


def test_a_sampled_primitive_that_the_model_lacks_learns_its_own_offset(model: CostModel) -> None:
    samples = Samples()
    for problem in problems(12, seed=8):
        samples.add(problem, "direct_blocked", 1, 5 * true_ms(problem, "direct_nhwc", 1))
        samples.add(problem, "direct_nhwc", 1, true_ms(problem, "direct_nhwc", 1))
    some = problems(20, seed=11)
    candidates = [("direct_blocked", "direct"), ("direct_nhwc", "direct")]
    found, _ = Costs(model, samples, machine()).predict(some, candidates)
    assert np.median(found[:, 0] / found[:, 1]) == pytest.approx(5, rel=0.2)


def test_without_samples_the_model_is_as_it_is(model: CostModel) -> None:
    some = problems(10)
    adapted = Costs(model, None, machine())
    ms, std = adapted.predict(some, CANDIDATES)
    np.testing.assert_allclose(ms, model.predict(some, CANDIDATES, 1), rtol=1e-12)
    assert (std > 0.5).all()
    at_home = CostModel(
        model.primitives,
        model.families,
        model.layers,
        model.statistics,
        model.operators,
        {"machines": [str(machine())]},
    )
    assert (Costs(at_home, None, machine()).predict(some, CANDIDATES[:4])[1] < 0.15).all()
    assert adapted.with_samples(sampled(dict.fromkeys(("direct", "im2col", "im2row", "winograd"), 2.0), 5, 1)).samples
