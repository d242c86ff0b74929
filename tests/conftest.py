"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# Of each process, whatever the machine; threads that wait leave their processor to other processes.
os.environ |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}

import pytest
import torch
from clock import Clock

# Triton's kernels run on the GPU if there is one, else in its interpreter; Triton must know when it is imported.
if not torch.cuda.is_available() or torch.version.hip:
    os.environ["TRITON_INTERPRET"] = "1"

# `make sanitize` names a folder with the library as it builds it.
if folder := os.environ.get("CONVSELECT_SANITIZED"):
    load_library = torch.ops.load_library
    torch.ops.load_library = lambda path: load_library(Path(folder, Path(path).name))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, help="of each test's cases, run the first, the (N+1)th and so on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    step, seen = config.getoption("--one-in"), Counter[str]()
    kept, left_out = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        test = item.nodeid.partition("[")[0]
        (left_out if seen[test] % step else kept).append(item)
        seen[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    # Files that take long first, so that no process is alone with one in the end.
    heavy = {item.path for item in kept if item.get_closest_marker("heavy")}
    items[:] = sorted(kept, key=lambda item: item.path not in heavy)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test may depend on the calibrations of whoever runs it, nor add to them."""
    os.environ["CONVSELECT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers wherever it runs, and whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def solver_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which the PBQP solver goes: a millisecond of its budget is 1000 looks, whatever the machine."""
    from convselect.selection import bound, pbqp

    return Clock.of(monkeypatch, bound, pbqp, look_s=1e-6)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of a compiled model that goes through Dynamo."""
    from torch._dynamo.eval_frame import OptimizedModule  # it imports Triton

    calls: list[int] = []
    original = OptimizedModule.__call__

    def count(self: OptimizedModule, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(OptimizedModule, "__call__", count)
    return calls
