"""How systems are compared on a GPU, dry: with a clock that counts and made-up times; and the page."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import compare as comparing
import pytest
import torch
from compare import Job, compare
from floor import Layer, floor_ms, layers
from gpu import RATES, needs_networks
from page import missing, page, ratio
from worker import caught

from convselect.errors import ConvselectWarning


class Counting:
    """A clock by which each call takes 2 ms."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.log: list[str] = []

    def synchronize(self) -> None: ...

    def elapsed_ms(self, run: Any) -> float:
        before = len(self.log)
        run()
        return 2.0 * (len(self.log) - before)


def small() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()


def test_systems_are_compared_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, noted = Counting(), []

    def prepare(system: str, model: Any) -> Any:
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())

        def call(x: torch.Tensor) -> torch.Tensor:
            if system == "convselect" and system not in clock.log:
                warnings.warn("no CUDA graph", ConvselectWarning, stacklevel=1)
            clock.log.append(system)
            assert x.is_contiguous(memory_format=torch.channels_last)
            return model(x) * (1.5 if system == "inductor" else 1)

        return call

    monkeypatch.setattr(comparing, "prepare", prepare)
    monkeypatch.setattr("convselect.explain", lambda call, x: SimpleNamespace(to_json=lambda: '{"layers": []}'))
    job = Job("small", 2, "float16")
    found = compare(
        small(), torch.randn(2, 3, 8, 8), job, comparing.SYSTEMS, clock, lambda **what: noted.append(what), rounds=3
    )
    assert [note["system"] for note in noted] == ["float64", "eager", "convselect", "inductor", "times", "plan"]
    assert found["convselect"]["median_ms"] == found["eager"]["min_ms"] == 2.0
    assert found["eager"]["all_ms"] == [2.0] * 3
    assert found["eager"]["runs"] == 2, "so many as fill the interval"
    assert 0 < found["eager"]["rel_l2"] < 1e-2
    assert found["convselect"]["plan"] == {"layers": []}
    assert found["convselect"]["warnings"] == ["no CUDA graph"]
    assert "median_ms" not in found["inductor"], "a wrong answer has no time"
    assert "error is" in found["inductor"]["absent"]


@pytest.mark.parametrize("fails", ["first", "later"])
def test_a_system_that_raises_leaves_the_others_their_times(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Also in the third run, when Inductor records its CUDA graph."""
    clock = Counting()

    def prepare(system: str, model: Any) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            clock.log.append(system)
            if system == broken and (fails == "first" or clock.log.count(system) > 2):
                raise KeyError("no such tile")
            return model(x)

        return call

    monkeypatch.setattr(comparing, "prepare", prepare)
    broken = "convselect"
    found = compare(small(), torch.randn(2, 3, 8, 8), Job("small", 2, "tf32"), comparing.SYSTEMS, clock, rounds=3)
    assert found["convselect"]["absent"] == "KeyError: 'no such tile'"
    assert "in call" in found["convselect"]["traceback"]
    assert "median_ms" not in found["convselect"]
    assert found["eager"]["median_ms"] == found["inductor"]["median_ms"] == 2.0
    broken = "eager"
    with pytest.raises(KeyError):
        compare(small(), torch.randn(2, 3, 8, 8), Job("small", 2, "tf32"), comparing.SYSTEMS, clock, rounds=3)


@pytest.mark.parametrize(("off", "timed"), [(4e-3, True), (6e-3, False)])
def test_a_precision_may_err_where_eager_errs_less(monkeypatch: pytest.MonkeyPatch, off: float, timed: bool) -> None:
    """cuDNN may have taken an algorithm in float32 where the others round to TF32."""

    def prepare(system: str, model: Any) -> Any:
        return lambda x: model(x) * (1 + off if system == "convselect" else 1)

    monkeypatch.setattr(comparing, "prepare", prepare)
    clock = Counting()
    found = compare(small(), torch.randn(2, 3, 8, 8), Job("small", 2, "tf32"), comparing.SYSTEMS[:2], clock, rounds=1)
    assert found["eager"]["rel_l2"] < 1e-6
    assert ("median_ms" in found["convselect"]) is timed


def test_what_breaks_the_context_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*args: Any, **where: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    try:
        raise ValueError("no engine")
    except ValueError:
        assert caught(torch.device("cpu"))["error"] == "ValueError: no engine"
        monkeypatch.setattr(torch, "ones", ones)
        with pytest.raises(RuntimeError, match="illegal"):
            caught(torch.device("cpu"))


def made_up(job: Job, ours: float, eager: float, inductor: float | None) -> dict[str, Any]:
    times = {"convselect": ours, "eager": eager, "inductor": inductor}
    systems = {name: {"median_ms": ms, "first_s": 1.5} for name, ms in times.items() if ms is not None}
    return {**job._asdict(), "floor_ms": 0.5, "model": "the roofline", "systems": systems}


def test_page() -> None:
    jobs = [Job("a", 1, "float16"), Job("b", 1, "float16"), Job("a", 32, "tf32")]
    records = [made_up(jobs[0], 1.0, 2.0, 4.0), made_up(jobs[1], 1.0, 0.5, None)]
    failures = [{**jobs[1]._asdict(), "system": "inductor", "error": "no memory"}]
    assert ratio(records[0]) == 2.0
    assert ratio(records[1]) is None
    lack = missing(jobs, records, failures)
    assert lack == [f"tf32, batch 32, {name}: a" for name in ("convselect", "cuDNN", "Inductor")]
    models = {"tf32": {"problems": 3, "timings": 9, "held_out": {"mdrae": 0.123, "slowdown_total": 1.01}}}
    text = page(RATES, RATES, models, records, failures, jobs)
    assert "Some GPU, 2000-01-01" in text
    assert "The tests on this GPU: passed." in text
    assert text.count("Chosen by the roofline.") == 1
    assert "| a | 1.000 | 2.000 | 4.000 | 2.00 | 50% | 1.5 |" in text
    assert "| b | 1.000 | 0.500 | - " in text
    assert "over 1 networks: 2.00; none is slower" in text
    assert "12.3%" in text
    assert "b, 1, float16, inductor: no memory" in text
    assert lack[0] in text
    wrong = made_up(jobs[0], 1.0, 2.0, 4.0)
    wrong["systems"]["convselect"] = {"rel_l2": 0.5, "absent": "its error is 0.5", "warnings": ["no CUDA graph"]}
    other = {**made_up(jobs[1], 1.0, 2.0, 4.0), "model": "a model of 9 timings of 3 problems"}
    text = page(RATES, RATES, {}, [wrong, other], [], jobs)
    assert "a, convselect: its error is 0.5." in text
    assert "a, convselect: no CUDA graph." in text
    assert "Chosen by the roofline: a." in text
    assert "Chosen by a model of 9 timings of 3 problems: b." in text
    died = {"precision": "tf32", "primitive": "some", "problem": "mb1", "error": "killed", "log": ["a", "b"]}
    assert "- tf32, some, mb1: killed\n" in page(RATES, RATES, {}, [], [died], jobs)


def test_floor() -> None:
    some = [Layer(flops=10**12, elements=1), Layer(flops=1, elements=10**9)]
    assert floor_ms(some, "float16", RATES) == pytest.approx(10 + 2)
    assert floor_ms(some, "tf32", RATES) == pytest.approx(20 + 4)


@needs_networks
def test_layers_of_a_network() -> None:
    found = layers("alexnet", 2)
    assert len(found) == 8
    assert found[-1] == Layer(2 * 2 * 4096 * 1000, 2 * (4096 + 1000) + 4096 * 1000)
    assert layers("inception_v3", 1)[0].elements == 3 * 299**2 + 32 * 149**2 + 32 * 27
