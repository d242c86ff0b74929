"""Profiles: the table, resumption, interruption."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from convselect import primitive
from convselect.data import COMMON, GRID, read_problems
from convselect.machine import cpu
from convselect.measure import profiling
from convselect.measure.cpu import PrimitiveTimer
from convselect.measure.profiling import operators_path, profile
from convselect.problem import ConvProblem

PROBLEMS = [ConvProblem(ic=ic, ih=8, iw=8, oc=16, kh=1, kw=1) for ic in (8, 16, 24, 32)]
PROBLEMS.append(ConvProblem(mb=2, ic=8, ih=9, iw=7, oc=16, kh=1, kw=1, sh=2, sw=2))


@pytest.fixture(autouse=True)
def few_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("to_nhwc", 4096, 2, 0.01), ("add.nchw", 4096, 2, 0.02)]
    monkeypatch.setattr(profiling, "time_operators", lambda deadline: rows)


@pytest.fixture
def candidates() -> list[primitive.Primitive]:
    return [primitive.get("pointwise_nhwc")]


class Recorder:
    """Counts the problems that are timed; stops at the given one as Ctrl-C does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.timed: list[ConvProblem] = []
        original = PrimitiveTimer.time_primitives

        def time_primitives(timer: PrimitiveTimer, problem: ConvProblem, *args: object, **options: object) -> object:
            if len(self.timed) == stop_at:
                raise KeyboardInterrupt
            self.timed.append(problem)
            return original(timer, problem, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(PrimitiveTimer, "time_primitives", time_primitives)


def problems_of(path: Path) -> list[ConvProblem]:
    names = list(ConvProblem.__dataclass_fields__)
    return [ConvProblem(**{name: row[name] for name in names}) for row in pq.read_table(path).to_pylist()]


def test_writes_the_long_format(tmp_path: Path, candidates: list[primitive.Primitive]) -> None:
    out = tmp_path / "deep" / "p.parquet"
    done = profile(out, [*PROBLEMS, PROBLEMS[0]], candidates, rounds=1, progress=False)
    assert (done.problems, done.skipped, done.timings, done.complete) == (len(PROBLEMS), 0, len(PROBLEMS), True)
    assert problems_of(out) == PROBLEMS
    table = pq.read_table(out)
    assert table.schema.names[:16] == "mb g ic ih iw oc kh kw sh sw ph pw dh dw primitive ms".split()
    for row in table.to_pylist():
        assert row["primitive"] == "pointwise_nhwc"
        assert row["family"] == "pointwise"
        assert row["ms"] > 0
        assert row["machine"] == str(cpu())
        assert row["threads"] == torch.get_num_threads()
        assert row["workspace_bytes"] >= 0
    operators = pq.read_table(operators_path(out))
    assert operators_path(out) == tmp_path / "deep" / "p.operators.parquet"
    assert operators.schema.names == ["key", "bytes", "threads", "ms", "machine"]
    assert operators["key"].to_pylist() == ["to_nhwc", "add.nchw"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["p.operators.parquet", "p.parquet"]


def test_resumes_where_ctrl_c_stopped_it(
    tmp_path: Path, candidates: list[primitive.Primitive], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.parquet"
    with monkeypatch.context() as patch:
        first = Recorder(patch, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            profile(out, PROBLEMS, candidates, rounds=1, progress=False)
    before = pq.read_table(out).to_pylist()
    assert len(before) == 2
    second = Recorder(monkeypatch)
    done = profile(out, PROBLEMS, candidates, rounds=1, progress=False)
    assert first.timed + second.timed == PROBLEMS
    assert (done.problems, done.skipped) == (3, 2)
    assert pq.read_table(out).to_pylist()[:2] == before
    assert problems_of(out) == PROBLEMS
    assert pq.read_table(operators_path(out)).num_rows == 2
    assert profile(out, PROBLEMS, candidates, rounds=1, progress=False).problems == 0
    assert len(second.timed) == 3


def test_another_number_of_threads_is_timed_on_its_own(tmp_path: Path, candidates: list[primitive.Primitive]) -> None:
    out = tmp_path / "p.parquet"
    threads = torch.get_num_threads()
    other = 2 if threads == 1 else 1
    profile(out, PROBLEMS[:2], candidates, rounds=1, progress=False)
    done = profile(out, PROBLEMS[:2], candidates, threads=other, rounds=1, progress=False)
    assert torch.get_num_threads() == threads
    assert done.problems == 2
    assert pq.read_table(out)["threads"].to_pylist() == [threads, threads, other, other]


def test_stops_at_the_budget(tmp_path: Path, candidates: list[primitive.Primitive]) -> None:
    done = profile(tmp_path / "p.parquet", PROBLEMS, candidates, budget_s=0.0, progress=False)
    assert (done.problems, done.complete) == (0, False)


def test_only_what_accepts_a_problem_is_timed(tmp_path: Path, candidates: list[primitive.Primitive]) -> None:
    done = profile(
        tmp_path / "p.parquet",
        [ConvProblem(ic=8, ih=8, iw=8, oc=8, kh=3, kw=3), PROBLEMS[0]],
        candidates,
        rounds=1,
        progress=False,
    )
    assert (done.problems, done.timings) == (1, 1)


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really"])
def test_refuses_a_file_that_is_no_table(tmp_path: Path, candidates: list[primitive.Primitive], content: bytes) -> None:
    out = tmp_path / "p.parquet"
    out.write_bytes(content)
    with pytest.raises(ValueError, match="not a Parquet table"):
        profile(out, PROBLEMS, candidates)
    assert out.read_bytes() == content


def test_refuses_another_table_and_another_suffix(tmp_path: Path, candidates: list[primitive.Primitive]) -> None:
    out = tmp_path / "p.parquet"
    pq.write_table(pa.table({"ms": [1.0]}), out)
    with pytest.raises(ValueError, match="lacks the columns"):
        profile(out, PROBLEMS, candidates)
    with pytest.raises(ValueError, match="must end in"):
        profile(tmp_path / "p.csv", PROBLEMS, candidates)
    with pytest.raises(ValueError, match="threads is 0"):
        profile(tmp_path / "q.parquet", PROBLEMS, candidates, threads=0)


def test_the_shipped_lists_parse() -> None:
    grid = read_problems(GRID)
    assert len(grid) == len(set(grid)) >= 900
    assert {p.mb for p in grid} >= {1, 2, 8}
    for sample in (grid[:200], grid):
        assert any(p.is_depthwise for p in sample)
        assert any(p.kh != p.kw for p in sample)
        assert any(1 < p.g < p.ic for p in sample)
    common = read_problems(COMMON)
    assert any(p.is_depthwise for p in common)
    assert len(common) == len(set(common))


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shapes.txt"
    path.write_text(f"# a comment\n\n{PROBLEMS[0]}\nmb1\n")
    with pytest.raises(ValueError, match="line 4: 'mb1'"):
        read_problems(path)
