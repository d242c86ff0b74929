"""What `benchmarks/gpu.sh` does on a GPU, dry: which parts it calls, and what a second run leaves out."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import profiles as profiling
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clock import Clock
from compare import Job
from gpu import BENCHMARKS, RATES, machine, needs_networks
from worker import Note, read, write

from convselect.costs import prior
from convselect.costs.train import Settings, train
from convselect.primitive import primitives


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", BENCHMARKS / "gpu" / "__main__.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_compare(model: Any, x: torch.Tensor, job: Job, systems: Any, clock: Any, note: Any) -> Any:
    assert x.shape == (job.batch, 3, 224, 224)
    assert not list(Path(os.environ["CONVSELECT_CACHE"]).iterdir()), "each network's first run"
    Path(os.environ["CONVSELECT_CACHE"], "calibration").touch()
    found: Any = {system: {"median_ms": 1.0, "first_s": 1.0} for system in systems}
    found["convselect"]["plan"] = {"systems": len(systems)}
    return found


@needs_networks
def test_networks_resume(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is left out, what is there is kept."""
    write(tmp_path / "ceilings.json", RATES)
    jobs = [Job("alexnet", 1, "float16"), Job("alexnet", 32, "tf32"), Job("alexnet", 32, "float16")]
    write(
        tmp_path / "failures.json",
        [
            {**jobs[1]._asdict(), "system": "inductor", "error": "of memory"},
            {**jobs[2]._asdict(), "system": "eager", "error": "of memory"},
        ],
    )
    done = []

    def fake(*args: Any) -> Any:
        done.append((args[2], tuple(args[3])))
        return fake_compare(*args)

    monkeypatch.setenv("CONVSELECT_CACHE", "elsewhere")
    monkeypatch.setattr(script, "compare", fake)
    monkeypatch.setattr(script, "built", lambda name: None)
    go = partial(
        script.run_networks,
        tmp_path,
        Note(tmp_path / "note.json"),
        jobs=jobs,
        clock=SimpleNamespace(device=torch.device("cpu")),
        machine=lambda dtype: machine("float16" if dtype == torch.float16 else "tf32"),
    )
    assert not go(budget_s=-1.0)
    assert go(budget_s=60.0)
    assert done == [(jobs[0], ("convselect", "eager", "inductor")), (jobs[1], ("convselect", "eager"))]
    done.clear()
    assert go(budget_s=60.0)
    assert not done
    records = read(tmp_path / "networks.json")
    assert [record["model"] for record in records] == ["the roofline"] * 2
    assert records[0]["floor_ms"] > 0
    assert "plan" not in records[0]["systems"]["convselect"]
    assert json.loads((tmp_path / "plans" / "alexnet_32_tf32.json").read_text()) == {"systems": 2}
    monkeypatch.setattr(script, "JOBS", jobs[:2])
    assert script.write_page(tmp_path, "gpu.sh") == []
    text = (tmp_path / "RESULTS_GPU.md").read_text()
    assert "of memory" in text
    assert "The tests on this GPU: not run to their end." in text
    write(tmp_path / "tests.json", {"exit_code": 1})
    script.write_page(tmp_path, "gpu.sh")
    assert "failed with exit code 1" in (tmp_path / "RESULTS_GPU.md").read_text()


@needs_networks
def test_what_tells_most_is_measured_first(script: ModuleType) -> None:
    assert len(set(script.JOBS)) == 44
    assert script.JOBS[:5] == [
        *(Job(name, 1, "float16") for name in ("resnet50", "mobilenet_v2", "vgg16", "efficientnet_b0")),
        Job("resnet50", 32, "float16"),
    ]
    assert {job.precision for job in script.JOBS[:16]} == {"float16", "tf32"}
    assert len(script.all_problems()) > 500


@needs_networks
def test_models_of_a_gpu(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the prior's own times, a model finds them again; precisions do not mix."""
    here = machine("tf32")
    able = [q for q in primitives("cuda") if q.family in ("igemm", "cudnn")]
    rows = []
    for p in script.problems("resnet18", 1) + script.problems("resnet18", 32) + script.problems("vgg11", 1):
        ms = prior.primitives_ms([p], [(q.name, q.family) for q in able], here)[0]
        rows += [
            {**vars(p), "primitive": q.name, "family": q.family, "ms": t, "threads": 1, "machine": str(here)}
            for q, t in zip(able, ms.tolist(), strict=True)
            if q.refusal(p, here) is None
        ]
    columns = (
        "mb",
        "g",
        "ic",
        "ih",
        "iw",
        "oc",
        "kh",
        "kw",
        "sh",
        "sw",
        "ph",
        "pw",
        "dh",
        "dw",
        "primitive",
        "family",
        "ms",
        "threads",
        "machine",
    )
    table = pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows])
    pq.write_table(table, tmp_path / "profile_tf32.parquet")
    moves = [{"key": "to_nhwc", "bytes": n, "threads": 1, "ms": n / 1e9} for n in (10**6, 10**7)]
    pq.write_table(pa.Table.from_pylist(moves), tmp_path / "profile_tf32.operators.parquet")
    monkeypatch.setattr(script, "train", partial(train, settings=Settings(steps=400)))
    script.train_models(tmp_path, lambda dtype: here)
    info = json.loads((tmp_path / "models.json").read_text())["tf32"]
    assert info["machines"] == [str(here)]
    assert info["threads"] == [1]
    assert info["held_out"]["slowdown_total"] < 1.5
    assert list(info["operators"]) == ["to_nhwc"]
    package = tmp_path / "package.safetensors"
    for module in (script, sys.modules["convselect.costs.prior"]):
        monkeypatch.setattr(module, "shipped", lambda machine: package)
    assert script.model_name(here) == "the roofline"
    script.use_models(tmp_path, lambda dtype: here)
    assert script.model_name(here) == f"a model of {info['timings']} timings of {info['problems']} problems"
    sums = json.loads((tmp_path / "layers.json").read_text())
    assert {(row["network"], row["batch"]) for row in sums} == {("resnet18", 1), ("resnet18", 32), ("vgg11", 1)}
    assert all(row["fastest"] <= row["prior"] for row in sums)


def test_parts_and_their_seconds(script: ModuleType) -> None:
    assert script.parse_parts("train profile=200.5") == {"profile": 200.5, "train": script.PARTS["train"]}
    with pytest.raises(script.click.BadParameter, match="no part is called 'trian'"):
        script.parse_parts("trian")
    with pytest.raises(script.click.BadParameter, match="NAME=SECONDS"):
        script.parse_parts("train=long")


def test_all_parts_are_called_as_they_ask(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, each by a command line that it takes; one that fails or takes too long does not stop the rest."""
    begun, clock = [], Clock()

    def parsed(command: Any) -> None:
        if command[1] == script.__file__:
            begun.append(script.main.make_context("gpu", list(command[2:])).params)

    class Process:
        returncode = 0

        def __init__(self, command: Any, start_new_session: bool, **where: Any) -> None:
            assert start_new_session, "or what it starts would outlive it"
            self.command = command
            parsed(command)

        def wait(self, seconds: float) -> int:
            assert seconds > 0
            if "train" in self.command:
                raise subprocess.TimeoutExpired(self.command, seconds)
            return 1

        def poll(self) -> int:
            return 0

    def run(command: Any, check: bool, timeout: float) -> None:
        parsed(command)

    def fake(command: Any, note: Path, failures: Path, log: Path, deadline: float, patience_s: Any) -> bool:
        parsed(command)
        assert begun[-1]["until"] == pytest.approx(deadline - script.LATE_S), "both clocks show the same"
        assert log == tmp_path / f"{begun[-1]['part']}.log"
        assert patience_s({"system": "inductor"}) > patience_s({"system": "eager"}) > patience_s({})
        raise RuntimeError("it fails before it begins")

    monkeypatch.setattr(script, "time", clock)
    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script.subprocess, "Popen", Process)
    monkeypatch.setattr(script, "supervise", fake)
    monkeypatch.setattr(script, "stop", lambda process, grace_s: None)
    script.everything(tmp_path, 500.0, script.PARTS)
    parts = [context["part"] for context in begun if context["part"] != "compile"]
    assert parts == ["ceilings", "profile", "train", "networks"]
    shards = [context["shard"] for context in begun if context["part"] == "compile"]
    assert shards == list(range(begun[1]["shards"]))
    assert all(context["out"] == tmp_path for context in begun)
    assert json.loads((tmp_path / "tests.json").read_text()) == {"exit_code": 1}, "they ran to their end"
    begun.clear()
    script.everything(tmp_path, 500.0, script.parse_parts("networks profile"))
    assert [context["part"] for context in begun] == ["ceilings", "profile", "networks"]
    begun.clear()
    script.everything(tmp_path, script.RESERVE_S, script.PARTS)
    assert [context["part"] for context in begun] == ["ceilings"], "there is no time"


STUB = """#!/bin/sh
echo "$PYTHONPATH" "$@" >> "$LOG"
case "$*" in
  *"benchmarks/gpu all"*) echo measured > "$RESULTS/ceilings.json"; exit 3;;
  -) cat > /dev/null;;
esac
"""


@pytest.mark.parametrize("given", [{}, {"PARTS": "profile=9 train", "WHEELS": "wheels", "BUDGET_S": "100"}])
def test_the_whole_script(tmp_path: Path, given: dict[str, str]) -> None:
    """With an interpreter that only says what it was asked for, and fails at last."""
    stub, out, results = tmp_path / "python", tmp_path / "out", tmp_path / "results"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "some.whl").touch()
    out.mkdir()
    given = {name: str(tmp_path / value) if name == "WHEELS" else value for name, value in given.items()}
    own = {
        "PYTHON": str(stub),
        "OUT": str(out),
        "RESULTS": str(results),
        "LOG": str(tmp_path / "log"),
        "PYTHONPATH": "",
    }
    kept = {name: value for name, value in os.environ.items() if name not in ("PARTS", "WHEELS", "SITE", "BUDGET_S")}
    done = subprocess.run([BENCHMARKS / "gpu.sh"], env={**kept, **own, **given}, check=False)
    assert done.returncode == 3
    with tarfile.open(out / "gpu.tgz") as archive:
        assert "./ceilings.json" in archive.getnames()
    calls = (tmp_path / "log").read_text().splitlines()
    assert " -c " in calls[0]
    assert calls[-2].endswith("--no-build-isolation ."), "what is missing is said before the build"
    assert calls[-3].endswith(" -")
    assert ("some.whl" in calls[1]) is ("WHEELS" in given)
    site, asked = calls[-1].split(" ", 1)
    assert site.endswith("build/gpu-site")
    found = re.search(rf"benchmarks/gpu all --out {results} --budget-s (\d+)", asked)
    assert found
    assert 0 < int(found[1]) <= (100 if "BUDGET_S" in given else 530), "what the script has taken is left out"
    assert asked.endswith("--parts profile=9 train") is ("PARTS" in given)


@needs_networks
def test_what_will_run_is_compiled_before(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the epilogues that networks have, and biases as folding makes them."""
    pytest.importorskip("triton")
    networks = {name: script.problems(name, 1)[:9] for name in ("resnet50", "vgg16", "efficientnet_b0")}
    ends: set[tuple[str, torch.dtype, bool]] = set()

    def epilogue(activation: Any, bias: torch.Tensor, residual: Any) -> Any:
        ends.add((activation.kind, bias.dtype, residual is not None))
        return whole(activation, bias, residual)

    whole = profiling.epilogue
    monkeypatch.setattr(profiling, "epilogue", epilogue)
    for precision, dtype in profiling.PRECISIONS.items():
        ends.clear()
        found = list(profiling.all_launches(machine(precision), networks))
        assert all(x.is_meta for launch in found for x in launch.args if isinstance(x, torch.Tensor))
        single = {("relu", False), ("relu", True), ("identity", False), ("identity", True), ("silu", False)}
        own = {("relu", torch.float16, False)} if dtype == torch.float16 else set()
        assert ends == {(kind, torch.float32, residual) for kind, residual in single} | own
