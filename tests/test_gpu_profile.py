"""Profiling on a GPU, dry: workers that die, primitives that raise, kernels that only say that they were compiled."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import profiles as profiling
import pytest
import torch
import worker as supervising
from gpu import FakeDevice, Named, machine
from worker import Note, read, stop, supervise, write

from convselect.kernels.triton.launch import Launch
from convselect.problem import ConvProblem

WORKER = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # as the worker does: a shell may have it ignored
note, failures, how = sys.argv[1:]
failed = json.load(open(failures)) if os.path.exists(failures) else []

def say(name):
    beside = pathlib.Path(note + ".new")
    beside.write_text(json.dumps({"primitive": name}))
    beside.replace(note)

for name in "abc":
    if [f for f in failed if f["primitive"] == name]:
        continue
    if name == "b" and how in ("hang", "save"):
        try:
            say(name)
            time.sleep(600)
        finally:
            open(note + ".saved", "w").close()
    say(name)
    if name == "b":
        if how == "crash":
            os.kill(os.getpid(), 11)
        if how == "advice":
            sys.exit("RuntimeError: out of memory" + chr(10) + "Set SOME_SWITCH=1 to learn more")
        sys.exit("an illegal memory access was encountered")
"""


class HourAtB:
    """A clock by which a worker that is at "b" has been there for an hour, and that stands still before and after."""

    sleep, strftime = staticmethod(time.sleep), staticmethod(time.strftime)

    def __init__(self, note: Path) -> None:
        self.note = note

    def monotonic(self) -> float:
        at_b = self.note.exists() and json.loads(self.note.read_text())["primitive"] == "b"
        return 3600.0 if at_b else 0.0

    def time(self) -> float:
        written = self.note.stat().st_mtime if self.note.exists() else 0.0
        return written + self.monotonic()


def supervised(tmp_path: Path, how: str) -> bool:
    """Whether the worker ended within two hours, or half an hour if it is to "save"."""
    note, failures = tmp_path / "note.json", tmp_path / "failures.json"
    command = [sys.executable, "-c", WORKER, str(note), str(failures), how]
    clock = HourAtB(note) if how in ("hang", "save") else time
    deadline = clock.monotonic() + (1800 if how == "save" else 7200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervising, "time", clock)
        return supervise(command, note, failures, tmp_path / "log", deadline, lambda noted: 600.0)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raise", "exit code 1: an illegal memory access was encountered"),
        ("crash", "killed by signal 11"),
        ("advice", "exit code 1: RuntimeError: out of memory"),
        ("hang", "no progress for 600 s: KeyboardInterrupt"),
    ],
)
def test_what_kills_a_worker_is_left_out(tmp_path: Path, how: str, error: str) -> None:
    (tmp_path / "log").write_text("ValueError: of an earlier worker\n")
    assert supervised(tmp_path, how)
    (failure,) = read(tmp_path / "failures.json")
    assert (failure["primitive"], failure["error"]) == ("b", error)
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0] == "ValueError: of an earlier worker", "each worker's log is kept"
    assert failure["log"] == [line for line in log[1:] if line.strip()]
    assert json.loads((tmp_path / "note.json").read_text()) == {"primitive": "c"}


def test_a_worker_that_does_not_begin(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import no_such_module"]
    paths = (tmp_path / name for name in ("note.json", "failures.json", "log"))
    with pytest.raises(RuntimeError, match="before it began"):
        supervise(command, *paths, time.monotonic() + 600, lambda noted: 600.0)
    assert "no_such_module" in capfd.readouterr().out


def test_out_of_time_is_no_failure(tmp_path: Path) -> None:
    """And the worker is told, so that it saves what it has."""
    assert not supervised(tmp_path, "save")
    assert not (tmp_path / "failures.json").exists()
    assert (tmp_path / "note.json.saved").exists()


def test_stopping_ends_what_was_started_too(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    stop(process, 0.2)
    assert process.stdout is not None
    with process.stdout as held:
        assert held.read() == b"", "at the end of its last holder"


class Timer:
    """Of a GPU that is not there: 1 ms each."""

    seen: ClassVar[list[tuple[str, str, set[str]]]] = []

    def __init__(self, dtype: torch.dtype, failures: Path) -> None:
        self.machine = machine("float16" if dtype == torch.float16 else "tf32")

    def time_primitives(self, problem: Any, some: Any, rounds: int) -> dict[str, float]:
        for q in some:
            q.prepack(problem, torch.empty(problem.oc, problem.ic, problem.kh, problem.kw, device="meta"))
        self.seen.append((self.machine.precision, str(problem), {q.name for q in some}))
        return {q.name: 1.0 for q in some}


FEW = [ConvProblem(ic=64, ih=size, iw=size, oc=64, kh=3, kw=3, ph=1, pw=1) for size in (7, 14, 28)]


def test_profiling_leaves_out_what_failed(tmp_path: Path) -> None:
    note, name = Note(tmp_path / "note.json"), "igemm_64x64_nhwc"
    failures = [{"precision": "tf32", "primitive": name, "problem": str(FEW[0]), "error": ""}]
    write(tmp_path / "failures.json", failures)
    Timer.seen.clear()
    assert profiling.profile(tmp_path, FEW, note, 60.0, Timer)
    assert [name in names for _, _, names in Timer.seen] == [True, True, True, False, True, True]
    assert not any(other.startswith("aten") for _, _, names in Timer.seen for other in names), "cuDNN is what it calls"
    assert json.loads((tmp_path / "note.json").read_text())["problem"] == str(FEW[2])
    Timer.seen.clear()
    assert profiling.profile(tmp_path, FEW, note, 60.0, Timer)
    assert not Timer.seen, "what the tables hold is not timed again"
    often = [{**failures[0], "problem": str(p)} for p in FEW[:2]]
    assert name not in {q.name for q in profiling.watched("tf32", often, note)}
    assert name in {q.name for q in profiling.watched("float16", often, note)}
    raised = [{**failure, "traceback": ""} for failure in often]
    assert name in {q.name for q in profiling.watched("tf32", raised, note)}, "that costs little"
    assert name not in {q.name for q in profiling.watched("tf32", 3 * raised, note)}


def test_a_primitive_that_raises_costs_its_own_times_only(tmp_path: Path) -> None:
    log: list[str] = []

    class Broken(Named):
        def run(self, problem: Any, *rest: Any) -> Any:
            log.append("tried")
            raise LookupError(f"no engine for {problem.ih}")

    failures = tmp_path / "failures.json"
    timer = profiling.Forgiving(machine("tf32"), torch.float32, FakeDevice(log), failures)
    some = [Named("ab", log), Broken("broken", log), Named("abc", log)]
    assert timer.time_primitives(FEW[0], some) == pytest.approx({"ab": 2.0, "abc": 3.0})
    (failure,) = read(failures)
    assert (failure["primitive"], failure["problem"]) == ("broken", str(FEW[0]))
    assert (failure["precision"], failure["error"]) == ("tf32", "LookupError: no engine for 7")
    assert "in run" in failure["traceback"]
    for _ in range(9):
        timer.time_primitives(FEW[1], some)
    assert len(read(failures)) == profiling.MOST_ERRORS, "then it is not tried again"


class Kernel:
    """Compiles if it is asked to."""

    def __init__(self, name: str, log: list[str], fails: bool = False) -> None:
        self.fn = SimpleNamespace(__name__=name)
        self.params = [SimpleNamespace(do_not_specialize=False), SimpleNamespace(do_not_specialize=True)]
        self.log, self.fails = log, fails

    def warmup(self, *args: Any, grid: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
        self.log.append(self.fn.__name__)
        if self.fails:
            raise TypeError("it does not compile")


def test_shards_compile_each_kernel_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    kernels = [Kernel(f"k{i}", log, fails=i == 3) for i in range(20)]
    some = [Launch(kernel, (1,), (size, None), {"ACT": 1}) for size in (3, 5) for kernel in kernels]
    monkeypatch.setattr(profiling, "all_launches", lambda here, networks: some)
    monkeypatch.setattr(profiling, "gpu", lambda index, dtype: None)
    monkeypatch.setattr(profiling, "PRECISIONS", {"float16": torch.float16})
    for shard in range(4):
        profiling.compile_kernels({}, shard, 4)
    assert sorted(log) == sorted(f"k{i}" for i in range(20))
    assert log.index("k3") < len(log) - 1, "one that fails does not end its shard"
    assert "does not compile: TypeError" in capsys.readouterr().out


def test_specializations_are_tritons() -> None:
    def key(*args: Any, **constants: Any) -> str:
        return profiling.specialization(Launch(Kernel("k", []), (1,), args, constants))

    half, single = (torch.empty(2, dtype=dtype, device="meta") for dtype in (torch.float16, torch.float32))
    assert key(3, 1) == key(5, 16)
    assert key(half, 1.5) == key(half[1:], 2.5)
    different = [(3,), (1,), (16,), (2**31 + 1,), (3, 2**31), (None,), (3.0,), (half,), (single,)]
    assert len({key(*args) for args in different} | {key(3, ACT=1)}) == 10
