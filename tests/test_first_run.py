"""The first run on a machine: calibration by itself, once, whatever the state of its cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clock import Clock
from made_up import Costs
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import convselect
from convselect import choices, machine
from convselect.costs import Samples, store
from convselect.measure import calibration, operators
from convselect.measure import cpu as cpu_timing
from convselect.primitive import primitives

SCRIPT = """
import pytest, torch, convselect
from clock import Clock
from convselect.measure import calibration
from convselect.measure import operators
from convselect.measure import cpu as cpu_timing
Clock.of(pytest.MonkeyPatch(), calibration, operators, cpu_timing, look_s=1e-3)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3)).eval()
x = torch.randn(1, 3, 32, 32)
with torch.inference_mode():
    assert torch.allclose(convselect.compile(model, budget_s=0.5)(x), model(x), rtol=1e-3, atol=1e-4)
"""


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A calibration makes a few hundred looks, whatever the machine."""
    return Clock.of(monkeypatch, calibration, operators, cpu_timing, look_s=1e-3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_once(**options: object) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """Compiles a model of two convolutions, and compares; the compiled model and its input."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        fast = convselect.compile(model, **{"budget_s": 0.5, **options})
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
    return fast, x


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(*_: object, **__: object) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr(calibration, "calibrate", calibrate)


def test_the_first_run_calibrates_and_the_second_does_not(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_once()
    samples = store.load(machine.cpu())
    assert samples is not None
    assert samples.timings
    store.save(machine.cpu(), Samples(seconds=0.5))
    forbid(monkeypatch)
    run_once()
    run_once(calibrate="never")
    with pytest.raises(BackendCompilerFailed, match="calibrated again"):
        run_once(calibrate="always")


def test_what_a_first_graph_leaves_of_the_budget_is_for_the_next(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it that it has little to be timed, or that Ctrl-C ended it."""
    store.save(machine.cpu(), Samples(seconds=0.2))
    budgets: list[float] = []

    def calibrate(budget_s: float, **_: object) -> Samples:
        budgets.append(budget_s)
        return store.save(machine.cpu(), Samples(seconds=budget_s))

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    run_once()
    run_once()
    assert budgets == [pytest.approx(0.3)]


def test_never_is_the_shipped_model_as_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a calibration, here one by which the first choice would be slow."""
    factors = {primitive.name: 1.0 + 0.01 * i for i, primitive in enumerate(primitives())}
    monkeypatch.setattr(choices, "costs_for", lambda machine, samples: Costs(factors, samples=samples, machine=machine))
    layers = []
    for _ in range(2):
        fast, x = run_once(calibrate="never")
        plan = convselect.explain(fast, x)
        layers.append([(layer.primitive, layer.predicted_ms) for layer in plan.layers])
        for problem, primitive in ((layer.problem, layer.primitive) for layer in plan.layers):
            samples = Samples(seconds=9.0)
            samples.add(problem, primitive, torch.get_num_threads(), 1000.0)
            store.save(machine.cpu(), samples)
    assert layers[0] == layers[1]
    fast, x = run_once()
    assert [layer.primitive for layer in convselect.explain(fast, x).layers] != [name for name, _ in layers[0]]


def test_never_leaves_no_trace(cache: Path) -> None:
    run_once(calibrate="never")
    run_once(budget_s=0.0)
    assert not cache.exists()


def test_a_damaged_cache_is_a_miss(cache: Path) -> None:
    run_once()
    for path in cache.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".safetensors"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert store.load(machine.cpu()) is None
    run_once()
    assert store.load(machine.cpu()) is not None


def test_a_cache_that_cannot_be_written_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(convselect.ConvselectWarning, match="file"):
        run_once()


@pytest.mark.heavy
def test_two_processes_at_once(cache: Path) -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    (entry,) = store.entries()
    assert not store.verify()
    assert entry.timings > 0
