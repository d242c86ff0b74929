"""The command line: help, wrong usage, and the commands that are quick."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from convselect.bench import networks
from convselect.cli import main
from convselect.cli.doctor import cost_model, findings
from convselect.machine import cpu

COMMANDS = {
    "demo",
    "bench",
    "explain",
    "calibrate",
    "profile",
    "train",
    "transfer-eval",
    "primitives",
    "cache",
    "doctor",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def output(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVSELECT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_commands() -> None:
    assert set(main.commands) == COMMANDS
    group = main.commands["cache"]
    assert isinstance(group, click.Group)
    assert set(group.commands) == {"path", "list", "verify", "clear"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    assert main.commands[name].help
    assert "Usage:" in output(name, "--help")


def test_version() -> None:
    assert "convselect" in output("--version")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench", "name a network, or give --model"),
        ("bench --model torchvision.models:resnet18", "--model and --input go together"),
        ("bench resnet18 --against onnxruntim", "did you mean 'onnxruntime'"),
        ("bench resnet18 --dtype float16", "--dtype goes with --device cuda"),
        ("bench resnet18 --device cuda --oracle", "--oracle judges plans of the CPU"),
        ("bench resnet18 --threads 100000", "threads is 100000, must be between 1 and"),
        ("bench --model nothing --input 1x3x8x8 --against eager --without-convselect", "must read MODULE:FACTORY"),
        ("bench --model math:pi --input 1x3x8 --against eager --without-convselect", "no callable named 'pi'"),
        ("bench resnet18 --accuracy exact", "accuracy is 'exact', must be one of strict"),
        ("bench resnet18 --json no/such/folder.json", "'no/such' is no folder that can be written"),
        ("bench resnet18 --oracle --plot x.png", "do not go with --oracle"),
        ("explain resnet18 --html no/such/page.html", "'no/such' is no folder that can be written"),
        ("explain", "give either a network of torchvision or --model"),
        ("explain resnet18 --model a:b --input 1x1", "give either a network of torchvision or --model"),
        ("primitives --problem mb1", "'mb1' is not a problem"),
        ("primitives --device tpu", "'tpu' is not one of"),
        ("train --out model.safetensors", "Missing argument"),
        ("profile", "Missing option '--out'"),
    ],
)
def test_wrong_usage(arguments: str, message: str) -> None:
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes networks, of which one works and one does not."""
    (tmp_path / "two_nets.py").write_text(
        "from torch import nn\n"
        "def sound():\n    return nn.Conv2d(3, 4, 3)\n"
        "def broken():\n    raise ValueError('of its own')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "two_nets"


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, within=None: None if name == package else find_spec(name, within)
    )


@pytest.mark.parametrize("command", ["demo", "bench alexnet", "explain alexnet"])
def test_without_torchvision_its_networks_say_what_to_install(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide("torchvision", monkeypatch)
    monkeypatch.setattr(networks, "torchvision_models", networks.torchvision_models.__wrapped__)
    result = run(*command.split())
    assert result.exit_code == 1
    assert "pip install --no-deps torchvision" in " ".join(result.output.split())


def test_a_plot_needs_matplotlib_before_anything_is_timed(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hide("matplotlib", monkeypatch)
    arguments = f"--model {module}:sound --input 1x3x8x8 --against eager --without-convselect --plot plot.png"
    result = run("bench", *arguments.split())
    assert result.exit_code == 1
    assert "--plot needs matplotlib" in result.output


def test_an_error_of_a_later_network_loses_nothing_and_is_no_usage_error(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    monkeypatch.setattr(networks, "check", lambda name, shape=None: None)
    monkeypatch.setattr(networks, "build", lambda name, batch: (nn.Conv2d(3, 4, 3).eval(), torch.zeros(1, 3, 8, 8)))
    page = tmp_path / "page.md"
    arguments = f"--threads 1 --rounds 1 --against eager --without-convselect --markdown {page}"
    result = run("bench", "first", "--model", f"{module}:broken", "--input", "1x3x8x8", *arguments.split())
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "of its own"
    assert "| first |" in page.read_text()
    assert "first" in result.output


def test_profile_names_the_line_that_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "shapes.txt").write_text("# none\n\nmb1_g1\n")
    result = run("profile", "--out", str(tmp_path / "p.parquet"), "--shapes", str(tmp_path / "shapes.txt"))
    assert result.exit_code == 2
    assert "line 3: 'mb1_g1' is not a problem" in result.output.replace("\n", "")


def test_primitives_lists_the_registry_with_refusals() -> None:
    import convselect

    text = output("primitives")
    assert all(primitive.name in text for primitive in convselect.primitives(device="cpu"))
    asked = output("primitives", "--problem", "mb1_g1ic64ih56iw56oc64oh56ow56kh3kw3sh1sw1ph1pw1dh1dw1")
    assert "can run it" in asked
    assert "only 1x1 kernels" in " ".join(asked.split())


def test_doctor(cache: Path) -> None:
    found = {finding.what: finding for finding in findings()}
    for name in ("convselect", "Python", "torch", "processor", "kernels", "threads", "caches", "GPU", "Triton"):
        assert found[name].found
    assert not found["calibration"].present
    assert found["cache folder"].found == str(cache)
    text = output("doctor")
    assert text.count("ok") + text.count("absent") >= len(found)


def test_doctor_tells_of_a_borrowed_cost_model() -> None:
    other = cost_model(replace(cpu(), isa="portable"))
    assert (other.found, other.present) == ("cpu_avx2.safetensors, as portable has none of its own", False)
    assert cost_model(replace(cpu(), isa="avx512")).present


def test_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convselect.costs.store.directory", lambda: None)
    found = {finding.what: finding for finding in findings()}
    assert not found["cache folder"].present
    result = run("cache", "path")
    assert result.exit_code == 1
    assert "set CONVSELECT_CACHE" in result.output
    assert output("cache", "list") == "no entries\n"
    assert output("cache", "clear") == "removed: 0\n"


def test_cache_commands(cache: Path) -> None:
    assert output("cache", "path").replace("\n", "") == str(cache)
    assert output("cache", "list") == "no entries\n"
    assert output("cache", "verify") == "every entry is sound\n"
    cache.mkdir()
    (cache / "0123456789abcdef.json").write_text("{damaged")
    damaged = run("cache", "verify")
    assert damaged.exit_code == 1
    assert "0123456789abcdef" in damaged.output
    assert "0123456789abcdef" in output("cache", "list")
    assert output("cache", "clear") == "removed: 1\n"
    assert output("cache", "list") == "no entries\n"
