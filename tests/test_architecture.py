"""Imports go down only, by the table in docs/architecture.md, and files stay small."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "convselect"

KERNELS = ROOT / "kernels"
FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
LONGEST = {"convselect": 350, "benchmarks": 350, "tests": 350, "kernels": 600}
"""Lines of a file, by folder; kernels have long signatures."""


def parts() -> list[str]:
    """Those of the table in docs/architecture.md, from the ground up; "" is the package itself, the public names."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "architecture.md").read_text().split("\n## ")[1], re.MULTILINE)
    names = [name.rstrip("/") for row in rows for name in re.findall("`(.*?)`", row)]
    return ["" if name == "convselect" else name for name in names]


LEVEL = {part: number for number, part in enumerate(parts())}


def part_of(module: str) -> str:
    """ "convselect.costs.store" -> "costs"."""
    names = module.split(".")
    return names[1] if len(names) > 1 else ""


def imported(path: Path) -> Iterator[str]:
    """Every module that `path` imports, at its top, in a function or for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            if node.module == "convselect":
                for alias in node.names:
                    known = (PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").exists()
                    yield f"convselect.{alias.name}" if known or alias.name == "kernels" else "convselect"
            else:
                yield node.module


def own(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "kernels"
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    here = own(path)
    assert here in LEVEL, f"give convselect.{here} a place in the table of docs/architecture.md"
    for module in imported(path):
        if module.split(".")[0] != "convselect":
            continue
        there = part_of(module)
        assert there in LEVEL, f"give convselect.{there} a place in the table of docs/architecture.md"
        assert there == here or LEVEL[there] < LEVEL[here], (
            f"{path.relative_to(ROOT)} imports {module}: that is upwards"
        )


def files_of(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


def test_the_table_has_every_part_once() -> None:
    assert sorted(parts()) == sorted({own(path) for path in FILES})


def test_costs_and_primitives_do_not_know_each_other() -> None:
    assert not [path for path in files_of("costs") for module in imported(path) if part_of(module) == "primitives"]
    assert not [path for path in files_of("primitives") for module in imported(path) if part_of(module) == "costs"]


def test_selection_imports_numpy_only() -> None:
    for path in files_of("selection"):
        for module in imported(path):
            top = module.split(".")[0]
            fine = top in sys.stdlib_module_names or top == "numpy" or module.startswith("convselect.selection")
            assert fine, f"{path.relative_to(ROOT)} imports {module}"


def test_kernels_are_imported_by_one_name() -> None:
    """`import kernels` from the root of the repository would make a second module of the same files."""
    paths = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not [path for path in paths for module in imported(path) if module.split(".")[0] == "kernels"]


@pytest.mark.parametrize("folder", LONGEST)
def test_files_stay_small(folder: str) -> None:
    for path in (ROOT / folder).rglob("*"):
        if path.suffix in (".py", ".cpp", ".h"):
            lines = len(path.read_text().splitlines())
            assert lines <= LONGEST[folder], f"{path.relative_to(ROOT)} has {lines} lines: split it by purpose"
