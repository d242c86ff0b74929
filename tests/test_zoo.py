"""What the zoo (`make zoo`) calls wrong, and that it ends with 1 then; its own networks in eager."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
import zoo_check
import zoo_page
from click.testing import CliRunner
from torch.utils._pytree import tree_leaves
from zoo_blocks import BLOCKS

RIGHT = {"overwritten": False, "warnings": [], "eager_error": 1e-6, "error": 1e-6, "form": [], "form_is_torchs": True}


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, "right"),
        ({"error": 1.9e-5}, "right"),
        ({"error": 2.1e-5}, "wrong"),
        ({"error": 1.9e-4, "eager_error": 1e-5}, "right"),
        ({"error": 2.1e-4, "eager_error": 1e-5}, "wrong"),
        ({"error": float("inf"), "eager_error": float("inf")}, "chaotic"),
        ({"error": 1.0, "eager_error": 2e-3}, "chaotic"),
        ({"overwritten": True}, "wrong"),
        ({"form": ["(1, 2) strides (2, 1) for (1, 2) strides (1, 1)"], "form_is_torchs": False}, "form"),
        ({"form": ["(1, 2) strides (2, 1) for (1, 2) strides (1, 1)"]}, "right"),
        ({"warnings": ["the model runs in ATen because of an error in convselect (KeyError: 1)"]}, "defect"),
    ],
)
def test_status(changed: dict[str, Any], status: str) -> None:
    assert zoo_check.status({**RIGHT, **changed}) == status


def test_error() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert zoo_check.error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert zoo_check.error(torch.tensor([3.0]), exact) == float("inf")
    assert zoo_check.error(torch.tensor([3.0, float("nan")]), exact) == float("inf")
    assert zoo_check.error(torch.tensor([3.0, float("nan")]), torch.tensor([3.0, float("nan")])) == 0
    assert zoo_check.error(torch.tensor([3, 4]), torch.tensor([3, 5])) == float("inf")
    assert zoo_check.error(torch.tensor([3, 4]), torch.tensor([3, 4])) == 0


def test_form_tells_strides_and_shared_memory() -> None:
    x = torch.zeros(2, 3)
    eager = zoo_check.form([x.t(), x + 1], [x])
    assert zoo_check.differences(zoo_check.form([x.t(), x + 1], [x]), eager) == []
    assert len(zoo_check.differences(zoo_check.form([x.t().clone(), x + 1], [x]), eager)) == 1
    assert len(zoo_check.differences(zoo_check.form([x.t().contiguous(), x + 1], [x]), eager)) == 2


def test_where_is_the_innermost_line_of_the_package() -> None:
    with pytest.raises(ValueError, match="activation") as raised:
        zoo_check.convselect.compile(torch.nn.ReLU(), accuracy="activation")
    assert zoo_check.where(raised.value).startswith("options.py:")


@pytest.mark.parametrize(
    ("status", "code"), [("right", 0), ("chaotic", 0), ("torch raises", 0), ("wrong", 1), ("crash", 1)]
)
def test_a_faulty_row_ends_with_1_and_is_listed_first(
    status: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "zoo"
    folder.mkdir()
    asked = []

    def check(part: str, name: str, core: int) -> dict[str, Any]:
        asked.append(name)
        return {"status": status if name == "blocks/b" else "right"}

    monkeypatch.setattr(zoo, "FOLDER", folder)
    monkeypatch.setattr(zoo, "names", lambda: ["blocks/a", "blocks/b", "timm/c"])
    monkeypatch.setattr(zoo, "check", check)
    monkeypatch.setattr(zoo, "measured", lambda: "here")  # timm may be absent
    assert CliRunner().invoke(zoo.main, ["blocks/", "--part", "results"]).exit_code == code
    assert sorted(asked) == ["blocks/a", "blocks/b"]
    assert json.loads((folder / "results.json").read_text()).keys() == {"blocks/a", "blocks/b"}
    text = (tmp_path / "ZOO.md").read_text()
    assert (f"## {status.capitalize()}" in text) == bool(code)
    assert CliRunner().invoke(zoo.main, ["--part", "results"]).exit_code == code
    assert asked[2:] == ["timm/c"]  # what has a row is left out


def test_a_process_that_ends_by_itself_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "check.py"
    monkeypatch.setattr(zoo, "CHECK", script)
    crash = "import os, signal, sys\nif sys.argv[1] in {parts}: os.kill(os.getpid(), signal.SIGSEGV)\n"
    crash += "open(sys.argv[3], 'w').write('{{}}')"
    script.write_text(crash.format(parts=("results",)))
    assert zoo.check("results", "blocks/a", 0)["status"] == "crash"
    script.write_text(crash.format(parts=("results", "plain")))
    assert zoo.check("results", "blocks/a", 0)["status"] == "torch raises"


def test_faults_come_first_and_slower_ones_next() -> None:
    time = {"status": "timed", "measured": "here", "convselect_first_s": 1.0, "aot_eager_first_s": 0.5, "ms": 2.0}
    results = {
        name: {"status": status, "measured": "here"} for name, status in (("a", "right"), ("b", "form"), ("c", "wrong"))
    }
    times = {"a": {**time, "ratio": 1.2, "ratio_median": 1.3}, "b": {**time, "ratio": 1.2, "ratio_median": 1.0}}
    text = zoo_page.page(results, times)
    parts = ["## Wrong", "`c`", "## Form", "`b`", "## Slower than eager", "`a`", "## All"]
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert "5 rows: here" in text
    assert "2 timed: 1 slower" in text


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_run_for_any_batch(name: str) -> None:
    factory, inputs = BLOCKS[name]
    model = factory().eval()
    with torch.inference_mode():
        for batch in (1, 2):
            results = [t for t in tree_leaves(model(*inputs(batch))) if isinstance(t, torch.Tensor)]
            assert results
            assert all(len(t) == batch and t.isfinite().all() for t in results)


def test_one_architecture_of_each_family_of_timm() -> None:
    lines = [line.split() for line in (zoo.FOLDER / "timm.txt").read_text().splitlines()]
    assert len({(module, family) for module, family, _, _ in lines}) == len(lines) >= 150
    assert all(name.startswith(family) and int(side) > 0 for _, family, name, side in lines)
