"""Several threads and processes at once: each result is one that a call alone gives, and the cache loses nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from saving import MACHINE, save_in_turn
from torch import nn

import convselect
from convselect.costs import Samples, store
from convselect.primitives.kernel import KernelPrimitive

THREADS, CALLS = 8, 200
PROCESSES, SAVES = 8, 12


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.MaxPool2d(2)
    ).eval()


def compiled(model: nn.Module) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()
    return convselect.compile(model, calibrate="never", strict=True)


@contextmanager
def beside(work: Callable[[threading.Event], None], failures: list[BaseException]) -> Iterator[None]:
    """Does `work` in a thread of its own, until the event that it is given."""
    done = threading.Event()

    def run() -> None:
        try:
            work(done)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def test_threads_beside_a_change_of_weights_and_a_calibration() -> None:
    model = network()
    fast = compiled(model)
    weights = [model[0].weight, nn.Parameter(model[0].weight.detach() + 0.5)]
    inputs = [torch.randn(1, 3, 12, 12) for _ in range(THREADS)]
    with torch.inference_mode():
        wanted = []
        for weight in weights:
            model[0].weight = weight
            wanted.append([fast(x) for x in inputs])
    assert not any(torch.equal(old, new) for old, new in zip(*wanted, strict=True))
    seen, failures = [0, 0], list[BaseException]()

    def call(i: int) -> None:
        try:
            with torch.inference_mode():
                for _ in range(CALLS):
                    got = fast(inputs[i])
                    matches = [torch.equal(got, want[i]) for want in wanted]
                    assert any(matches), "bits of neither weight"
                    seen[matches.index(True)] += 1
        except BaseException as error:
            failures.append(error)

    def change(done: threading.Event) -> None:
        """Each weight lasts for some calls."""
        for turn in range(10**9):
            if done.is_set():
                break
            model[0].weight = weights[turn % 2]
            begun = sum(seen)
            while sum(seen) < begun + 3 * THREADS and not done.is_set():
                time.sleep(0.001)

    def calibrate(done: threading.Event) -> None:
        while not done.is_set():
            convselect.calibrate(budget_s=0.05)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(THREADS)]
    with beside(change, failures), beside(calibrate, failures):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures
    assert min(seen) > 0
    with torch.inference_mode():
        for weight, want in zip(weights, wanted, strict=True):
            model[0].weight = weight
            assert all(torch.equal(fast(x), y) for x, y in zip(inputs, want, strict=True))


def test_a_weight_that_is_written_while_it_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread; the call may have the old values, the next must have the new ones."""
    model, x = network(), torch.randn(1, 3, 12, 12)
    meanwhile = [value for value in model.state_dict(keep_vars=True).values() if value.is_floating_point()]
    prepack = KernelPrimitive.prepack

    def written(self: KernelPrimitive, *args: object) -> torch.Tensor:
        packed = prepack(self, *args)
        with torch.no_grad():
            while meanwhile:
                meanwhile.pop().add_(0.5)
        return packed

    monkeypatch.setattr(KernelPrimitive, "prepack", written)
    with torch.inference_mode():
        fast = compiled(model)
        fast(x)
        assert not meanwhile
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def started(folder: Path, saves: Sequence[int]) -> dict[Connection, BaseProcess]:
    """Processes that save so often, by what they tell: children of a server that has imported all, to start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["convselect.costs.store"])
    found: dict[Connection, BaseProcess] = {}
    for worker, count in enumerate(saves):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_in_turn, args=(str(folder), worker, count, theirs), daemon=True)
        process.start()
        theirs.close()
        found[ours] = process
    return found


@pytest.mark.heavy
def test_processes_on_one_cache_some_of_which_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them, which would save for ever, each somewhere in the saves that follow its first few."""
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    running = started(tmp_path / "cache", [sys.maxsize, SAVES] * (PROCESSES // 2))
    killed_after = {ours: draw.randrange(1, SAVES - 2) for ours in list(running)[::2]}
    said: dict[Connection, list[str]] = {ours: [] for ours in running}
    open_ = set(running)
    while open_:
        for ours in wait(list(open_)):
            try:
                said[ours].append(ours.recv())
            except EOFError:
                open_.discard(ours)
                continue
            if len(said[ours]) == killed_after.get(ours):
                time.sleep(draw.uniform(0, 0.01))
                os.kill(running[ours].pid, signal.SIGKILL)
        assert store.load(MACHINE) is not None, "a reader beside them finds what is there"
    for ours, process in running.items():
        process.join()
        assert process.exitcode == (-signal.SIGKILL if ours in killed_after else 0)
        assert ours in killed_after or len(said[ours]) == SAVES
    assert not store.verify()
    kept = {timing.primitive for timing in store.load(MACHINE).timings}
    assert kept >= {name for names in said.values() for name in names}
    store.save(MACHINE, Samples(seconds=1.0))
    left = sorted(path.name.split(".")[-1] for path in (tmp_path / "cache").iterdir())
    assert left == ["json", "lock", "safetensors"], "what a killed process was writing goes with the next save"


def test_a_reader_beside_many_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each save removes the data that the JSON before it names."""
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path))
    store.save(MACHINE, Samples(seconds=1.0))
    read, saves = store._record, iter(range(5))

    def overtaken(path: Path) -> dict[str, object]:
        record = read(path)
        monkeypatch.setattr(store, "_record", read)
        if next(saves, None) is not None:
            store.save(MACHINE, Samples(seconds=1.0))
        monkeypatch.setattr(store, "_record", overtaken)
        return record

    monkeypatch.setattr(store, "_record", overtaken)
    assert store.load(MACHINE) == Samples(seconds=6.0)
