"""What `benchmarks/gpu.py` does on a GPU, dry: with a clock that counts, made-up times, and workers that die."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gpu import machine

from convselect.bench.gpu import compare as comparing
from convselect.bench.gpu.compare import Job, compare
from convselect.bench.gpu.floor import Layer, floor_ms, layers
from convselect.bench.gpu.report import missing, page, ratio
from convselect.bench.gpu.supervise import Note, read, supervise
from convselect.costs import roofline
from convselect.costs.train import Settings, train
from convselect.primitive import primitives

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RATES = {"machine": "Some GPU", "date": "2000-01-01", "versions": "torch 0", "command": "gpu.sh",
         "copy_gbs": 1000.0, "float16_tflops": 100.0, "tf32_tflops": 50.0, "float32_tflops": 10.0}  # fmt: skip
needs_networks = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="the networks are torchvision's, which is not installed"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_script", BENCHMARKS / "gpu.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        def call(x: torch.Tensor) -> torch.Tensor:
            clock.log.append(system)
            assert x.is_contiguous(memory_format=torch.channels_last)
            return model(x) * (1.5 if system == "inductor" else 1)

        return call

    monkeypatch.setattr(comparing, "prepare", prepare)
    job = Job("small", 2, "float16")
    found = compare(
        small(), torch.randn(2, 3, 8, 8), job, comparing.SYSTEMS, clock, lambda **what: noted.append(what), rounds=3
    )  # fmt: skip
    assert [note["system"] for note in noted] == ["float64", "eager", "convselect", "inductor"]
    assert found["convselect"]["median_ms"] == found["eager"]["min_ms"] == 2.0
    assert found["eager"]["runs"] == 2, "so many as fill the interval"
    assert 0 < float(found["eager"]["rel_l2"]) < 1e-2
    assert "median_ms" not in found["inductor"], "a wrong answer has no time"
    assert "error is" in str(found["inductor"]["absent"])


WORKER = """
import json, os, sys, time
note, failures, how = sys.argv[1:]
failed = json.load(open(failures)) if os.path.exists(failures) else []
for name in "abc":
    if [f for f in failed if f["primitive"] == name]:
        continue
    json.dump({"primitive": name}, open(note, "w"))
    if name == "b":
        if how == "hang":
            time.sleep(60)
        if how == "crash":
            os.kill(os.getpid(), 11)
        sys.exit("an illegal memory access was encountered")
"""


@pytest.mark.parametrize(
    ("how", "error"),
    [("raise", "exit code 1: an illegal memory access was encountered"), ("crash", "killed by signal 11"),
     ("hang", "no progress for 1 s")],
)  # fmt: skip
def test_what_kills_a_worker_is_left_out(tmp_path: Path, how: str, error: str) -> None:
    note, failures = tmp_path / "note.json", tmp_path / "failures.json"
    command = [sys.executable, "-c", WORKER, str(note), str(failures), how]
    assert supervise(command, note, failures, time.monotonic() + 30, patience_s=1)
    assert read(failures) == [{"primitive": "b", "error": error}]
    assert json.loads(note.read_text()) == {"primitive": "c"}


def test_a_worker_that_does_not_begin(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import no_such_module"]
    with pytest.raises(RuntimeError, match="no_such_module"):
        supervise(command, tmp_path / "note.json", tmp_path / "failures.json", time.monotonic() + 30, 10)


def test_out_of_time_is_no_failure(tmp_path: Path) -> None:
    note, failures = tmp_path / "note.json", tmp_path / "failures.json"
    command = [sys.executable, "-c", WORKER, str(note), str(failures), "hang"]
    assert not supervise(command, note, failures, time.monotonic() + 0.5, patience_s=10)
    assert not failures.exists()


@needs_networks
def test_profiling_leaves_out_what_failed(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = script.all_problems()
    assert len(problems) > 500
    few = [p for p in problems if p.g == 1][:3]
    monkeypatch.setattr(script, "all_problems", lambda: few)
    seen = []

    class Timer:
        def __init__(self, dtype: torch.dtype) -> None:
            self.machine = machine("float16" if dtype == torch.float16 else "tf32")

        def time_primitives(self, problem: Any, some: Any, rounds: int) -> dict[str, float]:
            for q in some:
                q.prepack(problem, torch.empty(problem.oc, problem.ic, problem.kh, problem.kw, device="meta"))
            seen.append((self.machine.precision, str(problem), {q.name for q in some}))
            return {q.name: 1.0 for q in some}

    name = "igemm_64x64_nhwc"
    failures = [{"precision": "tf32", "primitive": name, "problem": str(few[0]), "error": ""}]
    script.write(tmp_path / "failures.json", failures)
    assert script.profile(tmp_path, Note(tmp_path / "note.json"), 60.0, Timer)
    assert [name in names for _, _, names in seen] == [True, True, True, False, True, True]
    assert json.loads((tmp_path / "note.json").read_text())["problem"] == str(few[2])
    seen.clear()
    assert script.profile(tmp_path, Note(tmp_path / "note.json"), 60.0, Timer)
    assert not seen, "what the tables hold is not timed again"
    often = [{**failures[0], "problem": str(p)} for p in few[:2]]
    assert name not in {q.name for q in script.watched("tf32", often, Note(tmp_path / "note.json"))}
    assert name in {q.name for q in script.watched("float16", often, Note(tmp_path / "note.json"))}


@needs_networks
def test_networks_resume(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First all without Inductor, then with it; what failed is left out, what is there is kept."""
    script.write(tmp_path / "ceilings.json", RATES)
    jobs = [Job("alexnet", 1, "float16"), Job("alexnet", 32, "tf32")]
    script.write(tmp_path / "failures.json", [{**jobs[1]._asdict(), "system": "inductor", "error": "of memory"}])
    done = []

    def fake(model: Any, x: torch.Tensor, job: Job, systems: Any, clock: Any, note: Any) -> Any:
        assert x.shape == (job.batch, 3, 224, 224)
        done.append((job, tuple(systems)))
        return {system: {"median_ms": 1.0, "first_s": 1.0} for system in systems}

    monkeypatch.setattr(script, "compare", fake)
    monkeypatch.setattr(script, "built", lambda name: None)
    go = partial(script.run_networks, tmp_path, Note(tmp_path / "note.json"), clock=Counting(), jobs=jobs)
    assert not go(budget_s=-1.0)
    assert go(budget_s=60.0)
    two, three = ("convselect", "eager"), ("convselect", "eager", "inductor")
    assert done == [(jobs[0], two), (jobs[1], two), (jobs[0], three)]
    done.clear()
    assert go(budget_s=60.0)
    assert not done
    records = read(tmp_path / "networks.json")
    assert len(records) == 2
    assert records[0]["floor_ms"] > 0
    monkeypatch.setattr(script, "JOBS", jobs)
    assert script.write_page(tmp_path, "gpu.sh") == []
    assert "of memory" in (tmp_path / "RESULTS_GPU.md").read_text()


@needs_networks
def test_models_of_a_gpu(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the prior's own times, a model finds them again; precisions do not mix."""
    here = machine("tf32")
    able = [q for q in primitives("cuda") if q.family in ("igemm", "cudnn")]
    rows = []
    for p in script.problems("resnet18", 1) + script.problems("resnet18", 32) + script.problems("vgg11", 1):
        ms = roofline.primitives_ms([p], [(q.name, q.family) for q in able], here)[0]
        rows += [
            {**vars(p), "primitive": q.name, "family": q.family, "ms": t, "threads": 1, "machine": str(here)}
            for q, t in zip(able, ms.tolist(), strict=True) if q.refusal(p, here) is None
        ]  # fmt: skip
    columns = ("mb", "g", "ic", "ih", "iw", "oc", "kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw", "primitive",
               "family", "ms", "threads", "machine")  # fmt: skip
    table = pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows])
    pq.write_table(table, tmp_path / "profile_tf32.parquet")
    monkeypatch.setattr(script, "train", partial(train, settings=Settings(steps=400)))
    script.train_models(tmp_path, lambda dtype: here)
    info = json.loads((tmp_path / "models.json").read_text())["tf32"]
    assert info["machines"] == [str(here)]
    assert info["threads"] == [1]
    assert info["held_out"]["slowdown_total"] < 1.5
    assert (tmp_path / "tf32.safetensors").exists()
    sums = json.loads((tmp_path / "layers.json").read_text())
    assert {(row["network"], row["batch"]) for row in sums} == {("resnet18", 1), ("resnet18", 32), ("vgg11", 1)}
    assert all(row["fastest"] <= row["prior"] for row in sums)


def test_all_parts_are_called_as_they_ask(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each by a command line that it takes; one that fails or takes too long does not stop the rest."""
    begun = []

    def parsed(command: Any) -> None:
        if command[1] == script.__file__:
            begun.append(script.main.make_context("gpu", list(command[2:])).params)

    def run(command: Any, check: bool, timeout: float, **where: Any) -> Any:
        assert timeout > 0
        parsed(command)
        if "train" in command or "pytest" in command:
            raise script.subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=0)

    class Process:
        def __init__(self, command: Any) -> None:
            parsed(command)

        def wait(self, seconds: float) -> None:
            assert seconds > 0

    def fake(command: Any, note: Path, failures: Path, deadline: float, patience_s: float) -> bool:
        parsed(command)
        assert begun[-1]["until"] - time.time() == pytest.approx(deadline - time.monotonic() - 5, abs=1)
        raise RuntimeError("it fails before it begins")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script.subprocess, "Popen", Process)
    monkeypatch.setattr(script, "supervise", fake)
    script.everything(tmp_path, 500.0)
    parts = [context["part"] for context in begun if context["part"] != "compile"]
    assert parts == ["ceilings", "profile", "train", "networks"]
    shards = [context["shard"] for context in begun if context["part"] == "compile"]
    assert shards == list(range(begun[1]["shards"]))
    assert all(context["out"] == tmp_path for context in begun)


@needs_networks
def test_what_profile_will_launch_is_compiled_before(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    some = script.all_problems()[::100]
    monkeypatch.setattr(script, "all_problems", lambda: some)
    for precision in script.PRECISIONS:
        found = list(script.launches(precision, machine(precision), primitives("cuda")))
        assert len(found) > 5 * len(some)
        assert all(x.is_meta for launch in found for x in launch.args if isinstance(x, torch.Tensor))


def made_up(job: Job, ours: float, eager: float, inductor: float | None) -> dict[str, Any]:
    times = {"convselect": ours, "eager": eager, "inductor": inductor}
    systems = {name: {"median_ms": ms, "first_s": 1.5} for name, ms in times.items() if ms is not None}
    return {**job._asdict(), "floor_ms": 0.5, "systems": systems}


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
    assert "| a | 1.000 | 2.000 | 4.000 | 2.00 | 50% | 1.5 |" in text
    assert "| b | 1.000 | 0.500 | - " in text
    assert "over 1 networks: 2.00; none is slower" in text
    assert "12.3%" in text
    assert "b, 1, float16, inductor: no memory" in text
    assert lack[0] in text
    wrong = made_up(jobs[0], 1.0, 2.0, 4.0)
    wrong["systems"]["convselect"] = {"rel_l2": 0.5, "first_s": 1.0, "absent": "its error is 0.5"}
    assert "a, convselect: its error is 0.5." in page(RATES, RATES, {}, [wrong], [], jobs)


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
