"""`convselect transfer-eval`: the protocol, the methods, and what they find on a made-up pair of machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from convselect.cli import main
from convselect.costs import CostModel, Samples, gaussian_process, shipped
from convselect.costs.gaussian_process import Kin, Process, Rows
from convselect.costs.tables import read
from convselect.costs.train import Settings, learn
from convselect.costs.transfer import Adapted
from convselect.machine import cpu
from convselect.problem import ConvProblem
from convselect.study import evaluate as study
from convselect.study import learners, methods
from convselect.study.choose import choose
from convselect.study.evaluate import evaluate, split, summary
from convselect.study.methods import RANDOM, Prediction, columns, factors

pytestmark = pytest.mark.heavy

DATA = Path(__file__).parents[2] / "shared" / "data"
SPEEDS = {"direct-a": 20.0, "direct-b": 25.0, "im2col-a": 70.0, "im2col-b": 80.0, "winograd-a": 200.0}
OTHER = {"direct": 2.5, "im2col": 1.2, "winograd": 5.0}
"""What the second machine is slower by, family by family."""
KEYS = {"method", "samples", "repeat", "mdrae", "slowdown_total", "slowdown_geomean", "train_s"}


def table(slower: Mapping[str, float], count: int = 150) -> pa.Table:
    """A table in the long format; the second machine, of `slower`, has a small cache beside its factors."""
    rng = np.random.default_rng(0)
    rows = []
    choices = ((16, 32, 64, 128, 256), (16, 64, 128, 512), (7, 14, 28, 56), (1, 3, 5))
    shapes = {tuple(int(rng.choice(values)) for values in choices) for _ in range(count)}
    for ic, oc, ih, kh in sorted(shapes):
        for name, speed in SPEEDS.items():
            family = name.partition("-")[0]
            if family == "winograd" and kh != 3:
                continue
            flops = 2.0 * ic * oc * ih * ih * kh * kh
            spill = 1 + 0.5 * bool(slower) / (1 + np.exp(8 - 0.5 * np.log2(ic * ih * ih * kh * kh)))
            ms = 0.003 + flops / speed / 1e6 * slower.get(family, 1.0) * spill * (1 + 0.1 * np.log2(kh))
            rows.append({"ic": ic, "oc": oc, "ih": ih, "kh": kh, "primitive": name, "ms": float(ms)})
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Through the command line, with short training."""
    folder = tmp_path_factory.mktemp("study")
    pq.write_table(table({}), folder / "s.parquet")
    pq.write_table(table(OTHER), folder / "t.parquet")
    arguments = ["--source", folder / "s.parquet", "--target", folder / "t.parquet", "--json", folder / "out.json"]
    with pytest.MonkeyPatch.context() as patch:
        quick = {"nn1": learners.nn1, "nn2": learners.nn2}
        for name, learner in quick.items():
            patch.setattr(study, name, lambda profile, learner=learner: learner(profile, steps=150))
        patch.setattr(methods, "_TUNE_STEPS", 150)
        patch.setattr(methods, "_SCRATCH_STEPS", 150)
        settings = Settings(hidden=(48, 48), ensemble=2, steps=400, evaluations=10)
        patch.setattr(study, "learn", lambda profile, progress: learn(profile, settings=settings, progress=progress))
        result = CliRunner().invoke(
            main,
            ["transfer-eval", *map(str, arguments), "--samples", "0,4,16", "--repeats", "2"],
            catch_exceptions=False,
        )
    assert result.exit_code == 0, result.output
    assert "ours_chosen" in result.output
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def test_rows_have_the_fixed_keys_for_every_method_count_and_repeat(rows: list[dict[str, Any]]) -> None:
    assert all(row.keys() >= KEYS for row in rows)
    here = {(row["method"], row["samples"], row["repeat"]) for row in rows if not row["method"].endswith("(source)")}
    names = {*RANDOM, "ours_chosen"}
    assert here == {(m, s, r) for m in names for s in (0, 4, 16) for r in (0, 1) if s or m != "scratch"}
    assert {row["method"] for row in rows} - names == {f"{m} (source)" for m in ("linear", "nn1", "nn2", "ours")}
    assert all(np.isfinite([row[key] for key in KEYS - {"method"}]).all() for row in rows)


def test_methods_that_know_more_do_better(rows: list[dict[str, Any]]) -> None:
    found = {(method, samples): values for method, samples, values in summary(rows)}
    for samples in (4, 16):
        ours = found["ours_chosen", samples]["mdrae"][0]
        for name in ("none", "linear", "nn1", "factor", "scratch", "finetune", "family"):
            assert ours < found[name, samples]["mdrae"][0], (name, samples)
    assert found["ours_random", 16]["mdrae"][0] < 0.5 * found["ours_random", 0]["mdrae"][0]
    assert found["factor", 16]["mdrae"][0] < found["none", 16]["mdrae"][0]
    assert found["ours_chosen", 16]["slowdown_total"][0] < 1.05
    assert found["ours (source)", 0]["mdrae"][0] < found["linear (source)", 0]["mdrae"][0]


def test_intervals_hold_what_they_say(rows: list[dict[str, Any]]) -> None:
    found = {(method, samples): values for method, samples, values in summary(rows)}
    assert found["ours (source)", 0]["coverage_90"][0] > 0.75
    assert 0.75 < found["ours_random", 16]["coverage_90"][0] <= 1


def test_no_held_out_group_is_trained_on() -> None:
    source, target = read([table({})]), read([table(OTHER, count=200)])
    train, source_held, pool, held = split(source, target, 0.25)
    out = {(p.ic, p.oc, p.ih) for p in held.problems}
    assert out
    for profile in (train, pool):
        assert not out & {(p.ic, p.oc, p.ih) for p in profile.problems}
    assert len(train) + len(source_held) == len(source)
    assert len(pool) + len(held) == len(target)


def test_a_split_that_leaves_nothing_is_an_error() -> None:
    one = pa.table({"ic": [8, 8], "oc": [8, 8], "ih": [8, 8], "kh": [1, 3], "primitive": ["a", "a"], "ms": [1.0, 2.0]})
    with pytest.raises(ValueError, match="must leave groups"):
        evaluate(one, one, samples=(0,), repeats=1, progress=False)


def test_impossible_problems_are_left_out() -> None:
    base = {"ic": [8, 8], "oc": [8, 8], "ih": [2, 8], "kh": [3, 3], "primitive": ["a", "a"], "ms": [1.0, 2.0]}
    kept = study.possible(pa.table({**base, "ph": [0, 0], "pw": [0, 0]}))
    assert kept["ih"].to_pylist() == [8]


def test_a_bad_list_of_samples_is_a_usage_error(tmp_path: Path) -> None:
    pq.write_table(table({}), tmp_path / "s.parquet")
    arguments = ["--source", str(tmp_path / "s.parquet"), "--target", str(tmp_path / "s.parquet"), "--json", "x"]
    result = CliRunner().invoke(main, ["transfer-eval", *arguments, "--samples", "5,many"])
    assert result.exit_code == 2
    assert "not a list of numbers" in result.output


def test_a_primitive_without_samples_takes_its_familys_factor() -> None:
    profile = read([table({})])
    samples = profile.take(np.arange(3))
    ms = samples.ms.copy()
    ms[:, samples.primitives.index("direct-b")] = np.nan
    log_ms = np.log(samples.ms) - np.where([f == "direct" for f in samples.families], np.log(2), 0.0)
    found = factors(log_ms, replace(samples, ms=ms))
    assert found[samples.primitives.index("direct-b")] == pytest.approx(np.log(2))
    wanted = replace(samples, primitives=("direct-new", "new"), families=("direct", "new"))
    filled = columns(np.log(np.nan_to_num(samples.ms, nan=1.0)), samples, wanted)
    assert filled.shape == (3, 2)


def test_chosen_samples_are_distinct_nested_and_blind_to_times() -> None:
    profile = read([table({})])
    model = CostModel.load(shipped(cpu()))
    long = choose(model, profile, 20, seed=1)
    assert len(set(long.tolist())) == 20
    np.testing.assert_array_equal(choose(model, profile, 5, seed=1), long[:5])
    other = replace(profile, ms=profile.ms[:, ::-1] * 3)
    mirrored = replace(other, ms=np.where(np.isfinite(profile.ms), 7.0, np.nan))
    np.testing.assert_array_equal(choose(model, mirrored, 20, seed=1), long)


def random_rows(count: int) -> tuple[Rows, Kin]:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((4, 2))
    kin = Kin(np.exp(-((points[:, None] - points[None]) ** 2).sum(axis=2)), np.eye(4))
    p, c = rng.integers(0, 9, count), rng.integers(0, 4, count)
    return Rows(rng.standard_normal((9, 3)), p, c, 0.3 * rng.standard_normal(count), np.full(count, 0.1)), kin


def test_the_gradient_is_that_of_the_marginal_likelihood() -> None:
    rows, kin = random_rows(30)
    fitted = Process(rows, kin, np.array([0.0, 0.1, 0.0, 0.2]))

    def surprise(theta: np.ndarray[Any, Any]) -> float:
        k = fitted._kernel(rows, theta) + np.diag(np.exp(2 * theta[gaussian_process._NOISE]) * rows.std**2)
        return 0.5 * float(rows.y @ np.linalg.solve(k, rows.y) + np.linalg.slogdet(k)[1])

    theta = gaussian_process._TYPICAL + 0.1
    for i, slope in enumerate(fitted._gradient(rows, theta)):
        step = np.eye(len(theta))[i] * 1e-5
        assert slope == pytest.approx((surprise(theta + step) - surprise(theta - step)) / 2e-5, rel=1e-4, abs=1e-6), i


def test_a_process_goes_through_its_rows_and_is_unsure_far_from_them() -> None:
    rows, kin = random_rows(12)
    rows = replace(rows, std=np.full(len(rows), 1e-3))
    fitted = Process(rows, kin, np.zeros(4))
    mean, variance = fitted.predict(rows.x, np.full((9, 4), 1e-3), kin, np.zeros(4))
    first = {key: i for i, key in reversed(list(enumerate(zip(rows.p.tolist(), rows.c.tolist(), strict=True))))}
    single = [(p, c, i) for (p, c), i in first.items() if sum((rows.p == p) & (rows.c == c)) == 1]
    assert all(abs(mean[p, c] - rows.y[i]) < 0.05 for p, c, i in single)
    far, wide = fitted.predict(rows.x + 50, np.full((9, 4), 1e-3), kin, np.zeros(4))
    assert np.isfinite(far).all()
    assert wide.min() > variance.max()


def test_adapting_takes_a_fixed_number_of_factorisations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration adapts again and again within its two seconds; `benchmarks/limits.py` holds the time."""
    model = CostModel.load(shipped(cpu()))
    samples = Samples()
    rng = np.random.default_rng(0)
    problems = [ConvProblem(ic=16 * i, ih=28, iw=28, oc=64, kh=3, kw=3, ph=1, pw=1) for i in range(1, 31)]
    candidates = list(zip(model.primitives, model.families, strict=True))
    for problem in problems:
        for j in rng.choice(len(candidates), 8, replace=False):
            samples.add(problem, candidates[j][0], 2, float(rng.uniform(0.5, 2)))

    factorised: list[int] = []
    for name in ("inv", "solve"):
        original = getattr(np.linalg, name)
        monkeypatch.setattr(np.linalg, name, lambda a, *b, of=original: factorised.append(len(a)) or of(a, *b))
    adapted = Adapted(model, samples)
    assert len(samples.timings) == 240
    of_timings = sorted(size for size in factorised if size)  # none are of operators
    assert of_timings == [128] * gaussian_process._STEPS + [240] * (gaussian_process._ROUNDS + 1)
    factorised.clear()
    adapted.log_predict(problems, candidates, 2)
    assert factorised == [8] * 30, "of what was timed on a problem"


def test_on_the_papers_tables_a_few_samples_beat_a_factor_by_far() -> None:
    if not (DATA / "paper_intel.parquet").exists():
        pytest.skip(f"the paper's published tables are not at {DATA}")
    source, target = (read([DATA / f"paper_{name}.parquet"]) for name in ("intel", "amd"))
    train, _, pool, held = split(source, target, 0.2)
    model = learners.linear(train)  # a weak model shows as well what adaptation adds
    at = {name: i for i, name in enumerate(train.primitives)}
    sampled = pool.take(np.random.default_rng(0).permutation(len(pool))[:25])
    known, wanted = (model.log_ms(profile)[:, [at[n] for n in profile.primitives]] for profile in (sampled, held))
    scaled = Prediction(wanted + factors(known, sampled))
    found = study.quality(np.exp(scaled.log_ms), held.ms)
    assert found.slowdown_total < 1.3
