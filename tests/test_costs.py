"""The cost model: features, training, prediction, operators and adaptation."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from convselect import costs
from convselect.costs import CostModel, Costs, OperatorModel, Samples
from convselect.costs.features import FEATURES, features, floor_ms
from convselect.costs.metrics import mdrae, quality
from convselect.costs.tables import read
from convselect.costs.train import Settings, fit, predict_rows, train
from convselect.machine import Machine
from convselect.problem import ConvProblem

PAPER = Path(__file__).parents[2] / "shared" / "data" / "paper_intel.parquet"
PRIMITIVES = {
    "direct_nchw": ("direct", 20.0, 2.0),
    "direct_nhwc": ("direct", 30.0, 2.0),
    "im2col_nchw": ("im2col", 80.0, 9.0),
    "im2row_nhwc": ("im2row", 90.0, 8.0),
    "winograd_f4x4_3x3_nhwc": ("winograd", 250.0, 12.0),
    "winograd_f2x2_3x3_nhwc": ("winograd", 180.0, 10.0),
}
"""family, GFLOP/s, microseconds for each KiB moved / 1000: a made-up machine."""
CANDIDATES = [(name, family) for name, (family, _, _) in PRIMITIVES.items()]
SMALL = Settings(hidden=(48, 48), ensemble=2, steps=500, evaluations=10)


def problems(count: int, seed: int = 0) -> list[ConvProblem]:
    rng = np.random.default_rng(seed)

    def one() -> ConvProblem:
        kernel = int(rng.choice([1, 3, 5]))
        ic, oc = (int(v) for v in rng.choice([16, 32, 64, 96, 128, 256, 512], 2))
        size = int(rng.choice([7, 14, 28, 56]))
        stride = int(rng.choice([1, 2]))
        square = {"ih": size, "iw": size, "kh": kernel, "kw": kernel, "sh": stride, "sw": stride}
        return ConvProblem(ic=ic, oc=oc, **square, ph=kernel // 2, pw=kernel // 2)

    return list(dict.fromkeys(one() for _ in range(count)))


def true_ms(problem: ConvProblem, primitive: str, threads: int) -> float:
    family, gflops, moved = PRIMITIVES[primitive]
    if family == "winograd" and (problem.kh, problem.sh) != (3, 1):
        return float("nan")
    nbytes = problem.src_bytes + problem.dst_bytes + problem.weight_bytes
    return 0.003 + (problem.flops / gflops / 1e6 + nbytes * moved / 1e8) / threads


def table(problems: list[ConvProblem], threads: tuple[int, ...] = (1, 2)) -> pa.Table:
    rows = [
        {**vars_of(p), "threads": t, "primitive": name, "family": PRIMITIVES[name][0], "ms": true_ms(p, name, t)}
        for p in problems
        for t in threads
        for name in PRIMITIVES
    ]
    return pa.Table.from_pylist(rows)


def vars_of(problem: ConvProblem) -> dict[str, int]:
    return {name: getattr(problem, name) for name in ConvProblem.__dataclass_fields__}


def machine(threads: int = 1) -> Machine:
    return Machine("cpu", "made up", "avx2", 2, threads, 32768, 1 << 20, 0)


@pytest.fixture(scope="module", name="model")
def trained(tmp_path_factory: pytest.TempPathFactory) -> CostModel:
    out = tmp_path_factory.mktemp("model") / "cpu.safetensors"
    operators = pa.table(
        {
            "key": ["to_nhwc"] * 3 + ["elementwise.nhwc"] * 3,
            "bytes": [10_000, 100_000, 1_000_000] * 2,
            "threads": [1] * 6,
            "ms": [0.011, 0.02, 0.11, 0.006, 0.015, 0.105],
        }
    )
    return train(
        [table(problems(400))], operators=[operators], out=out, machine="made up", settings=SMALL, progress=False
    )


def test_features_are_finite_and_named() -> None:
    depthwise = ConvProblem(mb=2, g=32, ic=32, ih=9, iw=7, oc=32, kh=3, kw=5, sh=2, ph=1, pw=2)
    found = features([*problems(50), depthwise], 2)
    assert found.shape == (len(found), len(FEATURES))
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found[-1, FEATURES.index("depthwise")] == 1
    assert found[-1, FEATURES.index("log_threads")] == 1
    assert len(set(FEATURES)) == len(FEATURES)
    assert (floor_ms(problems(50), 2) < floor_ms(problems(50), 1)).all()


def test_features_see_every_dimension() -> None:
    base = ConvProblem(mb=2, g=2, ic=64, ih=28, iw=30, oc=32, kh=3, kw=5, ph=1, pw=2)
    for name in ConvProblem.__dataclass_fields__:
        other = ConvProblem(**{**vars_of(base), name: getattr(base, name) * 2})
        assert (features([base], 1) != features([other], 1)).any(), name


def test_held_out_rows_share_no_group() -> None:
    profile = read([table(problems(200))])
    held = profile.held_out(0.2)
    groups = [(p.ic, p.oc, p.ih) for p in profile.problems]
    assert not {g for g, h in zip(groups, held, strict=True) if h} & {
        g for g, h in zip(groups, held, strict=True) if not h
    }
    assert 0.1 < held.mean() < 0.3


def test_training_learns_and_says_how_well(model: CostModel) -> None:
    held = model.info["held_out"]
    assert held["mdrae"] < 0.06
    assert held["slowdown_total"] < 1.02
    assert 0.8 < held["coverage_90"] <= 1
    assert set(held["families"]) == {"direct", "im2col", "im2row", "winograd"}
    assert model.info["machines"] == ["made up"]
    assert model.info["threads"] == [1, 2]
    unseen = problems(60, seed=9)
    for threads in (1, 2):
        measured = np.array([[true_ms(p, name, threads) for name in PRIMITIVES] for p in unseen])
        assert mdrae(model.predict(unseen, CANDIDATES, threads), measured) < 0.06


def test_training_needs_problems() -> None:
    with pytest.raises(ValueError, match="two at least"):
        train([table([ConvProblem(ic=8, ih=8, iw=8, oc=8, kh=1, kw=1)])], settings=SMALL, progress=False)


def test_a_primitive_that_is_only_in_the_held_out_rows_is_trained_in_the_end() -> None:
    few = problems(60)
    held = read([table(few)]).held_out(0.2)
    rare = {**vars_of(few[int(np.nonzero(held)[0][0]) // 2]), "threads": 1, "primitive": "rare", "family": "rare"}
    whole = pa.concat_tables([table(few), pa.Table.from_pylist([{**rare, "ms": 1.0}])])
    settings = Settings(hidden=(16,), ensemble=1, steps=20, evaluations=2)
    assert "rare" in train([whole], settings=settings, progress=False).primitives


def test_a_saved_model_predicts_the_same(model: CostModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.safetensors")
    again = CostModel.load(tmp_path / "m.safetensors")
    some = problems(20, seed=3)
    np.testing.assert_array_equal(again.predict(some, CANDIDATES, 2), model.predict(some, CANDIDATES, 2))
    assert again.operators.lines == model.operators.lines
    assert again.info == model.info
    assert again.families == model.families


def test_a_missing_or_damaged_model_is_a_clear_error(model: CostModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="convselect train"):
        CostModel.load(path)
    model.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a cost model"):
        CostModel.load(path)


def test_a_whole_network_is_predicted_in_one_pass(model: CostModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long that takes is held by `benchmarks/limits.py`."""
    evaluated: list[int] = []
    residuals = CostModel._residuals
    monkeypatch.setattr(CostModel, "_residuals", lambda self, x: evaluated.append(len(x)) or residuals(self, x))
    network = problems(400)[:110]
    model.predict(network, [*CANDIDATES, ("direct_blocked", "direct"), ("fft_nchw", "fft")], 2)
    assert evaluated == [110]


def test_costs_import_downwards_and_torch_in_training_only() -> None:
    below = {
        "convselect.costs",
        "convselect.data",
        "convselect.errors",
        "convselect.files",
        "convselect.layout",
        "convselect.machine",
        "convselect.problem",
    }
    for path in Path(costs.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert path.name == "train.py" or name.partition(".")[0] != "torch", path.name
                if name.partition(".")[0] == "convselect":
                    assert ".".join(name.split(".")[:2]) in below, f"{path.name} imports {name}"


def test_an_unknown_primitive_takes_its_familys_prior(model: CostModel) -> None:
    some = [ConvProblem(ic=64, ih=28, iw=28, oc=64, kh=3, kw=3, ph=1, pw=1)]
    known, known_std = model.log_predict(some, CANDIDATES[:2], 1)
    found, std = model.log_predict(some, [("direct_blocked", "direct"), ("fft_nchw", "fft")], 1)
    assert known.min() <= found[0, 0] <= known.max()
    assert std[0, 0] > known_std.max()
    everything = model.predict(some, CANDIDATES, 1)
    assert np.exp(found[0, 1]) > np.median(everything)
    assert std[0, 1] > std[0, 0]


def test_a_problem_unlike_the_training_data_is_less_certain(model: CostModel) -> None:
    near = ConvProblem(ic=64, ih=28, iw=28, oc=64, kh=3, kw=3, ph=1, pw=1)
    far = ConvProblem(mb=64, ic=4096, ih=300, iw=300, oc=4096, kh=11, kw=11)
    std = model.log_predict([near, far], CANDIDATES, 1)[1]
    assert (std[1] > 2 * std[0]).all()
    assert np.isfinite(model.predict([far], CANDIDATES, 1)).all()
    assert model.predict([], CANDIDATES, 1).shape == (0, len(CANDIDATES))


def test_an_unknown_operator_falls_back_on_elementwise(model: CostModel) -> None:
    assert model.operators.ms("gelu.nhwc", 5_000, 1) == model.operators.ms("elementwise.nhwc", 5_000, 1)
    assert OperatorModel().ms("gelu.nhwc", 5_000, 1) > 0


def test_a_window_that_was_not_timed_is_predicted_from_all_that_were() -> None:
    slow = [("max_pool:3x3s1x1.nhwc", n, 1, 3e-6 * n) for n in (1_000, 10_000)]
    fast = [("max_pool:2x2s2x2.nhwc", n, 1, 1e-6 * n) for n in (1_000, 10_000)]
    model = OperatorModel.fit([*slow, *fast])
    assert model.ms("max_pool:3x3s1x1.nhwc", 5_000, 1) == pytest.approx(3 * model.ms("max_pool:2x2s2x2.nhwc", 5_000, 1))
    assert model.known("max_pool:5x5s1x1.nhwc") == "max_pool.nhwc"
    assert 5e-3 < model.ms("max_pool:5x5s1x1.nhwc", 5_000, 1) < 15e-3


def test_operator_timings_scale_their_lines(model: CostModel) -> None:
    samples = Samples()
    for nbytes in (10_000, 100_000, 1_000_000):
        samples.add_operator("to_nhwc", nbytes, 1, 3 * model.operators.ms("to_nhwc", nbytes, 1))
    before, after = Costs(model, None, machine()), Costs(model, samples, machine())
    assert after.operator_ms("to_nhwc", 50_000) == pytest.approx(3 * before.operator_ms("to_nhwc", 50_000), rel=0.15)
    assert after.operator_ms("add.nhwc", 50_000) > before.operator_ms("add.nhwc", 50_000)


def test_the_papers_own_table_is_learned() -> None:
    if not PAPER.exists():
        pytest.skip(f"{PAPER}, the paper's published table, is not on this machine")
    profile = read([pq.read_table(PAPER)])
    held = profile.held_out(0.2)
    model = fit(profile.take(~held), settings=Settings(hidden=(128, 128), ensemble=1, steps=1200, evaluations=10))
    found = quality(predict_rows(model, profile.take(held))[0], profile.take(held).ms)
    assert found.mdrae <= 0.03
    assert found.slowdown_total <= 1.01
