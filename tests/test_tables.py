"""Profile tables, the measures of quality, and the operators' lines."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from convselect.costs import OperatorModel, Samples
from convselect.costs.metrics import mdrae, quality
from convselect.costs.tables import family_of, read, read_operators
from convselect.problem import ConvProblem


def test_a_short_table_takes_the_documented_defaults() -> None:
    profile = read(
        [pa.table({"ic": [3], "ih": [32], "oc": [8], "kh": [5], "sh": [2], "primitive": ["a-b"], "ms": [1.0]})]
    )
    assert profile.problems == (ConvProblem(ic=3, ih=32, iw=32, oc=8, kh=5, kw=5, sh=2, sw=2, ph=2, pw=2),)
    assert (profile.threads.tolist(), profile.machines, profile.families) == ([1], ("",), ("a",))


def test_a_table_without_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the columns oc, ms"):
        read([pa.table({"ic": [3], "ih": [32], "kh": [5], "primitive": ["a"]})])
    with pytest.raises(ValueError, match="no timings"):
        read([])
    with pytest.raises(ValueError, match="does not fit"):
        read([pa.table({"ic": [3], "ih": [1], "oc": [8], "kh": [4], "ph": [0], "primitive": ["a"], "ms": [1.0]})])


def test_repeated_timings_take_the_least_and_bad_ones_are_dropped() -> None:
    one = {"ic": 3, "ih": 32, "oc": 8, "kh": 3, "primitive": "a"}
    profile = read([pa.Table.from_pylist([{**one, "ms": ms} for ms in (2.0, 1.0, -1.0, float("nan"), 3.0)])])
    assert profile.ms.tolist() == [[1.0]]


def test_quality_counts_only_what_was_timed() -> None:
    measured = np.array([[2.0, 1.0, np.nan], [4.0, 8.0, 5.0]])
    found = quality(np.array([[1.0, 2.0, 0.1], [4.4, 8.0, 5.0]]), measured)
    assert found.slowdown_total == pytest.approx(6 / 5)
    assert found.slowdown_geomean == pytest.approx(2**0.5)
    assert found.mdrae == pytest.approx(0.1)
    assert np.isnan(mdrae(measured, np.full_like(measured, np.nan)))


def test_operators_are_fitted_on_relative_error() -> None:
    rows = [("to_nhwc", n, 2, 0.01 + 1e-7 * n) for n in (1_000, 50_000, 1_000_000, 20_000_000)]
    fitted = OperatorModel.fit([*rows, ("add.nhwc", 0, 2, 0.005), ("add.nhwc", 10, 2, float("nan"))])
    assert fitted.ms("to_nhwc", 3_000_000, 2) == pytest.approx(0.31, rel=1e-6)
    assert fitted.ms("add.nhwc", 1_000, 1) == pytest.approx(0.005)
    falling = OperatorModel.fit([("cat.nchw", n, 1, ms) for n, ms in ((1_000, 2.0), (1_000_000, 1.0))])
    line = falling.lines["cat.nchw"][1]
    assert line.call >= 0
    assert line.per_byte >= 0
    assert OperatorModel.from_json(fitted.to_json()).lines == fitted.lines


def test_family_of_reads_the_stable_name() -> None:
    assert [family_of(n) for n in ("winograd_f4x4_3x3_nhwc", "im2col-copy-self", "kn2row")] == [
        "winograd",
        "im2col",
        "kn2row",
    ]


def test_operator_tables_are_read() -> None:
    table = pa.table({"key": ["to_nhwc"], "bytes": [100], "ms": [0.5]})
    assert read_operators([table]) == [("to_nhwc", 100, 1, 0.5)]
    with pytest.raises(ValueError, match="lacks the columns bytes"):
        read_operators([table.drop_columns(["bytes"])])


def test_a_time_must_be_positive() -> None:
    for ms in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive and finite"):
            Samples().add("p", "direct_nhwc", 1, ms)
