"""Lists of problems that ship with convselect."""

from __future__ import annotations

from pathlib import Path

from convselect.problem import ConvProblem

GRID = Path(__file__).parent / "grid.txt"
"""What a profile times, made by benchmarks/make_grid.py; any prefix of it is a useful sample."""
COMMON = Path(__file__).parent / "common.txt"
"""What calibration times when no network is given."""


def read_problems(path: Path = GRID) -> list[ConvProblem]:
    """A text file of problems, one a line; empty lines and lines that begin with # are skipped.

    Raises `ValueError` naming the line that is not in the grammar.
    """
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            problems.append(ConvProblem.parse(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return problems
