"""`convselect bench --oracle`: plans judged by one table of measured times."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from convselect.bench.oracle import WAYS, judge
from convselect.cli import main
from convselect.costs import CostModel, shipped, store
from convselect.machine import cpu
from convselect.options import Options


def chain() -> nn.Module:
    """What `MODULE:FACTORY` may name: two convolutions alike, one unlike."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_nothing_beats_the_oracle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table that judges, where every pass finds the same times; here they have nothing to do with the true.

    They are seconds, so that what transforms take, which the plan predicts and the judge measures, is next to nothing.
    """
    monkeypatch.setattr(
        "convselect.bench.oracle.measured_ms",
        lambda able, timer: {p: {q.name: 1e3 + 1e3 / (1 + len(q.name)) for q in of} for p, of in able.items()},
    )
    told: list[str] = []
    model, x = chain().eval(), torch.randn(1, 8, 24, 24)
    verdict = judge("chain", model, x, Options(budget_s=0.2), CostModel.load(shipped(cpu())), told.append)
    assert (verdict.convolutions, verdict.distinct) == (3, 2)
    assert verdict.timings > 2
    assert tuple(verdict.ms) == tuple(verdict.seconds) == WAYS
    others = [verdict.ms[way] for way in WAYS if way != "oracle"]
    assert 0 < verdict.ms["oracle"] <= 1.001 * min(others)
    assert verdict.ratio("oracle") == 1.0
    assert verdict.seconds["calibrated"] <= verdict.seconds["verified"]
    assert told[-1] == "judging"
    assert store.directory() == cache
    assert not cache.exists()  # the user's calibrations are neither read nor changed


def test_command(tmp_path: Path, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chain_net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    set_threads(1)
    options = ["--threads", "1", "--budget-s", "0.1"]
    network = ["--model", "chain_net:make", "--input", "1x8x20x20"]
    out = tmp_path / "out.json"
    result = CliRunner().invoke(main, ["bench", "--oracle", *network, *options, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "chain_net:make" in result.output
    data = json.loads(out.read_text())
    assert (data["threads"], data["budget_s"]) == (1, 0.1)
    (network_of,) = data["networks"]
    assert set(network_of["ratio"]) == set(WAYS)
